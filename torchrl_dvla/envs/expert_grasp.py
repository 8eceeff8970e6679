# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where to put the two fingers: across the thin side of an object, or on its rim."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchrl_dvla.envs.expert_geometry import (
    FloatArray,
    distance_to_hull,
    planar_direction,
    width_along,
)

__all__ = ["Grasp", "GraspPlanner"]


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


class GraspPlanner:
    """Chooses a :class:`Grasp` from the points of an object and of its neighbours.

    An object whose thinnest side fits between the fingers is taken across that side, at mid-height
    when it is low and near the top when it is tall. A wider one (bowl, mug, plate) is taken by the
    rim. Among the candidates the ones whose open fingers stay clear of the neighbours win; a small
    cost on yaw keeps the wrist near its home pose.

    Keyword Args:
        max_width (float): widest object taken across, in metres.
        finger_offset (float): distance of an open finger from the grasp point.
        rim_inset (float): how far inside its outer edge a rim is taken.
        rim_depth (float): how far below its top a rim is taken.
        min_clearance (float): gap between an open finger and a neighbour below which a turn is only
            taken if all are as tight.

    Examples:
        >>> from torchrl_dvla.envs.expert_geometry import box_corners
        >>> box = box_corners([0.05, 0.02, 0.02]) + np.array([0.1, 0.2, 0.02])
        >>> grasp = GraspPlanner().plan(box, [])
        >>> grasp.point.round(3).tolist(), round(abs(grasp.yaw), 3)
        ([0.1, 0.2, 0.02], 0.0)
    """

    def __init__(
        self,
        *,
        max_width: float = 0.072,
        finger_offset: float = 0.045,
        rim_inset: float = 0.008,
        rim_depth: float = 0.018,
        min_clearance: float = 0.005,
    ) -> None:
        self.max_width = max_width
        self.finger_offset = finger_offset
        self.rim_inset = rim_inset
        self.rim_depth = rim_depth
        self.min_clearance = min_clearance

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
        across = [(yaw, width_along(points, yaw + np.pi / 2)) for yaw in _yaws(36)]
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


def _yaws(num: int) -> list[float]:
    return np.linspace(-np.pi / 2, np.pi / 2, num, endpoint=False).tolist()


def _noise(jitter: np.random.Generator | None) -> float:
    return 0.0 if jitter is None else 0.01 * float(jitter.random())
