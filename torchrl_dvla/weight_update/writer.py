# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The writing side of the protocol that :mod:`torchrl_dvla.weight_update.store` describes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import torch

from torchrl_dvla.weight_update.copying import WeightCopier, is_finite, non_finite_names
from torchrl_dvla.weight_update.ledger import MAX_SLOTS
from torchrl_dvla.weight_update.segment import (
    WRITER_BYTE,
    SlotViews,
    WeightSegment,
    private_views,
    slot_byte,
)

__all__ = ["PublishStats", "SlotWriter", "not_finite"]

# How often a deferred version looks for a free slot. A look costs a system call per slot.
_RETRY_S = 5e-4


@dataclasses.dataclass(frozen=True)
class PublishStats:
    """Counters of the writing side.

    Args:
        num_publishes (int): versions taken; from a device, those that arrived or were replaced.
        num_deferred (int): versions that found no free slot at once.
        num_coalesced (int): versions that a newer one replaced before any reader could see them.
        num_refused (int): publishes refused since weights were not finite.
        bytes_total (int): bytes of weights copied by all publishes.
        stall_last_s, stall_max_s, stall_total_s (float): time the learner spent in ``publish``.
    """

    num_publishes: int = 0
    num_deferred: int = 0
    num_coalesced: int = 0
    num_refused: int = 0
    bytes_total: int = 0
    stall_last_s: float = 0.0
    stall_max_s: float = 0.0
    stall_total_s: float = 0.0


class SlotWriter:
    """Claims slots, fills them and offers them.

    Args:
        segment (WeightSegment): the store's memory.

    Keyword Args:
        check_finite (bool): refuse NaN and infinite weights.
        checksum (bool): record a checksum with each version.
    """

    def __init__(self, segment: WeightSegment, *, check_finite: bool, checksum: bool) -> None:
        self._segment = segment
        self._check_finite = check_finite
        self._checksum = checksum
        self.locks = segment.locks.open()
        if not self.locks.try_exclusive(WRITER_BYTE):
            raise RuntimeError(
                "A weight store must have one learner, got a second writer on the same memory. "
                "Publish through the first one, or make a store of its own."
            )
        self._ledger = segment.ledger()
        self._ledger.reset()  # only now: a second writer must not touch what readers act with
        self._copier = WeightCopier(segment.layout)
        self._views = [segment.views(slot) for slot in range(segment.num_slots)]
        self.version = -1
        self.source_addresses: set[int] = set()
        self.gate: Callable[[str], None] | None = None
        self._stats = PublishStats()
        self._counting = threading.Lock()
        self._is_paused = False
        # The slot that is locked exclusively, and the whole version in it if there is one.
        self._claimed: int | None = None
        self._prepared_version: int | None = None
        # A deferred version and where it is kept.
        self._staging: SlotViews | None = None
        self._staged_version: int | None = None
        self._mutex = threading.Lock()
        self._give_way = threading.Event()
        self._closing = threading.Event()
        self._flusher: threading.Thread | None = None

    def write_frozen(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the weights that travel once. There are no readers yet."""
        entries = self._segment.layout.entries
        for entry, tensor, view in zip(entries, tensors, self._views[0].entries, strict=True):
            if entry.is_frozen:
                view.copy_(tensor.detach())
                if self._check_finite and not is_finite(view.reshape(-1)):
                    raise not_finite([f"{entry.name} (frozen)"])

    def publish(
        self, tensors: Sequence[torch.Tensor], *, version: int | None, start_s: float
    ) -> int:
        """Take a version: into a free slot, or aside until there is one."""
        version = self.version + 1 if version is None else version

        def look() -> None:
            if self._check_finite:
                names = non_finite_names(self._segment.layout, tensors)
                if names:
                    self.count(num_refused=1)
                    raise not_finite(names)

        self.require_growth(version, self.version)
        self._give_way.set()
        with self._mutex:  # free, or held by the flusher, which gives way within one piece
            self._give_way.clear()
            self._take(version, lambda views: self._fill(tensors, views), look)
            self.note_source(tensors)
            self.count(num_publishes=1, bytes_total=self._segment.layout.weight_bytes)
            self.note_stall(start_s)
        return version

    def receive(self, fill: Callable[[torch.Tensor], None], version: int) -> None:
        """Take a version whose bytes ``fill`` writes. A part of a version is never offered."""
        self.require_growth(version, self.version)
        self._give_way.set()
        with self._mutex:
            self._give_way.clear()
            try:
                self._take(version, lambda views: fill(views.memory))
            except BaseException:
                # The target may have been a version that was put aside and that nobody has seen.
                whole = (self._staged_version, self._prepared_version)
                kept = [version for version in whole if version is not None]
                self.version = max([self._ledger.offer // MAX_SLOTS, *kept])
                raise
            self.count(num_publishes=1, bytes_total=self._segment.layout.weight_bytes)

    def pause(self) -> None:
        """Offer nothing from now on."""
        with self._mutex:
            self._is_paused = True

    def resume(self) -> None:
        """Offer what was prepared."""
        with self._mutex:
            self._is_paused = False
            if self._claimed is not None and self._prepared_version is not None:
                self._offer(self._claimed, self._prepared_version)

    def stats(self) -> PublishStats:
        """The counters."""
        return self._stats

    def close(self) -> None:
        """Stop the flusher and let every lock go."""
        self._closing.set()
        self._give_way.set()
        with self._mutex:
            flusher = self._flusher
        if flusher is not None:
            flusher.join()
        self.locks.close()
        # The last views that this side holds: the memory may go.
        del self._views, self._staging, self._ledger, self._segment

    def require_growth(self, version: int, newest: int) -> None:
        """Raise ValueError if ``version`` is not above ``newest``."""
        if version <= newest:
            raise ValueError(
                f"version must grow, got {version} after {newest}. Leave it out, or resume with "
                "WeightStore(first_version=...)."
            )

    def note_source(self, tensors: Sequence[torch.Tensor]) -> None:
        """Remember whose memory was published."""
        self.source_addresses = {tensor.data_ptr() for tensor in tensors if tensor.numel()}

    def note_stall(self, start_s: float) -> None:
        """Record that the learner was held up since ``start_s``."""
        stall_s = time.perf_counter() - start_s
        with self._counting:
            stats = self._stats
            self._stats = dataclasses.replace(
                stats,
                stall_last_s=stall_s,
                stall_max_s=max(stats.stall_max_s, stall_s),
                stall_total_s=stats.stall_total_s + stall_s,
            )

    def count(self, **increments: float) -> None:
        """Add to the counters."""
        with self._counting:
            values = {name: getattr(self._stats, name) + step for name, step in increments.items()}
            self._stats = dataclasses.replace(self._stats, **values)

    def _take(
        self,
        version: int,
        fill: Callable[[SlotViews], None],
        look: Callable[[], None] | None = None,
    ) -> None:
        if self._claimed is None:
            self._claimed = self._claim()
        slot = self._claimed
        replaces = self._prepared_version if slot is not None else self._staged_version
        if replaces is not None and look is not None:
            look()  # the target holds a good version that nobody has seen
        if slot is None:
            if self._staging is None:
                self._staging = private_views(self._segment.layout)
            self._staged_version = None
            fill(self._staging)
        else:
            self._prepared_version = None
            self._ledger.begin_write(slot)
            self._step("marked")
            try:
                fill(self._views[slot])
            except BaseException:
                self.locks.unlock(slot_byte(slot))
                self._claimed = None
                raise
        self.version = version
        self.count(num_coalesced=int(replaces is not None))
        if slot is None:
            self._staged_version = version
            self.count(num_deferred=1)
            self._start_flusher()
            return
        if self._staged_version is not None:
            self._staged_version = None
            self.count(num_coalesced=1)
        self._finish(slot, version)

    def _claim(self) -> int | None:
        offered = self._ledger.offer % MAX_SLOTS if self._ledger.offer >= 0 else -1
        slots = [slot for slot in range(self._segment.num_slots) if slot != offered]
        # The oldest first: the slot whose readers had the most time to leave.
        for slot in sorted(slots, key=self._ledger.version_in):
            if self.locks.try_exclusive(slot_byte(slot)):
                self._step("claimed")
                return slot
        return None

    def _fill(self, tensors: Sequence[torch.Tensor], views: SlotViews) -> None:
        between = None if self.gate is None else self._step_between
        if not self._copier.copy(tensors, views, check_finite=self._check_finite, between=between):
            self.count(num_refused=1)
            raise not_finite(non_finite_names(self._segment.layout, tensors))

    def _finish(self, slot: int, version: int) -> None:
        if self._is_paused:
            self._prepared_version = version
        else:
            self._offer(slot, version)

    def _offer(self, slot: int, version: int) -> None:
        checksum = self._segment.checksum(slot) if self._checksum else 0
        now_ns = time.monotonic_ns()
        self._ledger.end_write(slot, version=version, now_ns=now_ns, checksum=checksum)
        self._step("written")
        # Unlocked before it is offered, so that no reader is refused the slot it is offered.
        self.locks.unlock(slot_byte(slot))
        self._claimed = self._prepared_version = None
        self._step("unlocked")
        self._ledger.set_offer(version=version, slot=slot)
        self._step("offered")

    def _start_flusher(self) -> None:
        if self._flusher is None:
            self._flusher = threading.Thread(
                target=self._flush, name="dvla-weight-flusher", daemon=True
            )
            self._flusher.start()

    def _flush(self) -> None:
        """Move the deferred version into the first slot that a reader leaves."""
        while not self._closing.wait(_RETRY_S):
            with self._mutex:
                if self._staged_version is None:
                    self._flusher = None
                    return
                if self._claimed is None:
                    self._claimed = self._claim()
                if self._claimed is not None and self._flush_into(self._claimed):
                    self._flusher = None
                    return

    def _flush_into(self, slot: int) -> bool:
        assert self._staging is not None
        assert self._staged_version is not None
        self._prepared_version = None
        self._ledger.begin_write(slot)
        if not self._copier.copy(
            self._staging.entries, self._views[slot], between=self._give_way.is_set
        ):
            return False  # the slot stays claimed: the publish that is waiting writes it at once
        version, self._staged_version = self._staged_version, None
        self._finish(slot, version)
        return True

    def _step(self, name: str) -> None:
        if self.gate is not None:
            self.gate(name)

    def _step_between(self) -> bool:
        self._step("copying")
        return False


def not_finite(names: list[str]) -> ValueError:
    """The error that lists weights that are not finite."""
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return ValueError(
        f"weights must be finite, got NaN or infinity in {listed}. The last version stays in use; "
        "look at the gradients, or pass check_finite=False."
    )
