# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from torchrl_dvla.data import Admission


def test_synchronous_loop():
    admission = Admission(groups_per_update=2, max_policy_lag=0)
    assert [admission.admit(key) for key in range(3)] == [True, True, False]
    assert admission.select([1]) is None
    assert admission.select([1, 0]) == [0, 1]
    admission.learned([0, 1])
    # Between the update and its publication nothing may begin: it would be one version too old.
    assert not admission.admit(2)
    assert admission.advance() == 1
    assert admission.admit(2)
    assert admission.deadline(2) == 1


def test_groups_are_held_back_while_the_version_cannot_be_adopted():
    admission = Admission(groups_per_update=1, max_policy_lag=1)
    can_be_adopted, woken = threading.Event(), []
    admission.begin_only_if(can_be_adopted.is_set)
    admission.add_listener(lambda: woken.append(admission.may_admit))
    assert not admission.admit(0)
    assert not admission.wait_admissible(timeout_s=0.0)
    can_be_adopted.set()
    admission.reconsider()
    assert woken == [True]
    assert [admission.admit(key) for key in range(3)] == [True, True, False]  # the bound stays


def test_a_straggler_is_overtaken_until_its_deadline():
    admission = Admission(groups_per_update=1, max_policy_lag=2)
    assert [admission.admit(key) for key in range(4)] == [True, True, True, False]
    for version, group_id in enumerate((1, 2)):
        assert admission.select([group_id]) == [group_id]
        admission.learned([group_id])
        assert admission.advance() == version + 1
    # Version 2 is the deadline of group 0: others are complete, the learner waits for it.
    assert admission.admit(4)
    assert admission.deadline(0) == 2
    assert admission.select([4]) is None
    assert admission.missing([4]) == [0]
    assert admission.select([0, 4]) == [0]
    assert admission.missing([0, 4]) == []


def test_several_stragglers_may_not_all_wait_for_the_last_version():
    # G = 2, L = 1: four groups of one deadline, two learned a version. Three that stay behind
    # would be one too many for the last version.
    admission = Admission(groups_per_update=2, max_policy_lag=1)
    assert all(admission.admit(key) for key in range(4))
    assert admission.select([3]) is None
    assert admission.select([3, 1]) == [1, 3]
    admission.learned([1, 3])
    admission.advance()
    assert all(admission.admit(key) for key in (4, 5))
    # Both stragglers must go now: one of them and a younger group are no cohort.
    assert admission.select([0, 4, 5]) is None
    assert admission.missing([0, 4, 5]) == [2]
    assert admission.select([0, 2, 4, 5]) == [0, 2]


def test_only_who_must_go_now_is_named():
    # Group 0 has to be learned at version 2; 3 and 4 may follow at 3 and 4, as they are due.
    admission = Admission(groups_per_update=1, max_policy_lag=2)
    assert all(admission.admit(key) for key in range(3))
    for version, group_id in enumerate((1, 2), start=1):
        admission.learned(admission.select([group_id]))
        admission.advance()
        assert admission.admit(group_id + 2)
        assert admission.deadline(group_id + 2) == version + 2
    assert admission.missing([]) == [0]
    with pytest.raises(RuntimeError, match=r"cannot advance past 2: groups \[0\] would"):
        admission.advance()


def test_a_dropped_straggler_sets_the_learner_free():
    admission = Admission(groups_per_update=1, max_policy_lag=1)
    assert admission.admit(0)
    assert admission.admit(1)
    admission.learned(admission.select([1]))
    admission.advance()
    assert admission.admit(2)
    assert admission.select([2]) is None
    admission.drop(0)
    assert admission.select([2]) == [2]
    assert admission.stats()["groups_dropped"] == 1


def test_a_publication_that_would_break_the_bound_is_refused():
    admission = Admission(groups_per_update=1, max_policy_lag=0)
    assert admission.advance() == 1  # nothing is under way
    admission.admit(0)
    with pytest.raises(RuntimeError, match=r"cannot advance past 1: groups \[0\].*drop them"):
        admission.advance()
    assert admission.version == 1


def test_completed_groups_are_remembered():
    admission = Admission(groups_per_update=1, max_policy_lag=1)
    admission.admit(7)
    admission.admit(8)
    assert (admission.num_unlearned, admission.num_in_flight, admission.in_flight) == (2, 2, [7, 8])
    admission.complete(8)
    assert admission.in_flight == [7]
    assert admission.select() == [8]
    assert admission.admitted_version(8) == 0


def test_unknown_groups_are_refused_and_nothing_changes():
    admission = Admission(groups_per_update=2, max_policy_lag=0)
    admission.admit(0)
    with pytest.raises(ValueError, match="group_id must be new, got 0"):
        admission.admit(0)
    for call in (
        lambda: admission.learned([0, 1]),
        lambda: admission.drop(1),
        lambda: admission.select([1]),
        lambda: admission.complete(1),
        lambda: admission.deadline(1),
    ):
        with pytest.raises(KeyError, match="got 1"):
            call()
    assert admission.num_unlearned == 1


@pytest.mark.parametrize(("groups", "lag"), [(0, 1), (1, -1)])
def test_bad_bounds(groups, lag):
    with pytest.raises(ValueError, match="must be at least"):
        Admission(groups, lag)


def test_state_is_plain_data_and_resumes():
    admission = Admission(groups_per_update=1, max_policy_lag=1)
    admission.admit(0)
    admission.admit(1)
    admission.learned([1])
    admission.advance()
    admission.admit(2)
    admission.complete(2)
    state = admission.state_dict()
    other = Admission(groups_per_update=1, max_policy_lag=1)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert other.select() is None
    assert other.in_flight == [0]
    with pytest.raises(ValueError, match="max_policy_lag must equal the checkpoint's 1, got 2"):
        Admission(groups_per_update=1, max_policy_lag=2).load_state_dict(state)


def test_listeners_and_waiters_hear_of_changes():
    admission = Admission(groups_per_update=1, max_policy_lag=0)
    heard = []
    admission.add_listener(lambda: heard.append(admission.num_unlearned))
    admission.admit(0)
    assert not admission.wait_admissible(timeout_s=0)
    granted = []
    waiter = threading.Thread(target=lambda: granted.append(admission.wait_admissible(30)))
    waiter.start()
    admission.drop(0)
    waiter.join(30)
    assert granted == [True]
    assert heard == [0]


class AdmissionMachine(RuleBasedStateMachine):
    """An adversary finishes, drops and learns in any order; bound and progress must hold."""

    @initialize(groups=st.integers(1, 4), lag=st.integers(0, 3))
    def build(self, groups, lag):
        self.groups, self.lag = groups, lag
        self.admission = Admission(groups, lag)
        self.admitted_at: dict[int, int] = {}
        self.running: list[int] = []
        self.done: set[int] = set()
        self.count = self.num_learned = self.num_dropped = 0
        self.updates_now = 0

    @rule(burst=st.integers(1, 8))
    def admit(self, burst):
        for _ in range(burst):
            if not self.admission.admit(self.count):
                break
            self.admitted_at[self.count] = self.admission.version
            self.running.append(self.count)
            self.count += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        # Mostly the newest: the order that keeps stragglers waiting longest.
        index = data.draw(st.sampled_from([-1, -1, -1, 0, len(self.running) // 2]))
        key = self.running.pop(index)
        self.admission.complete(key)
        self.done.add(key)

    @precondition(lambda self: self.running or self.done)
    @rule(data=st.data())
    def drop(self, data):
        key = data.draw(st.sampled_from(sorted(self.running) + sorted(self.done)))
        self.admission.drop(key)
        self.num_dropped += 1
        del self.admitted_at[key]
        self.done.discard(key)
        if key in self.running:
            self.running.remove(key)

    @rule(publish=st.booleans())
    def learn(self, publish):
        cohort = self.admission.select(self.done)
        assert cohort == self.admission.select()  # asking changes nothing, and all are noted
        missing = self.admission.missing(self.done)
        assert set(missing) <= set(self.running)
        if cohort is None:
            # A learner that waits is short of groups, or is told for which it waits.
            assert len(self.done) < self.groups or missing
            return
        assert not missing
        assert len(set(cohort)) == self.groups
        assert set(cohort) <= self.done
        assert cohort == sorted(cohort)
        for key in cohort:
            assert self.admission.version - self.admitted_at.pop(key) <= self.lag
            self.done.remove(key)
        self.admission.learned(cohort)
        self.num_learned += len(cohort)
        self.updates_now += 1
        if publish:
            self.publish()

    @precondition(lambda self: self.updates_now)
    @rule()
    def publish(self):
        self.admission.advance()  # after an update it is never refused
        self.updates_now = 0

    @precondition(lambda self: not self.updates_now)
    @rule()
    def publish_without_learning(self):
        version = self.admission.version
        try:
            self.admission.advance()
        except RuntimeError:
            assert self.admitted_at and self.admission.version == version

    @rule()
    def resume_from_a_checkpoint(self):
        resumed = Admission(self.groups, self.lag)
        resumed.load_state_dict(self.admission.state_dict())
        self.admission = resumed

    @invariant()
    def every_group_is_in_one_place(self):
        if hasattr(self, "admission"):
            stats = self.admission.stats()
            assert stats["groups_admitted"] == self.count
            assert stats["groups_learned"] == self.num_learned
            assert stats["groups_dropped"] == self.num_dropped
            assert stats["groups_in_flight"] == len(self.running)
            assert stats["groups_completed"] == len(self.done)
            assert self.count == self.num_learned + self.num_dropped + len(self.admitted_at)

    @invariant()
    def as_many_as_can_still_be_learned_are_unlearned(self):
        """(1) of the docstring of Admission."""
        if hasattr(self, "admission"):
            version, num_taken = self.admission.version, self.groups * (self.updates_now > 0)
            for waiting in range(self.lag + 1):
                due = sum(at + self.lag <= version + waiting for at in self.admitted_at.values())
                assert due + num_taken <= (waiting + 1) * self.groups

    @invariant()
    def nothing_is_overdue(self):
        if hasattr(self, "admission"):
            for at in self.admitted_at.values():
                assert self.admission.version - at <= self.lag

    @invariant()
    def the_waiting_learner_gets_a_cohort_or_the_collector_a_group(self):
        if hasattr(self, "admission") and not self.running and not self.updates_now:
            assert self.admission.select(self.done) is not None or self.admission.may_admit

    def teardown(self):
        """From wherever the adversary stops: once all rollouts end, every group is learned."""
        if not hasattr(self, "admission"):
            return
        while self.running:
            key = self.running.pop()
            self.admission.complete(key)
            self.done.add(key)
        while self.admitted_at:
            if self.updates_now:
                self.publish()
            while len(self.done) < self.groups:  # the rest of the last cohort
                assert self.admission.admit(self.count)
                self.admitted_at[self.count] = self.admission.version
                self.admission.complete(self.count)
                self.done.add(self.count)
                self.count += 1
            num_unlearned = len(self.admitted_at)
            self.learn(publish=True)
            assert len(self.admitted_at) == num_unlearned - self.groups


@pytest.mark.parametrize("steps", [12, 60])
def test_staleness_is_bounded_and_there_is_no_deadlock(steps):
    run_state_machine_as_test(
        AdmissionMachine,
        settings=settings(max_examples=80, stateful_step_count=steps, deadline=None),
    )
