# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Geometry the scripted expert plans with: extents of objects, gaps for fingers, tool rotations.

Pure functions of numpy arrays in metres and radians, in the world frame of the robot (x forward, y
to the left, z up). Nothing here knows a simulator, so each has a test with hand-worked numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

__all__ = [
    "FloatArray",
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
