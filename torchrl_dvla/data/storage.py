# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A TorchRL storage whose items are rows of the environment pool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_leaf_nontensor
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase
from torchrl.data.replay_buffers.storages import Storage, TensorStorage

from torchrl_dvla.memory import EnvironmentPool

__all__ = ["PooledStorage"]

#: Owner of the pages that the storage leases for rows given to it by value.
_OWNER = "replay buffer"
#: Keys that samples carry besides the row and that may come back with them.
_FOREIGN_KEYS = ("index", "index_generation")


@dataclass
class _Segment:
    """Pages and rows of each rollout of a group."""

    pages: list[list[int]]
    sizes: list[int]


class _PooledCheckpointer(StorageCheckpointerBase):
    """Rows as one memory-mapped tensordict, everything else as JSON."""

    def dumps(self, storage: PooledStorage, path: Path | str) -> None:
        folder = Path(path)
        folder.mkdir(exist_ok=True, parents=True)
        state = storage.state_dict()
        rows = TensorDict(
            {str(number): tensor for number, tensor in enumerate(state.pop("fields"))},
            batch_size=[len(storage)],
        )
        if len(storage):
            rows.memmap(folder / "rows")
        (folder / "storage.json").write_text(json.dumps(state))

    def loads(self, storage: PooledStorage, path: Path | str) -> None:
        folder = Path(path)
        state = json.loads((folder / "storage.json").read_text())
        state["fields"] = []
        if state["num_rows"]:
            rows = TensorDict.load_memmap(folder / "rows")
            state["fields"] = [rows[str(number)] for number in range(len(storage.pool.layout))]
        storage.load_state_dict(state)


class PooledStorage(TensorStorage):
    """Rows of an :class:`~torchrl_dvla.memory.EnvironmentPool` as the items of a replay buffer.

    Item ``i`` is a *position* in an index of row numbers, so that scattered, partly filled pages
    look like one dense storage. It is filled in one of two ways, until it is emptied:

    - :meth:`adopt` takes sealed pages over as a *segment*, without touching a tensor. Segments are
      evicted whole (:meth:`evict`), and the positions behind them move up.
    - :meth:`set` copies rows in, like TorchRL's own storages: a ring of ``max_size`` positions over
      pages leased once.

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

    _default_checkpointer = _PooledCheckpointer

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
        rows = [self.pool.row_index(owned, size) for owned, size in zip(pages, sizes)]
        self.pool.store([page for owned in pages for page in owned])
        start, end = self._length, self._length + sum(sizes)
        torch.cat(rows, out=self._index[start:end])
        self._segments[key] = _Segment([list(owned) for owned in pages], list(sizes))
        self._length = end
        self._bump_mutation_revision()
        return torch.arange(start, end)

    def evict(self, key: int) -> None:
        """Free the pages of a segment; later positions move up.

        Raises:
            KeyError: if there is no such segment.
        """
        start, end = self._bounds(key)
        left = self._length - (end - start)
        self._index[start:left] = self._index[end : self._length].clone()
        self._length = left
        self.pool.free([page for owned in self._segments.pop(key).pages for page in owned])
        self._bump_mutation_revision()

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
        self._check_fields(data)
        positions = self._positions(cursor, self.max_size)
        if positions.numel() == 0:
            return
        if set_cursor:
            self._set_last_cursor(cursor)
        self._grow(int(positions.max()) + 1)
        rows = self._index[positions]
        is_single = isinstance(cursor, (int, np.integer)) or data.batch_dims == 0
        for key, (_, dtype) in self.pool.layout.items():
            value = data.get(key).to(dtype)
            self.pool.rows.get(key).index_copy_(0, rows, value.unsqueeze(0) if is_single else value)
        self._bump_mutation_revision()

    def get(self, index: Any) -> TensorDictBase:
        """The rows at ``index``: a copy; a contiguous slice in physical order is a view."""
        positions = self._index[: self._length]
        if isinstance(index, slice):
            rows = positions[index]
            first = int(rows[0]) if len(rows) else 0
            if len(rows) and torch.equal(rows, torch.arange(first, first + len(rows))):
                return self.pool.rows[first : first + len(rows)]
            return self._gathered(rows)
        if isinstance(index, (int, np.integer)):
            if not -self._length <= index < self._length:
                raise IndexError(f"index {index} is out of range for {self._length} rows")
            return self.pool.rows[int(positions[int(index)])].clone()
        return self._gathered(positions[self._positions(index, self._length)])

    def gather_into(self, rows: torch.Tensor, staging: TensorDictBase) -> None:
        """Copy rows into the first rows of a staging batch; nothing is allocated.

        Args:
            rows (torch.Tensor): int64 ``[n]``, row numbers of the pool (not positions).
            staging (TensorDictBase): batch size ``[m]`` with ``m >= n``, fields of the layout.
        """
        for key in self.pool.layout:
            torch.index_select(
                self.pool.rows.get(key), 0, rows, out=staging.get(key)[: rows.numel()]
            )

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
        start, end = self._bounds(key)
        return self._index[start:end].clone()

    def __len__(self) -> int:
        return self._length

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The filled rows by value, in the order of their positions, as plain data."""
        rows = self._gathered(self._index[: self._length])
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
        self._check_checkpoint(state_dict)
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
        rows = torch.cat([self.pool.row_index(owned, size) for owned, size in zip(pages, sizes)])
        for field, value in zip(self.pool.layout, values):
            self.pool.rows.get(field).index_copy_(0, rows, value)
        self.adopt(key, pages, sizes)

    # -- TorchRL's protocol ---------------------------------------------------------------------

    @property
    def _storage(self) -> TensorDictBase | None:
        # Samplers that look at single fields (staleness-aware, slice) read this and index it with
        # positions, which is only right where positions and rows run in step.
        rows = self._index[: self._length]
        if not self._length:
            return None
        first = int(rows[0])
        if not torch.equal(rows, torch.arange(first, first + self._length)):
            return None
        return self.pool.rows[first : first + self._length]

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

    def _bounds(self, key: int) -> tuple[int, int]:
        start = 0
        for other, segment in self._segments.items():
            if other == key:
                return start, start + sum(segment.sizes)
            start += sum(segment.sizes)
        raise KeyError(f"Group {key} is not stored. Stored groups: {list(self._segments)}.")

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

    def _gathered(self, rows: torch.Tensor) -> TensorDict:
        gathered = TensorDict({}, batch_size=[rows.numel()])
        for key in self.pool.layout:
            gathered.set(key, self.pool.rows.get(key).index_select(0, rows))
        return gathered

    def _grow(self, length: int) -> None:
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
        self._length = max(self._length, length)

    def _check_fields(self, data: TensorDictBase) -> None:
        layout = self.pool.layout
        keys = set(data.keys(True, True, is_leaf=is_leaf_nontensor))
        missing = [key for key in layout if key not in keys]
        extra = [key for key in keys if key not in layout and key not in _FOREIGN_KEYS]
        if missing or extra:
            raise KeyError(
                f"data must hold the fields of the row layout, got missing {missing} and unknown "
                f"{sorted(extra, key=str)}. Select the fields, or build the pool with them; "
                "strings need an InstructionTable."
            )
        for key, (shape, dtype) in layout.items():
            value = data.get(key)
            if value.shape[data.batch_dims :] != shape or not torch.can_cast(value.dtype, dtype):
                raise ValueError(
                    f"Field {key!r} must be {list(shape)} {dtype}, got "
                    f"{list(value.shape[data.batch_dims :])} {value.dtype}. Cast or reshape it."
                )

    def _check_checkpoint(self, state_dict: Mapping[str, Any]) -> None:
        if state_dict["signature"] != self.pool.layout.signature:
            raise ValueError(
                f"The checkpoint must come from the same specs, got rows "
                f"of\n{state_dict['layout']}\nfor a pool of\n{self.pool.layout!r}\nBuild the pool "
                "as that run did, or start the buffer empty."
            )
        if state_dict["num_rows"] > self.max_size:
            raise ValueError(
                f"The checkpoint's {state_dict['num_rows']} rows must fit in max_size, got "
                f"{self.max_size}. Raise env_bytes."
            )
