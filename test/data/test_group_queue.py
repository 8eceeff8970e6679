# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Groups from admission to the publication of their update, on a real pool."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from torchrl_dvla.data import Group, GroupState, InitStateSchedule
from torchrl_dvla.memory import PageState

from .conftest import LAYOUT, PAGES_PER_ROLLOUT, Plane


def ids(groups):
    return [group.group_id for group in groups]


def cohort_of(plane):
    """The ids of the cohort in hand or of the next one; None if the learner has to wait."""
    try:
        return ids(plane.groups.wait_cohort(timeout_s=0.0))
    except TimeoutError:
        return None


def wait_message(plane):
    with pytest.raises(TimeoutError) as error:
        plane.groups.wait_cohort(timeout_s=0.0)
    return str(error.value)


# -- admission ----------------------------------------------------------------------------------
def test_the_worked_trace_of_the_docstring(make_plane):
    plane = make_plane(groups=1, lag=1)
    zero, one = plane.admit(), plane.admit()
    assert (zero.deadline, one.deadline) == (1, 1)
    assert plane.groups.admit() == "no_admission"
    plane.sample(one)
    assert cohort_of(plane) == [1]
    assert plane.groups.admit() == "no_admission"
    assert plane.publish() == 1
    two = plane.admit()
    assert two.deadline == 2
    plane.sample(two)
    assert cohort_of(plane) is None
    plane.sample(zero)
    assert cohort_of(plane) == [0]


def test_synchronous_loop(make_plane):
    plane = make_plane(groups=2, lag=0)
    zero, one = plane.admit(), plane.admit()
    assert plane.groups.admit() == "no_admission"
    plane.sample(one)
    assert cohort_of(plane) is None
    plane.sample(zero)
    assert cohort_of(plane) == [0, 1]
    # Between the update and its publication nothing may begin: it would be one version too old.
    assert plane.groups.admit() == "no_admission"
    assert plane.publish() == 1
    assert plane.admit().deadline == 1


def test_a_group_is_admitted_whole_and_shares_its_initial_state(make_plane):
    plane = make_plane(tasks=("a", "b"))
    assert plane.groups.num_rollouts == 0
    first, second = plane.admit(), plane.admit()
    assert [rollout.rollout_id for rollout in first.rollouts] == [0, 1]
    assert {rollout.spec for rollout in first.rollouts} == {first.spec}
    assert (first.spec.task, second.spec.task) == ("a", "b")
    assert [rollout.rollout_id for rollout in second.rollouts] == [2, 3]
    assert (plane.groups.num_admitted, plane.groups.num_rollouts) == (2, 4)
    assert first.state is GroupState.RUNNING and not first.kept


def test_no_group_begins_while_it_is_paused(plane):
    heard = []
    plane.groups.add_listener(lambda: heard.append(plane.groups.paused))
    plane.groups.set_paused(True)
    assert plane.groups.admit() == "paused"
    plane.groups.set_paused(False)
    assert heard == [True, False]
    assert isinstance(plane.groups.admit(), Group)


def test_a_straggler_is_overtaken_until_its_deadline(make_plane):
    plane = make_plane(groups=1, lag=2)
    groups = [plane.admit() for _ in range(3)]
    assert plane.groups.admit() == "no_admission"
    for version, number in enumerate((1, 2)):
        plane.sample(groups[number])
        assert cohort_of(plane) == [number]
        assert plane.publish() == version + 1
    # Version 2 is the deadline of group 0: others are complete, the learner waits for it.
    plane.add()
    assert groups[0].deadline == 2
    assert "Groups [0] can wait no longer than version 2" in wait_message(plane)
    plane.sample(groups[0])
    assert cohort_of(plane) == [0]


def test_several_stragglers_may_not_all_wait_for_the_last_version(make_plane):
    # G = 2, L = 1: four groups of one deadline, two learned a version. Three that stay behind
    # would be one too many for the last version.
    plane = make_plane(groups=2, lag=1)
    groups = [plane.admit() for _ in range(4)]
    plane.sample(groups[3])
    assert cohort_of(plane) is None
    plane.sample(groups[1])
    assert cohort_of(plane) == [1, 3]
    plane.publish()
    plane.add(2)
    plane.sample(groups[0])
    # Both stragglers must go now: one of them and a younger group are no cohort.
    assert "Groups [2] can wait no longer" in wait_message(plane)
    plane.sample(groups[2])
    assert cohort_of(plane) == [0, 2]


def test_only_who_must_go_now_is_named(make_plane):
    # Group 0 has to be learned at version 2; 3 and 4 may follow at 3 and 4, as they are due.
    plane = make_plane(groups=1, lag=2)
    groups = [plane.admit() for _ in range(3)]
    for number in (1, 2):
        plane.sample(groups[number])
        assert cohort_of(plane) == [number]
        plane.publish()
        assert plane.admit().deadline == number + 2
    assert "Groups [0] can wait no longer" in wait_message(plane)
    with pytest.raises(RuntimeError, match=r"cannot advance past 2: groups \[0\] would"):
        plane.publish()


def test_a_dropped_straggler_sets_the_learner_free(make_plane):
    plane = make_plane(groups=1, lag=1)
    zero, one = plane.admit(), plane.admit()
    plane.sample(one)
    assert cohort_of(plane) == [1]
    plane.publish()
    plane.add()
    assert cohort_of(plane) is None
    learner = learner_of(plane)
    plane.groups.drop(zero, "its environment failed")
    assert learner.result(60) == [2]


class AdmissionMachine(RuleBasedStateMachine):
    """An adversary finishes, drops and learns in any order; bound and progress must hold."""

    @initialize(groups=st.integers(1, 4), lag=st.integers(0, 3))
    def build(self, groups, lag):
        self.num_groups, self.lag = groups, lag
        self.plane = self.new_plane()
        self.admitted_at: dict[int, int] = {}
        self.running: list[Group] = []
        self.done: set[int] = set()
        self.in_hand: list[int] = []
        self.to_reopen: list = []
        self.count = self.num_learned = self.num_dropped = self.num_lost = self.num_resumed = 0

    def new_plane(self):
        num_pages = 4 * (self.lag + 1) * self.num_groups + PAGES_PER_ROLLOUT
        return Plane(num_pages=num_pages, groups=self.num_groups, lag=self.lag)

    @property
    def version(self):
        return self.plane.groups.version

    @rule(burst=st.integers(1, 8))
    def admit(self, burst):
        for _ in range(burst):
            group = self.plane.groups.admit()
            if not isinstance(group, Group):
                assert group == "no_admission"
                break
            assert group.group_id == self.count
            if self.to_reopen:
                assert group.spec == self.to_reopen.pop(0)
            self.admitted_at[self.count] = self.version
            self.running.append(group)
            self.count += 1

    def pop_running(self, data):
        # Mostly the newest: the order that keeps stragglers waiting longest.
        index = data.draw(st.sampled_from([-1, -1, -1, 0, len(self.running) // 2]))
        return self.running.pop(index)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), times=st.integers(1, 4))
    def complete(self, data, times):
        for _ in range(min(times, len(self.running))):
            group = self.plane.sample(self.pop_running(data), sizes=(1, 1))
            self.done.add(group.group_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["no contrast", "failed", "failed half way"]))
    def drop(self, data, how):
        group = self.pop_running(data)
        if how == "no contrast":
            self.plane.sample(group, sizes=(1, 1), returns=(1.0, 1.0))
        else:
            if how == "failed half way":
                self.plane.play(group.rollouts[1], size=1)
            self.plane.groups.drop(group, how)
        assert not group.kept and not group.pages
        self.num_dropped += 1
        del self.admitted_at[group.group_id]

    @rule(publish=st.booleans())
    def learn(self, publish):
        cohort = cohort_of(self.plane)
        missing = ids(self.plane.groups._missing())
        assert set(missing) <= set(ids(self.running))
        if cohort is None:
            # A learner that waits is short of groups, or is told for which it waits.
            assert len(self.done) < self.num_groups or missing
            return
        assert cohort == cohort_of(self.plane)  # it stays in hand
        if not self.in_hand:
            assert len(set(cohort)) == self.num_groups
            assert set(cohort) <= self.done
            assert cohort == sorted(cohort)
            self.in_hand = cohort
        assert cohort == self.in_hand
        for key in cohort:
            assert self.version - self.admitted_at[key] <= self.lag
        if publish:
            self.publish()

    @precondition(lambda self: self.in_hand)
    @rule(fails=st.booleans())
    def publish(self, fails=False):
        version = self.version
        if fails:
            with pytest.raises(ArithmeticError), self.plane.groups.publishing():
                assert self.plane.groups.admit() == "no_admission"
                raise ArithmeticError
            assert self.version == version
            return
        assert self.plane.publish() == version + 1  # after an update it is never refused
        for key in self.in_hand:
            del self.admitted_at[key]
            self.done.remove(key)
        self.num_learned += len(self.in_hand)
        self.in_hand = []

    @precondition(lambda self: self.admitted_at and not self.in_hand)
    @rule()
    def publish_without_learning(self):
        version = self.version
        try:
            self.plane.publish()
        except RuntimeError:
            assert self.admitted_at and self.version == version

    @precondition(lambda self: self.done and self.num_resumed < 3)
    @rule()
    def resume_from_a_checkpoint(self):
        self.num_resumed += 1
        resumed = self.new_plane()
        state = json.loads(json.dumps(self.plane.groups.state_dict()))
        resumed.groups.load_state_dict(state)
        self.plane.pool.close()
        self.plane = resumed
        self.to_reopen = [group.spec for group in self.running] + self.to_reopen
        for group in self.running:
            del self.admitted_at[group.group_id]
        self.num_lost += len(self.running)
        self.running = []

    @invariant()
    def every_group_is_in_one_place(self):
        stats = self.plane.groups.stats()
        assert stats["groups_admitted"] == self.count
        assert stats["groups_learned"] == self.num_learned
        assert stats["groups_dropped"] == self.num_dropped
        assert stats["groups_in_flight"] == len(self.running)
        assert stats["groups_stored"] == len(self.done)
        assert ids(self.plane.groups.in_hand) == self.in_hand
        known = self.num_learned + self.num_dropped + self.num_lost + len(self.admitted_at)
        assert self.count == known

    @invariant()
    def as_many_as_can_still_be_learned_are_unlearned(self):
        """(1) of the docstring of GroupQueue."""
        for waiting in range(self.lag + 1):
            due = sum(at + self.lag <= self.version + waiting for at in self.admitted_at.values())
            assert due <= (waiting + 1) * self.num_groups

    @invariant()
    def nothing_is_overdue(self):
        for at in self.admitted_at.values():
            assert self.version - at <= self.lag

    @invariant()
    def the_waiting_learner_gets_a_cohort_or_the_collector_a_group(self):
        if not self.running and not self.in_hand:
            may_admit = len(self.plane.groups) < (self.lag + 1) * self.num_groups
            assert self.plane.groups._select() is not None or may_admit

    @invariant()
    def every_page_has_one_owner(self):
        self.plane.pool.check()
        stats = self.plane.pool.stats()
        assert stats["pages_stored"] == 2 * len(self.done)
        assert stats["pages_reserved"] == 2 * PAGES_PER_ROLLOUT * len(self.running)
        assert stats["pages_leased"] == stats["pages_sealed"] == 0

    def teardown(self):
        """From wherever the adversary stops: once all rollouts end, every group is learned."""
        if not hasattr(self, "plane"):
            return
        while self.running:
            self.done.add(self.plane.sample(self.running.pop(), sizes=(1, 1)).group_id)
        while self.admitted_at:
            if self.in_hand:
                self.publish()
            while len(self.done) < self.num_groups:  # the rest of the last cohort
                self.admitted_at[self.count] = self.version
                self.done.add(self.plane.sample(self.plane.admit(), sizes=(1, 1)).group_id)
                self.count += 1
            num_unlearned = len(self.admitted_at)
            self.learn(publish=True)
            assert len(self.admitted_at) == num_unlearned - self.num_groups
        self.plane.pool.close()


@pytest.mark.parametrize("steps", [12, 60])
def test_staleness_is_bounded_and_there_is_no_deadlock(steps):
    stateful.run_state_machine_as_test(
        AdmissionMachine,
        settings=settings(max_examples=60, stateful_step_count=steps, deadline=None),
    )


# -- pages --------------------------------------------------------------------------------------
def test_a_group_waits_for_the_pages_of_all_its_rollouts(make_plane):
    # Beside the group, a rollout of an evaluation always has room.
    plane = make_plane(num_pages=3 * PAGES_PER_ROLLOUT + 1)
    group = plane.admit()
    assert plane.groups.admit() == "no_page"
    # What finished rollouts did not take is free for others.
    plane.play(group.rollouts[0], size=1)
    assert plane.groups.admit() == "no_page"
    plane.groups.drop(group, "over")
    assert plane.pool.num_free_pages == 7
    assert plane.admit().group_id == 1


def test_a_kept_group_has_its_advantages_in_every_row_and_moves_no_tensor(plane):
    plane.pool.rows["advantage"].fill_(-9)
    pointers = {key: plane.pool.rows.get(key).data_ptr() for key in LAYOUT}
    group = plane.admit()
    plane.play(group.rollouts[1], 2, 0.0)  # page 0
    plane.play(group.rollouts[0], 3, 1.0)  # pages 1 and 2
    plane.groups.complete(group)
    assert group.row_index(plane.pool).tolist() == [2, 3, 4, 0, 1]
    assert plane.pool.rows["advantage"][:6].flatten().tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5, -9]
    assert {key: plane.pool.rows.get(key).data_ptr() for key in LAYOUT} == pointers
    assert {plane.pool.state(page) for page in group.pages} == {PageState.STORED}


def test_a_dropped_group_frees_what_it_had(plane):
    group = plane.admit()
    finished, running = group.rollouts
    plane.play(finished)
    running.pages.append(plane.pool.lease(running.rollout_id, running.rollout_id))
    plane.groups.drop(group, "the environment failed")
    assert plane.pool.num_free_pages == 40
    assert group.drop_reason == "the environment failed"
    never_began = plane.admit()
    plane.groups.drop(never_began, "the environment failed")
    lost = plane.admit()  # its worker is gone, and the caller has taken the pages back
    lost.rollouts[0].pages.append(plane.pool.lease(lost.rollouts[0].rollout_id))
    plane.pool.reclaim(lost.rollouts[0].rollout_id, keep_reserved=True)
    lost.rollouts[0].restart()
    plane.groups.drop(lost, "worker lost")
    assert plane.pool.num_free_pages == 40
    assert plane.groups.drop_counts() == {
        "the environment failed": {"count": 2, "mean_length": 12.0},  # 24 and 0 env steps
        "worker lost": {"count": 1, "mean_length": 0.0},
    }
    stats = plane.groups.stats()
    assert (stats["groups_dropped"], len(plane.groups)) == (3, 0)


def test_groups_out_of_turn_are_refused_and_nothing_changes(plane):
    group = plane.admit()
    with pytest.raises(RuntimeError, match=r"got \[0, 1\] unfinished. Call finish"):
        plane.groups.complete(group)
    page = plane.pool.lease("someone")
    group.rollouts[0].pages, group.rollouts[0].num_rows = [page, page], 1
    with pytest.raises(RuntimeError, match="pages must differ"):
        plane.groups.finish(group.rollouts[0])
    group.rollouts[0].pages = []
    with pytest.raises(ValueError, match="num_rows must be between"):
        plane.groups.finish(group.rollouts[0])
    plane.pool.reclaim("someone", keep_reserved=True)
    group.rollouts[0].restart()
    plane.sample(group)
    for call in (
        lambda: plane.groups.complete(group),
        lambda: plane.groups.drop(group, "too late"),
        lambda: plane.groups.finish(group.rollouts[0]),
    ):
        with pytest.raises(KeyError, match="group_id must name a group under way, got 0"):
            call()
    assert plane.pool.stats()["pages_stored"] == 3
    assert ids(plane.groups.stored) == [0]


def test_a_quarantined_task_is_skipped_and_the_last_one_ends_the_run(make_plane):
    plane = make_plane(tasks=("a", "b"), lag=3)
    first, second = plane.admit(), plane.admit()
    plane.groups.quarantine("a")
    assert plane.groups.running == [first, second], "the caller drops them"
    assert [plane.admit().spec.task for _ in range(2)] == ["b", "b"]
    with pytest.raises(RuntimeError, match=r"No task is left: \['a', 'b'\]"):
        plane.groups.quarantine("b")
    with pytest.raises(ArithmeticError):
        plane.groups.quarantine("b", ArithmeticError())


# -- groups with nothing to learn from ----------------------------------------------------------
def no_signal_plane(make_plane, on_no_signal):
    return make_plane(lag=3, config={"max_no_signal_groups": 3, "on_no_signal": on_no_signal})


def test_warn_samples_on_and_says_so_again_and_again(make_plane, caplog):
    plane = no_signal_plane(make_plane, "warn")
    plane.add(13, returns=(0.0, 0.0))
    assert [record.message[:22] for record in caplog.records] == [
        "3 groups in a row had ",
        "6 groups in a row had ",
        "12 groups in a row had",
    ]
    assert "because of 'no contrast'. Sampling goes on." in caplog.text
    assert "All 12 groups failed (mean return 0): the tasks are too hard" in caplog.text
    assert plane.groups.stats()["no_signal_groups"] == 13
    plane.add()
    assert plane.groups.stats()["no_signal_groups"] == 0


def test_keep_keeps_groups_until_there_is_contrast_again(make_plane, caplog):
    plane = no_signal_plane(make_plane, "keep")
    groups = plane.add(5, returns=(1.0, 1.0))
    assert [group.kept for group in groups] == [False] * 3 + [True] * 2
    assert groups[-1].advantages.tolist() == [0.0, 0.0]
    assert "Groups are kept as they come" in caplog.text
    plane.update()
    plane.publish()
    plane.add(returns=(1.0, 1.0))  # the sixth in a row, two of them learned from
    assert "6 groups in a row" in caplog.text and "All 6 groups succeeded" in caplog.text
    assert plane.groups.stats()["groups_kept_without_signal"] == 3
    assert [group.kept for group in plane.add(1) + plane.add(returns=(1.0, 1.0))] == [True, False]


def test_solved_is_what_succeeds_and_teaches_nothing_in_a_row(make_plane):
    plane = no_signal_plane(make_plane, "warn")
    for returns, num_groups, is_solved in (
        ((0.0, 0.0), 1, False),
        ((1.0, 1.0), 2, False),
        ((0.5, 1.0), 1, False),  # both succeed, the faster better
        ((2.0, 2.0), 2, False),
        ((1.0, 1.0), 1, True),
        ((1.0, 0.0), 1, False),
    ):
        plane.add(num_groups, returns=returns)
        assert plane.groups.is_solved is is_solved, returns


def test_a_run_that_ends_as_solved_stays_so_whatever_its_last_groups_do(make_plane, caplog):
    plane = no_signal_plane(make_plane, "warn")
    groups = plane.groups
    groups.add_listener(lambda: groups.is_solved and groups.end("nothing is left to learn"))
    under_way = [plane.admit() for _ in range(2)]
    plane.add(3, returns=(1.0, 1.0))
    assert "Sampling goes on" not in caplog.text
    for group in under_way:
        plane.sample(group, returns=(1.0, 0.0))
    assert groups.is_solved and groups.wait_cohort(0.0) == under_way
    plane.publish()
    with pytest.raises(RuntimeError, match="closed: nothing is left to learn"):
        groups.wait_cohort(0.0)


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        ([1.0, 1.0, 1.0], "All 3 groups succeeded (mean return 1): the tasks are solved"),
        ([0.0, 0.0, 0.0], "All 3 groups failed (mean return 0): the tasks are too hard"),
        ([1.0, 1.0, 0.0, 0.0], "4 groups had nothing to teach (mean return 0.5): take easier or"),
        ([1.0, 1.0], "2 groups had nothing to teach (mean return 1): take easier or"),
    ],
)
def test_a_learner_that_waits_for_contrast_is_not_told_to_wait_longer(make_plane, returns, message):
    plane = no_signal_plane(make_plane, "warn")
    plane.admit()
    for value in returns:
        plane.add(returns=(value, value))
    assert message in wait_message(plane)


def test_raise_ends_the_run(make_plane):
    plane = no_signal_plane(make_plane, "raise")
    plane.add(2, returns=(1.0, 1.0))
    with pytest.raises(RuntimeError, match="3 groups in a row .* The run ends here"):
        plane.add(returns=(1.0, 1.0))
    assert plane.groups.stats()["groups_dropped"] == 3
    assert plane.pool.num_free_pages == 40


# -- waiting and publishing ---------------------------------------------------------------------
def test_every_wait_has_its_reason_and_dropped_groups_are_counted(plane):
    assert wait_message(plane).endswith("Nothing is being collected: start the collector.")
    plane.add(3, returns=(1.0, 1.0))
    plane.add(returns=(0.0, 0.0), sizes=(1, 1))
    assert plane.groups.drop_counts() == {
        "no contrast": {"count": 4, "mean_length": 17.0}  # (3 * 20 + 8) / 4
    }
    message = wait_message(plane)
    assert message.startswith("No cohort of 2 groups within timeout_s=0: 0 finished, 0 in flight")
    assert "[], 4 dropped since the last update (4 x 'no contrast')" in message
    remedy = "easier or harder tasks, raise candidate_group_size, or widen return_bounds."
    assert message.endswith(remedy)
    stats = plane.groups.stats()
    assert (stats["groups_dropped"], stats["groups_kept"], stats["groups_stored"]) == (4, 0, 0)
    plane.add(2)
    assert plane.groups.stats()["kept_mean_length"] == 20.0
    plane.update()
    plane.publish()
    assert "0 dropped since the last update. Nothing is being collected" in wait_message(plane)
    plane.admit()
    message = wait_message(plane)
    assert "1 in flight [6]" in message and "raise timeout_s" in message


def learner_of(plane):
    return ThreadPoolExecutor(1).submit(lambda: ids(plane.groups.wait_cohort(60.0)))


def test_a_waiting_learner_is_woken_by_the_last_group_and_not_before(make_plane, monkeypatch):
    plane = make_plane(groups=3)
    waiting = threading.Event()
    groups, lock, wakes = plane.groups, plane.groups.lock, []
    wait, wake = lock.wait, lock.notify_all
    # It holds the lock until it sleeps.
    monkeypatch.setattr(lock, "wait", lambda *a: (waiting.set(), wait(*a)))
    monkeypatch.setattr(lock, "notify_all", lambda: (wakes.append(len(groups)), wake()))
    learner = learner_of(plane)
    assert waiting.wait(60)
    plane.add(2)
    assert wakes == []
    plane.add()
    assert learner.result(60) == [0, 1, 2]
    stats = groups.stats()
    assert stats["wait_s"] >= stats["last_wait_s"] >= 0


@pytest.mark.parametrize("how", ["end", "close"])
def test_the_end_wakes_a_waiting_learner_with_the_cause(plane, how):
    cause, learner = ValueError("the simulator is gone"), learner_of(plane)
    if how == "end":
        plane.groups.end("collection failed", cause)
    else:
        plane.groups.close("collection failed")
    error = learner.exception(60)
    assert str(error) == "The replay buffer was closed: collection failed"
    assert error.__cause__ is (cause if how == "end" else None)
    if how == "end":
        assert plane.groups.admit() == "paused"


def test_what_is_complete_is_still_learned_after_the_end(plane):
    plane.add(2)
    plane.groups.end("collection ended")
    assert cohort_of(plane) == [0, 1]
    plane.publish()
    with pytest.raises(RuntimeError, match="collection ended"):
        cohort_of(plane)


def test_nothing_works_once_the_pages_are_gone(plane):
    running = plane.admit()
    plane.add()
    plane.groups.end("the environments failed")
    plane.groups.close("the collector was shut down")
    for call in (
        plane.groups.admit,
        lambda: plane.groups.finish(running.rollouts[0]),
        lambda: plane.groups.complete(running),
        lambda: plane.groups.drop(running, "late"),
        plane.groups.wait_cohort,
        plane.publish,
        plane.groups.state_dict,
        lambda: plane.groups.load_state_dict({}),
    ):
        with pytest.raises(RuntimeError, match="was closed: the environments failed"):
            call()
    assert plane.groups.stats()["groups_stored"] == 1  # counts can be read


def test_a_publication_that_fails_changes_nothing(plane):
    plane.add(2)
    plane.groups.wait_cohort()
    may_admit = []
    plane.groups.add_listener(lambda: may_admit.append(not plane.groups._publishing))
    with pytest.raises(ArithmeticError), plane.groups.publishing():
        raise ArithmeticError
    assert may_admit == [True], "sampling, which was refused meanwhile, is woken"
    assert (plane.groups.version, len(plane.groups)) == (0, 2)
    assert cohort_of(plane) == [0, 1]
    assert plane.publish() == 1
    assert plane.pool.num_free_pages == 40
    assert ids(plane.groups.cohort) == [0, 1], "for the metrics"
    assert plane.groups.num_updates == 1


def test_a_publication_that_would_break_the_bound_is_refused_before_anything_is_sent(make_plane):
    plane = make_plane(groups=1, lag=0)
    assert plane.publish() == 1  # nothing is under way
    plane.admit()
    sent = []
    with pytest.raises(RuntimeError, match=r"cannot advance past 1: groups \[0\].*drop them"):
        with plane.groups.publishing():
            sent.append(1)
    assert (sent, plane.groups.version, plane.groups.num_updates) == ([], 1, 0)


def test_nothing_is_admitted_while_weights_are_sent(plane):
    heard = []
    plane.groups.add_listener(lambda: heard.append(plane.groups.version))
    with plane.groups.publishing():
        assert plane.groups.admit() == "no_admission"
        with pytest.raises(RuntimeError, match="published already"):
            plane.publish()
    assert heard == [1]
    assert plane.admit().deadline == 2


def test_whoever_publishes_may_say_the_version(make_plane):
    plane = make_plane(groups=1, lag=1)
    straggler = plane.admit()
    plane.add()
    plane.groups.wait_cohort()
    with pytest.raises(ValueError, match="version must grow .* got 0 after 0"):
        with plane.groups.publishing() as done:
            done.version = 0
    with plane.groups.publishing() as done:
        assert done.version == 1
        done.version = 7
    assert plane.groups.version == 7
    assert straggler.deadline == 7, "the lag counts updates"
    plane.sample(straggler)
    assert cohort_of(plane) == [0]


def test_listeners_hear_of_what_may_let_sampling_go_on(make_plane):
    plane = make_plane(groups=1, lag=0)
    heard = []
    plane.groups.add_listener(lambda: heard.append(len(plane.groups)))
    group = plane.admit()
    assert heard == []
    plane.play(group.rollouts[0])
    plane.groups.drop(group, "failed")
    plane.add(returns=(1.0, 1.0))
    plane.add()
    plane.groups.wait_cohort()
    plane.publish()
    assert heard == [1, 0, 1, 1, 0, 1, 1, 1, 0]


# -- checkpoints --------------------------------------------------------------------------------
def test_unfinished_groups_are_begun_anew_after_a_resume(make_plane):
    old = make_plane(lag=3)
    groups = [old.admit() for _ in range(3)]
    specs = [group.spec for group in groups]
    old.sample(groups[1])
    old.play(groups[2].rollouts[0])
    state = old.groups.state_dict()
    new = make_plane(lag=3)
    new.groups.load_state_dict(state)
    assert ids(new.groups.stored) == [1]
    assert ids(new.groups.running) == []
    resumed = [new.admit()]
    assert new.groups.state_dict()["reopened"] == state["reopened"], "begun or not"
    resumed += [new.admit(), new.admit()]
    assert [group.spec for group in resumed] == [specs[0], specs[2], old.admit().spec]
    assert ids(resumed) == [3, 4, 5], "ids are never used twice"
    assert resumed[0].rollouts[0].rollout_id == 6


def test_state_is_plain_data_and_resumes(make_plane):
    old = make_plane(groups=1, lag=1)
    zero = old.admit()
    old.add()
    old.groups.wait_cohort()
    old.publish()
    old.add()
    old.sample(zero)
    old.groups.wait_cohort()
    state = json.loads(json.dumps(old.groups.state_dict()))
    new = make_plane(groups=1, lag=1, num_pages=20)
    new.pool.lease("someone else")  # page numbers differ from the run before
    new.groups.load_state_dict(state)
    assert new.groups.state_dict() == state
    assert cohort_of(new) == ids(new.groups.in_hand) == ids(new.groups.cohort) == [0]
    assert new.pool.stats()["pages_stored"] == 6
    new.groups.load_state_dict(state)  # takes the place of what is there
    assert new.pool.stats()["pages_stored"] == 6


class Curriculum(InitStateSchedule):
    seen = {"mean": 0.0, "best": None, "history": [], "phase": "easy"}

    def state_dict(self):
        return super().state_dict() | self.seen


def test_the_state_of_a_users_schedule_is_compared_by_keys_and_types(make_plane):
    old, new = make_plane(), make_plane()
    old.groups.schedule, new.groups.schedule = Curriculum(("task",)), Curriculum(("task",))
    next(old.groups.schedule)
    old.groups.schedule.seen = {"mean": -1.0, "best": 0.5, "history": [1, -2], "phase": "hard"}
    new.groups.load_state_dict(old.groups.state_dict())
    assert next(new.groups.schedule) == next(old.groups.schedule)
    old.groups.schedule.seen = Curriculum.seen | {"history": 3}
    with pytest.raises(ValueError, match=r"'groups\.schedule\.history' must be list \| tuple"):
        new.groups.load_state_dict(old.groups.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lag": 2}, "'max_policy_lag' is 2 instead of 1"),
        ({"config": {"group_size": 3}}, "'group_size' is 3 instead of 2; 'num_candidates' is 3"),
        ({"config": {"candidate_group_size": 4}}, "'num_candidates' is 4 instead of 2"),
        ({"tasks": ("task", "other")}, r"'tasks' is \['task', 'other'\] instead of \['task'\]"),
    ],
)
def test_a_checkpoint_of_other_groups_or_another_schedule_is_refused(make_plane, options, message):
    state = make_plane().groups.state_dict()
    with pytest.raises(ValueError, match=message):
        make_plane(**options).groups.load_state_dict(state)
    older = {key: value for key, value in state.items() if key not in ("group_size", "tasks")}
    with pytest.raises(ValueError, match=r"\['group_size', 'tasks'\], got none.*older version of"):
        make_plane().groups.load_state_dict(older)
    other = make_plane()
    other.groups.schedule.seed = 5
    with pytest.raises(ValueError, match="'seed' is 5 instead of 0"):
        other.groups.load_state_dict(state)


def test_a_checkpoint_that_does_not_fit_changes_nothing(make_plane):
    old, small = make_plane(), make_plane(num_pages=8)
    old.add(3)
    small.add()
    taken = small.pool.lease("someone")
    with pytest.raises(ValueError, match="9 pages must fit in those that are free or .* got 7"):
        small.groups.load_state_dict(old.groups.state_dict())
    assert ids(small.groups.stored) == [0]
    small.pool.free([taken])
    running = make_plane()
    running.admit()
    with pytest.raises(RuntimeError, match="before the first group begins"):
        running.groups.load_state_dict(old.groups.state_dict())


# -- two threads --------------------------------------------------------------------------------
def test_collector_and_learner_threads(make_plane):
    plane = make_plane(num_pages=16, groups=2, lag=2, timeout_s=60.0)
    may_go_on, stop = threading.Event(), threading.Event()
    plane.groups.add_listener(may_go_on.set)

    def collect():
        try:
            while not stop.is_set():
                may_go_on.clear()
                group = plane.groups.admit()
                if not isinstance(group, Group):
                    assert may_go_on.wait(60)
                    continue
                number = group.group_id
                sizes = (1 + number % 4, 1 + number // 4 % 4)
                plane.sample(group, sizes, returns=(1.0, float(number % 5 == 0)))
        except BaseException as error:
            plane.groups.end("the collector failed", error)
            raise

    collector = ThreadPoolExecutor(1).submit(collect)
    seen: list[int] = []
    try:
        for version in range(40):
            for batch in plane.buffer:
                seen += batch["x"].flatten().tolist()
            assert all(group.group_id % 5 for group in plane.buffer.cohort)
            assert plane.publish() == version + 1
    finally:
        stop.set(), may_go_on.set()
    collector.result(60)
    assert len(seen) == len(set(seen))  # no row was handed out twice
    stats = plane.buffer.stats()
    assert (stats["updates"], stats["groups_learned"]) == (40, 80)
    assert stats["groups_kept"] == 80 + stats["groups_stored"]
    assert plane.pool.stats()["peak_bytes"] <= 16 * plane.pool.page_bytes
    assert torch.tensor(seen).max() < plane.x
