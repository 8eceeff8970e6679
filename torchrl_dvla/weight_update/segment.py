# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Shared memory of one weight store: slots and frozen weights, the ledger, and the lock file.

**Ledger.** Every word is an aligned 64-bit integer with one writer at a time: the learner writes
*latest* (the newest visible version and its slot) and a slot's record (only under the slot's
exclusive lock), a reader writes its own reader slot. *Latest* is a hint: a reader believes only
what it reads under its lock on a slot, so nothing here needs more than that a single word is not
torn.

**Locks.** The store needs three things of a lock: it must work between processes, a killed holder
must not keep it, and taking it must never wait. Linux *open file description* (OFD) record locks
give all three: they belong to one ``open()`` of the file, two of them conflict even inside one
process (so threads exclude each other as processes do), and they vanish with the last descriptor of
that ``open()``, whatever ended the process. A lock and its release cost one system call each, below
1 us. Each of those calls takes the spin lock of the file's lock list. A successful ``lock``
therefore sees every memory write made before the ``unlock`` it had to follow, on any processor: the
handshake of the store needs no fence that Python could not give.

Reference: Linux manual page ``F_OFD_SETLK(2const)``.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from torchrl_dvla.memory import SharedArena
from torchrl_dvla.memory.anonymous_file import AnonymousFile
from torchrl_dvla.weight_update.weight_layout import WeightLayout, align

if TYPE_CHECKING:
    from torchrl_dvla.memory import ModelPool

__all__ = [
    "WRITER_BYTE",
    "Adoption",
    "AdoptionStats",
    "LockFile",
    "LockHandle",
    "ReaderState",
    "SlotLedger",
    "SlotViews",
    "WeightSegment",
    "private_views",
    "reader_byte",
    "slot_byte",
    "wait_for_devices",
]

_LINE_WORDS = 8  # one cache line for each writer's words
_NUM_RECORDS = 64  # the last adoptions of a reader
_RECORD_WORDS = 4
_READER_WORDS = _LINE_WORDS + _NUM_RECORDS * _RECORD_WORDS
#: Slots fit in the low bits of *latest*.
MAX_SLOTS = 256

_VERSION, _PUBLISHED_NS = range(2)
_STATE, _READER_VERSION, _NUM_ADOPTIONS, _NUM_SKIPPED = range(4)


class ReaderState(enum.IntEnum):
    """State of a reader slot: free, handed out, in use, given back."""

    FREE = 0
    REGISTERED = 1
    ATTACHED = 2
    CLOSED = 3


@dataclasses.dataclass(frozen=True)
class Adoption:
    """One adoption, in seconds of ``time.monotonic``, which all processes of a node share.

    Args:
        version (int): what was adopted.
        published_s (float): when it became visible.
        start_s, end_s (float): when the reader began to look for it, and acted with it.
    """

    version: int
    published_s: float
    start_s: float
    end_s: float

    @property
    def latency_s(self) -> float:
        """Seconds from publish to adoption."""
        return self.end_s - self.published_s


@dataclasses.dataclass(frozen=True)
class AdoptionStats:
    """What one reader did with the published versions.

    Args:
        version (int): the version it reads now; -1 before the first.
        num_adoptions (int): versions it has adopted.
        num_skipped (int): versions it never saw, since a newer one was there at its next batch.
        latency_p50_s, latency_p99_s, latency_last_s (float): seconds from publish to adoption over
            the last 64 adoptions, by the nearest rank; 0 before the first.
    """

    version: int
    num_adoptions: int
    num_skipped: int
    latency_p50_s: float
    latency_p99_s: float
    latency_last_s: float


class SlotLedger:
    """Typed access to the shared words of a store.

    Args:
        words (torch.Tensor): int64 ``[num_words]`` in shared memory, zero when new.
        num_slots (int): slots of the store.

    Examples:
        >>> ledger = SlotLedger(torch.zeros(SlotLedger.num_words(3, 2), dtype=torch.int64), 3)
        >>> ledger.reset()
        >>> ledger.version_in(1)
        -1
        >>> ledger.set_latest(version=5, slot=1)
        >>> ledger.latest, ledger.latest_version, ledger.latest_slot
        (1281, 5, 1)
    """

    def __init__(self, words: torch.Tensor, num_slots: int) -> None:
        # Indexing a memoryview moves one machine word, some 40 times faster than a tensor's item().
        self._words: memoryview = words.numpy().data
        self._num_slots = num_slots
        self._first_reader = _LINE_WORDS * (1 + num_slots)

    @staticmethod
    def num_words(num_slots: int, max_readers: int) -> int:
        """Words that a store of this size needs."""
        return _LINE_WORDS * (1 + num_slots) + _READER_WORDS * max_readers

    def reset(self) -> None:
        """Mark every slot as holding nothing, before there is any reader."""
        self._words[0] = -1
        for slot in range(self._num_slots):
            self._words[self._slot(slot) + _VERSION] = -1

    @property
    def latest(self) -> int:
        """``version * 256 + slot`` of the latest version, -1 before the first; it only grows."""
        return self._words[0]

    @property
    def latest_version(self) -> int:
        """The newest version that readers can adopt; -1 before the first."""
        return self.latest // MAX_SLOTS

    @property
    def latest_slot(self) -> int:
        """The slot of :attr:`latest_version`; it is no slot before the first."""
        return self.latest % MAX_SLOTS

    def set_latest(self, *, version: int, slot: int) -> None:
        """Make ``version``, which is whole in ``slot``, visible to readers."""
        self._words[0] = version * MAX_SLOTS + slot

    def version_in(self, slot: int) -> int:
        """The whole version in ``slot``; -1 while it is being written or after a torn write."""
        return self._words[self._slot(slot) + _VERSION]

    def begin_write(self, slot: int) -> None:
        """Record that ``slot`` holds no whole version."""
        self._words[self._slot(slot) + _VERSION] = -1

    def end_write(self, slot: int, *, version: int, now_ns: int) -> None:
        """Record that ``slot`` holds the whole ``version``."""
        self._words[self._slot(slot) + _PUBLISHED_NS] = now_ns
        self._words[self._slot(slot) + _VERSION] = version

    def published_ns(self, slot: int) -> int:
        """Monotonic clock at the publish of ``slot``."""
        return self._words[self._slot(slot) + _PUBLISHED_NS]

    def state(self, reader: int) -> ReaderState:
        """State of a reader slot."""
        return ReaderState(self._words[self._reader(reader) + _STATE])

    def set_state(self, reader: int, state: ReaderState) -> None:
        """Set the state of a reader slot; one that is registered anew starts from nothing."""
        base = self._reader(reader)
        if state is ReaderState.REGISTERED:
            for word in range(base, base + _READER_WORDS):
                self._words[word] = 0
            self._words[base + _READER_VERSION] = -1
        self._words[base + _STATE] = state

    def record_adoption(
        self, reader: int, *, version: int, published_ns: int, start_ns: int, end_ns: int
    ) -> None:
        """Record in a reader's own slot that it adopted ``version``."""
        words, base = self._words, self._reader(reader)
        count = words[base + _NUM_ADOPTIONS]
        record = base + _LINE_WORDS + count % _NUM_RECORDS * _RECORD_WORDS
        words[record] = version
        words[record + 1] = published_ns
        words[record + 2] = start_ns
        words[record + 3] = end_ns
        if count:  # a late reader has skipped nothing
            words[base + _NUM_SKIPPED] += version - words[base + _READER_VERSION] - 1
        words[base + _NUM_ADOPTIONS] = count + 1
        words[base + _READER_VERSION] = version

    def num_adoptions(self, reader: int) -> int:
        """How many versions the reader has adopted."""
        return self._words[self._reader(reader) + _NUM_ADOPTIONS]

    def adoptions(self, reader: int, first: int = 0, stop: int | None = None) -> list[Adoption]:
        """Adoptions ``first:stop``, oldest first, as far as they are among the last 64."""
        base = self._reader(reader)
        stop = self.num_adoptions(reader) if stop is None else stop
        numbers = range(max(first, stop - _NUM_RECORDS, 0), stop)
        records = base + _LINE_WORDS
        read = []
        for number in numbers:
            at = records + number % _NUM_RECORDS * _RECORD_WORDS
            version, published, start, end = self._words[at : at + _RECORD_WORDS]
            read.append(Adoption(version, published / 1e9, start / 1e9, end / 1e9))
        # The reader goes on meanwhile, and may have begun to write over the oldest of them.
        oldest = self.num_adoptions(reader) - _NUM_RECORDS + 1
        return read[max(0, oldest - numbers.start) :]

    def adoption_stats(self, reader: int) -> AdoptionStats:
        """What the reader recorded."""
        base = self._reader(reader)
        latencies = [adoption.latency_s for adoption in self.adoptions(reader)]
        return AdoptionStats(
            version=self._words[base + _READER_VERSION],
            num_adoptions=self._words[base + _NUM_ADOPTIONS],
            num_skipped=self._words[base + _NUM_SKIPPED],
            latency_p50_s=quantile(latencies, 0.5),
            latency_p99_s=quantile(latencies, 0.99),
            latency_last_s=latencies[-1] if latencies else 0.0,
        )

    def _slot(self, slot: int) -> int:
        return _LINE_WORDS * (1 + slot)

    def _reader(self, reader: int) -> int:
        return self._first_reader + _READER_WORDS * reader


def quantile(values: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of ``values``; 0 for none."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else 0.0


# -- locks ---------------------------------------------------------------------------------------

# struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks), native alignment.
_FLOCK = "hhqqi4x"


def _request(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)


class LockHandle:
    """Holder of locks: one open file description of a :class:`LockFile`.

    Every holder (a reader, the writer) opens its own handle. A handle must not be shared by a
    forked child: the child's copy of the descriptor would keep the locks after the parent's death,
    so it is closed at once on the child's side of a fork.

    Args:
        path (str): where to open the file.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._requests: dict[tuple[int, int], bytes] = {}
        _OPEN_HANDLES.add(self)

    @property
    def is_open(self) -> bool:
        """Whether the handle can still hold locks."""
        return self._fd >= 0

    def try_shared(self, byte: int) -> bool:
        """Lock ``byte`` together with other readers; False when a writer holds it. Never waits."""
        return self._set(fcntl.F_RDLCK, byte)

    def try_exclusive(self, byte: int) -> bool:
        """Lock ``byte`` alone; False when anybody else holds it. Never waits."""
        return self._set(fcntl.F_WRLCK, byte)

    def unlock(self, byte: int) -> None:
        """Release ``byte``; nothing happens when this handle did not hold it."""
        self._set(fcntl.F_UNLCK, byte)

    def is_held_by_others(self, byte: int) -> bool:
        """Whether another handle, in any process, holds a lock on ``byte``."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, byte))
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Release every lock of this handle."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _set(self, kind: int, byte: int) -> bool:
        request = self._requests.get((kind, byte))
        if request is None:
            request = self._requests[kind, byte] = _request(kind, byte)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, request)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def __del__(self) -> None:
        self.close()


class LockFile(AnonymousFile):
    """File of lockable bytes, open in every process that it was pickled to.

    Raises:
        RuntimeError: on a system without OFD locks or without ``/proc``.

    Examples:
        >>> file = LockFile()
        >>> reader, writer = file.open(), file.open()
        >>> reader.try_shared(0), writer.try_exclusive(0)
        (True, False)
        >>> reader.close()
        >>> writer.try_exclusive(0)
        True
        >>> writer.close(); file.close()
    """

    label = "weight store"

    def __init__(self) -> None:
        if not hasattr(fcntl, "F_OFD_SETLK"):
            raise RuntimeError(
                "WeightStore needs open-file-description locks (F_OFD_SETLK), got a system without "
                "them. Run on Linux 3.15 or newer."
            )
        super().__init__()

    def open(self) -> LockHandle:
        """A new holder of locks.

        Raises:
            RuntimeError: if the file was closed, or ``/proc`` is not mounted.
        """
        if self.closed:
            raise RuntimeError("The weight store's lock file is closed. Make a new WeightStore.")
        try:
            # Opening the descriptor's entry in /proc, unlike dup(), makes a new description.
            return LockHandle(f"/proc/self/fd/{self._fd}")
        except OSError as error:
            raise RuntimeError(
                f"The weight store's lock file cannot be reopened through /proc/self/fd ({error}). "
                "Mount /proc in this container."
            ) from error


_OPEN_HANDLES: weakref.WeakSet[LockHandle] = weakref.WeakSet()


def _close_after_fork() -> None:
    for handle in list(_OPEN_HANDLES):
        handle.close()


os.register_at_fork(after_in_child=_close_after_fork)


# -- memory --------------------------------------------------------------------------------------

#: Held exclusively for as long as the store's process lives.
WRITER_BYTE = 0


def slot_byte(slot: int) -> int:
    """Shared lock: a reader's pin. Exclusive lock: the writer's claim."""
    return 1 + slot


def reader_byte(reader: int) -> int:
    """Held exclusively by the reader of that reader slot for as long as its process lives."""
    return 1 + MAX_SLOTS + reader


@dataclasses.dataclass(frozen=True, eq=False)
class SlotViews:
    """Tensors on one copy of the weights in memory; equal to itself alone.

    Args:
        entries (list of torch.Tensor): in the order of the layout's entries, frozen ones included.
            In shared memory each has a storage of its own that ends where it ends: copying such a
            tensor with its storage, as ``copy.deepcopy`` of a module does for buffers, copies it
            and not the arena.
        runs (dict of torch.Tensor): all live elements of each dtype, flat, padding included.
    """

    entries: list[torch.Tensor]
    runs: dict[torch.dtype, torch.Tensor]


_Take = Callable[[int, int, torch.dtype], torch.Tensor]


def _views(layout: WeightLayout, live: _Take, frozen: _Take) -> SlotViews:
    """Views by ``live(offset_bytes, numel, dtype)`` and, of frozen entries, ``frozen(...)``."""
    entries = []
    for entry in layout.entries:
        take = frozen if entry.is_frozen else live
        flat = take(entry.offset_bytes, entry.numel, entry.dtype)
        entries.append(flat.as_strided(entry.shape, entry.stride, flat.storage_offset()))
    runs = {b.dtype: live(b.offset_bytes, b.numel, b.dtype) for b in layout.buckets}
    return SlotViews(entries, runs)


def private_views(layout: WeightLayout) -> SlotViews:
    """A copy of the live weights in this process's own memory; frozen entries have none."""
    memory = torch.zeros(layout.slot_bytes, dtype=torch.uint8)

    def live(offset_bytes: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return memory[offset_bytes : offset_bytes + numel * dtype.itemsize].view(dtype)

    def frozen(offset_bytes: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device="meta")

    return _views(layout, live, frozen)


class WeightSegment:
    """An arena, laid out as ``ledger | slot 0 | slot 1 | ...``, one of frozen weights, and locks.

    It is picklable to a child process that is being spawned: memory and locks are the same there.
    The frozen weights may be the learner's own: they outlive the model pool.

    Args:
        layout (WeightLayout): what one slot holds.

    Keyword Args:
        num_slots (int): number of slots.
        max_readers (int): reader slots in the ledger.
        model_pool (ModelPool, optional): whose budget the arena counts in. Default: none.
    """

    def __init__(
        self,
        layout: WeightLayout,
        *,
        num_slots: int,
        max_readers: int,
        model_pool: ModelPool | None = None,
    ) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self._num_words = SlotLedger.num_words(num_slots, max_readers)
        self._slots_offset = align(8 * self._num_words)
        num_bytes = self.bytes_for(layout, num_slots=num_slots, max_readers=max_readers)
        num_bytes -= layout.frozen_bytes
        self.locks = LockFile()
        self._frozen: SharedArena | None = None
        if model_pool is None:
            self._arena = SharedArena(num_bytes)
            if layout.frozen_bytes:
                self._frozen = SharedArena(layout.frozen_bytes)
        else:
            self._arena = model_pool.arena(num_bytes, "weight slots")
            if layout.frozen_bytes:
                self._frozen = model_pool.arena(
                    layout.frozen_bytes, "frozen weights", outlives=True
                )

    @staticmethod
    def bytes_for(layout: WeightLayout, *, num_slots: int, max_readers: int) -> int:
        """Bytes of shared memory that a store of this size takes."""
        ledger_bytes = align(8 * SlotLedger.num_words(num_slots, max_readers))
        return ledger_bytes + layout.frozen_bytes + num_slots * layout.slot_bytes

    def ledger(self) -> SlotLedger:
        """The shared words, as seen from this process."""
        words = self._arena.tensor(0, (self._num_words,), torch.int64)
        return SlotLedger(words, self.num_slots)

    def pin(self) -> None:
        """Page-lock the memory in this process, for copies from and to CUDA."""
        self._arena.pin()
        if self._frozen is not None:
            self._frozen.pin()

    def views(self, slot: int) -> SlotViews:
        """The tensors of ``slot``."""
        start = self._slots_offset + slot * self.layout.slot_bytes

        def live(offset_bytes: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
            return self._arena.tensor(start + offset_bytes, (numel,), dtype)

        def frozen(offset_bytes: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
            assert self._frozen is not None, "the layout has such an entry"
            return self._frozen.tensor(offset_bytes, (numel,), dtype)

        with torch.inference_mode(False):
            return _views(self.layout, live, frozen)


def wait_for_devices(tensors: Iterable[torch.Tensor]) -> None:
    """Wait on the host for the copies of CUDA ``tensors`` that this thread has started.

    They are in the order of the stream that the caller computes on, so an optimiser step before
    them is in what they copied, and one after this call is not.
    """
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
