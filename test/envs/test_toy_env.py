# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
import torch
from torchrl.envs import MultiAction, ToyVLAEnv, TransformedEnv, check_env_specs

from torchrl_dvla.envs import ToyChunkEnv

from .batches import play_alike


def test_the_same_seed_is_the_same_scene():
    first, second = ToyChunkEnv(seed=1), ToyChunkEnv(seed=2)
    second.reset()
    for env in (first, second):
        env.set_seed(7)
    a, b = first.reset(), second.reset()
    assert torch.equal(a["observation", "state"], b["observation", "state"])
    assert torch.equal(a["observation", "image"], b["observation", "image"])
    assert not torch.equal(a["observation", "state"], first.reset()["observation", "state"])


@pytest.mark.parametrize(
    ("offsets", "success", "num_executed"),
    [
        ([0.0, 0.0, 0.0, 0.0], True, 2),
        ([0.3, 0.4, 0.3, -0.3], True, 4),  # 0.4 is outside of 0.35 and breaks the row
        ([0.4, 0.3, 0.4, 0.3], False, 4),
        ([0.4, 0.4, 0.3, 0.3], True, 4),
    ],
)
def test_success_takes_two_close_env_steps_in_a_row(offsets, success, num_executed):
    env = ToyChunkEnv(chunk_size=4, success_steps=2, success_tol=0.35, seed=0)
    td = env.reset()
    target = td["observation", "state"][2:]
    td["vla_action", "chunk"] = target + torch.tensor(offsets)[:, None]
    td = env.step(td)["next"]
    assert bool(td["success"]) is success
    assert bool(td["done"]) is success
    assert float(td["reward"]) == float(success)
    assert (~td["action_is_pad"]).sum() == num_executed
    executed = target + offsets[num_executed - 1]
    torch.testing.assert_close(td["observation", "state"][:2], executed)


def test_a_row_of_close_env_steps_goes_on_over_decisions():
    env = ToyChunkEnv(chunk_size=1, success_steps=2, seed=0)
    td = env.reset()
    target = td["observation", "state"][2:]
    td["vla_action", "chunk"] = target[None]
    td = env.step_mdp(env.step(td))
    assert not td["success"]
    td["vla_action", "chunk"] = target[None]
    assert env.step(td)["next", "success"]


def test_it_is_the_stock_environment_under_multi_action():
    chunk_env = ToyChunkEnv(seed=0)
    stock = TransformedEnv(
        ToyVLAEnv(2, 4, (3, 32, 32), success_steps=2, success_tol=0.35, seed=0),
        MultiAction.from_vla(stack_rewards=False),
    )
    generator = torch.Generator().manual_seed(0)
    for episode in range(20):
        for env in (chunk_env, stock):
            env.set_seed(episode)  # the first draw of both is the target
        ours, theirs = chunk_env.reset(), stock.reset()
        for _ in range(6):
            chunk = torch.rand(4, 2, generator=generator) * 2 - 1
            for td in (ours, theirs):
                td["vla_action", "chunk"] = chunk
            ours, theirs = chunk_env.step(ours), stock.step(theirs)
            for key in (("observation", "state"), "success", "done", "terminated"):
                assert torch.equal(ours["next"].get(key), theirs["next"].get(key))
            if ours["next", "done"]:
                break
            ours, theirs = chunk_env.step_mdp(ours), stock.step_mdp(theirs)


def test_specs_and_an_image_that_shows_target_and_action():
    env = ToyChunkEnv(image_size=32, seed=0)
    check_env_specs(env)
    td = env.reset()
    image = td["observation", "image"]
    column, row = ((td["observation", "state"][2:] + 1) / 2 * 31).round().long().tolist()
    assert image[:, row, column].tolist() == [60, 200, 60]


# -- batched --------------------------------------------------------------------------------------
def test_a_batch_of_episodes_is_that_of_single_ones():
    batched = ToyChunkEnv(batch_size=[3])
    check_env_specs(batched)
    generator = torch.Generator().manual_seed(0)

    def draw_chunk(td):
        noise = 1.2 * torch.rand(3, 4, 2, generator=generator) - 0.6
        return (td["observation", "state"][:, None, 2:] + noise).clamp(-1, 1)

    assert 5 < play_alike(batched, [ToyChunkEnv() for _ in range(3)], draw_chunk) < 30


def test_an_episode_that_takes_no_step_stays_as_it_is():
    env = ToyChunkEnv(batch_size=[2], success_steps=2, chunk_size=1)
    td = env.reset()
    close = td["observation", "state"][:, None, 2:].clone()
    td = env.step_mdp(env.step(td.set(("vla_action", "chunk"), close)))
    only_first = torch.tensor([True, False])
    td = env.step(td.set(("vla_action", "chunk"), close).set("_step", only_first))
    assert td["next", "success"].tolist() == [[True], [False]]
    td = env.step(env.step_mdp(td).set(("vla_action", "chunk"), close).set("_step", ~only_first))
    assert td["next", "success"][1], "its first close step still counts"
