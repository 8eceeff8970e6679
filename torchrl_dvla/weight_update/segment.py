# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The shared memory of one weight store: ledger, frozen weights and slots in one arena."""

from __future__ import annotations

import dataclasses

import torch

from torchrl_dvla.memory import SharedArena
from torchrl_dvla.weight_update.layout import WeightLayout, align
from torchrl_dvla.weight_update.ledger import MAX_SLOTS, Ledger
from torchrl_dvla.weight_update.locks import LockFile

__all__ = [
    "WRITER_BYTE",
    "SlotViews",
    "WeightSegment",
    "private_views",
    "reader_byte",
    "slot_byte",
]

#: Held exclusively for as long as the store's process lives.
WRITER_BYTE = 0


def slot_byte(slot: int) -> int:
    """Shared lock: a reader's pin. Exclusive lock: the writer's claim."""
    return 1 + slot


def reader_byte(row: int) -> int:
    """Held exclusively by the reader of ``row`` for as long as its process lives."""
    return 1 + MAX_SLOTS + row


@dataclasses.dataclass(frozen=True, eq=False)
class SlotViews:
    """One copy of the weights in memory; equal to itself alone.

    Args:
        entries (list of torch.Tensor): in the order of the layout's entries, frozen ones included.
            In shared memory each has a storage of its own that ends where it ends: copying such a
            tensor with its storage, as ``copy.deepcopy`` of a module does for buffers, copies it
            and not the arena.
        runs (dict of torch.Tensor): all live elements of each dtype, flat, padding included.
        memory (torch.Tensor): the whole of it, uint8 ``[slot_bytes]``.
    """

    entries: list[torch.Tensor]
    runs: dict[torch.dtype, torch.Tensor]
    memory: torch.Tensor


def private_views(layout: WeightLayout, device: torch.device | str = "cpu") -> SlotViews:
    """A copy of the live weights in this process's own memory; frozen entries are empty."""
    memory = torch.zeros(layout.slot_bytes, dtype=torch.uint8, device=device)
    entries = []
    for entry in layout.entries:
        stop = entry.offset_bytes + entry.numel * entry.dtype.itemsize
        if entry.is_frozen:
            entries.append(torch.empty(0, dtype=entry.dtype))
        else:
            flat = memory[entry.offset_bytes : stop].view(entry.dtype)
            entries.append(flat.as_strided(entry.shape, entry.stride, flat.storage_offset()))
    runs = {}
    for bucket in layout.buckets:
        stop = bucket.offset_bytes + bucket.numel * bucket.dtype.itemsize
        runs[bucket.dtype] = memory[bucket.offset_bytes : stop].view(bucket.dtype)
    return SlotViews(entries, runs, memory)


class WeightSegment:
    """One arena, laid out as ``ledger | frozen weights | slot 0 | slot 1 | ...``, and its locks.

    It is picklable to a child process that is being spawned: memory and locks are the same there.

    Args:
        layout (WeightLayout): what one slot holds.

    Keyword Args:
        num_slots (int): number of slots.
        max_readers (int): rows in the ledger.
    """

    def __init__(self, layout: WeightLayout, *, num_slots: int, max_readers: int) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.max_readers = max_readers
        self._num_words = Ledger.num_words(num_slots, max_readers, len(layout.buckets))
        self._frozen_offset = align(8 * self._num_words)
        self._slots_offset = self._frozen_offset + layout.frozen_bytes
        self.num_bytes = self._slots_offset + num_slots * layout.slot_bytes
        self.locks = LockFile()
        self._arena = SharedArena(self.num_bytes)

    def ledger(self) -> Ledger:
        """The shared words, as seen from this process."""
        words = self._arena.tensor(0, (self._num_words,), torch.int64)
        return Ledger(words, self.num_slots, len(self.layout.buckets))

    def pin(self) -> None:
        """Page-lock the memory in this process, for copies from and to CUDA."""
        self._arena.pin()

    def views(self, slot: int) -> SlotViews:
        """The tensors of ``slot``."""
        base = self._slots_offset + slot * self.layout.slot_bytes
        with torch.inference_mode(False):
            entries = []
            for entry in self.layout.entries:
                offset = (self._frozen_offset if entry.is_frozen else base) + entry.offset_bytes
                flat = self._arena.tensor(offset, (entry.numel,), entry.dtype)
                entries.append(flat.as_strided(entry.shape, entry.stride))
            runs = {
                bucket.dtype: self._arena.tensor(
                    base + bucket.offset_bytes, (bucket.numel,), bucket.dtype
                )
                for bucket in self.layout.buckets
            }
            memory = self._arena.tensor(base, (self.layout.slot_bytes,))
        return SlotViews(entries, runs, memory)

    def frozen_memory(self) -> torch.Tensor:
        """The weights that travel once, uint8 ``[frozen_bytes]``."""
        return self._arena.tensor(self._frozen_offset, (self.layout.frozen_bytes,))

    def checksums(self, slot: int) -> list[int]:
        """Wrapping sum of the 64-bit words of each bucket of the slot; buckets end on one."""
        sums = []
        for bucket in self.layout.buckets:
            offset = self._slots_offset + slot * self.layout.slot_bytes + bucket.offset_bytes
            num_words = bucket.numel * bucket.dtype.itemsize // 8
            sums.append(int(self._arena.tensor(offset, (num_words,), torch.int64).sum()))
        return sums
