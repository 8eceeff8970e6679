# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Geometry of the scripted expert, against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from torchrl_dvla.envs.expert_grasp import (
    GraspPlanner,
    box_corners,
    distance_to_hull,
    downward_rotation,
    planar_direction,
    rotation_error,
    width_along,
)

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
    assert distance_to_hull(point, points) == pytest.approx(distance)


def test_width_depends_on_the_direction():
    corners = box_corners([0.03, 0.02, 0.1])
    assert width_along(corners, 0.0) == pytest.approx(0.06)
    assert width_along(corners, np.pi / 2) == pytest.approx(0.04)
    # a 3-4-5 direction: 0.06 * 0.8 + 0.04 * 0.6
    assert width_along(corners, np.arctan2(3.0, 4.0)) == pytest.approx(0.072)


def test_box_corners_are_the_eight_corners():
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
    assert rotation_error(downward_rotation(-0.3), downward_rotation(0.4)) == pytest.approx(
        [0, 0, -0.7]
    )
    assert rotation_error(np.eye(3), np.eye(3)) == pytest.approx([0, 0, 0])


def test_planar_direction():
    assert planar_direction(np.pi / 3) == pytest.approx([0.5, np.sqrt(3) / 2])


class TestGraspPlanner:
    def test_takes_a_box_across_its_thin_side(self):
        # long side along y: the fingers must open along x, a quarter turn from home
        points = box_corners([0.02, 0.06, 0.03]) + [0.1, -0.2, 0.03]
        grasp = GraspPlanner().plan(points, [])
        assert abs(grasp.yaw) == pytest.approx(np.pi / 2)
        # 6 cm tall: the middle, 3 cm, is between 3.5 and 1 cm below the top
        assert grasp.point == pytest.approx([0.1, -0.2, 0.03])
        assert grasp.top == pytest.approx(0.06)
        assert grasp.height_above_bottom == pytest.approx(0.03)

    def test_takes_a_tall_object_near_its_top(self):
        points = box_corners([0.02, 0.02, 0.1]) + [0.0, 0.0, 0.1]
        grasp = GraspPlanner().plan(points, [])
        assert grasp.yaw == pytest.approx(0.0)
        assert grasp.point[2] == pytest.approx(0.2 - 0.035)

    def test_takes_a_wide_object_by_the_rim(self):
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        ring = np.stack([0.06 * np.cos(angles), 0.06 * np.sin(angles)], -1)
        points = np.concatenate([np.c_[ring, np.full(64, z)] for z in (0.0, 0.05)])
        grasp = GraspPlanner().plan(points, [])
        # 8 mm inside a rim of 6 cm radius, 18 mm below its top
        assert np.linalg.norm(grasp.point[:2]) == pytest.approx(0.052, abs=1e-4)
        assert grasp.point[2] == pytest.approx(0.032)

    def test_turns_away_from_a_neighbour(self):
        cube = box_corners([0.02, 0.02, 0.02]) + [0.0, 0.0, 0.02]
        # stands where a finger would be at yaw 0, which opens along y
        neighbour = box_corners([0.03, 0.03, 0.05]) + [0.0, 0.07, 0.05]
        assert GraspPlanner().plan(cube, []).yaw == pytest.approx(0.0)
        # a quarter turn costs 0.03 * pi / 2 = 0.047 and gains half of the gap, at most 0.03: the
        # cheaper yaw 0 loses because a finger would touch
        turned = GraspPlanner().plan(cube, [neighbour])
        assert abs(turned.yaw) == pytest.approx(np.pi / 2)

    def test_ignores_what_lies_below_the_object(self):
        cube = box_corners([0.02, 0.02, 0.02]) + [0.0, 0.0, 0.12]
        table = box_corners([1.0, 1.0, 0.05]) + [0.0, 0.0, 0.05]
        assert GraspPlanner().plan(cube, [table]).yaw == pytest.approx(0.0)
