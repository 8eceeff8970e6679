# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Random lives of pages, from reserve to evict, with workers that die: who owns, and what is read.

The model knows which rollout owns which pages and, for each of its rows, the number that was
written there. Every row that anybody may read is read after every step: in the pool, through a
second map of the same memory as another process has it, and through the storage.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torchrl_dvla.data import PooledStorage
from torchrl_dvla.memory import EnvironmentPool, Page, RowLayout, RowWriter

LAYOUT = RowLayout(
    {
        ("observation", "image"): ((2, 3), torch.uint8),
        "serial": ((1,), torch.int64),
        "check": ((1,), torch.float32),
    }
)
NUM_PAGES, ROWS = 9, 3
WORKERS = "abc"


class Killed(Exception):
    """The writer dies here."""


class DeadlyValue:
    """Kills whoever copies it: rows before it in the order of fields are written, it is not."""

    def __array__(self, *args, **kwargs):
        raise Killed


@dataclass(eq=False)
class Rollout:
    number: int
    worker: str
    pages: list[Page] = field(default_factory=list)
    serials: list[int] = field(default_factory=list)

    def rows(self):
        return [int(self.pages[i // ROWS]) * ROWS + i % ROWS for i in range(len(self.serials))]


def values(serial):
    return [torch.full((2, 3), serial % 256, dtype=torch.uint8).numpy(), serial, serial / 2]


class PageLives(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = EnvironmentPool(LAYOUT, NUM_PAGES, ROWS)
        self.storage = PooledStorage(self.pool)
        self.view = pickle.loads(pickle.dumps(self.pool.worker_view()))
        self.writers = {name: RowWriter(self.view, list(LAYOUT)) for name in WORKERS}
        self.promised = 0
        self.serial = 0
        self.count = 0
        self.open: list[Rollout] = []
        self.sealed: list[Rollout] = []
        self.stored: dict[int, list[Rollout]] = {}
        #: Leases that have ended.
        self.over: list[Page] = []

    def teardown(self):
        for rollout in self.open:
            self.pool.reclaim(rollout.number)
        self.pool.free([page for rollout in self.sealed for page in rollout.pages])
        self.storage._empty()
        self.pool.unreserve(self.promised)
        assert self.pool.num_free_pages == NUM_PAGES, "no page is lost"
        self.pool.check()
        self.pool.close()

    # -- reservations ---------------------------------------------------------------------------

    @rule(num_pages=st.integers(1, 4))
    def reserve(self, num_pages):
        granted = self.pool.reserve(num_pages)
        owned = sum(len(r.pages) for r in self.everyone())
        assert granted == (owned + self.promised + num_pages <= NUM_PAGES)
        self.promised += num_pages * granted

    @precondition(lambda self: self.promised)
    @rule()
    def unreserve(self):
        self.pool.unreserve(1)
        self.promised -= 1

    # -- workers --------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(WORKERS))
    def begin(self, worker):
        self.open.append(Rollout(self.count, worker))
        self.count += 1

    def next_row(self, rollout):
        """Row and generation for the next decision, if there is a page for it."""
        page, offset = divmod(len(rollout.serials), ROWS)
        if page == len(rollout.pages):
            if not self.promised and not self.pool.num_free_pages:
                with pytest.raises(RuntimeError, match="No free page is left"):
                    self.pool.lease(rollout.number)
                return None
            self.promised -= self.promised > 0
            rollout.pages.append(self.pool.lease(rollout.number, rollout.number))
        lease = rollout.pages[page]
        return int(lease) * ROWS + offset, lease.generation

    @precondition(lambda self: self.open)
    @rule(data=st.data(), times=st.integers(1, 5))
    def write(self, data, times):
        rollout = data.draw(st.sampled_from(self.open))
        for _ in range(times):
            place = self.next_row(rollout)
            if place is None:
                return
            self.serial += 1
            self.writers[rollout.worker].write(*place, values(self.serial))
            rollout.serials.append(self.serial)

    @precondition(lambda self: any(r.serials for r in self.open))
    @rule(data=st.data(), leased_ahead=st.booleans())
    def seal(self, data, leased_ahead):
        rollout = data.draw(st.sampled_from([r for r in self.open if r.serials]))
        if leased_ahead:  # its next row was prepared when the episode ended
            self.next_row(rollout)
        used = self.pool.seal(rollout.pages, len(rollout.serials))
        assert used == rollout.pages[: -(-len(rollout.serials) // ROWS)]
        self.over += rollout.pages
        rollout.pages = used
        self.open.remove(rollout)
        self.sealed.append(rollout)

    @rule(worker=st.sampled_from(WORKERS), mid_write=st.booleans(), keep=st.booleans())
    def kill(self, worker, mid_write, keep):
        lost = [rollout for rollout in self.open if rollout.worker == worker]
        for rollout in lost:
            place = self.next_row(rollout) if mid_write else None
            if place is not None:
                torn = values(255)[:1] + [DeadlyValue(), 0.0]
                with pytest.raises(Killed):
                    self.writers[worker].write(*place, torn)
            freed = self.pool.reclaim(rollout.number, keep_reserved=keep)
            assert freed == sorted(int(page) for page in rollout.pages)
            self.promised += len(freed) * keep
            self.over += rollout.pages
            self.open.remove(rollout)
        self.writers[worker] = RowWriter(pickle.loads(pickle.dumps(self.view)), list(LAYOUT))

    # -- groups ---------------------------------------------------------------------------------

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def adopt(self, data):
        group = data.draw(
            st.lists(st.sampled_from(self.sealed), min_size=1, max_size=3, unique_by=id)
        )
        key, self.count = self.count, self.count + 1
        self.storage.adopt(key, [r.pages for r in group], [len(r.serials) for r in group])
        self.stored[key] = group
        for rollout in group:
            self.sealed.remove(rollout)

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def evict(self, data):
        key = data.draw(st.sampled_from(sorted(self.stored)))
        self.storage.evict(key)
        self.over += [page for rollout in self.stored.pop(key) for page in rollout.pages]

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def drop(self, data):
        rollout = data.draw(st.sampled_from(self.sealed))
        self.pool.free(rollout.pages)
        self.over += rollout.pages
        self.sealed.remove(rollout)

    @precondition(lambda self: self.stored and not self.promised)
    @rule()
    def checkpoint(self):
        """Groups come back on other pages with the same rows."""
        self.storage.load_state_dict(self.storage.state_dict())
        for key, group in self.stored.items():
            self.over += [page for rollout in group for page in rollout.pages]
            for rollout, pages in zip(group, self.storage.segment_pages(key), strict=True):
                rollout.pages = pages

    # -- mistakes -------------------------------------------------------------------------------

    @precondition(lambda self: self.over)
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), offset=st.integers(0, ROWS - 1))
    def write_late(self, data, worker, offset):
        """Everything that is over stays over, whoever owns the page by now."""
        page = data.draw(st.sampled_from(self.over))
        with pytest.raises(RuntimeError, match="must lie in a leased page"):
            self.writers[worker].write(int(page) * ROWS + offset, page.generation, values(254))

    @precondition(lambda self: any(r.pages for r in self.everyone()))
    @rule(data=st.data(), move=st.sampled_from(["seal", "store", "free", "foreign", "double"]))
    def misuse(self, data, move):
        """A transition out of turn is an error, and the invariant finds nothing changed."""
        rollout = data.draw(st.sampled_from([r for r in self.everyone() if r.pages]))
        pages, pool = rollout.pages, self.pool
        if move == "double":
            with pytest.raises(RuntimeError, match="pages must differ"):
                pool.free([*pages, pages[0]])
        elif move == "foreign":
            stranger = [Page(int(page), pool.pool_id + 1, page.generation) for page in pages]
            with pytest.raises(RuntimeError, match="another pool"):
                pool.free(stranger)
        elif move == "free" and self.over:
            with pytest.raises(RuntimeError, match="since its|is sealed and|is stored and|differ"):
                stale = [page for page in self.over if not self.is_alive(page)]
                pool.free([*pages, *(stale or [pages[0]])])
        elif move == "seal" and rollout not in self.open:
            with pytest.raises(RuntimeError, match="cannot be sealed"):
                pool.seal(pages, 1)
        elif move == "store" and rollout not in self.sealed:
            with pytest.raises(RuntimeError, match="cannot be stored"):
                self.storage.adopt(-1, [pages], [1])

    def is_alive(self, page):
        return any(page == p and page.generation == p.generation for p in self.owned())

    def owned(self):
        return [page for rollout in self.everyone() for page in rollout.pages]

    def everyone(self):
        return [*self.open, *self.sealed, *(r for group in self.stored.values() for r in group)]

    # -- what must always hold ------------------------------------------------------------------

    @invariant()
    def every_page_has_one_owner(self):
        self.pool.check()
        owned = [int(page) for page in self.owned()]
        assert len(set(owned)) == len(owned)
        stats = self.pool.stats()
        assert stats["pages_reserved"] == self.promised
        assert stats["pages_free"] == NUM_PAGES - len(owned)
        stored = [page for group in self.stored.values() for r in group for page in r.pages]
        assert stats["pages_stored"] == len(stored)
        assert stats["pages_sealed"] == sum(len(r.pages) for r in self.sealed)

    @invariant()
    def every_row_holds_what_was_written(self):
        for rows in (self.pool.rows, self.view.rows):
            for rollout in self.everyone():
                self.check_rows(rows[torch.tensor(rollout.rows(), dtype=torch.int64)], rollout)

    @invariant()
    def positions_are_the_groups_in_order(self):
        rollouts = [rollout for group in self.stored.values() for rollout in group]
        serials = [serial for rollout in rollouts for serial in rollout.serials]
        assert len(self.storage) == len(serials)
        assert self.storage.segments() == {
            key: sum(len(r.serials) for r in group) for key, group in self.stored.items()
        }
        if serials:
            assert self.storage[:]["serial"].flatten().tolist() == serials
            backwards = torch.arange(len(serials) - 1, -1, -1)
            assert self.storage[backwards]["serial"].flatten().tolist() == serials[::-1]

    @staticmethod
    def check_rows(rows, rollout):
        assert rows["serial"].flatten().tolist() == rollout.serials
        assert rows["check"].flatten().tolist() == [serial / 2 for serial in rollout.serials]
        image = rows["observation", "image"].flatten(1)
        for pixels, serial in zip(image.tolist(), rollout.serials, strict=True):
            assert pixels == [serial % 256] * 6, "torn, or a row of someone else"


TestPageLives = PageLives.TestCase
TestPageLives.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
