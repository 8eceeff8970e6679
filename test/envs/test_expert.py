# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The scripted expert: its geometry and grasps by hand, its phases, and real LIBERO."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_dvla.envs import LiberoChunkEnv, expert_grasp
from torchrl_dvla.envs.expert import ExpertConfig, ExpertPhase, PickPlaceExpert, PlaceGoal
from torchrl_dvla.envs.expert_episode import ActionNoise
from torchrl_dvla.envs.expert_grasp import GraspPlanner, box_corners, downward_rotation
from torchrl_dvla.envs.libero_expert import record_demonstration

SQUARE = [[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]]


@pytest.mark.parametrize(
    ("point", "distance"),
    [
        ([3.0, 1.0], 1.0),  # beside an edge: exact
        ([1.0, 1.0], -1.0),  # in the middle: all four edges are 1 away
        ([0.25, 1.0], -0.25),
        ([2.0, 1.5], 0.0),  # on an edge
        ([5.0, 6.0], 4.0),  # beyond a corner: 5 away, and the bound is the larger of 3 and 4
    ],
)
def test_distance_to_hull_is_signed(point, distance):
    # a point inside the square must not change the hull
    points = [*SQUARE, [0.7, 1.1]]
    assert expert_grasp.distance_to_hull(point, points) == pytest.approx(distance)


def test_corners_and_widths_of_a_box():
    assert expert_grasp.planar_direction(np.pi / 3) == pytest.approx([0.5, np.sqrt(3) / 2])
    corners = box_corners([0.03, 0.02, 0.1])
    assert expert_grasp.width_along(corners, 0.0) == pytest.approx(0.06)
    assert expert_grasp.width_along(corners, np.pi / 2) == pytest.approx(0.04)
    # a 3-4-5 direction: 0.06 * 0.8 + 0.04 * 0.6
    assert expert_grasp.width_along(corners, np.arctan2(3.0, 4.0)) == pytest.approx(0.072)
    corners = box_corners([1.0, 2.0, 3.0])
    assert corners.shape == (8, 3)
    assert len(np.unique(corners, axis=0)) == 8
    assert np.abs(corners).tolist() == [[1.0, 2.0, 3.0]] * 8


def test_gripper_points_down_and_opens_along_the_turned_axis():
    rotation = downward_rotation(np.pi / 6)
    assert rotation @ [0, 0, 1] == pytest.approx([0, 0, -1])
    # at yaw 0 the grip site's x axis lies along world y, 30 degrees later along (-1/2, sqrt(3)/2)
    assert rotation @ [1, 0, 0] == pytest.approx([-0.5, np.sqrt(3) / 2, 0])
    assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_rotation_error_is_the_world_frame_turn():
    error = expert_grasp.rotation_error(downward_rotation(-0.3), downward_rotation(0.4))
    assert error == pytest.approx([0, 0, -0.7])
    assert expert_grasp.rotation_error(np.eye(3), np.eye(3)) == pytest.approx([0, 0, 0])


def test_takes_a_box_across_its_thin_side():
    # long side along y: the fingers must open along x, a quarter turn from home
    points = box_corners([0.02, 0.06, 0.03]) + [0.1, -0.2, 0.03]
    grasp = GraspPlanner().plan(points, [])
    assert abs(grasp.yaw) == pytest.approx(np.pi / 2)
    # 6 cm tall: the middle, 3 cm, is between 3.5 and 1 cm below the top
    assert grasp.point == pytest.approx([0.1, -0.2, 0.03])
    assert grasp.top == pytest.approx(0.06)
    assert grasp.height_above_bottom == pytest.approx(0.03)


def test_takes_a_tall_object_near_its_top():
    points = box_corners([0.02, 0.02, 0.1]) + [0.0, 0.0, 0.1]
    grasp = GraspPlanner().plan(points, [])
    assert grasp.yaw == pytest.approx(0.0)
    assert grasp.point[2] == pytest.approx(0.2 - 0.035)


def test_takes_a_wide_object_by_the_rim():
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    ring = np.stack([0.06 * np.cos(angles), 0.06 * np.sin(angles)], -1)
    points = np.concatenate([np.c_[ring, np.full(64, z)] for z in (0.0, 0.05)])
    grasp = GraspPlanner().plan(points, [])
    # 8 mm inside a rim of 6 cm radius, 18 mm below its top
    assert np.linalg.norm(grasp.point[:2]) == pytest.approx(0.052, abs=1e-4)
    assert grasp.point[2] == pytest.approx(0.032)


def test_turns_away_from_a_neighbour():
    cube = box_corners([0.02, 0.02, 0.02]) + [0.0, 0.0, 0.02]
    # stands where a finger would be at yaw 0, which opens along y
    neighbour = box_corners([0.03, 0.03, 0.05]) + [0.0, 0.07, 0.05]
    assert GraspPlanner().plan(cube, []).yaw == pytest.approx(0.0)
    # a quarter turn costs 0.03 * pi / 2 = 0.047 and gains half of the gap, at most 0.03: the
    # cheaper yaw 0 loses because a finger would touch
    turned = GraspPlanner().plan(cube, [neighbour])
    assert abs(turned.yaw) == pytest.approx(np.pi / 2)


def test_ignores_what_lies_below_the_object():
    cube = box_corners([0.02, 0.02, 0.02]) + [0.0, 0.0, 0.12]
    table = box_corners([1.0, 1.0, 0.05]) + [0.0, 0.0, 0.05]
    assert GraspPlanner().plan(cube, [table]).yaw == pytest.approx(0.0)


# -- phases, on a world of points where every motion can be followed by hand -----------------------
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


def run(scene, expert, num_env_steps=200, noise=None):
    """Phases in the order they were entered, until the goal holds."""
    phases = []
    for _ in range(num_env_steps):
        if scene.is_satisfied(scene.goals[0]):
            return phases
        if not phases or phases[-1] is not expert.phase:
            phases.append(expert.phase)
        action = expert.act()
        assert np.abs(action).max() <= 1.0
        if noise is not None:
            action[:3] += noise.normal(0.0, 0.3, 3)
        scene.step(np.clip(action, -1, 1))
    pytest.fail(f"goal not reached within {num_env_steps} env steps; went through {phases}")


def test_phases_of_an_undisturbed_episode():
    scene = PointScene()
    phases = [phase.value for phase in run(scene, PickPlaceExpert(scene))]
    assert phases == ["approach", "close", "carry", "lower", "release"]
    scene = PointScene(target="bin")  # is dropped into from above
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
    scene = PointScene()
    run(scene, PickPlaceExpert(scene), noise=np.random.default_rng(0))


def test_rests_once_its_goals_hold():
    scene = PointScene()
    scene.cube = scene.plate + [0.0, 0.0, 0.03]
    expert = PickPlaceExpert(scene)
    assert expert.phase is ExpertPhase.FINISHED
    assert expert.goal is None
    assert expert.act()[6] == -1.0


def test_configuration_and_a_task_without_placements():
    scene = PointScene()
    # half of the way's gain: 0.2 m * 2.5 is no longer cut
    action = PickPlaceExpert(scene, config=ExpertConfig(gain=2.5)).act()
    assert action[:2] == pytest.approx([0.5, -0.5])
    scene.goals = []
    with pytest.raises(ValueError, match="pick-and-place task"):
        PickPlaceExpert(scene)


# -- demonstrations --------------------------------------------------------------------------------
@pytest.mark.libero
def test_expert_solves_a_real_scene():
    options = {"replan_interval": 4, "max_episode_steps": 160, "shadows": False, "msaa": False}
    env = LiberoChunkEnv("libero_object", 3, **options)
    try:
        demo = record_demonstration(env, seed=7, noise=ActionNoise())
        assert demo.info.success
        # 118 env steps are what a careful expert needs here
        assert demo.info.num_env_steps < 110
        num_rows = -(-demo.info.num_env_steps // 4)
        assert demo.rows["observation", "image"].shape == (num_rows, 3, 128, 128)
        assert demo.rows["vla_action", "chunk"].abs().max() <= 1
        num_padded = [max(0, 4 * t + 8 - demo.info.num_env_steps) for t in range(num_rows)]
        assert demo.rows["action_is_pad"].sum(-1).tolist() == num_padded
        # the first decision saw what an ordinary reset shows
        env.set_seed(7)
        first = env.reset(TensorDict({"init_state_id": torch.tensor([-1])}, []))
        assert (first["observation", "image"] == demo.rows["observation", "image"][0]).all()
    finally:
        env.close()
