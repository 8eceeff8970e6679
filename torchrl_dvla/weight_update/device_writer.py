# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Publishing weights that lie on a device, while the learner goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from torchrl_dvla.weight_update.copying import WeightCopier
from torchrl_dvla.weight_update.device_copy import SideStream
from torchrl_dvla.weight_update.finite import is_finite, non_finite_names, not_finite
from torchrl_dvla.weight_update.segment import SlotViews, private_views
from torchrl_dvla.weight_update.writer import SlotWriter

__all__ = ["DeviceWriter"]

# Kernel launches cost more than passes over memory here: all weights of a dtype in one call.
_PIECE_BYTES = 1 << 60


@dataclasses.dataclass
class _Snapshot:
    """One version in the device's memory; ``taken`` happens when it is whole."""

    views: SlotViews
    bring: Callable[[_Snapshot], None]
    version: int = -1
    taken: torch.cuda.Event | None = None

    def run(self) -> None:
        """See :class:`~torchrl_dvla.weight_update.release.Release`."""
        self.bring(self)


class DeviceWriter:
    """Takes versions on the device at once, and brings them to a :class:`SlotWriter` in a thread.

    ``publish`` starts one copy within the device, on the stream that the learner computes on: what
    the learner starts there later, an optimiser step in place above all, cannot touch the version.
    Then it returns. The writer's ``releaser`` looks for NaN and infinity in the snapshot, has it
    copied to the slot on a side stream, waits for *that*, and only then is the version offered.

    The device holds one snapshot, and a second one from the first publish that comes while the one
    before is still on its way. A third never exists: versions that wait here coalesce.

    Not run on a GPU by this project; see :mod:`~torchrl_dvla.weight_update.device_copy`.

    Args:
        writer (SlotWriter): fills and offers the slots.
        side (SideStream): what copies.
    """

    def __init__(self, writer: SlotWriter, side: SideStream) -> None:
        self._writer, self._side = writer, side
        self._copier = WeightCopier(writer.layout, piece_bytes=_PIECE_BYTES)
        self._free: list[_Snapshot] = []

    def publish(
        self, tensors: Sequence[torch.Tensor], *, version: int | None, start_s: float
    ) -> int:
        """Take a version; as :meth:`SlotWriter.publish`, but never waits for the one before."""
        releaser = self._writer.releaser
        releaser.raise_error()
        newest = self._writer.newest
        version = newest + 1 if version is None else version
        self._writer.require_growth(version, newest)
        waiting = releaser.withdraw()
        if waiting is not None:
            assert isinstance(waiting, _Snapshot)
            self._writer.counter.add(num_publishes=1, num_coalesced=1)
            snapshot = waiting
        elif self._free:
            snapshot = self._free.pop()
        else:
            views = private_views(self._writer.layout, device=self._side.device)
            snapshot = _Snapshot(views, self._bring)
        snapshot.version = version
        snapshot.taken = self._side.on_current(lambda: self._copier.copy(tensors, snapshot.views))
        self._writer.note_source(tensors)
        releaser.submit(snapshot)
        self._writer.counter.note_stall(start_s)
        return version

    def _bring(self, snapshot: _Snapshot) -> None:
        taken = snapshot.taken
        assert taken is not None
        names: list[str] = []

        def look() -> None:
            # Reading a result waits for the side stream alone.
            if not all(is_finite(run) for run in snapshot.views.runs.values()):
                names.extend(non_finite_names(self._writer.layout, snapshot.views.entries))

        def download(slot: torch.Tensor) -> None:
            def start() -> None:
                slot.copy_(snapshot.views.memory, non_blocking=True)

            self._side.wait(self._side.on_side(start, after=taken))

        try:
            if self._writer.check_finite:
                self._side.wait(self._side.on_side(look, after=taken))
            if names:
                self._writer.refuse(None)
                raise not_finite(names, snapshot.version)
            self._writer.receive(download, snapshot.version)
        finally:
            # Its copy has ended, or never began: the learner may write it again.
            self._free.append(snapshot)
