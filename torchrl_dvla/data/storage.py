# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A TorchRL storage whose items are the rows of stored groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torchrl.data.replay_buffers.storages import Storage, TensorStorage

from torchrl_dvla.data.group_queue import GroupQueue
from torchrl_dvla.memory.row_access import RowFields
from torchrl_dvla.saved_state import require_form

__all__ = ["READ_ONLY", "PooledStorage"]

#: Why rows of a bound buffer are not written.
READ_ONLY = (
    "The buffer is bound to a collector, and its rows come from the collector: they cannot be "
    "written or removed here. Use a buffer that is not bound for rows of your own."
)
#: A field up to this size is shown to samplers. They read ids, flags, versions and rewards.
_SMALL_BYTES = 64


class PooledStorage(TensorStorage):
    """Rows of the stored groups of a :class:`GroupQueue` as the items of a replay buffer.

    Item ``i`` is a *position*: rows are counted oldest group first, rollout after rollout, so that
    scattered, partly filled pages look like one dense storage. When groups leave, the positions
    behind them move up.

    Reading always copies, also a slice: what is read stays what it was when its pages are used
    again. Nothing can be written.

    Args:
        groups (GroupQueue): the groups.
    """

    # TorchRL's conditional update writes to tensors indexed by position, and there are none here.
    supports_conditional_update = False

    def __init__(self, groups: GroupQueue) -> None:
        # Not TensorStorage.__init__, which wants the tensors; what is inherited is its protocol.
        # Compilable: counters are plain numbers. TorchRL's others are named semaphores in /dev/shm,
        # for processes that share a storage, which this one is not made for.
        Storage.__init__(self, groups.pool.num_rows, compilable=True)
        self.groups = groups
        self.ndim = 1
        self.device = torch.device("cpu")
        self.initialized = True
        self._last_cursor = None
        layout, rows = groups.pool.layout, groups.pool.rows
        small = [
            key
            for key, (shape, dtype) in layout.items()
            if shape.numel() * dtype.itemsize <= _SMALL_BYTES
        ]
        self._fields, self._small_fields = RowFields(rows, layout), RowFields(rows, small)

    def row_index(self) -> torch.Tensor:
        """Row numbers in the pool by position, int64 ``[len(self)]``.

        Raises:
            RuntimeError: if the pages are gone.
        """
        with self.groups.lock:
            self.groups.require_open()
            rows = [group.row_index(self.groups.pool) for group in self.groups.stored]
            return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)

    def get(self, index: Any) -> Any:
        """A copy of the rows at ``index``: a number, numbers, a mask, a slice; or of one field.

        Raises:
            IndexError: if there is no such position.
            KeyError: if there is no such field.
        """
        path = (index,) if isinstance(index, str) else index
        if isinstance(path, tuple) and isinstance(path[0], str):
            return self._get_field(unravel_key(path))
        if isinstance(index, (list, range, torch.Tensor)):
            index = np.asarray(index)
        with self.groups.lock:
            numbers = self.row_index().numpy()[index]
            flat = np.ascontiguousarray(numbers).reshape(-1)
            rows = self._fields.gather(torch.from_numpy(flat))
        return rows.reshape(numbers.shape) if np.ndim(numbers) else rows[0]

    def _get_field(self, key: NestedKey) -> Any:
        path = (key,) if isinstance(key, str) else key
        fields = self._fields.keys
        keys = [k for k in fields if ((k,) if isinstance(k, str) else k)[: len(path)] == path]
        if not keys:
            raise KeyError(f"index must name fields of the rows, got {key!r}. They are {fields}.")
        with self.groups.lock:
            return RowFields(self.groups.pool.rows, keys).gather(self.row_index()).get(key)

    @property
    def _storage(self) -> TensorDictBase:
        # What samplers look at: without the images, which would be copied for one number each.
        return self._small_fields.gather(self.row_index())

    @property
    def _len(self) -> int:
        with self.groups.lock:
            self.groups.require_open()
            return sum(group.num_rows for group in self.groups.stored)

    @property
    def shape(self) -> torch.Size:
        """``[len(self)]``."""
        return torch.Size([len(self)])

    def __len__(self) -> int:
        return self._len

    def contains(self, item: Any) -> Any:
        """Whether positions are filled."""
        if isinstance(item, int):
            return -len(self) <= item < len(self)
        item = torch.as_tensor(item)
        return (item >= -len(self)) & (item < len(self))

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        """Refused: rows come from the collector."""
        raise RuntimeError(READ_ONLY)

    def _empty(self) -> None:
        raise RuntimeError(READ_ONLY)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "A PooledStorage is saved and loaded with its groups: call dumps(), loads(), "
            "state_dict() or load_state_dict() of the buffer. Hooks have no place there."
        )

    dumps = loads = register_save_hook = register_load_hook = _refuse

    def state_dict(self) -> dict[str, Any]:
        """The rows by value, in the order of their positions, as plain data."""
        layout = self.groups.pool.layout
        rows = self.get(slice(None))
        return {
            "signature": layout.signature,
            "layout": repr(layout),
            "fields": [rows.get(key) for key in layout],
        }

    def check_state(self, state_dict: Mapping[str, Any], num_rows: int) -> None:
        """Refuse the rows of a checkpoint that was made with other specs, or is damaged.

        Args:
            state_dict (Mapping): what :meth:`state_dict` returned.
            num_rows (int): rows of its groups.

        Raises:
            ValueError: showing both specs, or naming the field.
        """
        layout = self.groups.pool.layout
        form = {"signature": str, "layout": str, "fields": [torch.Tensor]}
        require_form(form, state_dict, "storage")
        if state_dict["signature"] != layout.signature:
            raise ValueError(
                f"The checkpoint must come from the same specs, got rows "
                f"of\n{state_dict['layout']}\nfor a pool of\n{layout!r}\nBuild the pool "
                "as that run did, or start the buffer empty."
            )
        # Without the memory of so many rows.
        rows = {
            key: torch.zeros((), dtype=dtype).expand(num_rows, *shape)
            for key, (shape, dtype) in layout.items()
        }
        require_form(rows, dict(zip(layout, state_dict["fields"])), "storage")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy the rows of a checkpoint onto the pages of its groups, which are loaded already."""
        rows = TensorDict({}, batch_size=[len(self)])
        for key, field in zip(self.groups.pool.layout, state_dict["fields"], strict=True):
            rows.set(key, field)
        self._fields.scatter(self.row_index(), rows)
        self._bump_mutation_revision()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "A PooledStorage cannot be pickled: one process owns the ledger of its pool. Send "
            "pool.worker_view() to workers, or state_dict() to a checkpoint."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(len={len(self)}, groups={len(self.groups.stored)})"
