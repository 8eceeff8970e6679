# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The words that the writer and the readers of a weight store share.

Every word is an aligned 64-bit integer with one writer at a time: the learner writes the offer and
a slot's record (the latter only under the slot's exclusive lock), a reader writes its own row. The
offer is a hint: a reader believes only what it reads under its lock on a slot, so nothing here
needs more than that a single word is not torn.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import torch

__all__ = ["Adoption", "AdoptionStats", "Ledger", "ReaderState"]

_WORD_BYTES = 8
_LINE_WORDS = 8  # one cache line for each writer's words
_NUM_RECORDS = 64  # the last adoptions of a reader
_RECORD_WORDS = 4
_ROW_WORDS = _LINE_WORDS + _NUM_RECORDS * _RECORD_WORDS
#: Slots fit in the low bits of an offer.
MAX_SLOTS = 256

#: Words of a slot; its checksums follow.
_VERSION, _PUBLISHED_NS, _NUM_SUMS, _FIRST_SUM = range(4)
_STATE, _READER_VERSION, _NUM_ADOPTIONS, _NUM_SKIPPED = range(4)


class ReaderState(enum.IntEnum):
    """Life of a reader's row: free, handed out, in use, given back."""

    FREE = 0
    ISSUED = 1
    ATTACHED = 2
    CLOSED = 3


@dataclasses.dataclass(frozen=True)
class Adoption:
    """One adoption, in seconds of ``time.monotonic``, which all processes of a node share.

    Args:
        version (int): what was adopted.
        published_s (float): when it was offered.
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
        num_skipped (int): versions it never saw, since a newer one was there at its next look.
        latency_p50_s, latency_p99_s, latency_last_s (float): seconds from publish to adoption over
            the last 64 adoptions, by the nearest rank; 0 before the first.
    """

    version: int
    num_adoptions: int
    num_skipped: int
    latency_p50_s: float
    latency_p99_s: float
    latency_last_s: float


class Ledger:
    """Typed access to the shared words.

    Args:
        words (torch.Tensor): int64 ``[num_words]`` in shared memory, zero when new.
        num_slots (int): slots of the store.
        num_sums (int): checksums of a slot.

    Examples:
        >>> ledger = Ledger(torch.zeros(Ledger.num_words(3, 2), dtype=torch.int64), 3)
        >>> ledger.reset()
        >>> ledger.version_in(1)
        -1
        >>> ledger.set_offer(version=5, slot=1)
        >>> ledger.offer >> 8, ledger.offer & 255
        (5, 1)
    """

    def __init__(self, words: torch.Tensor, num_slots: int, num_sums: int = 0) -> None:
        # Indexing a memoryview moves one machine word, some 40 times faster than a tensor's item().
        self._words: memoryview = words.numpy().data
        self._num_slots = num_slots
        self._slot_words = _slot_words(num_sums)
        self._first_row = _LINE_WORDS + self._slot_words * num_slots

    @staticmethod
    def num_words(num_slots: int, max_readers: int, num_sums: int = 0) -> int:
        """Words that a store of this size needs."""
        return _LINE_WORDS + _slot_words(num_sums) * num_slots + _ROW_WORDS * max_readers

    def reset(self) -> None:
        """Mark every slot as holding nothing, before there is any reader."""
        self._words[0] = -1
        for slot in range(self._num_slots):
            self._words[self._slot(slot) + _VERSION] = -1

    @property
    def offer(self) -> int:
        """``version * 256 + slot`` of the newest version, -1 before the first; it only grows."""
        return self._words[0]

    def set_offer(self, *, version: int, slot: int) -> None:
        """Show readers where the newest version is."""
        self._words[0] = version * MAX_SLOTS + slot

    def version_in(self, slot: int) -> int:
        """The whole version in ``slot``; -1 while it is being written or after a torn write."""
        return self._words[self._slot(slot) + _VERSION]

    def begin_write(self, slot: int) -> None:
        """Say that ``slot`` holds no whole version."""
        self._words[self._slot(slot) + _VERSION] = -1

    def end_write(
        self, slot: int, *, version: int, now_ns: int, checksums: Sequence[int] = ()
    ) -> None:
        """Say that ``slot`` holds the whole ``version``."""
        base = self._slot(slot)
        self._words[base + _PUBLISHED_NS] = now_ns
        self._words[base + _NUM_SUMS] = len(checksums)
        for number, checksum in enumerate(checksums):
            self._words[base + _FIRST_SUM + number] = checksum
        self._words[base + _VERSION] = version

    def checksums_in(self, slot: int) -> list[int]:
        """Checksums that the writer computed for ``slot``; none without them."""
        base = self._slot(slot)
        first = base + _FIRST_SUM
        return list(self._words[first : first + self._words[base + _NUM_SUMS]])

    def published_ns(self, slot: int) -> int:
        """Monotonic clock at the publish of ``slot``."""
        return self._words[self._slot(slot) + _PUBLISHED_NS]

    def state(self, row: int) -> ReaderState:
        """State of a reader's row."""
        return ReaderState(self._words[self._row(row) + _STATE])

    def set_state(self, row: int, state: ReaderState) -> None:
        """Move a reader's row on; a newly issued row starts from nothing."""
        base = self._row(row)
        if state is ReaderState.ISSUED:
            for word in range(base, base + _ROW_WORDS):
                self._words[word] = 0
            self._words[base + _READER_VERSION] = -1
        self._words[base + _STATE] = state

    def reader_version(self, row: int) -> int:
        """The version that the reader of ``row`` reads; -1 before the first."""
        return self._words[self._row(row) + _READER_VERSION]

    def record_adoption(
        self, row: int, *, version: int, published_ns: int, start_ns: int, end_ns: int
    ) -> None:
        """Note in a reader's own row that it adopted ``version``."""
        words, base = self._words, self._row(row)
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

    def num_adoptions(self, row: int) -> int:
        """How many versions the reader of ``row`` has adopted."""
        return self._words[self._row(row) + _NUM_ADOPTIONS]

    def adoptions(self, row: int, first: int = 0, stop: int | None = None) -> list[Adoption]:
        """Adoptions ``first:stop``, oldest first, as far as they are among the last 64."""
        base = self._row(row)
        stop = self.num_adoptions(row) if stop is None else stop
        numbers = range(max(first, stop - _NUM_RECORDS, 0), stop)
        records = base + _LINE_WORDS
        read = []
        for number in numbers:
            at = records + number % _NUM_RECORDS * _RECORD_WORDS
            version, published, start, end = self._words[at : at + _RECORD_WORDS]
            read.append(Adoption(version, published / 1e9, start / 1e9, end / 1e9))
        # The reader goes on meanwhile, and may have begun to write over the oldest of them.
        oldest = self.num_adoptions(row) - _NUM_RECORDS + 1
        return read[max(0, oldest - numbers.start) :]

    def adoption_stats(self, row: int) -> AdoptionStats:
        """What the reader of ``row`` reported."""
        base = self._row(row)
        latencies = [adoption.latency_s for adoption in self.adoptions(row)]
        return AdoptionStats(
            version=self._words[base + _READER_VERSION],
            num_adoptions=self._words[base + _NUM_ADOPTIONS],
            num_skipped=self._words[base + _NUM_SKIPPED],
            latency_p50_s=quantile(latencies, 0.5),
            latency_p99_s=quantile(latencies, 0.99),
            latency_last_s=latencies[-1] if latencies else 0.0,
        )

    def _slot(self, slot: int) -> int:
        return _LINE_WORDS + self._slot_words * slot

    def _row(self, row: int) -> int:
        return self._first_row + _ROW_WORDS * row


def _slot_words(num_sums: int) -> int:
    return -(-(_FIRST_SUM + num_sums) // _LINE_WORDS) * _LINE_WORDS


def quantile(values: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of ``values``; 0 for none."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else 0.0
