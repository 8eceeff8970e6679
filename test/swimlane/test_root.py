# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Steps without ``step_mdp`` against TorchRL's own rollout."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Unbounded
from torchrl.envs import (
    Compose,
    InitTracker,
    MultiAction,
    RewardSum,
    StepCounter,
    SuccessReward,
    TransformedEnv,
)
from torchrl.envs.custom import ToyVLAEnv

from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.swimlane.root import Root
from torchrl_dvla.testing import CountingChunkEnv


def execute(root, chunk):
    root.take(chunk)
    return root.step()


class StatefulEnv(CountingChunkEnv):
    """Multiplies a state entry that only the root has, and says so."""

    def __init__(self) -> None:
        super().__init__(chunk_size=4, action_dim=2, max_env_steps=40)
        self.state_spec["gain"] = Unbounded(shape=(1,))
        self.observation_spec["gained"] = Unbounded(shape=(1,))

    def _reset(self, tensordict=None, **kwargs):
        out = super()._reset(tensordict, **kwargs)
        return out.update({"gain": torch.full((1,), 3.0), "gained": torch.ones(1)})

    def _step(self, tensordict):
        return super()._step(tensordict).set("gained", tensordict["gained"] * tensordict["gain"])


class RecyclingEnv(CountingChunkEnv):
    """Returns one and the same tensordict from every step."""

    _recycled = None

    def _step(self, tensordict):
        out = super()._step(tensordict)
        self._recycled = out if self._recycled is None else self._recycled.update(out)
        return self._recycled


def counting():
    return CountingChunkEnv(chunk_size=4, action_dim=2, max_env_steps=40)


def transformed():
    # Each of these reads from the root what it wrote to "next" one step before.
    return TransformedEnv(counting(), Compose(RewardSum(), StepCounter(100), InitTracker()))


def stock():
    env = ToyVLAEnv(action_dim=2, state_dim=4, success_steps=20)
    transforms = (MultiAction.from_vla(stack_rewards=False), SuccessReward(), StepCounter(100))
    return TransformedEnv(env, Compose(*transforms))


def toy():
    return ToyChunkEnv(chunk_size=4, success_steps=100)


@pytest.mark.parametrize("make_env", [counting, transformed, stock, toy, StatefulEnv])
def test_steps_are_those_of_torchrl(make_env):
    chunks = torch.rand(2, 8, 4, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    root, reference = Root(make_env()), make_env()
    for episode in range(2):  # the second one begins without step_mdp
        root.reset(seed=episode, init_state_id=-1)
        reference.set_seed(episode)
        expected = reference.reset()
        for chunk in chunks[episode]:
            expected["vla_action", "chunk"] = chunk
            expected = reference.step(expected)
            found = execute(root, chunk)
            ours = found.clone()
            root.advance()
            theirs = expected["next"]
            assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
            assert all((ours[key] == theirs[key]).all() for key in theirs.keys(True, True))
            expected = reference.step_mdp(expected)
    assert root.leaves_out_step_mdp


def test_what_only_the_root_has_is_carried_along():
    root = Root(StatefulEnv())
    root.reset(seed=0, init_state_id=-1)
    for step in range(6):
        assert execute(root, torch.zeros(4, 2))["gained"] == 3.0 ** (step + 1)
        root.advance()
    assert root.leaves_out_step_mdp


def test_an_environment_that_recycles_its_tensordict_keeps_step_mdp():
    root = Root(RecyclingEnv(chunk_size=4, action_dim=2, max_env_steps=40))
    root.reset(seed=0, init_state_id=-1)
    for step in range(6):
        found = execute(root, torch.zeros(4, 2))
        assert found["observation", "image"][1, 0, 0] == step + 1
        root.advance()
    assert not root.leaves_out_step_mdp


def test_the_reward_does_not_reach_the_next_root():
    seen = []

    class Watching(CountingChunkEnv):
        def _step(self, tensordict: TensorDict):
            seen.append("reward" in set(tensordict.keys()))
            return super()._step(tensordict)

    root = Root(Watching(chunk_size=4, action_dim=2, max_env_steps=40))
    root.reset(seed=0, init_state_id=-1)
    for _ in range(5):
        execute(root, torch.zeros(4, 2))
        root.advance()
    assert root.leaves_out_step_mdp and seen == [False] * 5
