# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The expert's phases, on a world of points where every motion can be followed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from torchrl_dvla.envs.expert import ExpertConfig, ExpertPhase, PickPlaceExpert, PlaceGoal
from torchrl_dvla.envs.expert_grasp import box_corners, downward_rotation


class PointScene:
    """A gripper without inertia: one unit of action moves it 2 cm; closed, it holds the cube."""

    def __init__(self, target="plate", slip_at_height=None):
        self.goals = [PlaceGoal("on", "cube", target)]
        self.objects = ["cube", "plate"]
        self.tool_position = np.array([-0.1, 0.0, 0.25])
        self.tool_rotation = downward_rotation(0.0)
        self.cube = np.array([0.1, -0.2, 0.02])
        self.plate = np.array([0.0, 0.2, 0.01])
        self.slip_at_height = slip_at_height
        self.holding = False

    def position(self, obj):
        return {"cube": self.cube, "plate": self.plate}[obj].copy()

    def points(self, obj):
        half = {"cube": [0.02] * 3, "plate": [0.1, 0.1, 0.01]}[obj]
        return box_corners(half) + self.position(obj)

    def target_point(self, target):
        return self.plate + [0.0, 0.0, 0.01]

    def is_container(self, target):
        return target == "bin"

    def is_satisfied(self, goal):
        over = np.abs(self.cube[:2] - self.plate[:2]).max() < 0.05
        return bool(over and not self.holding and self.cube[2] < 0.05)

    def step(self, action):
        assert action.shape == (7,)
        assert np.abs(action).max() <= 1.0
        self.tool_position = self.tool_position + 0.02 * action[:3]
        closed = action[6] > 0
        near = np.linalg.norm(self.cube - self.tool_position) < 0.02
        self.holding = closed and (self.holding or near)
        if self.holding and self.slip_at_height and self.tool_position[2] > self.slip_at_height:
            self.holding, self.slip_at_height = False, None
        if self.holding:
            self.cube = self.tool_position.copy()
        else:
            on_plate = np.abs(self.cube[:2] - self.plate[:2]).max() < 0.1
            self.cube[2] = 0.04 if on_plate else 0.02


def run(scene, expert, num_env_steps=200):
    """Phases in the order they were entered, until the goal holds."""
    phases = []
    for _ in range(num_env_steps):
        if scene.is_satisfied(scene.goals[0]):
            return phases
        if not phases or phases[-1] is not expert.phase:
            phases.append(expert.phase)
        scene.step(expert.act())
    pytest.fail(f"goal not reached within {num_env_steps} env steps; went through {phases}")


def test_phases_of_an_undisturbed_episode():
    scene = PointScene()
    phases = run(scene, PickPlaceExpert(scene))
    assert phases == [
        ExpertPhase.APPROACH,
        ExpertPhase.CLOSE,
        ExpertPhase.CARRY,
        ExpertPhase.LOWER,
        ExpertPhase.RELEASE,
    ]


def test_a_container_is_dropped_into_from_above():
    scene = PointScene(target="bin")
    assert ExpertPhase.LOWER not in run(scene, PickPlaceExpert(scene))


def test_first_action_flies_over_the_object_and_keeps_the_gripper_open():
    scene = PointScene()
    action = PickPlaceExpert(scene).act()
    # 0.2 m ahead and 0.2 m to the right: both saturate, in the same proportion
    assert action[:2] == pytest.approx([1.0, -1.0])
    # the hover is 5 cm above the cube's top, 9 cm: 16 cm below the tool, times 24, saturates
    assert action[2] == pytest.approx(-1.0)
    assert action[3:6] == pytest.approx([0.0, 0.0, 0.0])
    assert action[6] == -1.0


def test_approach_keeps_its_height_until_it_is_over_the_object():
    scene = PointScene()
    # 5 cm to the side, at hover height (cube's top 4 cm + 5 cm)
    scene.tool_position = np.array([0.05, -0.2, 0.09])
    action = PickPlaceExpert(scene).act()
    assert action[2] == pytest.approx(0.0)
    # 2 cm to the side: aims at 2 cm (grasp) + 4 * (2 cm - 1.2 cm), 3.8 cm below, times 24
    scene.tool_position = np.array([0.08, -0.2, 0.09])
    assert PickPlaceExpert(scene).act()[2] == pytest.approx(-24 * 0.038)


def test_a_slipped_object_is_grasped_again():
    scene = PointScene(slip_at_height=0.06)
    expert = PickPlaceExpert(scene)
    phases = run(scene, expert)
    assert phases.count(ExpertPhase.CLOSE) == 2
    assert expert.num_retries == 1


def test_action_noise_does_not_derail_it():
    scene, rng = PointScene(), np.random.default_rng(0)
    expert = PickPlaceExpert(scene)
    for _ in range(200):
        action = expert.act()
        action[:3] += rng.normal(0.0, 0.3, 3)
        scene.step(np.clip(action, -1, 1))
        if scene.is_satisfied(scene.goals[0]):
            return
    pytest.fail("goal not reached under noise")


def test_rests_once_its_goals_hold():
    scene = PointScene()
    scene.cube = scene.plate + [0.0, 0.0, 0.03]
    expert = PickPlaceExpert(scene)
    assert expert.phase is ExpertPhase.FINISHED
    assert expert.goal is None
    assert expert.act()[6] == -1.0


def test_speed_is_a_matter_of_configuration():
    scene = PointScene()
    # half of the way's gain: 0.2 m * 2.5 is no longer cut
    action = PickPlaceExpert(scene, config=ExpertConfig(gain=2.5)).act()
    assert action[:2] == pytest.approx([0.5, -0.5])


def test_refuses_a_task_without_placements():
    scene = PointScene()
    scene.goals = []
    with pytest.raises(ValueError, match="pick-and-place task"):
        PickPlaceExpert(scene)
