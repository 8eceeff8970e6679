# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Bit for bit what the stock stack sees: TransformedEnv(LiberoEnv(...), MultiAction)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import LiberoEnv, MultiAction, TransformedEnv

from torchrl_dvla.envs.libero_env import LiberoChunkEnv
from torchrl_dvla.envs.libero_setup import choose_gl_backend, setup_libero

pytestmark = [pytest.mark.libero, pytest.mark.slow, pytest.mark.timeout(600)]

SIZE, CHUNK, INIT_STATE = 48, 3, 5
CAMERAS = ("agentview", "robot0_eye_in_hand")
ALL_SUITES = os.environ.get("DVLA_TEST_ALL_SUITES") == "1"
# libero_goal by default: it has fixtures, a drawer and a stove knob
TASKS = [("libero_goal", 7)]
if ALL_SUITES:
    TASKS += [("libero_spatial", 4), ("libero_object", 0), ("libero_10", 2), ("libero_90", 1)]


class Stock:
    """The rival, as a user would build it."""

    def __init__(self, suite: str, task_id: int) -> None:
        self.libero = LiberoEnv(
            suite,
            task_id,
            camera_height=SIZE,
            camera_width=SIZE,
            init_state_mode="fixed",
            init_state_id=INIT_STATE,
            wrist_camera="robot0_eye_in_hand",
            max_episode_steps=7,
        )
        self.env = TransformedEnv(self.libero, MultiAction.from_vla(stack_rewards=False))

    def own_context(self) -> None:
        # with two environments in one process robosuite draws in whichever context is current
        self.libero._env.env.sim._render_context_offscreen.gl_ctx.make_current()

    def reset(self, seed: int) -> TensorDictBase:
        # a hard reset appends the drawer samplers once more, so that the n-th reset draws n times
        self.libero._env.env.object_property_initializers.clear()
        self.libero.set_seed(seed)
        self.own_context()
        return self.env.reset()

    def step(self, td: TensorDictBase) -> TensorDictBase:
        self.own_context()
        return self.env.step(td)["next"]


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task[0]}-{task[1]}")
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[LiberoChunkEnv, Stock]]:
    choose_gl_backend()
    setup_libero()
    suite, task_id = request.param
    ours = LiberoChunkEnv(
        suite,
        task_id,
        chunk_size=CHUNK,
        cameras=CAMERAS,
        camera_height=SIZE,
        camera_width=SIZE,
        max_episode_steps=7,
    )
    stock = Stock(suite, task_id)
    yield ours, stock
    ours.close()
    stock.own_context()
    stock.libero.close()


def assert_same(ours: TensorDictBase, stock: TensorDictBase, keys: list[str]) -> None:
    for key in ("image", "wrist_image", "state"):
        assert torch.equal(ours["observation", key], stock["observation", key]), key
    for key in keys:
        assert torch.equal(ours[key], stock[key]), key
    assert ours["language_instruction"] == stock["language_instruction"]


def test_episodes_equal_the_stock_stack(pair: tuple[LiberoChunkEnv, Stock]) -> None:
    """Two episodes: the second one starts with our soft reset, after a closed gripper."""
    ours, stock = pair
    generator = torch.Generator().manual_seed(1)
    for episode, seed in enumerate((11, 12)):
        theirs = stock.reset(seed)
        ours.set_seed(seed)
        mine = ours.reset(TensorDict({"init_state_id": torch.tensor([INIT_STATE])}))
        assert_same(mine, theirs, ["success", "done", "terminated", "truncated"])
        # 3 + 3 + 1 of 7 env steps in the first episode: truncated inside the third chunk
        for decision in range(3 if episode == 0 else 1):
            chunk = torch.rand(CHUNK, 7, generator=generator) * 2 - 1
            chunk[:, 2] -= 0.5
            chunk[:, 6] = 1.0
            mine["vla_action", "chunk"] = chunk
            theirs["vla_action", "chunk"] = chunk
            after, expected = ours.step(mine)["next"], stock.step(theirs)
            keys = ["reward", "success", "done", "terminated", "truncated"]
            assert_same(after, expected, keys)
            assert after["done"].item() == (decision == 2)
