# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Random lifecycles of pages, from admission to publication, with workers that die: who owns them,
and what is read.

The model knows for each row of each rollout the number that was written there. Every row that
anybody may read is read after every step: in the pool, through a second map of the same memory as
another process has it, and through the replay buffer.
"""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torchrl_dvla.data import Group, GroupConfig, GroupQueue, InitStateSchedule, PooledReplayBuffer
from torchrl_dvla.memory import EnvironmentPool, Page, RowLayout, RowWriter

LAYOUT = RowLayout(
    {
        ("observation", "image"): ((2, 3), torch.uint8),
        "serial": ((1,), torch.int64),
        "check": ((1,), torch.float32),
        "advantage": ((1,), torch.float32),
    }
)
WRITTEN = [key for key in LAYOUT if key != "advantage"]
NUM_PAGES, ROWS, PAGES_PER_ROLLOUT = 16, 3, 2
WORKERS = "abc"


class Killed(Exception):
    """The writer dies here."""


class DeadlyValue:
    """Kills whoever copies it: rows before it in the order of fields are written, it is not."""

    def __array__(self, *args, **kwargs):
        raise Killed


def values(serial):
    return [torch.full((2, 3), serial % 256, dtype=torch.uint8).numpy(), serial, serial / 2]


class PagesOfGroups(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = EnvironmentPool(LAYOUT, NUM_PAGES, ROWS)
        self.groups = self.new_groups(self.pool)
        self.buffer = PooledReplayBuffer(batch_size=4)
        self.buffer.bind(self.groups)
        self.view = pickle.loads(pickle.dumps(self.pool.worker_view()))
        self.writers = {name: RowWriter(self.view, WRITTEN) for name in WORKERS}
        self.serial = 0
        #: What is written in the rows of each rollout, by its id.
        self.serials: dict[int, list[int]] = {}
        #: Leases that have ended.
        self.over: list[Page] = []
        #: Pages of evaluation episodes, by owner.
        self.evaluated: dict[object, list[Page]] = {}

    @staticmethod
    def new_groups(pool):
        config = GroupConfig(group_size=2, candidate_group_size=3, groups_per_update=1)
        groups = GroupQueue(config, pool, InitStateSchedule(), pages_per_rollout=PAGES_PER_ROLLOUT)
        groups.set_paused(False)
        return groups

    def teardown(self):
        for group in self.groups.running:
            self.groups.drop(group, "over")
        for pages in self.evaluated.values():
            self.pool.free(pages)
        self.pool.free([page for group in self.groups.stored for page in group.pages])
        assert self.pool.num_free_pages == NUM_PAGES, "no page is lost"
        self.pool.check()
        self.pool.close()

    # -- rollouts -------------------------------------------------------------------------------
    @property
    def open(self):
        return [r for group in self.groups.running for r in group.rollouts if not r.finished]

    @property
    def sealed(self):
        return [r for group in self.groups.running for r in group.rollouts if r.finished]

    @property
    def stored(self):
        return [rollout for group in self.groups.stored for rollout in group.rollouts]

    def worker(self, rollout):
        return WORKERS[rollout.rollout_id % len(WORKERS)]

    @rule()
    def admit(self):
        group = self.groups.admit()
        if not isinstance(group, Group):
            few = self.pool.num_free_pages < 4 * PAGES_PER_ROLLOUT
            assert group == ("no_admission" if len(self.groups) == 2 else "no_page") and (
                few or len(self.groups) == 2
            )
            return
        self.serials.update({rollout.rollout_id: [] for rollout in group.rollouts})

    def next_row(self, rollout):
        """Row and generation for the next decision, if there is room for one."""
        page, offset = divmod(rollout.num_rows, ROWS)
        if page == PAGES_PER_ROLLOUT:
            return None
        if page == len(rollout.pages):
            lease = self.pool.lease(rollout.rollout_id, rollout.rollout_id, reserved=True)
            rollout.pages.append(lease)
        lease = rollout.pages[page]
        return int(lease) * ROWS + offset, lease.generation

    @precondition(lambda self: self.open)
    @rule(data=st.data(), times=st.integers(1, 5))
    def write(self, data, times):
        self.write_rows(data.draw(st.sampled_from(self.open)), times)

    def write_rows(self, rollout, times):
        for _ in range(times):
            row = self.next_row(rollout)
            if row is None:
                return
            self.serial += 1
            self.writers[self.worker(rollout)].write(*row, values(self.serial))
            self.serials[rollout.rollout_id].append(self.serial)
            version = self.groups.version
            rollout.record(policy_version=version, reward=1.0, success=True, num_env_steps=1)

    @precondition(lambda self: any(r.num_rows for r in self.open))
    @rule(data=st.data(), leased_ahead=st.booleans())
    def finish(self, data, leased_ahead):
        rollout = data.draw(st.sampled_from([r for r in self.open if r.num_rows]))
        self.finish_rollout(rollout, leased_ahead)

    def finish_rollout(self, rollout, leased_ahead):
        if leased_ahead:  # its next row was prepared when the episode ended
            self.next_row(rollout)
        leased = list(rollout.pages)
        self.groups.finish(rollout)
        assert rollout.pages == leased[: -(-rollout.num_rows // ROWS)]
        self.over += leased

    @precondition(lambda self: any(r.num_rows for r in self.open))
    @rule(worker=st.sampled_from(WORKERS), mid_write=st.booleans())
    def kill(self, worker, mid_write):
        for rollout in [rollout for rollout in self.open if self.worker(rollout) == worker]:
            row = self.next_row(rollout) if mid_write else None
            if row is not None:
                torn = values(255)[:1] + [DeadlyValue(), 0.0]
                with pytest.raises(Killed):
                    self.writers[worker].write(*row, torn)
            freed = self.pool.reclaim(rollout.rollout_id, keep_reserved=True)
            assert freed == sorted(int(page) for page in rollout.pages)
            self.over += rollout.pages
            rollout.restart()
            self.serials[rollout.rollout_id] = []
        self.writers[worker] = RowWriter(pickle.loads(pickle.dumps(self.view)), WRITTEN)

    @rule(num_pages=st.sampled_from([0, 1, 1, 1, 2, 3, NUM_PAGES]), data=st.data())
    def evaluate(self, num_pages, data):
        """An episode of an evaluation takes pages beside those of the groups."""
        fits = num_pages <= self.pool.num_free_pages
        assert self.pool.reserve(num_pages) == fits
        num_leased = data.draw(st.integers(0, min(3, num_pages))) if fits else 0
        self.pool.unreserve((num_pages - num_leased) * fits)
        owner, pages = object(), []
        for number in range(num_leased):
            # What is reserved is taken first, unless somebody says otherwise.
            reserved = data.draw(st.sampled_from([True, None]))
            pages.append(self.pool.lease(owner, number % 2, reserved=reserved))
        if self.pool.num_free_pages:
            pages.append(self.pool.lease(owner, 2, reserved=False))
        else:
            with pytest.raises(RuntimeError, match="page is left"):
                self.pool.lease(owner, 2, reserved=False)
        if pages:
            self.evaluated[owner] = pages

    @precondition(lambda self: self.evaluated)
    @rule(data=st.data(), is_killed=st.booleans())
    def end_evaluation(self, data, is_killed):
        owner = data.draw(st.sampled_from(list(self.evaluated)))
        pages = self.evaluated.pop(owner)
        if is_killed:
            assert self.pool.reclaim(owner) == sorted(int(page) for page in pages)
        else:
            self.pool.free(pages)
        self.over += pages

    # -- groups ---------------------------------------------------------------------------------
    @precondition(lambda self: self.open)
    @rule()
    def complete_too_early(self):
        group = next(g for g in self.groups.running if self.open[0] in g.rollouts)
        with pytest.raises(RuntimeError, match="unfinished"):
            self.groups.complete(group)

    @precondition(lambda self: self.groups.running)
    @rule(data=st.data(), contrast=st.sampled_from([True, True, True, False]))
    def play_to_the_end(self, data, contrast):
        group = data.draw(st.sampled_from(self.groups.running))
        for rollout in group.rollouts:
            if not rollout.finished:
                self.write_rows(rollout, data.draw(st.integers(1, PAGES_PER_ROLLOUT * ROWS)))
                self.finish_rollout(rollout, data.draw(st.booleans()))
        for number, rollout in enumerate(group.rollouts):
            rollout.episode_return = float(contrast and number == 1)
        pages = {rollout.rollout_id: list(rollout.pages) for rollout in group.rollouts}
        self.groups.complete(group)
        assert group.kept == contrast
        kept = {rollout.rollout_id for rollout in group.rollouts}
        assert len(kept) == 2 * contrast
        self.over += [page for key, owned in pages.items() if key not in kept for page in owned]

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def drop(self, data):
        group = data.draw(st.sampled_from(self.groups.running))
        self.over += [page for rollout in group.rollouts for page in rollout.pages]
        self.groups.drop(group, "given up")

    @precondition(lambda self: self.groups._select() is not None)
    @rule()
    def learn(self):
        cohort = self.groups.wait_cohort(0.0)
        learned = [serial for batch in self.buffer for serial in batch["serial"].flatten().tolist()]
        rollouts = [rollout for group in cohort for rollout in group.rollouts]
        serials = [serial for r in rollouts for serial in self.serials[r.rollout_id]]
        assert sorted(learned) == sorted(serials)
        pages = [page for group in cohort for page in group.pages]
        with self.groups.publishing():
            pass
        self.over += pages

    @precondition(lambda self: self.stored and not self.groups.running)
    @rule()
    def checkpoint(self):
        """Groups come back on other pages with the same rows."""
        pages = [page for rollout in self.stored for page in rollout.pages]
        self.buffer.load_state_dict(self.buffer.state_dict())
        self.over += pages

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
            with pytest.raises(RuntimeError, match="freed since its|is (sealed|stored) and|differ"):
                stale = [page for page in self.over if not self.is_alive(page)]
                pool.free([*pages, *(stale or [pages[0]])])
        elif move == "seal" and rollout.finished:
            with pytest.raises(RuntimeError, match="cannot be sealed"):
                pool.seal(pages, 1)
        elif move == "store" and rollout not in self.sealed:
            with pytest.raises(RuntimeError, match="cannot be stored"):
                pool.store(pages)

    def is_alive(self, page):
        owned = [p for r in self.everyone() for p in r.pages]
        return any(page == p and page.generation == p.generation for p in owned)

    def everyone(self):
        return [*self.open, *self.sealed, *self.stored]

    # -- what must always hold ------------------------------------------------------------------
    @invariant()
    def every_page_has_one_owner(self):
        self.pool.check()
        owned = [int(page) for rollout in self.everyone() for page in rollout.pages]
        owned += [int(page) for pages in self.evaluated.values() for page in pages]
        assert len(set(owned)) == len(owned)
        stats = self.pool.stats()
        promised = PAGES_PER_ROLLOUT * len(self.open) - sum(len(r.pages) for r in self.open)
        assert stats["pages_reserved"] == promised
        assert stats["pages_free"] == NUM_PAGES - len(owned)
        assert stats["pages_stored"] == sum(len(r.pages) for r in self.stored)
        assert stats["pages_sealed"] == sum(len(r.pages) for r in self.sealed)

    @invariant()
    def every_row_holds_what_was_written(self):
        rollouts = self.everyone()
        serials = [serial for r in rollouts for serial in self.serials[r.rollout_id]]
        assert sum(rollout.num_rows for rollout in rollouts) == len(serials)
        index = self.pool.row_index_of([r.pages for r in rollouts], [r.num_rows for r in rollouts])
        for rows in (self.pool.rows, self.view.rows):
            assert rows["serial"][index].flatten().tolist() == serials
            assert rows["check"][index].flatten().tolist() == [serial / 2 for serial in serials]
            image = rows["observation", "image"][index].flatten(1).tolist()
            assert image == [[serial % 256] * 6 for serial in serials], "torn, or of someone else"

    @invariant()
    def positions_are_the_groups_in_order(self):
        serials = [serial for r in self.stored for serial in self.serials[r.rollout_id]]
        assert len(self.buffer) == len(serials)
        if serials:
            assert self.buffer[:]["serial"].flatten().tolist() == serials
            backwards = torch.arange(len(serials) - 1, -1, -1)
            assert self.buffer[backwards]["serial"].flatten().tolist() == serials[::-1]


TestPagesOfGroups = PagesOfGroups.TestCase
TestPagesOfGroups.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
