# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Ledger of pages: their owners and states."""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["Page", "PageLedger", "PageState"]


class PageState(enum.IntEnum):
    """States of a page: free -> leased -> sealed -> stored -> free."""

    FREE = 0
    LEASED = 1
    SEALED = 2
    STORED = 3


class Page(int):
    """Lease of one page: the page's number, with its pool and its generation.

    It can be used wherever a number can. By its attributes the ledger refuses a lease of another
    pool, and an old lease of a page that was freed since.
    """

    pool_id: int
    generation: int

    def __new__(cls, number: int, pool_id: int, generation: int) -> Page:
        page = super().__new__(cls, number)
        page.pool_id = pool_id
        page.generation = generation
        return page

    def __reduce__(self) -> tuple[Any, ...]:
        return Page, (int(self), self.pool_id, self.generation)

    def __repr__(self) -> str:
        return f"Page({int(self)}, generation={self.generation})"


class PageLedger:
    """Ownership of pages under one lock; every transition takes a few operations a page.

    Invariant: every page has exactly one owner. It is free, or leased by one owner, or sealed (the
    rollout is over, its group is not), or stored in a buffer. A transition checks all of its pages
    before it changes any, so an error changes nothing; :meth:`check` verifies the whole ledger.

    Only the process that built the ledger moves pages. Workers write the rows that commands name.

    Worked trace, two pages of four rows::

        reserve(2)                    free 2, of which 2 reserved
        a = lease("worker 0")         free 1 reserved 1   leased {a}
        b = lease("worker 0")         free 0 reserved 0   leased {a, b}
        seal([a, b], num_rows=5)      sealed {a, b}: b holds one row, three are internal waste
        store([a, b])                 stored {a, b}
        free([a, b])                  free 2
        free([a, b])                  RuntimeError: page 0 is free ...

    Args:
        num_pages (int): pages.
        rows_per_page (int): rows of a page.
        row_bytes (int): bytes of a row, for the statistics.
    """

    def __init__(self, num_pages: int, rows_per_page: int, row_bytes: int = 0) -> None:
        for name, value in (("num_pages", num_pages), ("rows_per_page", rows_per_page)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}. Raise the byte budget.")
        self.num_pages = num_pages
        self.rows_per_page = rows_per_page
        self.num_rows = num_pages * rows_per_page
        self.page_bytes = rows_per_page * row_bytes
        self.pool_id = int.from_bytes(os.urandom(7), "little")
        self._states = np.zeros(num_pages, np.uint8)
        self._generations = np.zeros(num_pages, np.int64)
        # A stack that begins with page 0 on top: the page freed last is the one still in the cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: list[Hashable] = [None] * num_pages
        self._rollouts: list[Hashable] = [None] * num_pages
        self._fill = [0] * num_pages
        self._leases: dict[Hashable, set[int]] = {}
        self._num_reserved = 0
        self._num_by_state = [num_pages, 0, 0, 0]
        self._changed = threading.Condition(threading.RLock())
        self._peak_pages = 0
        self._num_leases = 0
        self._num_reclaimed = 0
        self._num_rows_kept = 0
        self._starved_since_s: float | None = None
        self._wait_s = 0.0
        self._sealed_rows_total = 0
        self._sealed_pages_total = 0

    # -- reservations ---------------------------------------------------------------------------

    @property
    def num_free_pages(self) -> int:
        """Pages that are neither owned nor reserved."""
        with self._changed:
            return len(self._free) - self._num_reserved

    def reserve(self, num_pages: int, timeout_s: float = 0.0) -> bool:
        """Reserve ``num_pages`` free pages for leases to come.

        A whole group reserves what its rollouts may need at most before its first rollout begins.
        So a rollout that has begun always gets its next page, and two half-finished groups can
        never wait for each other. The time from a refusal until pages are reserved again counts as
        ``page_wait_s``.

        Args:
            num_pages (int): pages to reserve.
            timeout_s (float): how long to wait for them.

        Returns:
            bool: whether they were reserved; if not, nothing has changed.

        Raises:
            ValueError: if the pool can never have so many.
        """
        if not 0 <= num_pages <= self.num_pages:
            raise ValueError(
                f"num_pages must be between 0 and the pool's {self.num_pages}, got {num_pages}. "
                "Raise env_bytes, or lower group_size or the decisions of a rollout."
            )
        with self._changed:
            if self._starved_since_s is None and self.num_free_pages < num_pages:
                self._starved_since_s = time.monotonic()
            if not self._changed.wait_for(lambda: self.num_free_pages >= num_pages, timeout_s):
                return False
            if self._starved_since_s is not None:
                self._wait_s += time.monotonic() - self._starved_since_s
                self._starved_since_s = None
            self._num_reserved += num_pages
            return True

    def unreserve(self, num_pages: int) -> None:
        """Release reserved pages, for instance those that a short rollout did not need."""
        with self._changed:
            if not 0 <= num_pages <= self._num_reserved:
                raise ValueError(
                    f"num_pages must be between 0 and the {self._num_reserved} reserved pages, got "
                    f"{num_pages}. Give back only what reserve() granted and lease() did not take."
                )
            self._num_reserved -= num_pages
            self._changed.notify_all()

    # -- transitions ----------------------------------------------------------------------------

    def lease(
        self, owner: Hashable, rollout_id: Hashable = None, *, reserved: bool | None = None
    ) -> Page:
        """Free -> leased: give a page to ``owner``.

        Args:
            owner (Hashable): who may write it until it is sealed; :meth:`reclaim` takes it.
            rollout_id (Hashable, optional): the rollout it is for.

        Keyword Args:
            reserved (bool, optional): whether the page is one that :meth:`reserve` has reserved. By
                default it is if any reserved page is left.

        Raises:
            RuntimeError: if no page is left.
        """
        with self._changed:
            if reserved is None:
                reserved = self._num_reserved > 0
            left = self._num_reserved if reserved else len(self._free) - self._num_reserved
            if left < 1:
                raise RuntimeError(
                    f"No {'reserved' if reserved else 'free'} page is left: {self.page_counts()}. "
                    "Reserve pages before a rollout begins, wait for the learner, or raise "
                    "env_bytes."
                )
            self._num_reserved -= reserved
            page = self._free.pop()
            self._owners[page], self._rollouts[page], self._fill[page] = owner, rollout_id, 0
            self._leases.setdefault(owner, set()).add(page)
            self._move(page, PageState.LEASED)
            self._num_leases += 1
            self._peak_pages = max(self._peak_pages, self.num_pages - len(self._free))
            return Page(page, self.pool_id, int(self._generations[page]))

    def seal(self, pages: Sequence[int], num_rows: int) -> list[Page]:
        """Leased -> sealed: the rollout on ``pages`` is over and holds ``num_rows`` rows.

        Args:
            pages (sequence of Page): its pages in the order they were filled.
            num_rows (int): rows that were written, from the first page on.

        Returns:
            list of Page: the pages that hold rows. Surplus pages, leased ahead, become free.

        Raises:
            ValueError: if *num_rows* does not fit the pages.
            RuntimeError: if a page is not leased, or the pages belong to several rollouts.
        """
        with self._changed:
            numbers = self._checked(pages, (PageState.LEASED,), "sealed")
            if not 1 <= num_rows <= len(numbers) * self.rows_per_page:
                raise ValueError(
                    f"num_rows must be between 1 and the {len(numbers) * self.rows_per_page} rows "
                    f"of the given pages, got {num_rows}. Pass all pages of the rollout, in order."
                )
            if len({(self._owners[page], self._rollouts[page]) for page in numbers}) > 1:
                raise RuntimeError(
                    f"Pages {numbers} belong to several rollouts. Seal one rollout at a time."
                )
            num_used = -(-num_rows // self.rows_per_page)
            for index, page in enumerate(numbers[:num_used]):
                self._forget_lease(page)
                fill = min(self.rows_per_page, num_rows - index * self.rows_per_page)
                self._fill[page] = fill
                self._num_rows_kept += fill
                self._move(page, PageState.SEALED)
            for page in numbers[num_used:]:
                self._release(page)
            self._sealed_rows_total += num_rows
            self._sealed_pages_total += num_used
            self._changed.notify_all()
            return [Page(p, self.pool_id, int(self._generations[p])) for p in numbers[:num_used]]

    def store(self, pages: Sequence[int]) -> None:
        """Sealed -> stored: a buffer takes ``pages`` over.

        Raises:
            RuntimeError: if a page is not sealed.
        """
        with self._changed:
            for page in self._checked(pages, (PageState.SEALED,), "stored"):
                self._move(page, PageState.STORED)

    def free(self, pages: Sequence[int]) -> None:
        """leased, sealed or stored -> free.

        Raises:
            RuntimeError: if a page is free already; none is freed then.
        """
        owned = (PageState.LEASED, PageState.SEALED, PageState.STORED)
        with self._changed:
            for page in self._checked(pages, owned, "freed"):
                self._release(page)
            self._changed.notify_all()

    def reclaim(self, owner: Hashable, *, keep_reserved: bool = False) -> list[int]:
        """Leased -> free: take back every page that ``owner``, who is gone, was still writing.

        Its sealed and stored pages stay: those rollouts are complete.

        Args:
            owner (Hashable): as given to :meth:`lease`; unknown owners have nothing to take.

        Keyword Args:
            keep_reserved (bool): reserve the pages again at once, for the rollout's second try.

        Returns:
            list of int: the pages that became free.
        """
        with self._changed:
            pages = sorted(self._leases.get(owner, ()))
            for page in pages:
                self._release(page)
            self._num_reclaimed += len(pages)
            if keep_reserved:
                self._num_reserved += len(pages)
            self._changed.notify_all()
            return pages

    # -- reading --------------------------------------------------------------------------------

    def state(self, page: int) -> PageState:
        """The state of a page now, whatever the age of the lease."""
        return PageState(self._states.item(page))

    def stats(self) -> dict[str, float]:
        """Counters and gauges of the pool.

        Returns:
            dict: ``pages_free``, ``pages_leased``, ``pages_sealed``, ``pages_stored``,
            ``pages_reserved`` (of the free ones), ``reserved_bytes`` (allocated once),
            ``used_bytes`` and ``peak_bytes`` (in owned pages), ``internal_waste`` (share of sealed
            and stored pages that holds no row, now), ``internal_waste_total`` (over every page ever
            sealed), ``leases``, ``pages_reclaimed``, ``page_wait_s`` (time without enough pages).
        """
        with self._changed:
            _, leased, sealed, stored = self._num_by_state
            used = self.num_pages - len(self._free)
            waiting = self._starved_since_s
            wait_s = self._wait_s + (0.0 if waiting is None else time.monotonic() - waiting)
            return {
                "pages": self.num_pages,
                "pages_free": len(self._free),
                "pages_leased": leased,
                "pages_sealed": sealed,
                "pages_stored": stored,
                "pages_reserved": self._num_reserved,
                "reserved_bytes": self.num_pages * self.page_bytes,
                "used_bytes": used * self.page_bytes,
                "peak_bytes": self._peak_pages * self.page_bytes,
                "internal_waste": self._waste(self._num_rows_kept, sealed + stored),
                "internal_waste_total": self._waste(
                    self._sealed_rows_total, self._sealed_pages_total
                ),
                "leases": self._num_leases,
                "pages_reclaimed": self._num_reclaimed,
                "page_wait_s": wait_s,
            }

    def check(self) -> None:
        """Verify that every page has exactly one owner.

        Raises:
            AssertionError: naming what does not add up.
        """
        with self._changed:
            free = set(self._free)
            assert len(free) == len(self._free), "a page is free twice"
            leased = [page for pages in self._leases.values() for page in pages]
            assert len(set(leased)) == len(leased), "a page is leased twice"
            counts = [0] * len(PageState)
            rows = 0
            for page in range(self.num_pages):
                state = self.state(page)
                counts[state] += 1
                assert (state is PageState.FREE) == (page in free), f"page {page} is {state.name}"
                is_leased = page in self._leases.get(self._owners[page], ())
                assert (state is PageState.LEASED) == is_leased, f"page {page} is {state.name}"
                rows += self._fill[page]
            assert counts == self._num_by_state, f"{counts} != {self._num_by_state}"
            assert 0 <= self._num_reserved <= len(free), "more pages are reserved than free"
            assert rows == self._num_rows_kept, f"{rows} rows kept, {self._num_rows_kept} counted"

    # -- helpers --------------------------------------------------------------------------------

    def _checked(
        self, pages: Sequence[int], states: Iterable[PageState], participle: str
    ) -> list[int]:
        """Plain page numbers, after every page was found fit; the lock is held."""
        numbers = []
        for page in pages:
            number, lease = int(page), page if isinstance(page, Page) else None
            if lease is not None and lease.pool_id != self.pool_id:
                raise RuntimeError(
                    f"{page!r} belongs to another pool. Return pages to the pool that leased them."
                )
            if not 0 <= number < self.num_pages:
                raise ValueError(
                    f"pages must be between 0 and {self.num_pages - 1}, got {number}. Pass what "
                    "lease() returned."
                )
            state = self.state(number)
            generation = self._generations.item(number)
            is_stale = lease is not None and lease.generation != generation
            if is_stale or state not in states:
                now = "was freed since its lease" if is_stale else f"is {state.name.lower()}"
                raise RuntimeError(
                    f"Page {number} {now} and cannot be {participle}. A page is leased, sealed, "
                    "stored and freed once, in this order."
                )
            numbers.append(number)
        if len(set(numbers)) != len(numbers):
            raise RuntimeError(f"pages must differ, got {numbers}. Name each page once.")
        return numbers

    def _move(self, page: int, state: PageState) -> None:
        self._num_by_state[self._states.item(page)] -= 1
        self._num_by_state[state] += 1
        self._states[page] = state

    def _forget_lease(self, page: int) -> None:
        pages = self._leases[self._owners[page]]
        pages.remove(page)
        if not pages:
            del self._leases[self._owners[page]]

    def _release(self, page: int) -> None:
        if self._states[page] == PageState.LEASED:
            self._forget_lease(page)
        self._num_rows_kept -= self._fill[page]
        self._owners[page], self._rollouts[page], self._fill[page] = None, None, 0
        self._generations[page] += 1
        self._move(page, PageState.FREE)
        self._free.append(page)

    def _waste(self, num_rows: int, num_pages: int) -> float:
        return 1.0 - num_rows / (num_pages * self.rows_per_page) if num_pages else 0.0

    def page_counts(self) -> str:
        """The number of pages in each state, in words."""
        free, leased, sealed, stored = self._num_by_state
        return (
            f"{free} free ({self._num_reserved} reserved), {leased} leased, {sealed} sealed, "
            f"{stored} stored of {self.num_pages}"
        )
