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

from torchrl_dvla.data.demonstrations import Demonstration, DemonstrationInfo
from torchrl_dvla.envs.expert_episode import ActionNoise, record_episode
from torchrl_dvla.envs.expert_grasp import FloatArray
from torchrl_dvla.envs.maniskill_env import ManiSkillChunkEnv

__all__ = [
    "PickCubeExpert",
    "PickCubeExpertConfig",
    "PickCubePhase",
    "PickCubeScene",
    "record_pick_cube",
]

_OPEN, _CLOSE = 1.0, -1.0
#: Metres that a change of position of 1 commands.
_METRES = 0.1


class PickCubeScene(NamedTuple):
    """What the expert reads at an env step, in the world frame.

    Attributes:
        tool (array): point between the finger tips, ``[3]``.
        cube (array): centre of the cube, ``[3]``.
        goal (array): where its centre has to go, ``[3]``.
        is_grasped (bool): whether both fingers press on it.
    """

    tool: FloatArray
    cube: FloatArray
    goal: FloatArray
    is_grasped: bool

    @classmethod
    def read(cls, maniskill_env: Any) -> PickCubeScene:
        """The scene of the first environment of ManiSkill's PickCube."""
        agent, cube = maniskill_env.agent, maniskill_env.cube
        poses = (agent.tcp.pose, cube.pose, maniskill_env.goal_site.pose)
        tool, centre, goal = (pose.p[0].double().cpu().numpy() for pose in poses)
        return cls(tool, centre, goal, bool(agent.is_grasping(cube)[0]))


class PickCubePhase(Enum):
    """What the expert is doing."""

    APPROACH = "approach"
    CLOSE = "close"
    CARRY = "carry"


@dataclass(frozen=True)
class PickCubeExpertConfig:
    """Distances in metres, times in env steps.

    Attributes:
        max_action (float): largest change of position, in action units.
        funnel_slope (float): how steeply the approach descends as it gets over the cube: at a
            lateral error ``e`` it aims ``funnel_slope * e`` above it.
        hover (float): largest height above the cube that the approach aims at.
        grasp_tolerance (float): position error at which the fingers close.
        close_steps (int): env steps that the fingers are given to close.
        patience (int): env steps after which the fingers open again if they hold nothing.
    """

    max_action: float = 0.8
    funnel_slope: float = 3.0
    hover: float = 0.12
    grasp_tolerance: float = 0.01
    close_steps: int = 2
    patience: int = 6


class PickCubeExpert:
    """Feedback controller that picks the cube up and holds it at the goal.

    It answers with one action of ``pd_ee_delta_pose`` per env step: change of position, change of
    orientation, gripper. The gripper is not turned, since the open fingers span the cube's diagonal
    and straighten it. Each phase servos to a target that moves with the scene, so the actions stay
    right when the executed ones are disturbed, and a cube that is lost is picked up again.

    Keyword Args:
        config (PickCubeExpertConfig, optional): speeds and tolerances.

    Examples:
        >>> expert = PickCubeExpert()
        >>> above, cube, goal = np.array([[0.0, 0, 0.2], [0, 0, 0.02], [0, 0, 0.3]])
        >>> action = expert.act(PickCubeScene(above, cube, goal, is_grasped=False))
        >>> action.tolist(), expert.phase.value  # down, fingers open
        ([0.0, 0.0, -0.8, 0.0, 0.0, 0.0, 1.0], 'approach')
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
            return self._action(scene.goal - scene.cube, _CLOSE)
        if self.phase is PickCubePhase.CARRY or self._age > config.patience:
            self._enter(PickCubePhase.APPROACH)
        move = scene.cube - scene.tool
        if self.phase is PickCubePhase.CLOSE:
            return self._action(move, _CLOSE)
        if float(np.linalg.norm(move)) < config.grasp_tolerance:
            self._enter(PickCubePhase.CLOSE)
        # Come down only as far as the fingers are over the cube.
        aside = max(0.0, float(np.linalg.norm(move[:2])) - config.grasp_tolerance)
        move[2] += min(config.funnel_slope * aside, config.hover)
        return self._action(move, _OPEN)

    def _enter(self, phase: PickCubePhase) -> None:
        self.phase, self._age = phase, 0

    def _action(self, move: FloatArray, gripper: float) -> FloatArray:
        move = move / _METRES
        move *= min(1.0, self.config.max_action / max(1e-9, float(np.abs(move).max())))
        return np.array([*move, 0.0, 0.0, 0.0, gripper])


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
