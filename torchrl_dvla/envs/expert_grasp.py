# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Grasps of the scripted expert: where two fingers go, and the geometry that decides it.

Pure functions of numpy arrays in metres and radians, in the world frame of the robot (x forward, y
to the left, z up). Nothing here knows a simulator, so each has a test with hand-worked numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

__all__ = [
    "FloatArray",
    "Grasp",
    "GraspPlanner",
    "box_corners",
    "distance_to_hull",
    "downward_rotation",
    "planar_direction",
    "rotation_error",
    "width_along",
]

FloatArray = NDArray[np.float64]


def planar_direction(angle: float) -> FloatArray:
    """Unit vector of the x-y plane.

    Args:
        angle (float): angle from the x axis, counter-clockwise.

    Returns:
        Array ``[2]``.

    Examples:
        >>> planar_direction(np.pi / 2).round(6).tolist()
        [0.0, 1.0]
    """
    return np.array([np.cos(angle), np.sin(angle)])


def box_corners(half_size: ArrayLike) -> FloatArray:
    """The eight corners of a box centred on the origin.

    Args:
        half_size (array): half the edge lengths ``[3]``.

    Returns:
        Array ``[8, 3]``.

    Examples:
        >>> box_corners([1.0, 2.0, 3.0])[0].tolist()
        [-1.0, -2.0, -3.0]
    """
    signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], dtype=float)
    return signs * np.asarray(half_size, dtype=float)


def width_along(points: ArrayLike, angle: float) -> float:
    """Extent of a point set along a horizontal direction.

    Args:
        points (array): points ``[N, 2]`` or ``[N, 3]``; only x and y are read.
        angle (float): direction, from the x axis.

    Returns:
        Largest minus smallest coordinate along the direction.

    Examples:
        >>> width_along([[0.0, 0.0], [3.0, 4.0]], 0.0)
        3.0
    """
    return float(np.ptp(np.asarray(points, dtype=float)[:, :2] @ planar_direction(angle)))


def distance_to_hull(point: ArrayLike, points: ArrayLike) -> float:
    """How far a point of the plane is outside the convex hull of others, at least.

    The distance is to the nearest of the lines through the hull's edges that separate the point
    from the hull: exact beside an edge, a lower bound beyond a corner, and negative inside.

    Args:
        point (array): the point ``[2]``.
        points (array): points that span the hull, ``[N, 2]`` or ``[N, 3]``; only x and y are read.

    Returns:
        The signed distance: positive outside.

    Examples:
        >>> square = [[0, 0], [2, 0], [2, 2], [0, 2]]
        >>> distance_to_hull([3.0, 1.0], square), distance_to_hull([1.0, 1.0], square)
        (1.0, -1.0)
    """
    hull = ConvexHull(np.asarray(points, dtype=float)[:, :2])
    # each row of `equations` is the outward unit normal of an edge and its offset
    return float(
        (hull.equations[:, :2] @ np.asarray(point, dtype=float) + hull.equations[:, 2]).max()
    )


def downward_rotation(yaw: float) -> FloatArray:
    """Rotation of a parallel gripper that points down.

    Robosuite's grip site has its x axis along world y when the arm is in its home pose, so the
    fingers open along world y at yaw 0; yaw turns them counter-clockwise seen from above.

    Args:
        yaw (float): rotation around world z.

    Returns:
        Rotation matrix ``[3, 3]`` from the tool to the world frame.

    Examples:
        >>> downward_rotation(0.0).tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]
    """
    home = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    return Rotation.from_euler("z", yaw).as_matrix() @ home


def rotation_error(target: ArrayLike, current: ArrayLike) -> FloatArray:
    """World-frame rotation vector that turns one orientation into another.

    Args:
        target (array): rotation matrix ``[3, 3]``.
        current (array): rotation matrix ``[3, 3]``.

    Returns:
        Axis times angle, ``[3]``, with the angle in ``[0, pi]``.

    Examples:
        >>> turn = rotation_error(downward_rotation(0.25), downward_rotation(0.0))
        >>> turn.round(6).tolist()
        [0.0, 0.0, 0.25]
    """
    delta = np.asarray(target, dtype=float) @ np.asarray(current, dtype=float).T
    return Rotation.from_matrix(delta).as_rotvec()


@dataclass(frozen=True)
class Grasp:
    """A top-down grasp.

    Attributes:
        point (array): where the point between the finger tips goes, ``[3]``.
        yaw (float): turn of the fingers around world z; at 0 they open along world y.
        top (float): height of the object's highest point.
        height_above_bottom (float): the grasp point above the object's lowest point.
    """

    point: FloatArray
    yaw: float
    top: float
    height_above_bottom: float


@dataclass(frozen=True)
class GraspPlanner:
    """Chooses a :class:`Grasp` from the points of an object and of its neighbours.

    An object whose thinnest side fits between the fingers is taken across that side, at mid-height
    when it is low and near the top when it is tall. A wider one (bowl, mug, plate) is taken by the
    rim. Among the candidates the ones whose open fingers stay clear of the neighbours win; a small
    cost on yaw keeps the wrist near its home pose.

    Args:
        max_width (float): widest object taken across, in metres.
        finger_offset (float): distance of an open finger from the grasp point.
        rim_inset (float): how far inside its outer edge a rim is taken.
        rim_depth (float): how far below its top a rim is taken.
        min_clearance (float): gap between an open finger and a neighbour below which a turn is only
            taken if all are as tight.

    Examples:
        >>> box = box_corners([0.05, 0.02, 0.02]) + np.array([0.1, 0.2, 0.02])
        >>> grasp = GraspPlanner().plan(box, [])
        >>> grasp.point.round(3).tolist(), round(abs(grasp.yaw), 3)
        ([0.1, 0.2, 0.02], 0.0)
    """

    max_width: float = 0.072
    finger_offset: float = 0.045
    rim_inset: float = 0.008
    rim_depth: float = 0.018
    min_clearance: float = 0.005

    def plan(
        self,
        points: FloatArray,
        neighbours: list[FloatArray],
        *,
        jitter: np.random.Generator | None = None,
    ) -> Grasp:
        """Plan one grasp.

        Args:
            points (array): points of the object, ``[N, 3]``.
            neighbours (list of arrays): points ``[M, 3]`` of each other object.

        Keyword Args:
            jitter (numpy Generator, optional): perturbs the choice, for a try after a failure.

        Returns:
            The best :class:`Grasp` found.
        """
        bottom, top = float(points[:, 2].min()), float(points[:, 2].max())
        # what lies lower than the object's foot cannot be in the fingers' way
        obstacles = [
            other for other in neighbours if len(other) and other[:, 2].max() > bottom + 0.02
        ]
        centre = (points[:, :2].max(0) + points[:, :2].min(0)) / 2
        yaws = np.linspace(-np.pi / 2, np.pi / 2, 36, endpoint=False).tolist()
        across = [(yaw, width_along(points, yaw + np.pi / 2)) for yaw in yaws]
        if min(width for _, width in across) <= self.max_width:
            offset, yaw = np.zeros(2), self._across(across, centre, obstacles, jitter)
            height = max(np.clip((bottom + top) / 2, top - 0.035, top - 0.01), bottom + 0.009)
        else:
            offset, yaw = self._rim(points, centre, obstacles, jitter)
            height = top - self.rim_depth if top - bottom > 0.03 else bottom + 0.012
        point = np.array([*(centre + offset), height])
        return Grasp(point, yaw, top, float(height - bottom))

    def _across(
        self,
        widths: list[tuple[float, float]],
        centre: FloatArray,
        obstacles: list[FloatArray],
        jitter: np.random.Generator | None,
    ) -> float:
        def cost(yaw: float, width: float) -> tuple[bool, float]:
            gap = self._clearance(centre, yaw + np.pi / 2, obstacles)
            blocked = gap < self.min_clearance
            return blocked, width + 0.03 * abs(yaw) - 0.5 * gap + _noise(jitter)

        return min((cost(yaw, w), yaw) for yaw, w in widths if w <= self.max_width)[1]

    def _rim(
        self,
        points: FloatArray,
        centre: FloatArray,
        obstacles: list[FloatArray],
        jitter: np.random.Generator | None,
    ) -> tuple[FloatArray, float]:
        candidates = []
        for side, angle in enumerate(np.linspace(-np.pi, np.pi, 16, endpoint=False)):
            radius = width_along(points, angle) / 2 - self.rim_inset
            offset = radius * planar_direction(angle)
            yaw = float(angle % np.pi - np.pi / 2)
            gap = self._clearance(centre + offset, angle, obstacles)
            candidates.append((gap - 0.02 * abs(yaw) + _noise(jitter), side, offset, yaw))
        _, _, offset, yaw = max(candidates, key=lambda c: c[:2])
        return offset, yaw

    def _clearance(self, xy: FloatArray, angle: float, obstacles: list[FloatArray]) -> float:
        """Smallest gap between either open finger and an obstacle, at most 6 cm."""
        reach = self.finger_offset * planar_direction(angle)
        gaps = [
            distance_to_hull(xy + side * reach, other) for other in obstacles for side in (-1, 1)
        ]
        return min([0.06, *gaps])


def _noise(jitter: np.random.Generator | None) -> float:
    return 0.0 if jitter is None else 0.01 * float(jitter.random())
