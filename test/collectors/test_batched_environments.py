# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Batched environments in whole runs, beside single ones of the same seeds."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys

import cloudpickle
import pytest
import torch
from torchrl.envs import SerialEnv, SuccessReward, ToyVLAEnv, TransformedEnv

from torchrl_dvla.collectors import EpisodeSpec, GroupConfig, InferenceConfig, InitStateSchedule
from torchrl_dvla.data import schema
from torchrl_dvla.envs import ChunkEnv, ToyChunkEnv
from torchrl_dvla.testing import Fault, FaultyEnvFactory

from .counting_task import make_policy

# Workers cannot import this module: they get its functions whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

GROUP = GroupConfig(group_size=3, groups_per_update=2, max_policy_lag=0)
make_single = functools.partial(
    ToyChunkEnv, chunk_size=4, image_size=16, success_steps=1, success_tol=0.5
)
make_batched = functools.partial(make_single, batch_size=[4])
SINGLE = {"num_workers": 2, "envs_per_worker": 4, "max_decisions": 4}
BATCHED = {"num_workers": 2, "envs_per_worker": 1, "max_decisions": 4}


def make_policy_of_the_toy():
    policy = make_policy()
    policy(make_single().reset().unsqueeze(0))
    torch.manual_seed(0)
    return policy


def learn(collector, num_updates):
    """All rows of some updates, each learned from by random steps of its weights."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_updates):
        rows.append(torch.cat([batch.clone() for batch in collector.replay_buffer]))
        for parameter in collector.policy.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        collector.update_policy_weights_()
    return rows


def assert_whole(rows):
    """Rollouts are whole, those of a group begin in one scene, and each ends at its last row."""
    ids = rows[schema.ROLLOUT_ID_KEY].flatten()
    for rollout_id in ids.unique():
        mine = rows[ids == rollout_id]
        order = mine[schema.DECISION_INDEX_KEY].flatten().argsort()
        assert mine[schema.DECISION_INDEX_KEY].flatten()[order].tolist() == list(range(len(mine)))
        done = mine[schema.DONE_KEY].flatten()[order].tolist()
        assert done == [False] * (len(mine) - 1) + [True]
        states, chunks = mine[schema.STATE_KEY][order], mine[schema.ACTION_CHUNK_KEY][order]
        # The state shows the last action of the chunk before: the row's own, not a neighbour's.
        assert torch.equal(states[1:, :2], chunks[:-1, -1])
        assert (states[:, 2:] == states[0, 2:]).all()
    first = rows[(rows[schema.DECISION_INDEX_KEY] == 0).squeeze(-1)]
    for group_id in first[schema.GROUP_ID_KEY].unique():
        states = first[(first[schema.GROUP_ID_KEY] == group_id).squeeze(-1)][schema.STATE_KEY]
        assert len(states) == 3 and (states == states[0]).all()


@pytest.mark.parametrize("num_kills", [0, 2])
def test_rollouts_of_a_batch_are_groups_of_rollouts_with_pages_of_their_own(
    start_collector, num_kills
):
    collector = start_collector(
        make_batched, policy=make_policy_of_the_toy(), group=GROUP, workers=BATCHED
    )
    learned = []
    for update in range(6):
        learned += learn(collector, 1)
        if update < num_kills:
            worker = next(p for p in multiprocessing.active_children() if p.name == "dvla-env-0")
            os.kill(worker.pid, signal.SIGKILL)
    ids = [set(rows[schema.ROLLOUT_ID_KEY].flatten().tolist()) for rows in learned]
    assert sum(map(len, ids)) == len(set.union(*ids)), "learned from twice"
    for rows in learned:
        assert_whole(rows)
    stats = collector.stats()
    assert stats.get("faults/workers_replaced", 0) == num_kills
    assert "faults/groups_dropped" not in stats
    collector.memory.environment.check()


def test_a_batched_environment_that_crashes_costs_no_group(start_collector, tmp_path):
    fault = Fault("raise", "step", at=2, once_path=str(tmp_path / "struck"))
    collector = start_collector(
        FaultyEnvFactory(make_batched, [fault]),
        policy=make_policy_of_the_toy(),
        group=GROUP,
        workers={**BATCHED, "num_workers": 1},
    )
    for rows in learn(collector, 2):
        assert_whole(rows)
    stats = collector.stats()
    assert (stats["faults/workers_replaced"], "faults/groups_dropped" in stats) == (1, False)


def test_greedy_episodes_are_those_of_single_environments(make_collector):
    episodes = [EpisodeSpec("default", seed) for seed in range(40)]
    results = []
    for make, workers in ((make_single, SINGLE), (make_batched, BATCHED)):
        collector = make_collector(make, policy=make_policy_of_the_toy(), workers=workers)
        results.append(collector.evaluate(episodes).result(60.0))
    single, batched = results
    assert 0 < sum(single.successes) < 40
    assert single.successes == batched.successes
    assert single.num_env_steps == batched.num_env_steps


@pytest.mark.parametrize("max_batch_size", [None, 3])
def test_in_lockstep_a_batch_samples_what_single_environments_do(start_collector, max_batch_size):
    runs = []
    for make, workers in ((make_single, SINGLE), (make_batched, BATCHED)):
        collector = start_collector(
            make,
            policy=make_policy_of_the_toy(),
            group=GROUP,
            workers=workers,
            inference=InferenceConfig(max_batch_size=max_batch_size),
        )
        runs.append(learn(collector, 2))
        collector.shutdown()
    for of_singles, of_batches in zip(*runs, strict=True):
        assert set(of_singles.keys(True, True)) == set(of_batches.keys(True, True))
        for key in of_singles.exclude(schema.INSTRUCTION_KEY).keys(True, True):
            assert torch.equal(of_singles[key], of_batches[key]), key


def make_serial():
    def make_base():
        return TransformedEnv(ToyVLAEnv(2, 4, success_steps=2, success_tol=0.5), SuccessReward())

    return ChunkEnv(SerialEnv(4, make_base), chunk_size=4)


def test_a_serial_env_is_sampled_from(start_collector):
    collector = start_collector(
        make_serial, policy=make_policy_of_the_toy(), group=GROUP, workers=BATCHED
    )
    [rows] = learn(collector, 1)
    assert len(rows[schema.ROLLOUT_ID_KEY].unique()) == 6
    assert_whole(rows)


# -- what is refused ------------------------------------------------------------------------------
class Unseeded(ToyChunkEnv):
    """Its episodes begin in scenes of their own."""

    def _seeded_target(self, is_reset, seeds):
        return self._sample_target()


def test_a_group_in_four_scenes_ends_the_run_by_the_name_of_its_task(start_collector):
    collector = start_collector(
        {"reach": lambda: Unseeded(chunk_size=4, image_size=16, batch_size=[4])},
        policy=make_policy_of_the_toy(),
        group=GroupConfig(group_size=4, groups_per_update=2),
        workers={**BATCHED, "num_workers": 1},
    )
    message = "(?s)must start from the same observation, got .* task 'reach' ignores its seed"
    with pytest.raises(RuntimeError, match=message):
        next(iter(collector.replay_buffer))
    assert collector.stats()["buffer/groups_admitted"] <= 2


def test_a_batch_size_that_changes_between_workers(make_collector):
    def make():
        size = 3 if multiprocessing.current_process().name == "dvla-env-1" else 4
        return make_single(batch_size=[size])

    with pytest.raises(RuntimeError, match=r"(?s)same specs.*num_rollouts=4.* num_rollouts=3"):
        make_collector(make, policy=make_policy_of_the_toy(), workers=BATCHED)


def test_a_batch_size_that_changes_between_tasks(start_collector, caplog):
    collector = start_collector(
        {"four": make_batched, "three": functools.partial(make_single, batch_size=[3])},
        policy=make_policy_of_the_toy(),
        group=GROUP,
        workers={**BATCHED, "max_task_failures": 1, "max_rollout_failures": 1},
        schedule=InitStateSchedule(("four", "three")),
    )
    learn(collector, 1)
    assert "Task 'three' is quarantined" in caplog.text
    assert "must have the first one's batch size, 4, got 3" in caplog.text
