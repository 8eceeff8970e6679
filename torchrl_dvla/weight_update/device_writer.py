# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Publishing weights that lie on a device, while the learner goes on."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import torch

from torchrl_dvla.weight_update.copying import WeightCopier, is_finite, non_finite_names
from torchrl_dvla.weight_update.device_copy import SideStream
from torchrl_dvla.weight_update.layout import WeightLayout
from torchrl_dvla.weight_update.segment import SlotViews, private_views
from torchrl_dvla.weight_update.writer import SlotWriter, not_finite

__all__ = ["DeviceWriter"]

# Kernel launches cost more than passes over memory here: all weights of a dtype in one call.
_PIECE_BYTES = 1 << 60


@dataclasses.dataclass
class _Snapshot:
    """One version in the device's memory; ``taken`` happens when it is whole."""

    views: SlotViews
    version: int = -1
    taken: torch.cuda.Event | None = None


class DeviceWriter:
    """Takes versions on the device at once, and brings them to a :class:`SlotWriter` in a thread.

    ``publish`` starts one copy within the device, on the stream that the learner computes on: what
    the learner starts there later, an optimiser step in place above all, cannot touch the version.
    Then it returns. A thread looks for NaN and infinity in the snapshot, has it copied to the slot
    on a side stream, waits for *that*, and only then is the version offered.

    The device holds one snapshot, and a second one from the first publish that comes while the one
    before is still on its way. A third never exists: versions that wait here coalesce.

    Since a version is looked at after ``publish`` has returned, a refusal is raised by the next
    :meth:`publish` or :meth:`finish`. The refused version is forgotten: :attr:`version` goes back.

    Not run on a GPU by this project; see :mod:`~torchrl_dvla.weight_update.device_copy`.

    Args:
        writer (SlotWriter): fills and offers the slots.
        layout (WeightLayout): the order of the weights.
        side (SideStream): what copies.

    Keyword Args:
        check_finite (bool): refuse NaN and infinite weights.
    """

    def __init__(
        self, writer: SlotWriter, layout: WeightLayout, side: SideStream, *, check_finite: bool
    ) -> None:
        self._writer, self._layout, self._side = writer, layout, side
        self._check_finite = check_finite
        self._copier = WeightCopier(layout, piece_bytes=_PIECE_BYTES)
        self._changed = threading.Condition()
        self._free: list[_Snapshot] = []
        self._waiting: _Snapshot | None = None
        self._moving: _Snapshot | None = None
        self._error: BaseException | None = None
        self._is_closing = False
        self._thread: threading.Thread | None = None

    @property
    def version(self) -> int:
        """The version taken last, be it in a slot already or not."""
        with self._changed:
            return self._newest()

    def publish(
        self, tensors: Sequence[torch.Tensor], *, version: int | None, start_s: float
    ) -> int:
        """Take a version; as :meth:`SlotWriter.publish`, but for when a refusal is raised."""
        self._raise_error()
        with self._changed:
            newest = self._newest()
            version = newest + 1 if version is None else version
            self._writer.require_growth(version, newest)
            snapshot = self._waiting or (self._free.pop() if self._free else None)
            if self._waiting is not None:
                self._writer.count(num_publishes=1, num_coalesced=1)
            self._waiting = None
        if snapshot is None:
            snapshot = _Snapshot(private_views(self._layout, device=self._side.device))
        views = snapshot.views
        snapshot.version = version
        snapshot.taken = self._side.on_current(lambda: self._copier.copy(tensors, views))
        self._writer.note_source(tensors)
        with self._changed:
            self._waiting = snapshot
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._bring, name="dvla-weight-download", daemon=True
                )
                self._thread.start()
        self._writer.note_stall(start_s)
        return version

    def finish(self) -> None:
        """Wait until what was published is on the host, and raise what kept it from there."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
        self._raise_error()

    def close(self) -> None:
        """End after the copy that is under way; a version that waits behind it is dropped."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None)
            self._waiting = None
            self._free.clear()

    def _newest(self) -> int:
        on_the_way = [s.version for s in (self._moving, self._waiting) if s is not None]
        return max([self._writer.version, *on_the_way])

    def _raise_error(self) -> None:
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _bring(self) -> None:
        """Bring snapshots to the host, the newest first, until none waits."""
        while True:
            with self._changed:
                if self._waiting is None or self._is_closing:
                    self._thread = None
                    self._changed.notify_all()
                    return
                snapshot = self._moving = self._waiting
                self._waiting = None
            error: BaseException | None = None
            try:
                self._bring_one(snapshot)
            except BaseException as raised:
                error = raised
            with self._changed:
                self._error = self._error or error
                self._moving = None
                # Its copy has ended, or never began: the learner may write it again.
                self._free.append(snapshot)

    def _bring_one(self, snapshot: _Snapshot) -> None:
        taken = snapshot.taken
        assert taken is not None
        names: list[str] = []

        def look() -> None:
            # Reading a result waits for the side stream alone.
            if not all(is_finite(run) for run in snapshot.views.runs.values()):
                names.extend(non_finite_names(self._layout, snapshot.views.entries))

        def download(slot: torch.Tensor) -> None:
            def start() -> None:
                slot.copy_(snapshot.views.memory, non_blocking=True)

            self._side.wait(self._side.on_side(start, after=taken))

        if self._check_finite:
            self._side.wait(self._side.on_side(look, after=taken))
        if names:
            self._writer.count(num_refused=1)
            error = not_finite(names)
            error.add_note(f"They were published as version {snapshot.version}, from a device.")
            raise error
        self._writer.receive(download, snapshot.version)
