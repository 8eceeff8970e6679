# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's replay buffer on rows of a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.utils import pin_memory_output
from torchrl.data.replay_buffers.writers import RoundRobinWriter

from torchrl_dvla.data.cohort import Staging
from torchrl_dvla.data.samplers import SamplerView
from torchrl_dvla.data.storage import PooledStorage
from torchrl_dvla.memory import ModelPool

__all__ = ["RowReplayBuffer"]


class RowReplayBuffer(ReplayBuffer):
    """What :class:`~torchrl_dvla.data.PooledReplayBuffer` is apart from groups.

    TorchRL writes fields through a view of the whole storage, lets samplers read whole rows and
    allocates each batch. Rows of a pool lie anywhere, so no such view exists: here fields are
    written by position, samplers see a :class:`~torchrl_dvla.data.samplers.SamplerView`, and
    batches may be staged.

    Keyword Args:
        storage (PooledStorage): the rows.
        batch_size (int, optional): rows of a batch.
        num_staging (int): persistent batches; 0 allocates each one.
        model_pool (ModelPool, optional): takes the persistent batches into its budget.
        prefetch (int, optional): batches that threads of TorchRL's prepare ahead.
        **kwargs: further arguments of :class:`torchrl.data.ReplayBuffer`.
    """

    def __init__(
        self,
        *,
        storage: PooledStorage,
        batch_size: int | None = None,
        num_staging: int = 0,
        model_pool: ModelPool | None = None,
        prefetch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if num_staging and batch_size is None:
            raise ValueError(
                "batch_size must be given to learn from groups or to stage batches, got None. Set "
                "the rows of one minibatch."
            )
        super().__init__(
            storage=storage,
            batch_size=batch_size,
            prefetch=prefetch,
            # Compilable: its counters are plain numbers, not named semaphores in /dev/shm.
            **{"writer": RoundRobinWriter(compilable=True), **kwargs},
        )
        self._view = SamplerView(storage)
        self._staging: Staging | None = None
        if num_staging and batch_size is not None:
            # Prefetching threads may fill p batches ahead of the one in hand, and in another order
            # than they are handed out, which puts p more between a batch and its memory's reuse.
            num_batches = num_staging + 2 * (prefetch or 0)
            num_rows = min(batch_size, storage.pool.num_rows)
            self._staging = Staging(storage.pool.layout, num_rows, num_batches, model_pool)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Overwrite rows, or with a key one field of all rows."""
        key = index if isinstance(index, str) else isinstance(index, tuple) and unravel_key(index)
        if key:
            self.set_(key, value)
        else:
            super().__setitem__(index, value)

    def set_(self, key: NestedKey, value: torch.Tensor) -> RowReplayBuffer:
        """Overwrite one field of all rows."""
        return self.set_at_(key, value, slice(None))

    def set_at_(self, key: NestedKey, value: torch.Tensor, index: Any) -> RowReplayBuffer:
        """Overwrite one field of the rows at ``index``."""
        with self._replay_lock:
            self._storage.set_field(key, value, index)
        return self

    def update_(
        self,
        input_dict_or_td: Mapping[NestedKey, torch.Tensor] | TensorDictBase,
        clone: bool = False,
        *,
        keys_to_update: Sequence[NestedKey] | None = None,
    ) -> RowReplayBuffer:
        """Overwrite fields of all rows; values are always copied."""
        data = TensorDict.from_any(input_dict_or_td, auto_batch_size=False)
        for key in data.keys(True, True) if keys_to_update is None else keys_to_update:
            self.set_(key, data.get(key))
        return self

    def can_sample(self, batch_size: int | None = None) -> bool:
        """Whether :meth:`sample` can give a batch now."""
        size = self._batch_size if batch_size is None else batch_size
        with self._replay_lock, self._write_lock:
            return bool(self._sampler.can_sample(self._view, size))

    @pin_memory_output
    def _sample(self, batch_size: int) -> tuple[Any, dict[str, Any]]:
        # TorchRL's, but for what the sampler sees, where the rows go, and which groups leave.
        with self._replay_lock, self._write_lock:
            index, info = self._sampler.sample(self._view, batch_size)
            if self._sample_unit is not None:
                index, info = self._sample_unit.expand(index, info, self._view)
            info["index"] = index
            if self._writer.tracks_generations:
                info["index_generation"] = self._writer.generations_of(index)
            rows = self._storage.rows_at(index)
            if self._staging is None or len(rows) > self._staging.batch_size:
                data = self._storage.get(index)
            else:
                data = self._storage.gather_into(rows, self._staging.next())
            self._after_draw()
        data = self._collate_fn(data)
        return (self._transform(data) if len(self._transform) else data), info

    def _after_draw(self) -> None:
        """Called with the lock held when a batch was copied."""
