# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import functools

import pytest
import torch
from tensordict import TensorDict
from torchrl.data.vla import UniformActionTokenizer
from torchrl.envs import RewardSum, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type
from torchrl.modules.vla import TinyVLA

from torchrl_dvla.data import schema
from torchrl_dvla.functional import group_advantage
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.objectives import GRPOLoss
from torchrl_dvla.testing import CountingChunkEnv, CountingOracle, Latency


def chosen(init_state_id: int) -> TensorDict:
    return TensorDict({"init_state_id": torch.tensor([init_state_id])}, [])


def play(env: CountingChunkEnv, right: list[list[bool]]) -> list[TensorDict]:
    """One episode; ``right`` says for each decision which env steps point the right way."""
    env.reset()
    target = torch.tensor(env.current_scene.target)
    out = []
    for steps in right:
        sign = torch.tensor([1.0 if step else -1.0 for step in steps])
        action = TensorDict({"vla_action": {"chunk": 0.5 * sign[:, None] * target}}, [])
        out.append(env.step(action)["next"])
    return out


@pytest.mark.parametrize("length", ["fixed", "heavy_tailed"])
def test_specs(length):
    make = functools.partial(CountingChunkEnv, length=length, image_size=(8, 12), action_dim=3)
    check_env_specs(make())
    inner = TransformedEnv(make(), StepCounter())
    check_env_specs(TransformedEnv(inner, RewardSum(), auto_unwrap=False))
    check_env_specs(SerialEnv(2, make))


def test_counting_by_hand():
    # limit 10, required 6; chunks of 4: 3 right, then 2, then success at the first step
    env = CountingChunkEnv(chunk_size=4, max_env_steps=10, action_dim=3)
    decisions = play(env, [[True, True, True, False], [True, False, False, True], [True] * 4])
    scene = env.current_scene
    assert env.num_required(scene) == 6
    for index, (steps, count) in enumerate([(4, 3), (8, 5), (9, 6)]):
        after = decisions[index]
        expected = [*scene.target, steps / 10, count / 10]
        torch.testing.assert_close(after["observation", "state"], torch.tensor(expected))
        image = env.expected_image(scene, index + 1, count)
        assert torch.equal(after["observation", "image"], image)
        assert image[:, 0, 0].tolist() == [scene.scene_id, index + 1, count]
    assert [bool(after["success"]) for after in decisions] == [False, False, True]
    assert [float(after["reward"]) for after in decisions] == [0.0, 0.0, 1.0]
    assert [bool(after["terminated"]) for after in decisions] == [False, False, True]
    assert decisions[0]["action_is_pad"].tolist() == [False] * 4
    assert decisions[2]["action_is_pad"].tolist() == [False, True, True, True]


def test_failure_is_truncated_at_the_limit():
    env = CountingChunkEnv(chunk_size=4, max_env_steps=6)
    decisions = play(env, [[False] * 4, [True, True, True, True]])
    last = decisions[1]
    assert last["action_is_pad"].tolist() == [False, False, True, True]
    assert bool(last["truncated"]) and bool(last["done"]) and not bool(last["terminated"])
    assert not bool(last["success"]) and float(last["reward"]) == 0.0


def test_without_stop_on_success_the_length_is_the_limit():
    env = CountingChunkEnv(chunk_size=4, max_env_steps=6, stop_on_success=False)
    decisions = play(env, [[True] * 4, [False] * 4])
    assert bool(decisions[0]["success"]) and not bool(decisions[0]["done"])
    assert float(decisions[0]["reward"]) == 0.0
    assert bool(decisions[1]["truncated"]) and float(decisions[1]["reward"]) == 1.0


def test_group_shares_the_scene_exactly():
    envs = [CountingChunkEnv(length="heavy_tailed", action_dim=4) for _ in range(2)]
    envs[1].rollout(5)  # another past
    scenes = []
    for env in envs:
        env.set_seed(11)
        env.reset(chosen(3))
        scenes.append(env.current_scene)
    assert scenes[0] == scenes[1] == envs[0].scene(11, 3)
    others = {envs[0].scene(11, i) for i in range(20)} | {envs[0].scene(s, 3) for s in range(20)}
    assert len(others) > 30


def test_without_id_every_reset_is_a_new_scene():
    env = CountingChunkEnv(action_dim=6)
    env.set_seed(5)
    seen = []
    for index in range(4):
        env.reset(chosen(-1)) if index % 2 else env.reset()
        seen.append(env.current_scene)
        assert env.current_scene == env.scene(5, reset_index=index)
    assert len(set(seen)) == 4
    env.set_seed(5)
    env.reset()
    assert env.current_scene == seen[0]


def test_heavy_tail():
    env = CountingChunkEnv(max_env_steps=64, length="heavy_tailed")
    limits = [env.scene(seed).num_env_steps for seed in range(400)]
    assert min(limits) == 16 and max(limits) == 64
    assert sum(limit <= 24 for limit in limits) > 150
    assert sum(limit >= 48 for limit in limits) > 50


@pytest.mark.parametrize("tokenizer", [None, UniformActionTokenizer(8, low=-1, high=1)])
def test_oracle_solves_every_scene_in_the_fewest_decisions(tokenizer):
    env = CountingChunkEnv(chunk_size=3, max_env_steps=20, length="heavy_tailed", action_dim=5)
    oracle = CountingOracle(env, action_tokenizer=tokenizer)
    for init_state_id in range(10):
        reset = env.reset(chosen(init_state_id))
        rollout = env.rollout(50, oracle, auto_reset=False, tensordict=reset)
        assert bool(rollout["next", "success"][-1])
        required = env.num_required(env.current_scene)
        assert rollout.shape[0] == -(-required // 3)
        executed = (~rollout["next", "action_is_pad"]).sum()
        assert int(executed) == required
    if tokenizer is not None:
        assert rollout["vla_action", "tokens"].shape[1:] == (3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "must be positive"),
        ({"length": "long"}, "length must be one of"),
        ({"required_fraction": 1.5}, "required_fraction must be in"),
    ],
)
def test_options(options, message):
    law = Latency(0.001)
    assert CountingChunkEnv().latency is None
    assert CountingChunkEnv(step_latency_s=law).latency is law
    assert CountingChunkEnv(step_latency_s=0.25).latency.sample() == 0.25
    with pytest.raises(ValueError, match=message):
        CountingChunkEnv(**options)


# -- the smallest GRPO loop: every part of it has to be right for this to learn --------------------
READ = ("observation", "language_instruction")


def collect(envs: list[CountingChunkEnv], policy: TinyVLA) -> tuple[TensorDict, torch.Tensor]:
    """One episode in each environment, in lock-step; their decisions and their success [N]."""
    current = torch.stack([env.current.select(*READ) for env in envs]).to_tensordict()
    rows, owner = [], []
    success = torch.zeros(len(envs))
    alive = list(range(len(envs)))
    while alive:
        with torch.no_grad():
            acted = policy(current[alive])
        for row, index in enumerate(alive.copy()):
            after = envs[index].step(acted[row].select(("vla_action", "chunk")))["next"]
            rows.append(acted[row].set(schema.ACTION_IS_PAD_KEY, after["action_is_pad"]))
            owner.append(index)
            current[index] = after.select(*READ)
            if after["done"]:
                success[index] = after["success"].float()
                alive.remove(index)
    batch = torch.stack([row.exclude("language_instruction") for row in rows])
    batch["owner"] = torch.tensor(owner)
    return batch, success


def test_a_simple_policy_learns_it_with_grpo():
    chunk_size, action_dim, group_size, num_groups = 4, 1, 8, 8
    policy = tiny_token_policy(action_dim, chunk_size, vocab_size=4, hidden_dim=32)
    envs = [
        CountingChunkEnv(action_dim=action_dim, max_env_steps=8, image_size=(4, 4))
        for _ in range(group_size * num_groups)
    ]

    def episode(seed: int) -> tuple[TensorDict, torch.Tensor]:
        for index, env in enumerate(envs):
            env.set_seed(seed)
            env.current = env.reset(chosen(index // group_size))
        return collect(envs, policy)

    with set_exploration_type(ExplorationType.RANDOM):
        _, before = episode(0)
        loss = GRPOLoss(policy, entropy_coeff=0.03)
        optimiser = torch.optim.Adam(loss.parameters(), lr=1e-2)
        for update in range(12):
            batch, success = episode(update)
            advantage = group_advantage(success.view(num_groups, group_size))
            batch["advantage"] = advantage.flatten()[batch["owner"]].unsqueeze(-1)
            batch["language_instruction"] = [envs[0].instruction] * len(batch)
            for _ in range(2):
                losses = loss(batch)
                (losses["loss_objective"] + losses["loss_entropy"]).backward()
                optimiser.step()
                optimiser.zero_grad()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        _, after = episode(1000)
    assert before.mean() < 0.5
    assert after.mean() > 0.9
