# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The environment pool: rows in shared memory, cut into pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from torchrl_dvla.memory.arena import SharedArena
from torchrl_dvla.memory.layout import RowLayout
from torchrl_dvla.memory.limits import format_bytes, parse_bytes
from torchrl_dvla.memory.numa import pool_node
from torchrl_dvla.memory.pages import Page, PageLedger, PageState

__all__ = ["EnvironmentPool", "WorkerView"]

#: Per page: its generation (int64) and its state (uint8), ahead of the first field.
_HEADER_BYTES_PER_PAGE = 9
#: A plain number: comparing with a member of an enum takes longer than the rest of the guard.
_LEASED = int(PageState.LEASED)


def _header_bytes(num_pages: int) -> int:
    return -(-num_pages * _HEADER_BYTES_PER_PAGE // 64) * 64


def _header(arena: SharedArena, num_pages: int) -> tuple[np.ndarray, np.ndarray]:
    generations = arena.tensor(0, (num_pages,), torch.int64).numpy()
    states = arena.tensor(num_pages * 8, (num_pages,), torch.uint8).numpy()
    return states, generations


class EnvironmentPool(PageLedger):
    """Rows of one layout in one shared-memory arena, owned page by page.

    Row ``page * rows_per_page + i`` is the i-th row of a page. A rollout takes as many pages as it
    needs, from anywhere: any free page serves any rollout, so there is no external fragmentation,
    and the internal waste is the unused end of a rollout's last page (half a page on average).

    All memory is taken by the constructor (invariant 6) and nothing is allocated afterwards.
    Ownership and its transitions are those of :class:`PageLedger`.

    Args:
        layout (RowLayout): what a row holds.
        num_pages (int): pages.
        rows_per_page (int): rows of a page. Small pages waste less; the book-keeping is per page.

    Keyword Args:
        pin_memory (bool, optional): page-lock the arena for CUDA copies. Defaults to whether CUDA
            is present.
        numa_node (int, optional): on a machine with several memory nodes, the one that the rows
            shall lie on. Defaults to that of the CPU the constructor runs on; see
            :mod:`torchrl_dvla.memory.numa`.

    Raises:
        ValueError: if *num_pages* or *rows_per_page* is not positive, or there is no such node.
        RuntimeError: if there is not enough shared memory.

    Examples:
        >>> layout = RowLayout({"state": ((2,), torch.float32), "advantage": ((1,), torch.float32)})
        >>> with EnvironmentPool(layout, num_pages=3, rows_per_page=2) as pool:
        ...     page = pool.lease(owner="worker 0", rollout_id=7)
        ...     pool.rows["state"][page * pool.rows_per_page] = torch.tensor([1.0, 2.0])
        ...     pages = pool.seal([page], num_rows=1)
        ...     pool.rows["state"][pool.row_index(pages, num_rows=1)]
        tensor([[1., 2.]])
    """

    def __init__(
        self,
        layout: RowLayout,
        num_pages: int,
        rows_per_page: int = 4,
        *,
        pin_memory: bool | None = None,
        numa_node: int | None = None,
    ) -> None:
        if num_pages < 1 or rows_per_page < 1:
            raise ValueError(
                f"num_pages and rows_per_page must be at least 1, got {num_pages} and "
                f"{rows_per_page}. A pool that cannot hold one row cannot be used."
            )
        self.layout = layout
        header = _header_bytes(num_pages)
        num_rows = num_pages * rows_per_page
        #: The memory node that the pages come from; ``None`` on a machine with one.
        self.numa_node = pool_node(numa_node)
        self._arena = SharedArena(header + layout.nbytes(num_rows), numa_node=self.numa_node)
        if pin_memory or (pin_memory is None and torch.cuda.is_available()):
            self._arena.pin()
        states, generations = _header(self._arena, num_pages)
        super().__init__(
            num_pages, rows_per_page, layout.row_bytes, states=states, generations=generations
        )
        #: Zero-copy views of every row ``[num_rows]``; writes are visible to all processes.
        self.rows: TensorDict = layout.rows(self._arena, num_rows, header)

    @classmethod
    def from_budget(
        cls,
        layout: RowLayout,
        env_bytes: int | str,
        rows_per_page: int = 4,
        *,
        pin_memory: bool | None = None,
        numa_node: int | None = None,
    ) -> EnvironmentPool:
        """The largest pool that fits a byte budget.

        Args:
            layout (RowLayout): what a row holds.
            env_bytes (int or str): the budget; strings such as ``"2GB"`` are understood.
            rows_per_page (int): rows of a page.

        Keyword Args:
            pin_memory (bool, optional), numa_node (int, optional): as for the constructor.

        Raises:
            ValueError: if not even one page fits; the message says how much one needs.
        """
        budget = parse_bytes(env_bytes)
        num_pages = cls.pages_within(layout, budget, rows_per_page)
        if not num_pages:
            need = cls.nbytes_for(layout, 1, rows_per_page)
            raise ValueError(
                f"env_bytes must be at least {need} ({format_bytes(need)}: one page of "
                f"{rows_per_page} rows), got {budget}. Raise it, or lower rows_per_page or the "
                "image size."
            )
        return cls(layout, num_pages, rows_per_page, pin_memory=pin_memory, numa_node=numa_node)

    @staticmethod
    def nbytes_for(layout: RowLayout, num_pages: int, rows_per_page: int) -> int:
        """Bytes of shared memory that such a pool takes, to the last one."""
        return _header_bytes(num_pages) + layout.nbytes(num_pages * rows_per_page)

    @classmethod
    def pages_within(cls, layout: RowLayout, nbytes: int, rows_per_page: int) -> int:
        """The most pages of a pool that takes at most ``nbytes``."""
        num_pages = nbytes // (rows_per_page * layout.row_bytes + _HEADER_BYTES_PER_PAGE)
        while num_pages and cls.nbytes_for(layout, num_pages, rows_per_page) > nbytes:
            num_pages -= 1
        return num_pages

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory that the pool has taken."""
        return self._arena.nbytes

    def stats(self) -> dict[str, float]:
        """As :meth:`PageLedger.stats`; ``reserved_bytes`` are those of the whole arena."""
        return {**super().stats(), "reserved_bytes": self.nbytes}

    @property
    def closed(self) -> bool:
        """Whether the memory was given back."""
        return self._arena.closed

    def worker_view(self) -> WorkerView:
        """The same rows for another process: picklable, without the ledger."""
        return WorkerView(
            self._arena, self.layout, self.num_pages, self.rows_per_page, self.pool_id
        )

    def row_index(self, pages: Sequence[int], num_rows: int | None = None) -> torch.Tensor:
        """Row numbers of a rollout, int64 ``[num_rows]``, in the order of its decisions.

        Args:
            pages (sequence of Page): its pages in order.
            num_rows (int, optional): its rows. Defaults to every row of the pages.
        """
        size = len(pages) * self.rows_per_page if num_rows is None else num_rows
        return self.row_index_of([pages], [size])

    def row_index_of(self, pages: Sequence[Sequence[int]], sizes: Sequence[int]) -> torch.Tensor:
        """Row numbers of several rollouts, int64 ``[sum(sizes)]``, one after the other.

        Args:
            pages (sequence): the pages of each rollout in order.
            sizes (sequence of int): the rows of each rollout.
        """
        rows: list[int] = []
        for owned, size in zip(pages, sizes, strict=True):
            for page in owned:
                first = page * self.rows_per_page
                rows += range(first, first + min(size, self.rows_per_page))
                size -= self.rows_per_page
        return torch.from_numpy(np.array(rows, np.int64))  # in half of the time of torch.tensor

    def close(self) -> None:
        """Give the memory back at once; safe to call twice. Views that live on read zeros."""
        if not self._arena.closed:
            # The ledger outlives its memory, so that a late free() in a shutting-down run is no
            # crash.
            self._states = self._states.copy()
            self._generations = self._generations.copy()
            self._arena.close()

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "An EnvironmentPool cannot be pickled: one process owns its ledger. Send "
            "pool.worker_view() instead."
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._census()}, rows_per_page={self.rows_per_page}, "
            f"{format_bytes(self.nbytes)})"
        )


class WorkerView:
    """The rows of an :class:`EnvironmentPool` in another process; obtained by ``worker_view()``.

    It can be pickled and mapped as often as wished. It holds no ledger: the coordinator says which
    rows to write, and nothing else may be written.
    """

    def __init__(
        self,
        arena: SharedArena,
        layout: RowLayout,
        num_pages: int,
        rows_per_page: int,
        pool_id: int,
    ) -> None:
        self._arena = arena
        self.layout = layout
        self.num_pages = num_pages
        self.rows_per_page = rows_per_page
        self.pool_id = pool_id
        self._map()

    def _map(self) -> None:
        states, generations = _header(self._arena, self.num_pages)
        # Reading an item of a memoryview takes half the time of one of an array.
        self._states, self._generations = states.data, generations.data
        self.num_rows = self.num_pages * self.rows_per_page
        #: Zero-copy views of every row ``[num_rows]``.
        self.rows: TensorDict = self.layout.rows(
            self._arena, self.num_rows, _header_bytes(self.num_pages)
        )

    def row(self, page: Page, offset: int) -> int:
        """The row to write for ``offset`` in a leased page, after making sure that it is leased.

        Raises:
            RuntimeError: if the page was sealed, freed or given to another rollout meanwhile, or
                belongs to another pool.
            ValueError: if *offset* is not a row of the page.
        """
        if page.pool_id != self.pool_id:
            raise RuntimeError(f"{page!r} belongs to another pool. Use the view of its own pool.")
        if not 0 <= offset < self.rows_per_page:
            raise ValueError(
                f"offset must be between 0 and {self.rows_per_page - 1}, got {offset}. Ask for the "
                "next page."
            )
        row = page * self.rows_per_page + offset
        self.require_leased(row, page.generation)
        return row

    def require_leased(self, row: int, generation: int) -> None:
        """Make sure that ``row`` may be written: two reads of shared memory.

        Args:
            row (int): the row.
            generation (int): that of the row's page, as in the lease.

        Raises:
            RuntimeError: if the page of the row is not leased, or was leased anew.
            IndexError: if the pool has no such row.
        """
        page = row // self.rows_per_page
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row must be between 0 and {self.num_rows - 1}, got {row}.")
        if self._states[page] != _LEASED or self._generations[page] != generation:
            state = PageState(self._states[page])
            now = "leased anew" if state is PageState.LEASED else state.name.lower()
            raise RuntimeError(
                f"Row {row} must lie in a leased page, got page {page}, which is {now}. Rows are "
                "written before their page is sealed; stop writing."
            )

    def close(self) -> None:
        """Drop this process's map; the rows live on for the others."""
        if self._arena.is_owner:
            return  # it is the pool's own arena, and the pool closes it
        self._arena.close()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("rows", "_states", "_generations"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()
