# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's samplers on rows that lie anywhere and that leave in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torchrl.data import StreamingSliceSampler
from torchrl.data.replay_buffers.samplers import (
    ConsumingSampler,
    PrioritizedSampler,
    PromptGroupSampler,
    Sampler,
    SamplerWithoutReplacement,
    SliceSampler,
)
from torchrl.data.replay_buffers.storages import TensorStorage

from torchrl_dvla.data.fields import RowFields

if TYPE_CHECKING:
    from torchrl_dvla.data.storage import PooledStorage

__all__ = ["SamplerView", "check_sampler_for_groups", "follow_eviction"]

#: A field up to this size is shown to samplers. They read ids, flags, versions and rewards.
_SMALL_BYTES = 64


class SamplerView(TensorStorage):
    """A pooled storage as a sampler sees it: by position, and only the small fields.

    Samplers ask for ``storage[:]`` or ``storage[index]`` and then look at a flag or an id. On the
    storage itself that would copy images: a slice sampler would copy its batch twice, and first of
    all the whole buffer.

    Args:
        storage (PooledStorage): what is shown; nothing of it is owned.
    """

    def __init__(self, storage: PooledStorage) -> None:
        # Not TensorStorage.__init__, which wants the tensors; what is inherited is its protocol.
        self._pooled = storage
        self.ndim, self.device, self.max_size = 1, storage.device, storage.max_size
        self.initialized = True
        small = [
            key
            for key, (shape, dtype) in storage.pool.layout.items()
            if shape.numel() * dtype.itemsize <= _SMALL_BYTES
        ]
        self._fields = RowFields(storage.pool.rows, small)

    def get(self, index: Any) -> Any:
        """Small fields of the rows at ``index``; for a key, that field of all rows."""
        is_key = isinstance(index, str) or (
            isinstance(index, tuple) and all(isinstance(part, str) for part in index)
        )
        if is_key:
            return self._fields.gather_field(index, self._pooled.rows_at(slice(None)))
        return self._fields.gather(self._pooled.rows_at(index))

    @property
    def _storage(self) -> TensorDictBase:
        return self.get(slice(None))

    @property
    def _len(self) -> int:
        return len(self._pooled)

    @property
    def _is_full(self) -> bool:
        return self._pooled._is_full

    @property
    def _total_shape(self) -> torch.Size:
        return self._pooled._total_shape

    @property
    def _rng(self) -> torch.Generator | None:
        return self._pooled._rng

    @property
    def _mutation_revision(self) -> Any:
        return self._pooled._mutation_revision

    @property
    def _last_cursor_index(self) -> Any:
        return self._pooled._last_cursor_index

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._pooled!r})"


def check_sampler_for_groups(sampler: Sampler) -> None:
    """Refuse the samplers that cannot follow an eviction.

    Raises:
        TypeError: naming the sampler and the reason.
    """
    is_streaming = isinstance(sampler, StreamingSliceSampler)
    if is_streaming or (isinstance(sampler, SliceSampler) and sampler.fragmented):
        raise TypeError(
            f"sampler must not be a {'' if is_streaming else 'fragmented '}"
            f"{type(sampler).__name__} for groups: it indexes single slots of a ring in the order "
            "they were written, and groups leave whole, in any order. Take a plain SliceSampler, "
            "or extend the buffer with TensorDicts."
        )


def follow_eviction(sampler: Sampler, start: int, stop: int, length: int) -> None:
    """Move what a sampler knows by position.

    Positions ``[start, stop)`` of ``length`` were evicted, so each later one moved up by ``stop -
    start``. A sampler keeps what it knew about the rows that stayed: priorities, how often a row
    was sampled, which rows are still to come in this pass.

    Args:
        sampler (Sampler): any that :func:`check_sampler_for_groups` lets pass. Samplers without
            state by position are left alone.
        start (int): first evicted position.
        stop (int): the position after the last.
        length (int): positions before the eviction.
    """
    if isinstance(sampler, PrioritizedSampler):
        _move_priorities(sampler, start, stop, length)
    if isinstance(sampler, ConsumingSampler):
        _move_counts(sampler, start, stop, length)
    if isinstance(sampler, SliceSampler):
        sampler._cache.clear()
    if isinstance(sampler, PromptGroupSampler):
        sampler._group_index = None
    if isinstance(sampler, SamplerWithoutReplacement) and sampler._sample_list is not None:
        if isinstance(sampler, SliceSampler):
            sampler._sample_list = None  # it lists trajectories: a new pass begins
            return
        left = sampler._sample_list
        left = left[(left < start) | (left >= stop)]
        left = torch.where(left >= stop, left - (stop - start), left)
        sampler._sample_list = left if left.numel() else None
        sampler.len_storage = length - (stop - start)


def _move_priorities(sampler: PrioritizedSampler, start: int, stop: int, length: int) -> None:
    sources, left = torch.arange(stop, length), length - (stop - start)
    destinations, freed = torch.arange(start, left), torch.arange(left, length)
    if sources.numel():
        for tree in (sampler._sum_tree, sampler._min_tree):
            tree[destinations] = torch.as_tensor(tree[sources])
    # Outside of the positions in use the minimum is never asked for, but the maximum is.
    sampler._sum_tree[freed] = torch.zeros(freed.numel(), dtype=sampler.dtype)
    if sampler._max_priority_within_buffer:
        sampler._recompute_max_priority_from_tree()


def _move_counts(sampler: ConsumingSampler, start: int, stop: int, length: int) -> None:
    left = length - (stop - start)
    for counts in (sampler._sample_count, sampler._live_mask):
        if counts is not None:
            counts[start:left] = counts[stop:length].clone()
            counts[left:length] = 0
    sampler._known_storage_len = left
    # Consumed slots are not written anew one by one: the whole group goes.
    sampler._free_indices, sampler._free_head = None, 0
