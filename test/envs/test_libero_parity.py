# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Bit for bit what the stock stack does: TransformedEnv(LiberoEnv(...), MultiAction)."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import LiberoEnv, MultiAction, TransformedEnv

from torchrl_dvla.envs.libero_env import LiberoChunkEnv
from torchrl_dvla.envs.libero_setup import choose_gl_backend, setup_libero

pytestmark = pytest.mark.libero

SIZE, CHUNK, INIT_STATE = 48, 3, 5
CAMERAS = ("agentview", "robot0_eye_in_hand")
ALL_SUITES = os.environ.get("DVLA_TEST_ALL_SUITES") == "1"
# libero_goal by default: it has fixtures, a drawer and a stove knob
TASKS = [("libero_goal", 7)]
if ALL_SUITES:
    TASKS += [("libero_spatial", 4), ("libero_object", 0), ("libero_10", 2), ("libero_90", 1)]


class Stock:
    """The rival, as a user would build it."""

    def __init__(self, suite: str, task_id: int):
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

    def own_context(self):
        # with two environments in one process robosuite draws in whichever context is current
        self.libero._env.env.sim._render_context_offscreen.gl_ctx.make_current()

    def reset(self, seed: int):
        # a hard reset appends the drawer samplers once more, so that the n-th reset draws n times
        self.libero._env.env.object_property_initializers.clear()
        self.libero.set_seed(seed)
        self.own_context()
        return self.env.reset()

    def step(self, td):
        self.own_context()
        return self.env.step(td)["next"]


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task[0]}-{task[1]}")
def pair(request):
    choose_gl_backend()
    setup_libero()
    suite, task_id = request.param
    options = {"camera_height": SIZE, "camera_width": SIZE, "max_episode_steps": 7}
    ours = LiberoChunkEnv(suite, task_id, chunk_size=CHUNK, cameras=CAMERAS, **options)
    stock = Stock(suite, task_id)
    yield ours, stock
    ours.close()
    stock.own_context()
    stock.libero.close()


def assert_same(ours, stock, keys):
    for key in ("image", "wrist_image", "state"):
        assert torch.equal(ours["observation", key], stock["observation", key]), key
    for key in keys:
        assert torch.equal(ours[key], stock[key]), key
    assert ours["language_instruction"] == stock["language_instruction"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_episodes_equal_the_stock_stack(pair):
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


# -- physics ---------------------------------------------------------------------------------------
NUM_SUBSTEPS, TICK_S, PERIOD_S = 25, 0.002, 0.05


@pytest.mark.parametrize("num_forced", [1, 2])
def test_clock_reads_when_robosuite_does(num_forced: int):
    from robosuite.utils.observables import Observable, sensor

    from torchrl_dvla.envs.libero_physics import SamplingClock

    reads = 0

    @sensor(modality="test")
    def count(cache: dict[str, np.ndarray]):
        nonlocal reads
        reads += 1
        return np.zeros(3)

    observable = Observable("count", count, sampling_rate=20)
    observable.reset()
    for _ in range(num_forced):
        observable.update(TICK_S, {}, force=True)
    clock = SamplingClock(TICK_S, PERIOD_S)
    clock.start(num_forced)
    for _ in range(200 * NUM_SUBSTEPS):
        before = reads
        observable.update(TICK_S, {})
        assert clock.tick() == (reads > before)


@pytest.fixture(scope="module")
def env():
    size = {"camera_height": 16, "camera_width": 16}
    env = LiberoChunkEnv("libero_spatial", 0, shadows=False, msaa=False, **size)
    yield env
    env.close()


def trajectory(env, actions):
    """Everything that matters after each env step, `[T, ...]`."""
    env.set_seed(4)
    env.reset()
    data = env.robosuite_env.sim.data._data
    rows = []
    for action in actions:
        success = env._physics.env_step(action)
        state = env._read_state(env._observed).numpy()
        parts = (data.qpos, data.qvel, data.qacc_warmstart, data.ctrl, data.xpos.ravel(), state)
        rows.append(np.concatenate([*parts, [success, data.ncon]]))
    return np.array(rows)


def test_compiled_loop_equals_robosuites_bit_for_bit(env, monkeypatch):
    assert env._physics._loop is not None
    actions = np.random.RandomState(0).uniform(-1, 1, (40, 7))
    # press onto the table with a closing, then an opening gripper: many contacts
    actions[:, 2] -= 0.6
    actions[:20, 6], actions[20:, 6] = 1, -1
    # no rotation: the controller then keeps its old orientation goal
    actions[5:10, 3:6] = 0
    compiled = trajectory(env, actions)
    monkeypatch.setattr(env._physics, "_loop", None)
    interpreted = trajectory(env, actions)
    assert compiled[:, -1].max() > 20
    np.testing.assert_array_equal(compiled, interpreted)


def test_other_controllers_take_robosuites_loop(env):
    from torchrl_dvla.envs.libero_physics import LiberoPhysics

    controller = env.robosuite_env.robots[0].controller
    mode = controller.impedance_mode
    controller.impedance_mode = "variable"
    try:
        assert LiberoPhysics(env.robosuite_env, lambda: None)._loop is None
    finally:
        controller.impedance_mode = mode
