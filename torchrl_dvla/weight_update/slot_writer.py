# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Writing side of the protocol that :mod:`torchrl_dvla.weight_update.store` describes."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import get_total_norm

from torchrl_dvla.weight_update.segment import (
    WRITER_BYTE,
    SlotViews,
    WeightSegment,
    private_views,
    slot_byte,
    wait_for_devices,
)
from torchrl_dvla.weight_update.weight_layout import Bucket, Entry, WeightLayout

__all__ = ["PublishStats", "SlotWriter", "WeightCopier", "is_finite", "non_finite_names"]

# A piece is copied and then checked while it is still in a cache: the check costs arithmetic, not a
# second pass over memory. 512 KiB, of source and copy each, were fastest among 128 KiB to 4 MiB on
# a core with 2 MiB of L2.
_PIECE_BYTES = 512 << 10

# How often the deferred writer tries to claim a slot, which costs a system call per slot.
_RETRY_S = 5e-4

_ONE_LEARNER = (
    "publish must be called by one learner at a time, got a second call while one is copying. Let "
    "one thread publish."
)


@dataclasses.dataclass(frozen=True)
class PublishStats:
    """Counters of the writing side.

    Args:
        num_publishes (int): versions taken.
        num_deferred (int): versions that found no free slot at once.
        num_coalesced (int): versions that a newer one replaced before any reader could see them.
        num_refused (int): publishes refused since weights were not finite.
        bytes_total (int): bytes of weights copied by all publishes.
        stall_last_s, stall_max_s (float): time the learner spent in ``publish``.
    """

    num_publishes: int = 0
    num_deferred: int = 0
    num_coalesced: int = 0
    num_refused: int = 0
    bytes_total: int = 0
    stall_last_s: float = 0.0
    stall_max_s: float = 0.0


# -- finite check ----------------------------------------------------------------------------------


def is_finite(flat: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; integers always pass.

    The sum is one vectorised pass that any NaN or infinity survives, at twice the speed of
    ``torch.aminmax`` and fifty times that of ``torch.isfinite(flat).all()``. Finite numbers may
    overflow it; then the extremes decide.

    Examples:
        >>> is_finite(torch.tensor([1.0, -2.0])), is_finite(torch.tensor([1.0, math.nan]))
        (True, False)
    """
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    if not flat.is_floating_point() or not flat.numel():
        return True
    if flat.dtype.itemsize == 1:  # no reduction is implemented for 8-bit floats
        flat = flat.float()
    if flat.dtype != torch.float16 and math.isfinite(flat.sum().item()):  # half overflows at 65504
        return True
    low, high = torch.aminmax(flat)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def non_finite_names(
    layout: WeightLayout, tensors: Sequence[torch.Tensor], indices: Iterable[int]
) -> list[str]:
    """``name (k of n elements)`` of each entry that must not be published as it is.

    A parameter must be finite once it is cast to what is stored. A buffer may hold infinities of
    its own, as attention masks do; it must not hold NaN, which no forward pass recovers from, nor
    an infinity that the cast made.

    Args:
        layout (WeightLayout): the entries.
        tensors (sequence of torch.Tensor): the source, in the order of the entries.
        indices (iterable of int): the entries to check.
    """
    names = []
    for index in _uncertain(layout, tensors, indices):
        names += _non_finite(layout.entries[index], tensors[index].detach())
    return names


def _non_finite(entry: Entry, tensor: torch.Tensor) -> list[str]:
    """``name (k of n elements)`` of an entry, if it must not be published as it is."""
    stored = tensor.to(entry.dtype)
    if is_finite(stored.reshape(-1)):
        return []
    bad = ~torch.isfinite(stored)
    if entry.is_buffer:
        bad &= (stored != stored) | torch.isfinite(tensor)
    count = int(bad.sum())
    return [f"{entry.name} ({count} of {entry.numel} elements)"] if count else []


def _uncertain(
    layout: WeightLayout, tensors: Sequence[torch.Tensor], indices: Iterable[int]
) -> list[int]:
    """The entries but for parameters on a device that one question finds finite all together.

    Every answer of a device is waited for: 370 of them take longer than to copy a gigabyte.
    """
    indices, together = list(indices), {}
    for index in indices:
        entry, tensor = layout.entries[index], tensors[index].detach()
        has_norm = tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel()
        if tensor.is_cuda and has_norm and tensor.dtype == entry.dtype and not entry.is_buffer:
            together[index] = tensor
    if together and not math.isfinite(get_total_norm(together.values(), math.inf)):
        together.clear()
    return [index for index in indices if index not in together]


# -- copy ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run:
    """Elements ``start:stop`` of a dtype's run: some small entries, or a large one."""

    dtype: torch.dtype
    start: int
    stop: int
    indices: tuple[int, ...]


class WeightCopier:
    """Copy of the live (not frozen) entries of a layout into a slot, piece by piece.

    Args:
        layout (WeightLayout): which entries there are, and which of them are live.

    Keyword Args:
        piece_bytes (int): bytes copied between two checks. Default: 512 KiB.
    """

    def __init__(self, layout: WeightLayout, *, piece_bytes: int = _PIECE_BYTES) -> None:
        self._layout = layout
        self._piece_bytes = piece_bytes
        self._groups: list[_Run] = []
        for bucket in layout.buckets:
            self._add_groups(bucket)

    def _add_groups(self, bucket: Bucket) -> None:
        entries, itemsize = self._layout.entries, bucket.dtype.itemsize
        indices: list[int] = []
        start = stop = 0

        def flush() -> None:
            if indices:
                self._groups.append(_Run(bucket.dtype, start, stop, tuple(indices)))
                indices.clear()

        for index, entry in enumerate(entries):
            if entry.is_frozen or entry.dtype != bucket.dtype or not entry.numel:
                continue
            begin = (entry.offset_bytes - bucket.offset_bytes) // itemsize
            end = begin + entry.numel
            if (end - start) * itemsize > self._piece_bytes:
                flush()
            if not indices:
                start = begin
            indices.append(index)
            stop = end
        flush()

    @torch.no_grad()
    def copy(
        self,
        source: Sequence[torch.Tensor],
        destination: SlotViews,
        *,
        check_finite: bool = False,
        should_stop: Callable[[], bool] | None = None,
    ) -> bool:
        """Copy every live entry, casting where the dtypes differ.

        Args:
            source (sequence of torch.Tensor): in the order of the layout's entries. Copies from a
                CUDA device are only started: :func:`wait_for_devices` waits for them.
            destination (SlotViews): where to.

        Keyword Args:
            check_finite (bool): check what was written, piece by piece.
            should_stop (callable, optional): called after each piece; the copy stops when it
                returns True.

        Returns:
            True if everything was copied and, where that is checked, is finite.
        """
        has_pieces = check_finite or should_stop is not None
        for group in self._groups:
            numel = group.stop - group.start
            if has_pieces:
                numel = max(1, self._piece_bytes // group.dtype.itemsize)
            pieces = destination.runs[group.dtype][group.start : group.stop].split(numel)
            flat = self._flat(group, source)
            if flat is None:
                entries = [destination.entries[index] for index in group.indices]
                tensors = [source[index] for index in group.indices]
                # Other devices than CUDA are not waited for at the end.
                is_waited_for = all(tensor.is_cuda for tensor in tensors)
                torch._foreach_copy_(entries, tensors, non_blocking=is_waited_for)
            parts = [None] * len(pieces) if flat is None else flat.split(numel)
            for piece, part in zip(pieces, parts, strict=True):
                if part is not None:
                    piece.copy_(part, non_blocking=part.is_cuda)
                if check_finite and not is_finite(piece) and self._is_bad(group, source):
                    return False
                if should_stop is not None and should_stop():
                    return False
        return True

    def _is_bad(self, group: _Run, source: Sequence[torch.Tensor]) -> bool:
        """Whether a group that is not finite as a whole has more than, say, an attention mask."""
        has_buffers = any(self._layout.entries[index].is_buffer for index in group.indices)
        return not has_buffers or bool(non_finite_names(self._layout, source, group.indices))

    def _flat(self, group: _Run, source: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The group in ``source``, flat; None if it is not dense there, or of several entries."""
        index = group.indices[0]
        tensor = source[index].detach()
        if len(group.indices) > 1 or tensor.stride() != self._layout.entries[index].stride:
            return None
        return tensor.as_strided((tensor.numel(),), (1,))


# -- protocol --------------------------------------------------------------------------------------


class SlotWriter:
    """Writer of a store's slots, of which there is one.

    Args:
        segment (WeightSegment): the store's memory.

    Keyword Args:
        check_finite (bool): refuse NaN and infinite weights.
    """

    def __init__(self, segment: WeightSegment, *, check_finite: bool) -> None:
        self._segment = segment
        self._layout = segment.layout
        self._check_finite = check_finite
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
        self.stats = PublishStats()
        # Memory of the weights that were published last, by address.
        self._sources: dict[int, StorageWeakRef] = {}
        # A version that found no free slot (-1: none), where it waits, and who moves it.
        self._deferred_version = -1
        self._deferred: SlotViews | None = None
        self._deferred_writer: threading.Thread | None = None
        self._turn = threading.Lock()  # one publish at a time
        self._mutex = threading.Lock()  # between a publish and the deferred writer
        self._preempt = threading.Event()
        self._closing = threading.Event()

    @property
    def version(self) -> int:
        """The version taken last: visible, or deferred; -1 before the first."""
        return max(self._ledger.latest_version, self._deferred_version)

    def write_frozen(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the weights that travel once. There are no readers yet."""
        frozen = [index for index, entry in enumerate(self._layout.entries) if entry.is_frozen]
        for index in frozen:
            self._views[0].entries[index].copy_(tensors[index].detach())
        if self._check_finite:
            self._refuse_if(non_finite_names(self._layout, tensors, frozen), 0)

    def publish(
        self, find: Callable[[], Sequence[torch.Tensor]], *, version: int | None = None
    ) -> int:
        """Take a version: into a free slot, or deferred until there is one.

        Args:
            find (callable): gives the weights, in the order of the layout's entries.

        Keyword Args:
            version (int, optional): its number; default is the next one.

        Returns:
            the version; see :meth:`WeightStore.publish` for what is raised.
        """
        if not self._turn.acquire(blocking=False):
            raise RuntimeError(_ONE_LEARNER)
        try:
            start_s = time.perf_counter()
            tensors = find()
            number = self.version + 1 if version is None else version
            self._publish(tensors, number)
            self._count_stall(time.perf_counter() - start_s)
        finally:
            self._turn.release()
        return number

    def _publish(self, tensors: Sequence[torch.Tensor], version: int) -> None:
        is_on_device = any(tensor.is_cuda for tensor in tensors)
        if is_on_device:
            self._segment.pin()
        # Checked before the copy: what is on a device, which is faster at it, and whatever might
        # overwrite a deferred version, which only one that is good as well may replace.
        checks_before = self._check_finite and (is_on_device or self._deferred_version >= 0)
        live = [index for index, entry in enumerate(self._layout.entries) if not entry.is_frozen]
        if checks_before:
            self._refuse_if(non_finite_names(self._layout, tensors, live), version)

        def copy(views: SlotViews) -> None:
            checks_now = self._check_finite and not checks_before
            if not self._copier.copy(tensors, views, check_finite=checks_now):
                names = non_finite_names(self._layout, tensors, live)
                self._refuse_if(names or ["weights that changed during the copy"], version)
            wait_for_devices(tensors)

        self._write(copy, version)
        self._sources = {
            tensors[index].data_ptr(): StorageWeakRef(tensors[index].untyped_storage())
            for index in live  # what is frozen may be read by others from where it is
            if tensors[index].numel()
        }

    def publish_each(
        self, weights: Iterator[tuple[str, torch.Tensor]], *, version: int | None = None
    ) -> int:
        """Take a version whose weights come one after the other; none is kept.

        Each goes straight into the slot, so there is never a second copy of all of them, and is
        checked there. They are asked for to the end, whatever is wrong with one. If that is found
        while a version is deferred, that one is dropped as well: readers keep what is visible.

        Args:
            weights (iterator): name and tensor of every entry that is not frozen, in any order;
                a tied one under any of its names. Others are passed over.

        Keyword Args:
            version (int, optional): its number; default is the next one.

        Returns:
            the version; see :meth:`WeightStore.publish` for what is raised.
        """
        layout = self._layout
        missing = {k for k, entry in enumerate(layout.entries) if not entry.is_frozen}
        problems: list[str] = []
        infinite: list[str] = []

        @torch.no_grad()
        def copy(views: SlotViews) -> None:
            for name, tensor in weights:
                index = layout.index_of.get(name)
                if index is None:
                    problems.append(f"{name}: not in the store")
                elif index in missing:
                    entry, target = layout.entries[index], views.entries[index]
                    if tensor.shape != entry.shape or tensor.dtype != entry.source_dtype:
                        problems.append(f"{name}: {tuple(tensor.shape)}, {tensor.dtype}")
                    else:
                        target.copy_(tensor)
                        if self._check_finite and not is_finite(target.reshape(-1)):
                            infinite.extend(_non_finite(entry, tensor))
                    missing.discard(index)
                del tensor  # before the next one is made
            problems.extend(f"{layout.entries[index].name}: missing" for index in sorted(missing))
            if problems:
                raise ValueError(
                    "weights must be those that the weight store was made from, got "
                    f"{len(problems)} differences: {'; '.join(problems[:5])}. Build both from one "
                    "configuration."
                )
            self._refuse_if(infinite, number)

        if not self._turn.acquire(blocking=False):
            raise RuntimeError(_ONE_LEARNER)
        try:
            start_s = time.perf_counter()
            number = self.version + 1 if version is None else version
            self._write(copy, number)
            self._sources = {}
            self._count_stall(time.perf_counter() - start_s)
        finally:
            self._turn.release()
        return number

    def write_parts(self, fill: Callable[[list[np.ndarray]], None], version: int) -> None:
        """Take a version that another node's slot held: into a free slot, or deferred.

        Args:
            fill (callable): fills memory, uint8, as :meth:`WeightReader.pin_bytes` gives it there.
            version (int): its number.
        """

        def write(views: SlotViews) -> None:
            runs = [views.runs[bucket.dtype] for bucket in self._layout.buckets]
            fill([run.view(torch.uint8).numpy() for run in runs])

        with self._turn:
            self._write(write, version)

    def publishes_from(self, addresses: set[int]) -> bool:
        """Whether one of the memory addresses belongs to the weights published last."""
        # Weights that were made for one publication are gone, and others live where they were.
        return any(not self._sources[key].expired() for key in addresses & self._sources.keys())

    def close(self) -> None:
        """Stop the deferred writer, drop what it has, and let every lock go."""
        self._closing.set()
        self._preempt.set()
        with self._mutex:
            thread = self._deferred_writer
        if thread is not None:
            thread.join()  # it looks at both events between two pieces of the copy
        self.locks.close()
        # The last views that this side holds: the memory may go.
        del self._views, self._deferred, self._ledger, self._segment

    def _refuse_if(self, names: list[str], version: int) -> None:
        if names:
            self._count(num_refused=1)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"weights must be finite, got NaN or infinity in {', '.join(names[:5])}{more} of "
                f"version {version}. The one before stays in use; check the gradients (clip them "
                "with error_if_nonfinite=True), or pass check_finite=False."
            )

    def _count_stall(self, stall_s: float) -> None:
        self.stats = dataclasses.replace(
            self.stats,
            stall_last_s=stall_s,
            stall_max_s=max(self.stats.stall_max_s, stall_s),
        )

    def _count(self, **increments: int) -> None:
        values = {name: getattr(self.stats, name) + step for name, step in increments.items()}
        self.stats = dataclasses.replace(self.stats, **values)

    def _write(self, fill: Callable[[SlotViews], None], version: int) -> None:
        """Have ``fill`` write where no reader is, and make that visible or defer it."""
        if version <= self.version:
            raise ValueError(
                f"version must grow, got {version} after {self.version}. Leave it out, or resume "
                "with WeightStore(first_version=...)."
            )
        self._preempt.set()
        with self._mutex:  # free, or held by the deferred writer, which ends within one piece
            self._preempt.clear()
            replaces = self._deferred_version >= 0
            slot = self._claim()
            if slot is None:
                self._defer(fill, version)
            else:
                self._fill_slot(slot, fill)
                self._make_visible(slot, version)
                self._deferred_version = -1
            self._count(
                num_publishes=1,
                num_deferred=int(slot is None),
                num_coalesced=int(replaces),
                bytes_total=self._layout.weight_bytes,
            )

    def _claim(self) -> int | None:
        """Lock a slot that no reader reads and that is not the latest; None if there is none."""
        # The oldest first: the slot whose readers had the most time to leave.
        for slot in sorted(range(self._segment.num_slots), key=self._ledger.version_in):
            if slot != self._ledger.latest_slot and self.locks.try_exclusive(slot_byte(slot)):
                return slot
        return None

    def _fill_slot(self, slot: int, fill: Callable[[SlotViews], None]) -> None:
        self._ledger.begin_write(slot)
        try:
            fill(self._views[slot])
        except BaseException:
            self.locks.unlock(slot_byte(slot))
            raise

    def _make_visible(self, slot: int, version: int) -> None:
        self._ledger.end_write(slot, version=version, now_ns=time.monotonic_ns())
        # Unlocked before it is visible, so that no reader is refused the slot that it reads of.
        self.locks.unlock(slot_byte(slot))
        self._ledger.set_latest(version=version, slot=slot)

    # -- deferred versions ---------------------------------------------------------------------

    def _defer(self, fill: Callable[[SlotViews], None], version: int) -> None:
        if self._deferred is None:
            self._deferred = private_views(self._layout)
        self._deferred_version = -1
        fill(self._deferred)
        self._deferred_version = version
        if self._deferred_writer is None:
            self._deferred_writer = threading.Thread(
                target=self._write_deferred, name="dvla-weight-deferred", daemon=True
            )
            self._deferred_writer.start()

    def _write_deferred(self) -> None:
        """Move the deferred version into the first slot that its readers leave."""
        while not self._closing.wait(_RETRY_S):
            with self._mutex:
                if self._deferred_version < 0 or self._move_deferred():
                    self._deferred_writer = None
                    return

    def _move_deferred(self) -> bool:
        """Move the deferred version into a free slot, unless there is none or a publish waits."""
        assert self._deferred is not None
        slot = self._claim()
        if slot is None:
            return False
        self._ledger.begin_write(slot)
        source, target = self._deferred.entries, self._views[slot]
        if not self._copier.copy(source, target, should_stop=self._preempt.is_set):
            self.locks.unlock(slot_byte(slot))
            return False
        self._make_visible(slot, self._deferred_version)
        self._deferred_version = -1
        return True
