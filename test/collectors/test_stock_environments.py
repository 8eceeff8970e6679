# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Environments that are not ours, in whole runs."""

from __future__ import annotations

import functools
import sys

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl.data import Binary
from torchrl.envs import RenameTransform, SuccessReward, ToyVLAEnv, TransformedEnv

from torchrl_dvla.collectors import GroupConfig
from torchrl_dvla.data import schema
from torchrl_dvla.envs import ChunkEnv
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.objectives import GRPOLoss
from torchrl_dvla.testing import CountingChunkEnv

from .counting_task import ENV_KWARGS, make_policy

# Workers cannot import this module: they get its functions whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def make_toy():
    env = ToyVLAEnv(action_dim=2, state_dim=4, success_steps=20)
    return ChunkEnv(TransformedEnv(env, SuccessReward()), chunk_size=4)


def test_a_group_of_the_toy_task_is_learned(start_collector):
    collector = start_collector(
        make_toy,
        policy=make_policy(action_dim=2, chunk_size=4),
        # Nobody succeeds within three decisions: groups are kept as they come.
        group=GroupConfig(2, groups_per_update=1, max_no_signal_groups=1, on_no_signal="keep"),
        workers={"envs_per_worker": 2, "max_decisions": 3},
    )
    rows = torch.cat([batch.clone() for batch in collector.replay_buffer])
    collector.update_policy_weights_()
    ids = rows[schema.ROLLOUT_ID_KEY].flatten()
    assert len(rows) == 6 and len(ids.unique()) == 2
    for rollout_id in ids.unique():
        mine = rows[ids == rollout_id]
        assert sorted(mine[schema.DECISION_INDEX_KEY].flatten().tolist()) == [0, 1, 2]
    first = rows[(rows[schema.DECISION_INDEX_KEY] == 0).squeeze(-1)]
    assert torch.equal(*first[schema.STATE_KEY]), "a group shares its scene"
    assert set(rows[schema.INSTRUCTION_KEY]) == {make_toy().reset()[schema.INSTRUCTION_KEY]}
    assert (rows[schema.ADVANTAGE_KEY] == 0).all()


class Line(gym.Env):
    """A number that actions are added to; solved at the fifth env step, and cut at the seventh."""

    observation_space = gym.spaces.Box(-99, 99, (4,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    metadata, render_mode = {"render_modes": ["rgb_array"]}, "rgb_array"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, self.np_random.uniform()
        return np.full(4, self.x, np.float32), {}

    def step(self, action):
        self.t, self.x = self.t + 1, self.x + float(action[0])
        info = {"success": self.t >= 5}
        return np.full(4, self.x, np.float32), self.x, False, self.t == 7, info

    def render(self):
        return np.full((16, 16, 3), self.t, np.uint8)


def test_gymnasiums_environments_by_id_and_by_factory(start_collector, monkeypatch):
    spec = gym.envs.registration.EnvSpec("Line-v0", Line, max_episode_steps=6)
    monkeypatch.setitem(gym.registry, "Line-v0", spec)  # in this process alone, as a script may
    collector = start_collector(
        {"id": "Line-v0", "factory": Line},
        group=GroupConfig(2, groups_per_update=2),
        workers={"envs_per_worker": 2},
    )
    rows = torch.cat([batch.clone() for batch in collector.replay_buffer])
    # Two rollouts of two decisions each: 4 and 2 env steps with the id's time limit, else 4 and 3.
    assert len(rows) == 8
    ends = rows["next", "done"].flatten()
    assert sorted(rows[ends]["action_is_pad"].sum(-1).tolist()) == [1, 1, 2, 2]
    assert not rows[~ends]["action_is_pad"].any()
    assert rows["next", "truncated"].equal(rows["next", "done"])
    assert rows["next", "success"].equal(rows["next", "done"]), "the fifth step is in the second"
    frames = rows["observation", "image"].flatten(1).unique(dim=1).flatten()
    assert sorted(frames.tolist()) == [0] * 4 + [4] * 4
    # Pages have the chunk size of the policy, which nothing else has told.
    assert rows["vla_action", "chunk"].shape == (8, 4, 2)


def test_an_environment_without_a_camera_is_learned(start_collector):
    policy = tiny_token_policy(2, 3, use_image=False)
    collector = start_collector(lambda: ChunkEnv(Line(), state_key="state"), policy=policy)
    loss = GRPOLoss(policy)
    for batch in collector.replay_buffer:
        assert list(batch["observation"].keys()) == ["state"]
        loss(batch)["loss_objective"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in policy.head.parameters())


def test_a_success_function_that_raises_in_the_middle_ends_the_run_by_name(start_collector):
    collector = start_collector(
        lambda: ChunkEnv(Line(), success=lambda td: td["done"] and td["hand"])
    )
    with pytest.raises(RuntimeError, match="(?s)success must not raise, got KeyError.*Correct"):
        next(iter(collector.replay_buffer))


class MaskedEnv(CountingChunkEnv):
    """Forbids the even tokens of the first action dimension, at the root as TorchRL does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.set_spec_lock_(False)
        self.observation_spec["action_mask"] = Binary(shape=(4, 2, 8), dtype=torch.bool)
        self.mask = torch.ones(4, 2, 8, dtype=torch.bool)
        self.mask[:, 0, ::2] = False

    def _observe(self, success, num_executed):
        return super()._observe(success, num_executed) | {"action_mask": self.mask.clone()}


def test_a_mask_of_actions_reaches_the_policy_in_the_lane_and_in_the_loss(start_collector):
    with pytest.raises(RuntimeError, match="RenameTransform"):
        start_collector(functools.partial(MaskedEnv, **ENV_KWARGS))
    mask_key = ("observation", "action_mask")

    def make():
        return TransformedEnv(
            MaskedEnv(**ENV_KWARGS), RenameTransform(["action_mask"], [mask_key], create_copy=False)
        )

    policy = make_policy().set_keys(action_mask=mask_key)
    assert mask_key not in policy.in_keys
    collector = start_collector(make, policy=policy)
    loss = GRPOLoss(policy)
    for batch in collector.replay_buffer:
        tokens = batch["vla_action", "tokens"]
        assert (tokens[..., 0] % 2 == 1).all() and (tokens[..., 1] % 2 == 0).any()
        assert not batch[mask_key][..., 0, ::2].any() and batch[mask_key][..., 1, :].all()
        torch.testing.assert_close(loss(batch)["max_ratio"], torch.tensor(1.0))


class Unseeded(CountingChunkEnv):
    """Its scenes follow from the process and its resets alone, and it says not what is solved."""

    def __init__(self):
        super().__init__(**ENV_KWARGS, seed=id(self))
        del self.observation_spec["success"]

    def _set_seed(self, seed):
        if self._num_resets == 0:
            super()._set_seed(seed)

    def _observe(self, success, num_executed):
        out = super()._observe(success, num_executed)
        del out["success"]
        return out


def test_an_environment_that_ignores_its_seed_ends_the_run(start_collector, caplog):
    collector = start_collector(lambda: Unseeded(), workers={"envs_per_worker": 2})
    with pytest.raises(RuntimeError, match="(?s)same observation.*task 'default' ignores"):
        next(iter(collector.replay_buffer))
    assert caplog.text.count("no 'success'") == 1 and "ChunkEnv(success=...)" in caplog.text
