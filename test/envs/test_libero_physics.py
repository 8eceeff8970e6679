# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The physics path against robosuite's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from torchrl_dvla.envs.libero_env import LiberoChunkEnv

pytestmark = pytest.mark.libero

NUM_SUBSTEPS, TICK_S, PERIOD_S = 25, 0.002, 0.05


@pytest.mark.parametrize("num_forced", [1, 2])
def test_clock_reads_when_robosuite_does(num_forced: int) -> None:
    from robosuite.utils.observables import Observable, sensor

    from torchrl_dvla.envs.libero_physics import SamplingClock

    reads = 0

    @sensor(modality="test")
    def count(cache: dict[str, np.ndarray]) -> np.ndarray:
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
def env() -> Iterator[LiberoChunkEnv]:
    env = LiberoChunkEnv(
        "libero_spatial", 0, camera_height=16, camera_width=16, shadows=False, msaa=False
    )
    yield env
    env.close()


def trajectory(env: LiberoChunkEnv, actions: np.ndarray) -> np.ndarray:
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


def test_compiled_loop_equals_robosuites_bit_for_bit(
    env: LiberoChunkEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert env._physics.is_compiled
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


def test_other_controllers_take_robosuites_loop(env: LiberoChunkEnv) -> None:
    from torchrl_dvla.envs.libero_physics import LiberoPhysics

    controller = env.robosuite_env.robots[0].controller
    mode = controller.impedance_mode
    controller.impedance_mode = "variable"
    try:
        assert not LiberoPhysics(env.robosuite_env, lambda: None).is_compiled
    finally:
        controller.impedance_mode = mode
