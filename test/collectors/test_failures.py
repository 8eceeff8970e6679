# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What counts as a failure, and against whom."""

from __future__ import annotations

import itertools

from torchrl_dvla.collectors.failures import FailureAction, FailureLog
from torchrl_dvla.data import EpisodeSpec, Rollout


def make_log(max_failures=5):
    clock = itertools.count(1.0)
    limits = {"max_rollout_failures": 2, "max_task_failures": 2}
    return FailureLog(max_failures, **limits, clock=lambda: next(clock))


def make_rollout(task="reach", group_id=0):
    return Rollout(EpisodeSpec(task, seed=0), group_id, rollout_id=group_id)


def test_processes_lost_to_one_cause_are_one_failure():
    log = make_log(max_failures=1)
    for _ in range(64):  # all were started at 0, the fork server died at 1
        assert log.record_crash(started_s=0.0, rollout=make_rollout()) is FailureAction.RETRY
    assert not log.too_many
    log.record_crash(started_s=70.0)  # a replacement, lost as well
    assert log.too_many


def test_a_finished_rollout_clears_the_count_of_the_run():
    log = make_log(max_failures=1)
    for start_s in (0.0, 1.5):
        log.record_crash(start_s)
    assert log.too_many
    log.record_progress("reach")
    assert not log.too_many


def test_a_rollout_that_fails_again_takes_its_group_along_and_then_its_task():
    log, start_s = make_log(), itertools.count(0.5)
    first, second = make_rollout(group_id=0), make_rollout(group_id=1)
    actions = [log.record_crash(next(start_s), r) for r in (first, first, second, second)]
    assert actions == [
        FailureAction.RETRY,
        FailureAction.DROP_GROUP,
        FailureAction.RETRY,
        FailureAction.QUARANTINE_TASK,
    ]
    assert not log.too_many, "the cause is dealt with"


def test_one_bad_scene_among_good_ones_is_not_the_tasks_fault():
    log, start_s = make_log(), itertools.count(0.5)
    for group_id in range(10):
        bad = make_rollout(group_id=group_id)
        assert log.record_crash(next(start_s), bad) is FailureAction.RETRY
        log.record_progress("reach")  # another scene of the task
        assert log.record_crash(next(start_s), bad) is FailureAction.DROP_GROUP


def test_a_failure_is_remembered_by_the_second_try():
    log = make_log()
    rollout = make_rollout()
    log.record_crash(0.5, rollout)
    rollout.restart()
    assert rollout.num_failures == 1
    assert log.record_crash(1.5, rollout) is FailureAction.DROP_GROUP
