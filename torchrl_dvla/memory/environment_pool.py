# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Environment pool: rows in shared memory, cut into pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from torchrl_dvla.memory.arena import SharedArena
from torchrl_dvla.memory.available_memory import format_bytes
from torchrl_dvla.memory.pages import PageLedger, PageState
from torchrl_dvla.memory.row_layout import RowLayout

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

    All memory is allocated by the constructor (invariant 6), page-locked for copies to the device
    where CUDA is present, and nothing is allocated afterwards. Ownership and its transitions are
    those of :class:`PageLedger`.

    Args:
        layout (RowLayout): what a row holds.
        num_pages (int): pages.
        rows_per_page (int): rows of a page. Small pages waste less; the ledger's work is per page.

    Raises:
        ValueError: if *num_pages* or *rows_per_page* is not positive.
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

    def __init__(self, layout: RowLayout, num_pages: int, rows_per_page: int = 4) -> None:
        super().__init__(num_pages, rows_per_page, layout.row_bytes)
        self.layout = layout
        self._arena = SharedArena(self.nbytes_for(layout, num_pages, rows_per_page))
        self._arena.pin()
        # Shared memory begins zeroed, as the ledger's own arrays do: every page is free.
        self._states, self._generations = _header(self._arena, num_pages)
        self._is_open = True
        self._rows: TensorDict = layout.rows(self._arena, self.num_rows, _header_bytes(num_pages))

    @property
    def rows(self) -> TensorDict:
        """Zero-copy views of every row ``[num_rows]``; writes are visible to all processes.

        Raises:
            RuntimeError: after :meth:`close`. Views taken before read zeros then.
        """
        self.require_open()
        return self._rows

    def require_open(self) -> None:
        """Refuse to go on once the memory is given back.

        Raises:
            RuntimeError: naming who closes a pool.
        """
        if not self._is_open:
            raise RuntimeError(
                "The environment pool was closed by its owner, such as a collector's shutdown(): "
                "its rows are gone. Make a new one."
            )

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

    def worker_view(self) -> WorkerView:
        """The same rows for another process: picklable, without the ledger."""
        return WorkerView(self._arena, self.layout, self.num_pages, self.rows_per_page)

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
        if self._is_open:
            self._is_open = False
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
            f"{type(self).__name__}({self.page_counts()}, rows_per_page={self.rows_per_page}, "
            f"{format_bytes(self.nbytes)})"
        )


class WorkerView:
    """Rows of an :class:`EnvironmentPool` in another process; obtained by ``worker_view()``.

    It can be pickled and mapped any number of times. It holds no ledger: the collector says which
    rows to write, and nothing else may be written.
    """

    def __init__(
        self, arena: SharedArena, layout: RowLayout, num_pages: int, rows_per_page: int
    ) -> None:
        self._arena = arena
        self.layout = layout
        self.num_pages = num_pages
        self.rows_per_page = rows_per_page
        self.num_rows = num_pages * rows_per_page
        states, generations = _header(arena, num_pages)
        # Reading an item of a memoryview takes half the time of one of an array.
        self._states, self._generations = states.data, generations.data
        #: Zero-copy views of every row ``[num_rows]``.
        self.rows: TensorDict = layout.rows(arena, self.num_rows, _header_bytes(num_pages))

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

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerView, (self._arena, self.layout, self.num_pages, self.rows_per_page)
