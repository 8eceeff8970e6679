# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every pair of stamped and learned version, and the fate of every group that was admitted.

``G = groups_per_update``, ``L = max_policy_lag``, ``N`` updates. The cohort of update ``N - L`` was
taken at version ``N - L - 1``, so ``G (N - L)`` groups had been admitted by then; all of them were
due at version ``N - 1`` at the latest. Ids count up, hence after ``N`` updates none of the first
``G (N - L)`` groups can be unlearned: whatever became of *these* is what is compared with what was
sampled, and nothing of it is up to chance.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import threading
from collections import Counter, defaultdict

import cloudpickle
import pytest
import torch

from torchrl_dvla.collectors import EpisodeSpec, GroupConfig, InitStateSchedule
from torchrl_dvla.data import schema
from torchrl_dvla.testing import CountingChunkEnv, Latency

NUM_UPDATES, GROUPS_PER_UPDATE, GROUP_SIZE = 10, 2, 3
CHUNK_SIZE, MAX_ENV_STEPS = 4, 32
ENV_KWARGS = {
    "chunk_size": CHUNK_SIZE,
    "max_env_steps": MAX_ENV_STEPS,
    "length": "heavy_tailed",
    "step_latency_s": Latency(0.001, tail_index=1.5, seed=5),
}
WORKERS = {"num_workers": 2, "envs_per_worker": 4, "max_decisions": MAX_ENV_STEPS // CHUNK_SIZE}
# Workers cannot import this module: they get its classes whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class OwnReturnEnv(CountingChunkEnv):
    """Pays for each chunk what its tokens are as a number, so that no two rollouts return the same.

    Every group has contrast, then, and is kept. Success ends no episode: its length is the scene's.

    Keyword Args:
        gate (str, optional): a named pipe; a step of the scene of ``gated_seed`` waits until
            somebody opens it for writing.
        gated_seed (int): see ``gate``.
    """

    def __init__(self, *, gate=None, gated_seed=-1, **kwargs):
        super().__init__(stop_on_success=False, **kwargs)
        self.gate, self.gated_seed = gate, gated_seed
        digits = torch.arange(self.chunk_size * self.action_dim)
        self.weights = (8.0**-digits).view(self.chunk_size, self.action_dim)

    def _step(self, tensordict):
        if self.gate is not None and self._seed == self.gated_seed:
            with open(self.gate):
                pass
        out = super()._step(tensordict)
        chunk = tensordict.get(schema.ACTION_CHUNK_KEY)
        return out.set("reward", (chunk * self.weights).sum().view(1))


class Learner:
    """Takes updates at an irregular speed, and writes down what it meets.

    Sometimes it takes a cohort, or publishes, as soon as it can; sometimes only once sampling has
    come to rest because nothing more is admitted: no learner can be slower than that.
    """

    def __init__(self, collector, seed):
        self.collector = collector
        self.groups = collector.replay_buffer.groups
        #: Every group that is sampled to its end, by id.
        self.sampled = {}
        self.complete, self.groups.complete = self.groups.complete, self.record
        self.pace = random.Random(seed)
        self.changed = threading.Event()
        self.groups.add_listener(self.changed.set)
        self.pairs = Counter()
        self.group_ids = []  # in the order of learning
        self.rollout_ids = []
        #: Env steps of the learned rollouts, by group.
        self.lengths = defaultdict(list)

    def record(self, group):
        assert group.group_id not in self.sampled
        self.sampled[group.group_id] = group
        self.complete(group)

    def dawdle(self):
        if self.pace.random() < 0.5:
            return
        while True:
            self.changed.clear()
            config = self.groups.config
            limit = (config.max_policy_lag + 1) * config.groups_per_update
            if not self.groups.running and len(self.groups) == limit:
                return
            assert self.changed.wait(60.0), "sampling never came to rest"

    def update(self):
        self.dawdle()
        parts = []
        for batch in self.collector.replay_buffer:
            learned_at = self.collector.policy_version
            stamps = batch[schema.POLICY_VERSION_KEY].flatten().tolist()
            self.pairs.update((stamp, learned_at) for stamp in stamps)
            keys = (schema.GROUP_ID_KEY, schema.ROLLOUT_ID_KEY)
            num_env_steps = (~batch[schema.ACTION_IS_PAD_KEY]).sum(-1, keepdim=True)
            parts.append(torch.cat([*(batch[key] for key in keys), num_env_steps], -1).clone())
        rows = torch.cat(parts)
        for rollout_id in rows[:, 1].unique().tolist():
            chosen = rows[rows[:, 1] == rollout_id]
            self.rollout_ids.append(rollout_id)
            self.lengths[int(chosen[0, 0])].append(int(chosen[:, 2].sum()))
        self.group_ids += rows[:, 0].unique().tolist()
        self.dawdle()
        self.collector.update_policy_weights_()


def run(make_collector, make_env, *, max_policy_lag, seed, **group):
    """Learn NUM_UPDATES times, and end the collection."""
    group = GroupConfig(
        group_size=GROUP_SIZE,
        groups_per_update=GROUPS_PER_UPDATE,
        max_policy_lag=max_policy_lag,
        **group,
    )
    collector = make_collector(make_env, group=group, workers=WORKERS, batch_size=16, seed=seed)
    learner = Learner(collector, seed)
    collector.start()
    for _ in range(NUM_UPDATES):
        learner.update()
    collector.shutdown()
    assert collector.policy_version == NUM_UPDATES
    return collector, learner


def check_bound_and_fates(collector, learner):
    """What must hold of every run.

    Returns:
        set of int: the groups that were dropped, each for its returns.
    """
    lags = {learned_at - stamp for stamp, learned_at in learner.pairs}
    assert min(lags) >= 0 and max(lags) <= collector.group.max_policy_lag
    if collector.group.max_policy_lag:
        assert max(lags) > 0, "nothing was learned late: the bound was not put to the test"

    assert len(learner.group_ids) == len(set(learner.group_ids)) == NUM_UPDATES * GROUPS_PER_UPDATE
    assert len(learner.rollout_ids) == len(set(learner.rollout_ids))
    assert len(learner.rollout_ids) == len(learner.group_ids) * GROUP_SIZE

    sampled = learner.sampled
    dropped = {key: group.drop_reason for key, group in sampled.items() if not group.kept}
    reasons = ("no contrast", "mean return outside")
    assert all(reason.startswith(reasons) for reason in dropped.values())
    counts = collector.replay_buffer.groups.drop_counts()
    assert {reason: of["count"] for reason, of in counts.items()} == Counter(dropped.values())
    running = [group.group_id for group in learner.groups.running]
    fates = [*learner.group_ids, *dropped, *running]
    stored = [key for key in sampled if key not in dropped and key not in learner.lengths]
    assert sorted(fates + stored) == list(range(collector.stats()["buffer/groups_admitted"]))
    assert sorted(group.group_id for group in learner.groups.stored) == sorted(stored)
    # Of what was learned, nothing is missing, and nothing was added.
    for key, lengths in learner.lengths.items():
        expected = [rollout.num_env_steps for rollout in sampled[key].rollouts]
        assert sorted(lengths) == sorted(expected)
    num_due = GROUPS_PER_UPDATE * (NUM_UPDATES - collector.group.max_policy_lag)
    assert set(range(num_due)) <= set(learner.group_ids) | set(dropped)
    return set(dropped)


@pytest.mark.parametrize(("max_policy_lag", "seed"), [(0, 1), (1, 2), (2, 3), (4, 4)])
def test_lengths_that_are_learned_are_those_that_were_sampled(make_collector, max_policy_lag, seed):
    make_env = functools.partial(OwnReturnEnv, **ENV_KWARGS)
    collector, learner = run(make_collector, make_env, max_policy_lag=max_policy_lag, seed=seed)
    assert check_bound_and_fates(collector, learner) == set()
    num_due = GROUPS_PER_UPDATE * (NUM_UPDATES - max_policy_lag)
    env, schedule = make_env(), InitStateSchedule(seed=seed)
    limits = [env.scene(next(schedule).seed).num_env_steps for _ in range(num_due)]
    assert min(limits) < MAX_ENV_STEPS == max(limits), "there are short episodes and cut tails"
    learned = Counter(length for key in range(num_due) for length in learner.lengths[key])
    assert learned == Counter(limits * GROUP_SIZE)


@pytest.mark.parametrize(("max_policy_lag", "seed"), [(1, 7), (3, 8)])
def test_groups_are_dropped_for_their_returns_alone(make_collector, max_policy_lag, seed):
    # Successes end early here, so lengths differ within a group, and dropping by age would show.
    make_env = functools.partial(CountingChunkEnv, required_fraction=0.5, **ENV_KWARGS)
    collector, learner = run(
        make_collector, make_env, max_policy_lag=max_policy_lag, seed=seed, return_bounds=(0.5, 1.0)
    )
    dropped = check_bound_and_fates(collector, learner)
    # Decided by hand from the returns: two successes of three are kept, and nothing else is.
    for key, group in learner.sampled.items():
        successes = sum(rollout.success for rollout in group.candidates)
        assert (key in dropped) == (successes != 2)
    assert dropped, "some groups have no contrast"
    lengths = [set(numbers) for numbers in learner.lengths.values()]
    assert any(len(numbers) > 1 for numbers in lengths)


def test_a_straggler_is_overtaken_until_its_deadline_and_then_waited_for(make_collector, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = next(InitStateSchedule(seed=0))
    assert first == EpisodeSpec("default", 0)
    collector = make_collector(
        functools.partial(OwnReturnEnv, max_env_steps=8, gate=str(gate), gated_seed=first.seed),
        group=GroupConfig(group_size=2, groups_per_update=1, max_policy_lag=2),
        # Two workers hang in group 0; the third samples groups 1 and 2, one after the other.
        workers={"num_workers": 3},
    )
    buffer = collector.replay_buffer
    pairs = []

    def update():
        for batch in buffer:
            version = collector.policy_version
            pairs.extend((stamp, version) for stamp in batch[schema.POLICY_VERSION_KEY].flatten())
        group_id = buffer.cohort[0].group_id
        collector.update_policy_weights_()
        return group_id

    collector.start()
    assert [update(), update()] == [1, 2]
    buffer.timeout_s = 0.05
    with pytest.raises(TimeoutError, match=r"Groups \[0\] can wait no longer than version 2"):
        update()
    buffer.timeout_s = 60.0
    # Opened for both, so that this open does not wait for a reader and later ones pass.
    descriptor = os.open(gate, os.O_RDWR)
    try:
        pairs.clear()
        assert update() == 0
    finally:
        os.close(descriptor)
    # Two decisions of two rollouts: one before the gate, at whatever version a slow worker came to
    # it, and one after it.
    stamps = sorted(int(stamp) for stamp, _ in pairs)
    assert len(stamps) == 4 and stamps[0] >= 0 and stamps[2:] == [2, 2]
    assert {version for _, version in pairs} == {2}
    assert buffer.groups.drop_counts() == {}
