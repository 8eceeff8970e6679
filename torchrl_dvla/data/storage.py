# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A TorchRL storage whose items are rows of the environment pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data.replay_buffers.storages import Storage, TensorStorage

from torchrl_dvla.data.fields import RowFields
from torchrl_dvla.data.storage_checks import PooledCheckpointer, check_checkpoint, check_fields
from torchrl_dvla.memory import EnvironmentPool

__all__ = ["PooledStorage"]

#: Owner of the pages that the storage leases for rows given to it by value.
_OWNER = "replay buffer"


@dataclass
class _Segment:
    """Pages and rows of each rollout of a group."""

    pages: list[list[int]]
    sizes: list[int]


class PooledStorage(TensorStorage):
    """Rows of an :class:`~torchrl_dvla.memory.EnvironmentPool` as the items of a replay buffer.

    Item ``i`` is a *position* in an index of row numbers, so that scattered, partly filled pages
    look like one dense storage. It is filled in one of two ways, until it is emptied:

    - :meth:`adopt` takes sealed pages over as a *segment*, without touching a tensor. Segments are
      evicted whole (:meth:`evict`), and the positions behind them move up.
    - :meth:`set` copies rows in, like TorchRL's own storages: a ring of ``max_size`` positions over
      pages leased once.

    Reading always copies, also a slice: what is read stays what it was when its pages get another
    life. Samplers look at a :class:`~torchrl_dvla.data.samplers.SamplerView`.

    Args:
        pool (EnvironmentPool): the rows.

    Keyword Args:
        max_size (int, optional): positions. Defaults to all rows of the pool.

    Examples:
        >>> from torchrl_dvla.memory import RowLayout
        >>> pool = EnvironmentPool(RowLayout({"x": ((1,), torch.float32)}), 3, rows_per_page=2)
        >>> storage = PooledStorage(pool)
        >>> storage.set(range(3), TensorDict({"x": torch.arange(3.0).unsqueeze(-1)}, [3]))
        >>> storage[torch.tensor([2, 0])]["x"].flatten()
        tensor([2., 0.])
        >>> pool.stats()["pages_stored"]
        2
        >>> pool.close()
    """

    _default_checkpointer = PooledCheckpointer
    # TorchRL's conditional update writes to tensors indexed by position, and there are none here.
    supports_conditional_update = False

    def __init__(self, pool: EnvironmentPool, *, max_size: int | None = None) -> None:
        max_size = pool.num_rows if max_size is None else max_size
        if not 1 <= max_size <= pool.num_rows:
            raise ValueError(
                f"max_size must be between 1 and the pool's {pool.num_rows} rows, got {max_size}. "
                "Raise env_bytes or lower max_size."
            )
        self._length = 0
        # Not TensorStorage.__init__, which wants the tensors; what is inherited is its protocol.
        # Compilable: counters are plain numbers. TorchRL's others are named semaphores in /dev/shm,
        # for processes that share a storage, which this one is not made for.
        Storage.__init__(self, max_size, compilable=True)
        self.pool = pool
        self.ndim = 1
        self.device = torch.device("cpu")
        self.initialized = True
        self._last_cursor = None
        self._fields = RowFields(pool.rows, pool.layout)
        self._index = torch.empty(pool.num_rows, dtype=torch.int64)
        self._segments: dict[int, _Segment] = {}
        self._own_pages: list[int] = []

    # -- groups ---------------------------------------------------------------------------------

    def adopt(self, key: int, pages: Sequence[Sequence[int]], sizes: Sequence[int]) -> torch.Tensor:
        """Take sealed pages over; no tensor moves.

        Args:
            key (int): name of the segment.
            pages (sequence): the sealed pages of each rollout, in order.
            sizes (sequence of int): the rows of each rollout.

        Returns:
            torch.Tensor: int64 ``[sum(sizes)]``, the positions of the rows.

        Raises:
            RuntimeError: if rows were given by value before, or a page is not sealed.
            ValueError: if the segment exists.
        """
        if self._own_pages:
            raise RuntimeError(
                "The buffer holds rows given by value and cannot adopt pages beside them: they "
                "are a ring that would overwrite groups. Call empty() first, or use two buffers."
            )
        if key in self._segments:
            raise ValueError(f"key must be new, got {key}, which is stored. Count group ids up.")
        rows = self.pool.row_index_of(pages, sizes)
        self.pool.store([page for owned in pages for page in owned])
        start, end = self._length, self._length + len(rows)
        self._index[start:end] = rows
        self._segments[key] = _Segment([list(owned) for owned in pages], list(sizes))
        self._length = end
        self._bump_mutation_revision()
        return torch.arange(start, end)

    def evict(self, key: int) -> tuple[int, int]:
        """Free the pages of a segment; later positions move up.

        Returns:
            tuple of int: its first position, and the one after its last.

        Raises:
            KeyError: if there is no such segment.
        """
        start, end = self.segment_positions(key)
        left = self._length - (end - start)
        self._index[start:left] = self._index[end : self._length].clone()
        self._length = left
        self.pool.free([page for owned in self._segments.pop(key).pages for page in owned])
        self._bump_mutation_revision()
        return start, end

    # -- rows by value --------------------------------------------------------------------------

    def set(self, cursor: Any, data: TensorDictBase, *, set_cursor: bool = True) -> None:
        """Copy rows to positions.

        Args:
            cursor (int, sequence, slice or tensor): positions.
            data (TensorDictBase): rows with exactly the fields of the layout.

        Raises:
            KeyError: naming fields that are missing or that rows have no place for.
            ValueError: naming a field of another shape or type.
            RuntimeError: if the storage holds groups, or the pool has no page left.
        """
        if isinstance(data, list):
            data = torch.stack(data)
        check_fields(self.pool.layout, data)
        positions = self._positions(cursor, self.max_size)
        if positions.numel() == 0:
            return
        if set_cursor:
            self._set_last_cursor(cursor)
        self._grow(int(positions.max()) + 1)
        is_single = isinstance(cursor, (int, np.integer)) or data.batch_dims == 0
        self._fields.scatter(self._index[positions], data.unsqueeze(0) if is_single else data)
        self._bump_mutation_revision()

    def set_field(self, key: NestedKey, value: torch.Tensor, index: Any = slice(None)) -> None:
        """Overwrite one field of filled rows.

        Args:
            key (NestedKey): a field of the layout.
            value (torch.Tensor): what to write, ``[n, *shape]`` or of a shape that expands to it.
            index (int, sequence, slice or tensor): positions; by default all.

        Raises:
            KeyError: if rows have no such field.
        """
        if key not in self.pool.layout:
            raise KeyError(
                f"key must be a field of the row layout, got {key!r}. Build the pool with it; its "
                f"fields are {list(self.pool.layout)}."
            )
        self._fields.scatter_field(key, self.rows_at(index), torch.as_tensor(value))
        self._bump_mutation_revision()

    def get(self, index: Any) -> TensorDictBase:
        """A copy of the rows at ``index``."""
        rows = self._fields.gather(self.rows_at(index))
        return rows[0] if isinstance(index, (int, np.integer)) else rows

    def gather_into(self, rows: torch.Tensor, batch: RowFields) -> TensorDict:
        """Copy rows into the first rows of a batch; nothing is allocated.

        Args:
            rows (torch.Tensor): int64 ``[n]``, row numbers of the pool (not positions).
            batch (RowFields): ``[m]`` with ``m >= n``, fields of the layout.

        Returns:
            TensorDict: ``[n]``, views on the batch.
        """
        return self._fields.gather(rows, batch)

    def rows_at(self, index: Any) -> torch.Tensor:
        """Row numbers in the pool of the positions ``index``, int64 ``[n]``.

        Raises:
            IndexError: if a position is not filled.
        """
        if isinstance(index, slice) and (index.step is None or index.step > 0):
            return self._index[: self._length][index]
        return self._index[self._positions(index, self._length)]

    def contains(self, item: Any) -> Any:
        """Whether positions are filled."""
        if isinstance(item, (int, np.integer)):
            return -self._length <= item < self._length
        item = torch.as_tensor(item)
        return (item >= -self._length) & (item < self._length)

    def segments(self) -> dict[int, int]:
        """Rows by adopted segment, oldest first."""
        return {key: sum(segment.sizes) for key, segment in self._segments.items()}

    def segment_pages(self, key: int) -> list[list[int]]:
        """The pages of each rollout of a segment."""
        return [list(owned) for owned in self._segments[key].pages]

    def segment_rows(self, key: int) -> torch.Tensor:
        """Row numbers of a segment, int64 ``[n]``."""
        start, end = self.segment_positions(key)
        return self._index[start:end].clone()

    def segment_positions(self, key: int) -> tuple[int, int]:
        """The first position of a segment, and the one after its last.

        Raises:
            KeyError: if there is no such segment.
        """
        start = 0
        for other, segment in self._segments.items():
            if other == key:
                return start, start + sum(segment.sizes)
            start += sum(segment.sizes)
        raise KeyError(f"Group {key} is not stored. Stored groups: {list(self._segments)}.")

    def __len__(self) -> int:
        return self._length

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The filled rows by value, in the order of their positions, as plain data."""
        rows = self._fields.gather(self._index[: self._length])
        return {
            "signature": self.pool.layout.signature,
            "layout": repr(self.pool.layout),
            "num_rows": self._length,
            "segments": [[key, list(segment.sizes)] for key, segment in self._segments.items()],
            "fields": [rows.get(key) for key in self.pool.layout],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the content by a checkpoint's.

        Rollouts come back on other pages; ask :meth:`segment_pages` for them.

        Raises:
            ValueError: if the checkpoint was made with other specs, or does not fit.
        """
        adopted = [owned for segment in self._segments.values() for owned in segment.pages]
        num_own_pages = len(self._own_pages) + sum(map(len, adopted))
        check_checkpoint(self.pool, self.max_size, num_own_pages, state_dict)
        self._empty()
        num_rows = int(state_dict["num_rows"])
        start = 0
        for key, sizes in state_dict["segments"]:
            end = start + sum(sizes)
            self._restore(key, sizes, [field[start:end] for field in state_dict["fields"]])
            start = end
        if num_rows and not state_dict["segments"]:
            rows = TensorDict({}, batch_size=[num_rows])
            for key, field in zip(self.pool.layout, state_dict["fields"]):
                rows.set(key, field)
            self.set(range(num_rows), rows)

    def _restore(self, key: int, sizes: Sequence[int], values: Sequence[torch.Tensor]) -> None:
        pages: list[list[int]] = []
        for number, size in enumerate(sizes):
            count = -(-size // self.pool.rows_per_page)
            leased = [self.pool.lease(_OWNER, (key, number), reserved=False) for _ in range(count)]
            pages.append(list(self.pool.seal(leased, size)))
        rows = self.pool.row_index_of(pages, sizes)
        for field, value in zip(self.pool.layout, values):
            self._fields.scatter_field(field, rows, value)
        self.adopt(key, pages, sizes)

    # -- TorchRL's protocol ---------------------------------------------------------------------

    @property
    def _is_full(self) -> bool:
        # Only a ring is ever full: where it is, samplers look for trajectories across its end.
        return bool(self._own_pages) and self._length == self.max_size

    @property
    def _total_shape(self) -> torch.Size:
        return torch.Size([self.max_size])

    @property
    def _len(self) -> int:
        return self._length

    @_len.setter
    def _len(self, value: int) -> None:
        pass  # set() counts what it writes

    @property
    def _storage_keys(self) -> list[NestedKey]:
        return list(self.pool.layout)

    def _empty(self) -> None:
        for segment in self._segments.values():
            self.pool.free([page for owned in segment.pages for page in owned])
        self._segments.clear()
        self.pool.free(self._own_pages)
        self._own_pages = []
        self._length = 0
        self._set_last_cursor(None)
        self._bump_mutation_revision()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "A PooledStorage cannot be pickled: one process owns the ledger of its pool. Send "
            "pool.worker_view() to workers, or state_dict() to a checkpoint."
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(len={self._length}, max_size={self.max_size}, "
            f"groups={len(self._segments)}, pool={self.pool!r})"
        )

    # -- helpers --------------------------------------------------------------------------------

    def _positions(self, index: Any, limit: int) -> torch.Tensor:
        if isinstance(index, slice):
            index = range(*index.indices(limit))
        if isinstance(index, range):
            index = list(index)
        if isinstance(index, tuple) and len(index) == 1:
            index = index[0]
        positions = torch.as_tensor(index)
        if positions.dtype is torch.bool:
            positions = positions.nonzero().squeeze(-1)
        positions = positions.to(torch.int64).reshape(-1)
        positions = torch.where(positions < 0, positions + limit, positions)
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < limit:
            raise IndexError(f"positions must be within {limit} rows, got {positions.tolist()}")
        return positions

    def _grow(self, length: int) -> None:
        if length <= self._length:
            return
        if self._segments:
            raise RuntimeError(
                "The buffer holds groups and cannot take rows by value beside them. Extend it with "
                "GroupRecords, call empty() first, or use two buffers."
            )
        size = self.pool.rows_per_page
        while len(self._own_pages) * size < length:
            page = self.pool.lease(_OWNER, reserved=False)
            (page,) = self.pool.seal([page], size)
            self.pool.store([page])
            start = len(self._own_pages) * size
            self._index[start : start + size] = self.pool.row_index([page])
            self._own_pages.append(page)
        self._length = length
