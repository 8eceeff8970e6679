# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the scripted expert may see of a LIBERO scene: the simulator's own state, no image."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from torchrl_dvla.envs.expert_geometry import FloatArray, box_corners

__all__ = ["ExpertScene", "PlaceGoal"]

# MuJoCo's mjtGeom values; a worker may read them without importing mujoco itself.
_SPHERE, _CAPSULE, _CYLINDER, _MESH = 2, 3, 5, 7


class PlaceGoal(NamedTuple):
    """A goal of the form ``(In|On object target)``.

    Attributes:
        predicate (str): ``"in"`` or ``"on"``.
        obj (str): name of the object to bring.
        target (str): name of the object or region it goes to.
    """

    predicate: str
    obj: str
    target: str


class ExpertScene:
    """Privileged view on the robosuite environment inside a LIBERO environment.

    Args:
        robosuite_env: the task's robosuite environment (``ControlEnv.env`` in LIBERO's names).

    Examples:
        >>> scene = ExpertScene(robosuite_env)  # doctest: +SKIP
        >>> scene.goals  # doctest: +SKIP
        [PlaceGoal(predicate='in', obj='alphabet_soup_1', target='basket_1_contain_region')]
    """

    def __init__(self, robosuite_env: Any) -> None:
        self._env = robosuite_env
        self._grip_site = robosuite_env.sim.model.site_name2id("gripper0_grip_site")

    @property
    def goals(self) -> list[PlaceGoal]:
        """Placements the task asks for, in the task's order; other goals are left out."""
        goals = self._env.parsed_problem["goal_state"]
        return [PlaceGoal(*goal) for goal in goals if len(goal) == 3 and goal[0] in ("in", "on")]

    @property
    def objects(self) -> list[str]:
        """Names of all objects and fixtures with a body of their own."""
        return list(self._env.obj_body_id)

    @property
    def tool_position(self) -> FloatArray:
        """Point between the finger tips, ``[3]``."""
        return self._env.sim.data.site_xpos[self._grip_site].copy()

    @property
    def tool_rotation(self) -> FloatArray:
        """Rotation matrix ``[3, 3]`` of the gripper."""
        return self._env.sim.data.site_xmat[self._grip_site].reshape(3, 3).copy()

    def is_satisfied(self, goal: PlaceGoal) -> bool:
        """Whether LIBERO's own predicate holds now."""
        return bool(self._env._eval_predicate(list(goal)))

    def position(self, obj: str) -> FloatArray:
        """Origin of an object's body, ``[3]``."""
        return self._env.sim.data.body_xpos[self._env.obj_body_id[obj]].copy()

    def points(self, obj: str) -> FloatArray:
        """World-frame points ``[N, 3]`` that span an object's collision geometry; empty if none."""
        model, data = self._env.sim.model._model, self._env.sim.data._data
        root = self._env.obj_body_id[obj]
        found = [
            _geom_points(model, data, geom)
            for geom in range(model.ngeom)
            if model.geom_contype[geom] | model.geom_conaffinity[geom]
            and _is_part_of(model, model.geom_bodyid[geom], root)
        ]
        return np.concatenate(found) if found else np.zeros((0, 3))

    def target_point(self, target: str) -> FloatArray:
        """Where to let go of an object's bottom: the middle of the target's top, ``[3]``."""
        if target in self._env.obj_body_id:
            return np.array([*self.position(target)[:2], self.points(target)[:, 2].max()])
        point = self._env.sim.data.get_site_xpos(target).copy()
        parent = self.parent(target)
        if parent is not None and "contain" in target:
            # a container is filled over its rim, not through its wall
            point[2] = self.points(parent)[:, 2].max()
        return point

    def parent(self, region: str) -> str | None:
        """The object a region belongs to, if any."""
        return next((name for name in self.objects if region.startswith(name)), None)

    def is_container(self, target: str) -> bool:
        """Whether the target is a region that things are dropped into from above."""
        return target not in self._env.obj_body_id and "contain" in target


def _is_part_of(model: Any, body: int, root: int) -> bool:
    while body not in (0, root):
        body = model.body_parentid[body]
    return bool(body == root)


def _geom_points(model: Any, data: Any, geom: int) -> FloatArray:
    """Corners of one geom in the world frame, ``[N, 3]``."""
    kind, size = int(model.geom_type[geom]), model.geom_size[geom]
    if kind == _MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        corners = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
    elif kind == _SPHERE:
        corners = box_corners([size[0]] * 3)
    elif kind == _CAPSULE:
        corners = box_corners([size[0], size[0], size[0] + size[1]])
    elif kind == _CYLINDER:
        corners = box_corners([size[0], size[0], size[1]])
    else:
        corners = box_corners(size)
    return corners @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
