# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Scripted pick-and-place expert on privileged simulator state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from torchrl_dvla.envs.expert_grasp import (
    FloatArray,
    Grasp,
    GraspPlanner,
    box_corners,
    downward_rotation,
    rotation_error,
)

__all__ = ["ExpertConfig", "ExpertPhase", "ExpertScene", "PickPlaceExpert", "PlaceGoal"]

# MuJoCo's mjtGeom values; a worker may read them without importing mujoco itself.
_SPHERE, _CAPSULE, _CYLINDER, _MESH = 2, 3, 5, 7
_OPEN, _CLOSE = -1.0, 1.0


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


class ExpertPhase(Enum):
    """What the expert is doing; the phases of one goal follow each other in this order."""

    APPROACH = "approach"
    CLOSE = "close"
    CARRY = "carry"
    LOWER = "lower"
    RELEASE = "release"
    RETREAT = "retreat"
    FINISHED = "finished"


@dataclass(frozen=True)
class ExpertConfig:
    """Speeds (in action units, of which 1 commands 5 cm), distances in metres, times in env steps.

    Attributes:
        gain (float): action per metre of position error, before clipping to ``[-1, 1]``.
        turn_gain (float): action per radian of orientation error.
        max_turn (float): largest rotation action.
        hover (float): height over the object that the approach keeps while it is off to the side.
        funnel_slope (float): how steeply the approach descends as it gets over the object: at a
            lateral error ``e`` it aims ``funnel_slope * e`` above the grasp.
        grasp_tolerance (float): position error at which the fingers close.
        close_steps (int): env steps that the fingers are given to close.
        carry_clearance (float): gap between the carried object and the top of its target.
        lift_slope (float): lateral action allowed per metre of lift, so that an object leaves the
            table before it travels.
        drop_tolerance (float): lateral error at which a container is dropped into.
        place_tolerance (float): lateral error at which lowering on a surface starts.
        release_steps (int): env steps that the fingers are given to open.
        drop_distance (float): drift of the object in the hand that counts as having lost it.
        patience (int): env steps after which a motion is taken as finished.
    """

    gain: float = 24.0
    turn_gain: float = 2.4
    max_turn: float = 0.5
    hover: float = 0.05
    funnel_slope: float = 4.0
    grasp_tolerance: float = 0.012
    close_steps: int = 6
    carry_clearance: float = 0.03
    lift_slope: float = 20.0
    drop_tolerance: float = 0.03
    place_tolerance: float = 0.015
    release_steps: int = 6
    drop_distance: float = 0.05
    patience: int = 60


class PickPlaceExpert:
    """Feedback controller for goals of the form ``(In|On object target)``, one after the other.

    It reads the simulator's state and answers with one 7-dimensional OSC_POSE action per env step:
    change of position, change of orientation, gripper. Each phase servos to a target that moves
    with the scene, so the actions stay right when the executed ones are disturbed, which is what
    recording demonstrations with action noise needs. A goal that is missed is tried again.

    Args:
        scene (ExpertScene): the scene, after its reset.

    Keyword Args:
        config (ExpertConfig, optional): speeds and tolerances. Defaults to :class:`ExpertConfig`.
        seed (int): seed of the perturbation of grasps after a failure. Defaults to 0.

    Raises:
        ValueError: if the task has no goal of the form the expert solves.

    Examples:
        >>> expert = PickPlaceExpert(ExpertScene(robosuite_env))  # doctest: +SKIP
        >>> action = expert.act()  # doctest: +SKIP
        >>> action.shape, expert.phase  # doctest: +SKIP
        ((7,), <ExpertPhase.APPROACH: 'approach'>)
    """

    def __init__(
        self,
        scene: ExpertScene,
        *,
        config: ExpertConfig | None = None,
        seed: int = 0,
    ) -> None:
        if not scene.goals:
            raise ValueError(
                "scene must have a goal of the form (In|On object target), got none. Choose a "
                "pick-and-place task: goals over joints (drawers, doors) are beyond this expert."
            )
        self.scene = scene
        self.config = config or ExpertConfig()
        self.planner = GraspPlanner()
        self._jitter = np.random.default_rng(seed)
        self._pending = self._open_goals()
        self.num_retries = 0
        self.phase = ExpertPhase.FINISHED
        self._begin_goal()

    @property
    def goal(self) -> PlaceGoal | None:
        """The goal in hand; ``None`` once all of them were tried."""
        return self._pending[0] if self._pending else None

    def act(self) -> FloatArray:
        """Action ``[7]`` for the current simulator state, in ``[-1, 1]``."""
        if self.phase is ExpertPhase.FINISHED:
            self._pending = self._open_goals()
            if not self._pending:
                return np.array([0.0, 0.0, 0.3, 0.0, 0.0, 0.0, _OPEN])
            self.num_retries += 1
            self._begin_goal()
        self._age += 1
        return np.asarray(getattr(self, f"_{self.phase.value}")())

    # ---- the phases: each returns an action and may set the phase of the next env step

    def _approach(self) -> FloatArray:
        config, grasp, tool = self.config, self._grasp, self.scene.tool_position
        aside = float(np.linalg.norm(grasp.point[:2] - tool[:2]))
        turn = float(np.linalg.norm(self._turn()))
        # come down only as far as the fingers are over the object and turned its way
        height = config.funnel_slope * max(0.0, aside - config.grasp_tolerance) + max(
            0.0, turn - 0.2
        )
        target = grasp.point + [0.0, 0.0, min(height, self._hover - grasp.point[2])]
        if np.linalg.norm(grasp.point - tool) < config.grasp_tolerance or self._impatient:
            self._enter(ExpertPhase.CLOSE)
        return self._servo(target, _OPEN)

    def _close(self) -> FloatArray:
        if self._age >= self.config.close_steps:
            self._lifted_from = self.scene.tool_position
            self._in_hand = self._object - self._lifted_from
            self._enter(ExpertPhase.CARRY)
        return self._servo(self._grasp.point, _CLOSE)

    def _carry(self) -> FloatArray:
        config, tool = self.config, self.scene.tool_position
        if self._lost():
            return self._try_again()
        place = self.scene.target_point(self._goal.target)
        height = max(
            place[2] + self._grasp.height_above_bottom + config.carry_clearance,
            self._lifted_from[2] + 0.05,
        )
        target = np.array([*(place[:2] - self._in_hand[:2]), height])
        aside = np.linalg.norm(target[:2] - tool[:2])
        speed = config.lift_slope * max(0.0, tool[2] - self._lifted_from[2])
        container = self.scene.is_container(self._goal.target)
        tolerance = config.drop_tolerance if container else config.place_tolerance
        if (aside < tolerance and tool[2] > height - 0.03) or self._impatient:
            self._enter(ExpertPhase.RELEASE if container else ExpertPhase.LOWER)
        return self._servo(target, _CLOSE, max_lateral=speed)

    def _lower(self) -> FloatArray:
        if self._lost():
            return self._try_again()
        place = self.scene.target_point(self._goal.target)
        in_hand = self._object - self.scene.tool_position
        height = place[2] + self._grasp.height_above_bottom
        target = np.array([*(place[:2] - in_hand[:2]), height])
        if self.scene.tool_position[2] - height < self.config.grasp_tolerance or self._age > 25:
            self._enter(ExpertPhase.RELEASE)
        return self._servo(target, _CLOSE, max_action=0.6)

    def _release(self) -> FloatArray:
        if self._age >= self.config.release_steps:
            self._retreat_to = self.scene.tool_position + [0.0, 0.0, 0.1]
            self._enter(ExpertPhase.RETREAT)
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, _OPEN])

    def _retreat(self) -> FloatArray:
        if self.scene.tool_position[2] > self._retreat_to[2] - 0.03 or self._age > 15:
            self._pending = self._pending[1:]
            self._begin_goal()
        return self._servo(self._retreat_to, _OPEN)

    # ---- helpers

    def _open_goals(self) -> list[PlaceGoal]:
        return [goal for goal in self.scene.goals if not self.scene.is_satisfied(goal)]

    def _begin_goal(self) -> None:
        if not self._pending:
            self._enter(ExpertPhase.FINISHED)
            return
        self._goal = self._pending[0]
        neighbours = [self.scene.points(o) for o in self.scene.objects if o != self._goal.obj]
        jitter = self._jitter if self.num_retries else None
        points = self.scene.points(self._goal.obj)
        self._grasp: Grasp = self.planner.plan(points, neighbours, jitter=jitter)
        self._hover = max(self._grasp.top, self._grasp.point[2]) + self.config.hover
        self._rotation = downward_rotation(self._grasp.yaw)
        self._enter(ExpertPhase.APPROACH)

    def _enter(self, phase: ExpertPhase) -> None:
        self.phase, self._age = phase, 0

    @property
    def _impatient(self) -> bool:
        return self._age > self.config.patience

    @property
    def _object(self) -> FloatArray:
        return self.scene.position(self._goal.obj)

    def _lost(self) -> bool:
        in_hand = self._object - self.scene.tool_position
        return bool(np.linalg.norm(in_hand - self._in_hand) > self.config.drop_distance)

    def _try_again(self) -> FloatArray:
        """Open, rise, and start the same goal over."""
        self.num_retries += 1
        self._pending = [self._goal, *self._pending]
        self._retreat_to = self.scene.tool_position + [0.0, 0.0, 0.08]
        self._enter(ExpertPhase.RETREAT)
        return self._retreat()

    def _turn(self) -> FloatArray:
        return rotation_error(self._rotation, self.scene.tool_rotation)

    def _servo(
        self,
        target: FloatArray,
        gripper: float,
        *,
        max_action: float = 1.0,
        max_lateral: float = 1.0,
    ) -> FloatArray:
        move = self.config.gain * (target - self.scene.tool_position)
        # the x-y part keeps its direction when it is cut, height has a limit of its own
        lateral = min(max_action, max_lateral) / max(1e-9, float(np.abs(move[:2]).max()))
        move[:2] *= min(1.0, lateral)
        move[2] = np.clip(move[2], -max_action, max_action)
        turn = np.clip(
            self.config.turn_gain * self._turn(), -self.config.max_turn, self.config.max_turn
        )
        return np.concatenate([move, turn, [gripper]])
