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
from typing import NoReturn

import torch

from torchrl_dvla.weight_update.copying import WeightCopier
from torchrl_dvla.weight_update.finite import (
    CopyLook,
    is_finite,
    non_finite_names,
    not_finite,
)
from torchrl_dvla.weight_update.layout import WeightLayout
from torchrl_dvla.weight_update.ledger import MAX_SLOTS
from torchrl_dvla.weight_update.publish_stats import PublishCounter
from torchrl_dvla.weight_update.release import Releaser
from torchrl_dvla.weight_update.segment import (
    WRITER_BYTE,
    SlotViews,
    WeightSegment,
    private_views,
    slot_byte,
)

__all__ = ["SlotWriter"]

# How often a deferred version looks for a free slot. A look costs a system call per slot.
_RETRY_S = 5e-4

# Up to here the learner looks for NaN and infinity itself: of 1 MB, it takes 17 us, while the other
# thread would be done 50 us after it was told (docs/decisions/0022).
_LOOK_AT_ONCE_BYTES = 4 << 20


class SlotWriter:
    """Claims slots, fills them and offers them.

    Args:
        segment (WeightSegment): the store's memory.

    Keyword Args:
        check_finite (bool): refuse NaN and infinite weights.
        checksum (bool): record checksums with each version, one of each bucket.
    """

    def __init__(self, segment: WeightSegment, *, check_finite: bool, checksum: bool) -> None:
        self._segment = segment
        self.check_finite = check_finite
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
        self.counter = PublishCounter()
        self.offer_listeners: list[Callable[[], None]] = []
        self._is_paused = False
        self._is_looked_at_later = check_finite and segment.layout.slot_bytes > _LOOK_AT_ONCE_BYTES
        #: The thread that ends what ``publish`` began.
        self.releaser = Releaser()
        # The slot that is locked exclusively, and the whole version in it if there is one.
        self._claimed: int | None = None
        self._prepared_version: int | None = None
        # The slot of the version that is being looked at. Its lock does not keep this side from
        # locking it again: all of the writer is one holder.
        self._looked_at: int | None = None
        # A deferred version and where it is kept.
        self._staging: SlotViews | None = None
        self._staged_version: int | None = None
        self._mutex = threading.Lock()
        self._give_way = threading.Event()
        self._closing = threading.Event()
        self._flusher: threading.Thread | None = None

    def write_frozen(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the weights that travel once. There are no readers yet."""
        entries = self.layout.entries
        for entry, tensor, view in zip(entries, tensors, self._views[0].entries, strict=True):
            if entry.is_frozen:
                view.copy_(tensor.detach())
                if self.check_finite and not is_finite(view.reshape(-1)):
                    raise not_finite([f"{entry.name} (frozen)"], 0)

    def publish(
        self, tensors: Sequence[torch.Tensor], *, version: int | None, start_s: float
    ) -> int:
        """Take a version: into a free slot, or aside until there is one.

        Where looking for NaN and infinity takes time, :attr:`releaser` does it while this thread
        copies, and offers the version when it has ended. One version is on its way at a time: if
        the thread has not ended with the one before, it is waited for, and its refusal raised.
        """
        self.releaser.finish()
        version = self.version + 1 if version is None else version
        self.require_growth(version, self.version)
        self._give_way.set()
        with self._mutex:  # free, or held by the flusher, which gives way within one piece
            self._give_way.clear()
            slot, replaces = self._choose()
            if self._is_looked_at_later and not replaces:
                self._copy_and_look_later(tensors, slot, version)
            else:
                self._copy_and_look(tensors, slot, version, replaces)
                self._accept(slot, version, replaces)
        self.note_source(tensors)
        self.counter.note_stall(start_s)
        return version

    def receive(self, fill: Callable[[torch.Tensor], None], version: int) -> None:
        """Take a version whose bytes ``fill`` writes. A part of a version is never offered."""
        self.require_growth(version, self.version)
        self._give_way.set()
        with self._mutex:
            self._give_way.clear()
            try:
                slot, replaces = self._choose()
                self._fill(slot, lambda views: fill(views.memory))
            except BaseException:
                # The target may have been a version that was put aside and that nobody has seen.
                whole = (self._staged_version, self._prepared_version)
                kept = [version for version in whole if version is not None]
                self.version = max([self._ledger.offer // MAX_SLOTS, *kept])
                raise
            self._accept(slot, version, replaces)

    @property
    def newest(self) -> int:
        """The version taken last, be it good or not looked at yet."""
        on_the_way = self.releaser.newest  # read first: it becomes `version` before it leaves there
        return max(on_the_way, self.version)

    @property
    def layout(self) -> WeightLayout:
        """What a slot holds."""
        return self._segment.layout

    def accept(self, slot: int | None, version: int) -> None:
        """Offer a version that was looked at, or have it wait for a slot."""
        self._step("looked")
        self._give_way.set()
        with self._mutex:
            self._give_way.clear()
            self._looked_at = None
            self._accept(slot, version)

    def refuse(self, slot: int | None) -> None:
        """Give back the slot of a version that no reader may see."""
        self.counter.add(num_refused=1)
        if slot is not None:
            with self._mutex:
                self._looked_at = None
                self.locks.unlock(slot_byte(slot))

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

    def close(self) -> None:
        """Release what was published, stop the flusher and let every lock go."""
        self.releaser.close()
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

    def _choose(self) -> tuple[int | None, bool]:
        """Where to write, None for aside, and whether a good version that nobody saw is there."""
        if self._claimed is None:
            self._claimed = self._claim()
        slot = self._claimed
        unseen = self._prepared_version if slot is not None else self._staged_version
        return slot, unseen is not None

    def _fill(self, slot: int | None, fill: Callable[[SlotViews], None]) -> None:
        """Write where no reader is."""
        if slot is None:
            if self._staging is None:
                self._staging = private_views(self.layout)
            self._staged_version = None
            fill(self._staging)
            return
        self._prepared_version = None
        self._ledger.begin_write(slot)
        self._step("marked")
        try:
            fill(self._views[slot])
        except BaseException:
            self.locks.unlock(slot_byte(slot))
            self._claimed = None
            raise

    def _copy_and_look(
        self, tensors: Sequence[torch.Tensor], slot: int | None, version: int, replaces: bool
    ) -> None:
        def refuse() -> NoReturn:
            self.counter.add(num_refused=1)
            raise not_finite(non_finite_names(self.layout, tensors), version)

        def copy(views: SlotViews) -> None:
            between = None if self.gate is None else self._step_between
            check = self.check_finite
            if not self._copier.copy(tensors, views, check_finite=check, between=between):
                refuse()

        # A good version is written over only by one that is good as well.
        if replaces and self.check_finite and non_finite_names(self.layout, tensors):
            refuse()
        self._fill(slot, copy)

    def _copy_and_look_later(
        self, tensors: Sequence[torch.Tensor], slot: int | None, version: int
    ) -> None:
        def copy(views: SlotViews) -> None:
            look = CopyLook(self._copier.sights(tensors, views))
            self.releaser.submit(_HostRelease(version, self, slot, views, look))

            def between() -> bool:
                return self._step_between() or look.note_piece()

            try:
                self._copier.copy(tensors, views, between=between)
            except BaseException:
                look.end(is_given_up=True)
                raise
            self._claimed, self._looked_at = None, slot
            look.end()

        self._fill(slot, copy)

    def _accept(self, slot: int | None, version: int, replaces: bool = False) -> None:
        """Offer the good version in ``slot``, or have what was put aside wait for one."""
        self.version = version
        self.counter.add(
            num_publishes=1,
            bytes_total=self.layout.weight_bytes,
            num_coalesced=int(replaces),
        )
        if slot is None:
            self._staged_version = version
            self.counter.add(num_deferred=1)
            self._start_flusher()
            return
        if self._claimed not in (None, slot):
            # While this version was looked at, the flusher began to move an older one.
            self.counter.add(num_coalesced=int(self._prepared_version is not None))
            self.locks.unlock(slot_byte(self._claimed))
        if self._staged_version is not None:
            self._staged_version = None
            self.counter.add(num_coalesced=1)
        self._claimed = slot
        self._finish(slot, version)

    def _claim(self) -> int | None:
        offered = self._ledger.offer % MAX_SLOTS if self._ledger.offer >= 0 else -1
        mine = (offered, self._looked_at)
        slots = [slot for slot in range(self._segment.num_slots) if slot not in mine]
        # The oldest first: the slot whose readers had the most time to leave.
        for slot in sorted(slots, key=self._ledger.version_in):
            if self.locks.try_exclusive(slot_byte(slot)):
                self._step("claimed")
                return slot
        return None

    def _finish(self, slot: int, version: int) -> None:
        if self._is_paused:
            self._prepared_version = version
        else:
            self._offer(slot, version)

    def _offer(self, slot: int, version: int) -> None:
        checksums = self._segment.checksums(slot) if self._checksum else ()
        now_ns = time.monotonic_ns()
        self._ledger.end_write(slot, version=version, now_ns=now_ns, checksums=checksums)
        self._step("written")
        # Unlocked before it is offered, so that no reader is refused the slot it is offered.
        self.locks.unlock(slot_byte(slot))
        self._claimed = self._prepared_version = None
        self._step("unlocked")
        self._ledger.set_offer(version=version, slot=slot)
        self._step("offered")
        for listener in tuple(self.offer_listeners):
            listener()

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


@dataclasses.dataclass
class _HostRelease:
    """A version that the learner is copying, or has copied, to ``slot`` (None: aside)."""

    version: int
    writer: SlotWriter
    slot: int | None
    views: SlotViews
    look: CopyLook

    def run(self) -> None:
        """Offer it if it is good; see :class:`~torchrl_dvla.weight_update.release.Release`."""
        is_good = self.look.run()
        if self.look.is_given_up:
            return  # publish has raised why
        if is_good:
            self.writer.accept(self.slot, self.version)
            return
        names = non_finite_names(self.writer.layout, self.views.entries)
        self.writer.refuse(self.slot)
        raise not_finite(names, self.version)
