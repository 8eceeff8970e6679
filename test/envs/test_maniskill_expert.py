# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The expert of PickCube in a scene that moves as told; test_maniskill_env.py has the real one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from torchrl_dvla.envs.maniskill_expert import (
    PickCubeExpert,
    PickCubeExpertConfig,
    PickCubePhase,
    PickCubeScene,
    record_pick_cube,
)

GOAL = np.array([0.05, -0.05, 0.25])


def make_scene(**changes):
    scene = PickCubeScene(
        tool=np.array([0.0, 0.0, 0.2]),
        cube=np.array([0.0, 0.0, 0.02]),
        goal=GOAL,
        is_grasped=False,
    )
    return scene._replace(**changes)


def run(scene, expert, num_env_steps=60, slips_at=None, noise=None):
    """The scene after env steps that go half of the commanded way; phases on the way."""
    phases = []
    for step in range(num_env_steps):
        action = expert.act(scene)
        assert action.shape == (7,) and np.abs(action).max() <= 1.0
        phases.append(expert.phase)
        if noise is not None:
            action[:3] += noise.normal(0.0, 0.15, 3)
        is_over = np.linalg.norm(scene.tool - scene.cube) < 0.02
        held = action[6] < 0 and is_over and step != slips_at
        move = 0.05 * action[:3]
        cube = scene.cube + move if held else np.array([*scene.cube[:2], 0.02])
        scene = scene._replace(tool=scene.tool + move, cube=cube, is_grasped=held)
    return scene, phases


def test_phases_of_an_undisturbed_episode():
    scene = make_scene(cube=np.array([0.08, -0.06, 0.02]))
    scene, phases = run(scene, PickCubeExpert())
    order = [phase for phase, last in zip(phases, [None, *phases]) if phase is not last]
    assert order == [PickCubePhase.APPROACH, PickCubePhase.CLOSE, PickCubePhase.CARRY]
    assert scene.cube == pytest.approx(GOAL, abs=1e-3)


def test_comes_down_only_over_the_cube():
    # 10 cm aside at the cube's height: up as far as the hover, and to the side
    action = PickCubeExpert().act(make_scene(tool=np.array([0.1, 0.0, 0.02])))
    assert action[0] < 0 < action[2] and action[6] == 1.0
    # 2 cm aside, 3 * (2 - 1) cm above: at the right height for now
    action = PickCubeExpert().act(make_scene(tool=np.array([0.02, 0.0, 0.05])))
    assert action[:3] == pytest.approx([-0.2, 0.0, 0.0])


def test_closes_at_the_cube_and_waits_for_the_fingers():
    at_cube = make_scene(tool=np.array([0.0, 0.005, 0.02]))
    expert = PickCubeExpert(config=PickCubeExpertConfig(close_steps=2, patience=3))
    assert expert.act(at_cube)[6] == 1.0 and expert.phase is PickCubePhase.CLOSE
    assert [expert.act(at_cube)[6] for _ in range(3)] == [-1.0] * 3
    # nothing is in the hand after three env steps: open, and try again
    assert expert.act(at_cube)[6] == 1.0
    held = at_cube._replace(is_grasped=True)
    assert expert.act(held)[6] == -1.0 and expert.phase is PickCubePhase.CLOSE
    action = expert.act(held)
    assert expert.phase is PickCubePhase.CARRY and action[6] == -1.0
    # (0.05, -0.05, 0.23) m away; the longest is cut to 0.8
    assert action[:3] == pytest.approx(np.array([0.5, -0.5, 2.3]) * 0.8 / 2.3)


def test_a_lost_cube_is_picked_up_again():
    scene, phases = run(make_scene(), PickCubeExpert(), num_env_steps=80, slips_at=14)
    assert phases.count(PickCubePhase.CARRY) and phases[14] is PickCubePhase.CARRY
    assert PickCubePhase.APPROACH in phases[15:]
    assert scene.cube == pytest.approx(GOAL, abs=1e-3)


def test_noise_does_not_derail_it():
    noise = np.random.default_rng(0)
    scene, _ = run(make_scene(), PickCubeExpert(), 80, noise=noise)
    # 7.5 mm of noise and half of the error each env step leave 8.7 mm in each direction
    assert scene.is_grasped and np.linalg.norm(scene.cube - GOAL) < 0.05


def test_knows_one_task():
    env = SimpleNamespace(task="PushCube-v1", batch_size=(), num_envs=1)
    with pytest.raises(ValueError, match="must be one 'PickCube-v1', got 'PushCube-v1'"):
        record_pick_cube(env, seed=0)
