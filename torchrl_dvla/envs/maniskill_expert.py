# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Scripted expert of ManiSkill's PickCube on privileged simulator state, and its demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from torchrl_dvla.data.demonstrations import Demonstration, DemonstrationInfo
from torchrl_dvla.envs.expert_episode import ActionNoise, record_episode
from torchrl_dvla.envs.expert_grasp import FloatArray, rotation_error
from torchrl_dvla.envs.maniskill_env import ManiSkillChunkEnv

__all__ = [
    "PickCubeExpert",
    "PickCubeExpertConfig",
    "PickCubePhase",
    "PickCubeScene",
    "record_pick_cube",
]

_OPEN, _CLOSE = 1.0, -1.0
#: The gripper in its home pose: x forward, z down; the fingers open along y.
_HOME = np.diag([1.0, -1.0, -1.0])
#: What an action of 1 commands, in metres and, with ManiSkill's sign, in radians.
_METRES, _RADIANS = 0.1, -0.1


class PickCubeScene(NamedTuple):
    """What the expert reads at an env step, in the world frame.

    Attributes:
        tool (array): point between the finger tips, ``[3]``.
        rotation (array): rotation matrix of the gripper, ``[3, 3]``.
        cube (array): centre of the cube, ``[3]``.
        cube_rotation (array): its rotation matrix, ``[3, 3]``.
        goal (array): where its centre has to go, ``[3]``.
        is_grasped (bool): whether both fingers press on it.
    """

    tool: FloatArray
    rotation: FloatArray
    cube: FloatArray
    cube_rotation: FloatArray
    goal: FloatArray
    is_grasped: bool

    @classmethod
    def read(cls, maniskill_env: Any) -> PickCubeScene:
        """The scene of the first environment of ManiSkill's PickCube."""
        tool = maniskill_env.agent.tcp.pose.to_transformation_matrix()[0].double().cpu().numpy()
        cube = maniskill_env.cube.pose.to_transformation_matrix()[0].double().cpu().numpy()
        goal = maniskill_env.goal_site.pose.p[0].double().cpu().numpy()
        is_grasped = bool(maniskill_env.agent.is_grasping(maniskill_env.cube)[0])
        return cls(tool[:3, 3], tool[:3, :3], cube[:3, 3], cube[:3, :3], goal, is_grasped)


class PickCubePhase(Enum):
    """What the expert is doing."""

    APPROACH = "approach"
    CLOSE = "close"
    CARRY = "carry"


@dataclass(frozen=True)
class PickCubeExpertConfig:
    """Distances in metres, angles in radians, times in env steps.

    Attributes:
        max_action (float): largest change of position, in action units.
        max_turn (float): largest change of orientation, in action units.
        turn_gain (float): commanded angle per angle of error.
        funnel_slope (float): how steeply the approach descends as it gets over the cube: at a
            lateral error ``e`` it aims ``funnel_slope * e`` above it.
        hover (float): largest height above the cube that the approach aims at.
        grasp_tolerance (float): position error at which the fingers close.
        turn_tolerance (float): orientation error up to which the approach descends.
        close_steps (int): env steps that the fingers are given to close.
        patience (int): env steps after which the fingers open again if they hold nothing.
    """

    max_action: float = 0.8
    max_turn: float = 1.0
    turn_gain: float = 2.5
    funnel_slope: float = 3.0
    hover: float = 0.12
    grasp_tolerance: float = 0.01
    turn_tolerance: float = 0.35
    close_steps: int = 2
    patience: int = 6


class PickCubeExpert:
    """Feedback controller that picks the cube up and holds it at the goal.

    It answers with one action of ``pd_ee_delta_pose`` per env step: change of position, change of
    orientation, gripper. Each phase servos to a target that moves with the scene, so the actions
    stay right when the executed ones are disturbed, and a cube that is lost is picked up again.

    Keyword Args:
        config (PickCubeExpertConfig, optional): speeds and tolerances.

    Examples:
        >>> expert, level = PickCubeExpert(), np.eye(3)
        >>> above, cube, goal = np.array([[0.0, 0, 0.2], [0, 0, 0.02], [0, 0, 0.3]])
        >>> scene = PickCubeScene(above, np.diag([1, -1, -1]), cube, level, goal, False)
        >>> action = expert.act(scene)
        >>> action[:3].tolist(), float(action[6]), expert.phase.value  # down, fingers open
        ([0.0, 0.0, -0.8], 1.0, 'approach')
    """

    def __init__(self, *, config: PickCubeExpertConfig | None = None) -> None:
        self.config = config or PickCubeExpertConfig()
        self._enter(PickCubePhase.APPROACH)

    def act(self, scene: PickCubeScene) -> FloatArray:
        """Action ``[7]`` for the current state, in ``[-1, 1]``.

        Args:
            scene (PickCubeScene): the state.
        """
        config = self.config
        self._age += 1
        may_carry = self.phase is PickCubePhase.CARRY or (
            self.phase is PickCubePhase.CLOSE and self._age >= config.close_steps
        )
        if may_carry and scene.is_grasped:
            self._enter(PickCubePhase.CARRY)
            return self._action(scene.goal - scene.cube, np.zeros(3), _CLOSE)
        if self.phase is PickCubePhase.CARRY or self._age > config.patience:
            self._enter(PickCubePhase.APPROACH)
        move = scene.cube - scene.tool
        turn = rotation_error(_grasp_rotation(scene), scene.rotation)
        if self.phase is PickCubePhase.CLOSE:
            return self._action(move, turn, _CLOSE)
        excess = max(0.0, float(np.linalg.norm(turn)) - config.turn_tolerance)
        if float(np.linalg.norm(move)) < config.grasp_tolerance and excess == 0.0:
            self._enter(PickCubePhase.CLOSE)
        # Come down only as far as the fingers are over the cube and turned its way.
        aside = max(0.0, float(np.linalg.norm(move[:2])) - config.grasp_tolerance)
        move[2] += min(config.funnel_slope * aside + excess, config.hover)
        return self._action(move, turn, _OPEN)

    def _enter(self, phase: PickCubePhase) -> None:
        self.phase, self._age = phase, 0

    def _action(self, move: FloatArray, turn: FloatArray, gripper: float) -> FloatArray:
        config = self.config
        move = _shortened(move / _METRES, config.max_action)
        turn = _shortened(config.turn_gain * turn / _RADIANS, config.max_turn)
        return np.concatenate([move, turn, [gripper]])


def _grasp_rotation(scene: PickCubeScene) -> FloatArray:
    """Gripper that points down, turned to the nearest side of the cube."""
    cube, tool = (np.arctan2(r[1, 0], r[0, 0]) for r in (scene.cube_rotation, scene.rotation))
    side = (cube - tool + np.pi / 4) % (np.pi / 2) - np.pi / 4
    return Rotation.from_euler("z", tool + side).as_matrix() @ _HOME


def _shortened(vector: FloatArray, limit: float) -> FloatArray:
    return vector * min(1.0, limit / max(1e-9, float(np.abs(vector).max())))


def record_pick_cube(
    env: ManiSkillChunkEnv,
    *,
    seed: int,
    noise: ActionNoise | None = None,
    config: PickCubeExpertConfig | None = None,
) -> Demonstration:
    """Record one episode of the expert on the scene of *seed*.

    Its labels are those of :func:`~torchrl_dvla.envs.expert_episode.record_episode`.

    Args:
        env (ManiSkillChunkEnv): ``"PickCube-v1"`` with ``num_envs=1`` and ``"pd_ee_delta_pose"``.

    Keyword Args:
        seed (int): decides scene and noise.
        noise (ActionNoise, optional): disturbance of what is executed. Defaults to none.
        config (PickCubeExpertConfig, optional): speeds and tolerances of the expert.

    Returns:
        The :class:`~torchrl_dvla.data.demonstrations.Demonstration`, successful or not.

    Raises:
        ValueError: for another task: the expert knows this one.
    """
    if env.task != "PickCube-v1" or env.batch_size:
        raise ValueError(
            f"env must be one 'PickCube-v1', got {env.task!r} with num_envs={env.num_envs}. Of "
            "other tasks, bring demonstrations of your own."
        )
    env.set_seed(seed)
    observation = env.reset()
    expert = PickCubeExpert(config=config)
    rows, success, num_env_steps = record_episode(
        env,
        observation,
        lambda: expert.act(PickCubeScene.read(env.maniskill_env)),
        noise=noise,
        rng=np.random.default_rng(seed),
    )
    info = DemonstrationInfo(
        instruction=env.instruction,
        task_suite=env.task,
        task_id=0,
        seed=seed,
        success=success,
        num_env_steps=num_env_steps,
    )
    return Demonstration(rows, info)
