# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every kind of process of a run is ended, or hangs, in turn; what is promised for each holds."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
from multiprocessing import forkserver

import pytest
import torch

from torchrl_dvla.collectors import EpisodeSpec, GroupConfig, InferenceConfig
from torchrl_dvla.data.schema import DECISION_INDEX_KEY, POLICY_VERSION_KEY, ROLLOUT_ID_KEY
from torchrl_dvla.testing import Fault, FaultyEnvFactory

from .counting_task import make_env, make_initialised_policy

KEPT_FAILING = "the environment kept failing"


def learn(collector, num_updates=1, learned=None):
    """Take updates; every rollout that comes is whole and came never before."""
    learned = set() if learned is None else learned
    for _ in range(num_updates):
        rows = torch.cat([batch.clone() for batch in collector.replay_buffer])
        collector.update_policy_weights_()
        ids = set(rows[ROLLOUT_ID_KEY].flatten().tolist())
        assert not ids & learned, "learned from twice"
        learned |= ids
        for rollout_id in ids:
            mine = rows[(rows[ROLLOUT_ID_KEY] == rollout_id).squeeze(-1)]
            order = sorted(mine[DECISION_INDEX_KEY].flatten().tolist())
            assert order == list(range(len(order)))
    return learned


def process(name):
    return next(p for p in multiprocessing.active_children() if p.name == name)


@pytest.mark.parametrize("victim", ["dvla-env-0", "dvla-inference", "fork server"])
def test_a_killed_process_costs_no_group(start_collector, victim):
    collector = start_collector(workers={"num_workers": 2, "max_failures": 2})
    learned = learn(collector)
    pid = process(victim).pid if victim != "fork server" else forkserver._forkserver._forkserver_pid
    os.kill(pid, signal.SIGKILL)
    # More than can have been finished before: at lag 1 four groups, two cohorts, are under way.
    learn(collector, 4, learned)
    stats = collector.stats()
    num_lost = stats.get("faults/workers_replaced", 0), stats.get("faults/inference_restarts", 0)
    assert num_lost == {"dvla-env-0": (1, 0), "dvla-inference": (0, 1)}.get(victim, (2, 1))
    assert "faults/groups_dropped" not in stats
    admitted = stats["buffer/groups_admitted"]
    learned_or_dropped = 2 * 5 + stats["buffer/groups_dropped"]
    assert admitted - learned_or_dropped <= 4, "every admitted group is learned, dropped or open"


@pytest.mark.parametrize("kind", ["kill", "raise"])
@pytest.mark.parametrize("place", ["reset", "step"])
def test_a_lost_worker_loses_no_rollout(start_collector, tmp_path, kind, place):
    fault = Fault(kind, place, at=2, once_path=str(tmp_path / "struck"))
    collector = start_collector(FaultyEnvFactory(make_env, [fault]))
    assert len(learn(collector)) == 6
    assert (tmp_path / "struck").exists()
    assert collector.stats()["faults/workers_replaced"] == 1


@pytest.mark.parametrize("place", ["step", "reset"])
def test_a_worker_that_lets_nothing_run_is_replaced_in_time(start_collector, tmp_path, place):
    fault = Fault("stall", place, at=2, once_path=str(tmp_path / "struck"))
    limit = {f"{place}_timeout_s": 3.0}  # the others are minutes
    collector = start_collector(FaultyEnvFactory(make_env, [fault]), workers=limit)
    learn(collector, 2)
    assert collector.stats()["faults/workers_replaced"] == 1


def test_the_log_shows_where_a_hung_worker_was(start_collector, tmp_path, caplog):
    fault = Fault("hang", "step", at=2, once_path=str(tmp_path / "struck"))
    limit = {"step_timeout_s": 1.0}
    collector = start_collector(FaultyEnvFactory(make_env, [fault]), workers=limit)
    learn(collector)
    assert "stepping took more than step_timeout_s=1 s" in caplog.text
    assert "in strike" in caplog.text and "run_env_worker" in caplog.text


class FirstStartLimited:
    """The limits of a collector; the first worker that is started again has one second."""

    def __init__(self, config):
        self._config = config
        self._limits = itertools.chain([1.0, 1.0], itertools.repeat(300.0))  # read twice, to log it

    def __getattr__(self, name):
        return next(self._limits) if name == "start_timeout_s" else getattr(self._config, name)


def test_a_replacement_that_hangs_as_it_starts_is_replaced_too(make_collector, tmp_path, caplog):
    gate = str(tmp_path / "gate")

    def make():
        if os.path.exists(gate):
            with open(gate, "w"):  # both ends are opened together
                os.unlink(gate)
            multiprocessing.Event().wait()
        return make_env()

    collector = make_collector(make)
    envs = collector._loop.envs
    envs._config = FirstStartLimited(envs._config)
    os.mkfifo(gate)
    collector.start()
    os.kill(process("dvla-env-0").pid, signal.SIGKILL)
    with open(gate) as reached:
        reached.read()
    learn(collector, 2)
    assert collector.stats()["faults/workers_replaced"] == 2
    assert "starting took more than start_timeout_s=1 s" in caplog.text
    assert "in make" in caplog.text, "the stack says where"


def policy_that_strikes(number, strike):
    """Builds a policy that calls ``strike`` before the ``number``-th decision of its process."""
    policy = make_initialised_policy()

    def make():
        calls = itertools.count(1)

        def count(module, args):
            if next(calls) == number:
                strike()

        policy.register_forward_pre_hook(count)
        return policy

    return make


def test_a_hung_inference_process_is_replaced_at_its_deadline(start_collector, tmp_path, caplog):
    gate = str(tmp_path / "hung")

    def hang():
        if not os.path.exists(gate):
            open(gate, "w").close()
            multiprocessing.Event().wait()

    policy_factory = policy_that_strikes(10, hang)
    inference = InferenceConfig(timeout_s=1.0)
    collector = start_collector(inference=inference, policy_factory=policy_factory)
    learn(collector, 5)
    assert os.path.exists(gate)
    assert collector.stats()["faults/inference_restarts"] == 1
    assert "a call took more than timeout_s=1 s" in caplog.text and "in hang" in caplog.text


def test_an_evaluation_never_mixes_two_versions(make_collector, tmp_path):
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def die_once():
        if os.path.exists(gate):
            with open(gate) as published:  # both ends are opened together
                os.unlink(gate)
                published.read()
            os.kill(os.getpid(), signal.SIGKILL)

    collector = make_collector(policy_factory=policy_that_strikes(6, die_once))
    evaluation = collector.evaluate([EpisodeSpec("default", seed) for seed in range(8)])
    with open(gate, "w"):
        assert evaluation.num_finished > 0
        collector.update_policy_weights_()
    assert evaluation.result(60.0).policy_version == 1
    assert {rollout.last_policy_version for rollout in evaluation._finished.values()} == {1}
    assert collector.stats()["faults/inference_restarts"] == 1


def test_an_evaluation_that_ends_with_the_collection_says_why(make_collector):
    def broken():
        policy = make_initialised_policy()
        policy.register_forward_pre_hook(lambda module, args: 1 / 0)
        return policy

    collector = make_collector(policy_factory=broken)
    evaluation = collector.evaluate([EpisodeSpec("default", 0)])
    with pytest.raises(RuntimeError, match="ended before the evaluation") as raised:
        evaluation.result(60.0)
    assert "ZeroDivisionError" in str(raised.value.__cause__)


def test_a_worker_that_leaks_is_recycled_between_rollouts(start_collector):
    leak = Fault("leak", "reset", at=1, repeat=True, leak_bytes=100 << 20)
    collector = start_collector(
        FaultyEnvFactory(make_env, [leak]), workers={"max_rss_bytes": "600MB", "num_workers": 2}
    )
    learned = set()
    while collector.stats().get("faults/workers_recycled", 0) < 2:
        learn(collector, 1, learned)
    assert "faults/workers_replaced" not in collector.stats(), "recycling is no failure"


def test_a_task_that_keeps_failing_is_quarantined_and_the_others_go_on(make_collector, caplog):
    bad = FaultyEnvFactory(make_env, [Fault("raise", "step", repeat=True)])
    collector = make_collector(
        {"bad": bad, "good": make_env},
        workers={"num_workers": 2, "max_rollout_failures": 1, "max_task_failures": 2},
    )
    episodes = [EpisodeSpec("good", 0), EpisodeSpec("bad", 0)]
    collector.start()
    learned = set()
    for _ in range(4):
        learn(collector, 1, learned)
        assert {group.spec.task for group in collector.replay_buffer.cohort} == {"good"}
    assert "Task 'bad' is quarantined" in caplog.text and "injected at step 0" in caplog.text
    stats = collector.stats()
    assert stats["faults/tasks_quarantined"] == 1
    assert stats["faults/workers_replaced"] <= 4, "no restart after that"
    assert collector.replay_buffer.groups.drop_counts()[KEPT_FAILING]["count"] >= 2
    with pytest.raises(ValueError, match="quarantined"):
        collector.evaluate(episodes)


def test_an_environment_of_another_task_is_compared_with_the_first(start_collector, caplog):
    def blind():
        env = make_env()
        env.set_spec_lock_(False)
        del env.observation_spec["success"]
        return env

    small = functools.partial(make_env, image_size=(8, 8))
    workers = {"num_workers": 2, "max_rollout_failures": 1, "max_task_failures": 2}
    collector = start_collector({"1": make_env, "blind": blind, "small": small}, workers=workers)
    learn(collector, 3)
    assert caplog.text.count("'blind' have no 'success'") == caplog.text.count("no 'success'") == 1
    assert "Task 'small' is quarantined" in caplog.text and "first one's specs" in caplog.text
    assert "faults/workers_replaced" not in collector.stats()


@pytest.mark.parametrize(
    ("limit", "at", "message", "num_replaced"),
    [
        ({"max_rollout_failures": 2}, 0, r"max_task_failures \(3\).*injected at step 0", 6),
        ({"max_failures": 1}, 1, "max_failures.*injected at step 1", None),
    ],
)
def test_failures_without_end_reach_the_learner(start_collector, limit, at, message, num_replaced):
    fault = Fault("raise", "step", at=at, repeat=True)
    collector = start_collector(FaultyEnvFactory(make_env, [fault]), workers=limit)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        learn(collector, 1)
    assert num_replaced in (None, collector.stats()["faults/workers_replaced"])


def test_a_replacement_with_other_specs_is_refused(start_collector, tmp_path):
    changed = str(tmp_path / "changed")
    fault = Fault("kill", "step", at=1, once_path=changed)

    def make():
        size = (8, 8) if os.path.exists(changed) else (16, 16)
        return FaultyEnvFactory(make_env, [fault])(image_size=size)

    collector = start_collector(make, workers={"max_failures": 2})
    with pytest.raises(RuntimeError, match=r"(?s)specs.*Make create_env_fn deterministic"):
        learn(collector, 2)


def test_the_newest_weights_serve_after_a_restart(start_collector):
    group = GroupConfig(group_size=3, groups_per_update=1, max_policy_lag=0)
    collector = start_collector(group=group)
    learn(collector, 3)
    os.kill(process("dvla-inference").pid, signal.SIGKILL)
    for batch in collector.replay_buffer:
        assert (batch[POLICY_VERSION_KEY] == 3).all()
