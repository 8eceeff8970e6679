# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Lag 0 on real processes against a plain loop without any: equal to the last bit."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import random
from collections import deque

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.collectors import EpisodeSpec, GroupConfig, InferenceConfig, InitStateSchedule
from torchrl_dvla.data import schema
from torchrl_dvla.data.replay_buffer import CohortPlan
from torchrl_dvla.functional import group_advantage
from torchrl_dvla.objectives import GRPOLoss
from torchrl_dvla.swimlane import batch_seed
from torchrl_dvla.testing import Latency

from .counting_task import make_env, make_initialised_policy

NUM_UPDATES, NUM_SLOTS, GROUP_SIZE, GROUPS_PER_UPDATE, MAX_DECISIONS = 4, 4, 3, 2, 4
BATCH_SIZE, NUM_EPOCHS, SEED = 7, 2, 11
GROUP = GroupConfig(group_size=GROUP_SIZE, groups_per_update=GROUPS_PER_UPDATE, max_policy_lag=0)


class Learner:
    """Policy, loss and optimiser; keeps every batch, loss and weight that it meets."""

    def __init__(self):
        self.policy = make_initialised_policy()
        self.loss = GRPOLoss(self.policy, entropy_coeff=0.03)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-2)
        self.batches, self.losses, self.weights = [], [], []

    def learn(self, batches):
        for batch in batches:
            losses = self.loss(batch)
            (losses["loss_objective"] + losses["loss_entropy"]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.batches.append(batch.clone())
            self.losses.append(losses.detach().clone())
        self.weights.append([p.detach().clone() for p in self.policy.parameters()])

    def assert_equals(self, other):
        assert len(self.batches) == len(other.batches) > NUM_UPDATES
        for ours, theirs in zip(self.batches, other.batches, strict=True):
            assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
            for key in ours.keys(True, True):
                if key == schema.INSTRUCTION_KEY:
                    assert ours[key] == theirs[key]
                else:
                    assert torch.equal(ours[key], theirs[key]), key
        for ours, theirs in zip(self.losses, other.losses, strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in sorted(ours.keys()))
        for ours, theirs in zip(self.weights, other.weights, strict=True):
            assert all(map(torch.equal, ours, theirs))


class Episode:
    """One rollout of the plain loop."""

    def __init__(self, spec, group_id, rollout_id):
        self.spec, self.group_id, self.rollout_id = spec, group_id, rollout_id
        self.rows = []

    def reset(self, env):
        self.env = env
        env.set_seed(self.spec.seed)
        id_ = torch.tensor([self.spec.init_state_id])
        self.observed = env.reset(TensorDict({schema.INIT_STATE_ID_KEY: id_}))

    def step(self, decision, version):
        """Take one decision; whether the episode goes on."""
        taken = self.observed.clone().set(schema.ACTION_CHUNK_KEY, decision["vla_action", "chunk"])
        after = self.env.step(taken)
        outcome = after["next"]
        column = functools.partial(torch.full, (1,))
        row = TensorDict(
            {
                "observation": taken["observation"],
                "vla_action": {key: decision["vla_action", key] for key in ("tokens", "chunk")},
                schema.SAMPLE_LOG_PROB_KEY: decision[schema.SAMPLE_LOG_PROB_KEY],
                "next": outcome.select("reward", "done", "terminated", "truncated"),
                schema.SUCCESS_KEY: outcome["success"],
                schema.ACTION_IS_PAD_KEY: outcome[schema.ACTION_IS_PAD_KEY],
                schema.POLICY_VERSION_KEY: column(version),
                schema.GROUP_ID_KEY: column(self.group_id),
                schema.ROLLOUT_ID_KEY: column(self.rollout_id),
                schema.DECISION_INDEX_KEY: column(len(self.rows)),
                schema.INSTRUCTION_ID_KEY: column(0),
            }
        )
        self.rows.append(row)
        self.observed = self.env.step_mdp(after)
        return not outcome["done"]


class SequentialLoop:
    """What the collector is at lag 0, without processes, pages, threads or messages."""

    def __init__(self, policy):
        self.policy = policy
        self.envs = [make_env() for _ in range(NUM_SLOTS)]
        self.schedule = InitStateSchedule(seed=SEED)
        self.num_calls, self.group_ids, self.rollout_ids = 0, itertools.count(), itertools.count()
        self.num_dropped = 0

    def collect(self, version):
        """The kept groups of one update, oldest first."""
        slots = [None] * NUM_SLOTS
        pending, finished, kept = deque(), {}, {}
        while len(kept) < GROUPS_PER_UPDATE:
            for index in range(NUM_SLOTS):
                if slots[index] is not None:
                    continue
                if not pending and len(finished) + len(kept) < GROUPS_PER_UPDATE:
                    spec, group_id = next(self.schedule), next(self.group_ids)
                    finished[group_id] = []
                    for _ in range(GROUP_SIZE):
                        pending.append(Episode(spec, group_id, next(self.rollout_ids)))
                if pending:
                    slots[index] = pending.popleft()
                    slots[index].reset(self.envs[index])
            running = [episode for episode in slots if episode is not None]
            for episode, decision in zip(running, self.decide(running), strict=True):
                if episode.step(decision, version):
                    continue
                slots[slots.index(episode)] = None
                group = finished[episode.group_id]
                group.append(episode)
                if len(group) == GROUP_SIZE:
                    self.judge(finished.pop(episode.group_id), kept)
        return [kept[group_id] for group_id in sorted(kept)]

    def decide(self, running):
        images, states = (
            torch.stack([episode.observed[key] for episode in running])
            for key in (schema.IMAGE_KEY, schema.STATE_KEY)
        )
        batch = TensorDict({schema.IMAGE_KEY: images, schema.STATE_KEY: states}, [len(running)])
        texts = [episode.env.instruction for episode in running]
        batch.set(schema.INSTRUCTION_KEY, NonTensorStack(*texts))
        torch.manual_seed(batch_seed(SEED, self.num_calls))
        self.num_calls += 1
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            return self.policy(batch)

    def judge(self, episodes, kept):
        episodes.sort(key=lambda episode: episode.rollout_id)
        returns = [sum(float(row[schema.REWARD_KEY]) for row in e.rows) for e in episodes]
        if min(returns) == max(returns):
            self.num_dropped += 1
            return
        advantages = group_advantage(torch.tensor(returns))
        rows = []
        for episode, advantage in zip(episodes, advantages, strict=True):
            for row in episode.rows:
                row.set(schema.ADVANTAGE_KEY, advantage.view(1))
                row.set(schema.NUM_DECISIONS_KEY, torch.tensor([len(episode.rows)]))
            rows += episode.rows
        kept[episodes[0].group_id] = torch.stack(rows)

    def batches(self, update):
        rows = torch.cat(self.collect(update))
        rows.set(schema.INSTRUCTION_KEY, NonTensorStack(*[self.envs[0].instruction] * len(rows)))
        plan = CohortPlan(len(rows), BATCH_SIZE, NUM_EPOCHS, seed=0, update=update)
        while not plan.is_over:
            yield rows[plan.row_ordinals()]
            plan.position += 1


@pytest.fixture(scope="module")
def sequential():
    learner = Learner()
    loop = SequentialLoop(make_initialised_policy())
    for update in range(NUM_UPDATES):
        loop.policy.load_state_dict(learner.policy.state_dict())
        learner.learn(list(loop.batches(update)))
    assert loop.num_dropped > 0, "groups without contrast belong to what is compared"
    return learner


def slow_env(latency_seed):
    """Heavy-tailed waits that differ from worker to worker: answers come in ever new orders."""

    def make():  # nested, so that it is pickled by value: workers cannot import this file
        name = multiprocessing.current_process().name
        seed = random.Random(f"{latency_seed}/{name}").randrange(1000)
        latency = Latency(0.004, tail_index=1.2, seed=seed)
        return make_env(step_latency_s=latency)

    return make


def run(start_collector, create_env_fn=None, *, before_update=lambda collector: None, **kwargs):
    """The learner of a collector on four environments in two workers."""
    learner = Learner()
    collector = start_collector(
        create_env_fn,
        policy=learner.policy,
        group=GROUP,
        workers={"num_workers": 2, "envs_per_worker": 2, "max_decisions": MAX_DECISIONS},
        batch_size=BATCH_SIZE,
        num_epochs=NUM_EPOCHS,
        seed=SEED,
        **kwargs,
    )
    for _ in range(NUM_UPDATES):
        before_update(collector)
        learner.learn(collector.replay_buffer)
        collector.update_policy_weights_()
    return learner


@pytest.mark.parametrize("latency_seed", [0, 1, 2])
def test_lag_0_equals_a_sequential_loop(start_collector, sequential, latency_seed):
    run(start_collector, slow_env(latency_seed)).assert_equals(sequential)


def test_an_evaluation_beside_training_changes_nothing(start_collector, sequential):
    evaluations, episodes = [], [EpisodeSpec("default", seed=k) for k in range(6)]

    def evaluate(collector):
        evaluations.append(collector.evaluate(episodes, greedy=False))

    run(start_collector, before_update=evaluate).assert_equals(sequential)
    versions = [evaluation.result(60.0).policy_version for evaluation in evaluations]
    assert len(versions) == NUM_UPDATES and versions == sorted(versions)


def test_small_batches_are_deterministic_too(start_collector):
    inference = InferenceConfig(max_batch_size=3)
    first, second = (run(start_collector, slow_env(k), inference=inference) for k in (3, 4))
    first.assert_equals(second)


def test_it_is_deterministic_at_lag_0_alone():
    assert InferenceConfig().is_deterministic(0) and not InferenceConfig().is_deterministic(1)
    assert not InferenceConfig(deterministic=False).is_deterministic(0)
