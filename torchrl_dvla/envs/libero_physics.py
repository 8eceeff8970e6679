# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Env steps of robosuite: the same physics, without its observables, in compiled code.

An env step is 25 physics substeps. In each, robosuite 1.4 runs three forward passes and its
operational-space controller in Python, which takes longer than the physics. :func:`run_substeps`
does the same arithmetic in the same order on the same memory layouts, through MuJoCo's own C
functions and robosuite's own compiled maths, so that its results are equal bit for bit
(``test_libero_physics`` holds it to that). It leaves out what provably has no effect:

- of the three forward passes of a substep, the second and third start from unchanged positions and
  velocities, so their position and velocity stages would recompute equal numbers. Their constraint
  solves stay: each starts from the last one's result and refines it;
- sensors, which nothing in LIBERO reads.

Importing this module imports the simulator (``mujoco``, ``numba``, ``robosuite``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import mujoco
import numba
import numpy as np
from numba import types
from robosuite import macros
from robosuite.controllers.osc import OperationalSpaceController
from robosuite.models.grippers.panda_gripper import PandaGripper
from robosuite.utils.control_utils import (
    nullspace_torques,
    opspace_matrices,
    orientation_error,
)

__all__ = ["LiberoPhysics", "SamplingClock", "full_mass_matrix_arguments", "run_substeps"]


class SamplingClock:
    """When robosuite reads its sensors.

    Each of robosuite's observables counts simulated time in floats, reads its sensor once per
    period and starts over when a period is full. A forced read (at a reset) counts as a tick, so
    the instant of the reading moves inside the env step with the number of forced reads. All
    observables run in the same phase; this is one clock for all, with the very same float
    operations.

    Args:
        tick_s (float): simulated time of one substep.
        period_s (float): simulated time of one env step.

    Examples:
        >>> clock = SamplingClock(tick_s=0.25, period_s=1.0)
        >>> clock.start(num_forced=1)
        >>> [clock.tick() for _ in range(4)]
        [False, False, False, True]
    """

    def __init__(self, tick_s: float, period_s: float) -> None:
        self._tick_s = tick_s
        self._period_s = period_s
        self.start(0)

    def start(self, num_forced: int) -> None:
        """Begin an episode.

        Args:
            num_forced (int): forced reads so far: one by robosuite's reset, another where an init
                state was set.
        """
        self._elapsed_s = 0.0
        self._sampled = False
        for _ in range(num_forced):
            self._advance(force=True)

    def tick(self) -> bool:
        """Advance by one substep.

        Returns:
            whether the sensors are read now.
        """
        return self._advance(force=False)

    def _advance(self, force: bool) -> bool:
        self._elapsed_s += self._tick_s
        due = not self._sampled and self._period_s >= self._elapsed_s
        read = due or force
        if read:
            self._sampled = True
        if self._elapsed_s >= self._period_s:
            read = read or not self._sampled
            self._elapsed_s %= self._period_s
            self._sampled = False
        return read


class LiberoPhysics:
    """Env steps of a robosuite environment: same physics, no observables.

    The first substep of an env step sets the controller's goal and is left to robosuite. The others
    run in compiled code where the robot is the one LIBERO uses (one arm with a fixed-impedance
    ``OSC_POSE`` controller and a two-finger gripper), and through robosuite's own loop elsewhere.

    Args:
        robosuite_env: the environment to step.
        on_sample (callable): called without arguments at the substep where robosuite would read its
            sensors.
    """

    def __init__(self, robosuite_env: Any, on_sample: Callable[[], None]) -> None:
        self._env = robosuite_env
        self._on_sample = on_sample
        self._num_substeps = int(robosuite_env.control_timestep / robosuite_env.model_timestep)
        self.clock = SamplingClock(robosuite_env.model_timestep, 1.0 / robosuite_env.control_freq)
        self._loop = _CompiledLoop(robosuite_env) if _is_stock(robosuite_env) else None

    def env_step(self, action: np.ndarray) -> bool:
        """Execute one action.

        Args:
            action (np.ndarray): float64 ``[A]``.

        Returns:
            whether the task's goal holds afterwards.
        """
        env = self._env
        env.timestep += 1
        self._substeps(action)
        env.cur_time += env.control_timestep
        success = bool(env._check_success())
        env.done = env.timestep >= env.horizon and not env.ignore_done
        env._post_process()
        return success

    def _substeps(self, action: np.ndarray) -> None:
        self._robosuite_substep(action, is_first=True)
        if self._loop is not None:
            self._loop.begin(action)
        num_pending = 0
        for substep in range(self._num_substeps):
            num_pending += substep > 0
            if self.clock.tick():
                self._run_pending(num_pending, action)
                num_pending = 0
                self._on_sample()
        self._run_pending(num_pending, action)

    def _run_pending(self, num_substeps: int, action: np.ndarray) -> None:
        if self._loop is None:
            for _ in range(num_substeps):
                self._robosuite_substep(action, is_first=False)
        elif num_substeps:
            self._loop.run(num_substeps)

    def _robosuite_substep(self, action: np.ndarray, is_first: bool) -> None:
        env = self._env
        env.sim.forward()
        env._pre_action(action, is_first)
        env.sim.step()


def _is_stock(env: Any) -> bool:
    """Whether the robot and its controller are the ones the compiled loop reproduces."""
    if len(env.robots) != 1 or not macros.ENABLE_NUMBA:
        return False
    robot = env.robots[0]
    controller = robot.controller
    return (
        type(controller) is OperationalSpaceController
        and type(robot.gripper) is PandaGripper
        and controller.impedance_mode == "fixed"
        and controller.uncoupling
        and controller.interpolator_pos is None
        and controller.interpolator_ori is None
        and env.sim.model._model.na == 0
    )


class _CompiledLoop:
    """The views and scratch arrays that :func:`run_substeps` works on."""

    def __init__(self, env: Any) -> None:
        self._robot = robot = env.robots[0]
        model, data = env.sim.model._model, env.sim.data._data
        # the addresses below are only good while these live
        self._owners = (model, data)
        site = env.sim.model.site_name2id(robot.controller.eef_name)
        mass = np.zeros((model.nv, model.nv))
        low, high = robot.torque_limits
        self._state = (
            full_mass_matrix_arguments(data, mass),
            mass,
            np.zeros((3, model.nv)),
            np.zeros((3, model.nv)),
            site,
            data.qpos,
            data.qvel,
            data.qfrc_bias,
            data.site_xpos,
            data.site_xmat,
            data.ctrl,
            np.array(robot._ref_joint_pos_indexes, dtype=np.int64),
            np.array(robot._ref_joint_vel_indexes, dtype=np.int64),
            np.array(robot._ref_joint_actuator_indexes, dtype=np.int64),
            np.array(low),
            np.array(high),
        )
        grip = [env.sim.model.actuator_name2id(name) for name in robot.gripper.actuators]
        ctrl_range = model.actuator_ctrlrange[grip]
        self._grip_index = np.array(grip, dtype=np.int64)
        self._grip_bias = 0.5 * (ctrl_range[:, 1] + ctrl_range[:, 0])
        self._grip_weight = 0.5 * (ctrl_range[:, 1] - ctrl_range[:, 0])
        self._towards: tuple[Any, ...] = ()

    def begin(self, action: np.ndarray) -> None:
        """Take over the goal that robosuite's first substep has set."""
        controller, gripper = self._robot.controller, self._robot.gripper
        sign = np.sign(action[controller.control_dim :])
        self._towards = (
            np.array(controller.goal_pos),
            np.ascontiguousarray(controller.goal_ori),
            controller.kp,
            controller.kd,
            controller.initial_joint,
            self._grip_index,
            gripper.current_action,
            np.array([-1.0, 1.0]) * gripper.speed * sign,
            self._grip_bias,
            self._grip_weight,
        )

    def run(self, num_substeps: int) -> None:
        """Run substeps; the gripper's integrated command is updated in place."""
        model, data = self._owners
        run_substeps(model._address, data._address, num_substeps, *self._state, *self._towards)


# -- the compiled loop -----------------------------------------------------------------------------


def _mujoco_library() -> str:
    folder = os.path.dirname(mujoco.__file__)
    for name in sorted(os.listdir(folder)):
        if name.startswith(("libmujoco.", "mujoco.dll")):
            return os.path.join(folder, name)
    raise ImportError(f"libmujoco must be inside {folder}, got none. Reinstall mujoco.")


# makes the C functions below known to the linker of compiled code, cached or new
llvmlite.binding.load_library_permanently(_mujoco_library())

_pointer = types.uintp
_mj_step2 = types.ExternalFunction("mj_step2", types.void(_pointer, _pointer))
_mj_check_pos = types.ExternalFunction("mj_checkPos", types.void(_pointer, _pointer))
_mj_check_vel = types.ExternalFunction("mj_checkVel", types.void(_pointer, _pointer))
_mj_forward_skip = types.ExternalFunction(
    "mj_forwardSkip", types.void(_pointer, _pointer, types.intc, types.intc)
)
_mj_jac_site = types.ExternalFunction(
    "mj_jacSite", types.void(_pointer, _pointer, _pointer, _pointer, types.intc)
)
_mj_full_m = types.ExternalFunction("mj_fullM", types.void(_pointer, _pointer, _pointer))

# mjtStage
_NOTHING_DONE, _VELOCITY_DONE = 0, 2
_SKIP_SENSORS = 1


def full_mass_matrix_arguments(data: Any, out: np.ndarray) -> tuple[int, int]:
    """Second and third argument of ``mj_fullM``, whose order changed in MuJoCo 3.4."""
    version = tuple(int(part) for part in mujoco.__version__.split(".")[:2])
    if version >= (3, 4):
        return data._address, out.ctypes.data
    return out.ctypes.data, data.qM.ctypes.data


@numba.jit(nopython=True, nogil=True, cache=True)
def run_substeps(
    model: int,
    data: int,
    num_substeps: int,
    full_m: tuple[int, int],
    mass: np.ndarray,
    jac_pos: np.ndarray,
    jac_ori: np.ndarray,
    site: int,
    qpos: np.ndarray,
    qvel: np.ndarray,
    qfrc_bias: np.ndarray,
    site_xpos: np.ndarray,
    site_xmat: np.ndarray,
    ctrl: np.ndarray,
    qpos_index: np.ndarray,
    qvel_index: np.ndarray,
    arm_index: np.ndarray,
    torque_low: np.ndarray,
    torque_high: np.ndarray,
    goal_pos: np.ndarray,
    goal_ori: np.ndarray,
    kp: np.ndarray,
    kd: np.ndarray,
    initial_joint: np.ndarray,
    grip_index: np.ndarray,
    grip_command: np.ndarray,
    grip_delta: np.ndarray,
    grip_bias: np.ndarray,
    grip_weight: np.ndarray,
) -> None:
    """Run substeps towards a goal that is already set.

    All arrays are views on the simulation's memory or scratch; ``D`` is the number of arm joints.

    Args:
        model (int): address of the ``mjModel``.
        data (int): address of the ``mjData``.
        num_substeps (int): how many.
        full_m (tuple of int): see :func:`full_mass_matrix_arguments`.
        mass (np.ndarray): scratch ``[V, V]`` that ``full_m`` writes to.
        jac_pos (np.ndarray): scratch ``[3, V]``.
        jac_ori (np.ndarray): scratch ``[3, V]``.
        site (int): index of the end effector's site.
        qpos (np.ndarray): positions ``[Q]``.
        qvel (np.ndarray): velocities ``[V]``.
        qfrc_bias (np.ndarray): gravity and Coriolis forces ``[V]``.
        site_xpos (np.ndarray): ``[S, 3]``.
        site_xmat (np.ndarray): ``[S, 9]``.
        ctrl (np.ndarray): actuator commands ``[U]``, written.
        qpos_index (np.ndarray): the arm's ``[D]`` indices into ``qpos``.
        qvel_index (np.ndarray): the arm's ``[D]`` indices into ``qvel``.
        arm_index (np.ndarray): the arm's ``[D]`` indices into ``ctrl``.
        torque_low (np.ndarray): ``[D]``.
        torque_high (np.ndarray): ``[D]``.
        goal_pos (np.ndarray): ``[3]``.
        goal_ori (np.ndarray): ``[3, 3]``.
        kp (np.ndarray): stiffness ``[6]``.
        kd (np.ndarray): damping ``[6]``.
        initial_joint (np.ndarray): rest posture ``[D]``.
        grip_index (np.ndarray): the gripper's ``[F]`` indices into ``ctrl``.
        grip_command (np.ndarray): integrated gripper command ``[F]``, updated.
        grip_delta (np.ndarray): its change per substep ``[F]``.
        grip_bias (np.ndarray): centre of the control range ``[F]``.
        grip_weight (np.ndarray): half of the control range ``[F]``.
    """
    num_joints = qvel_index.shape[0]
    # Fortran order, as numpy's fancy indexing leaves these arrays in robosuite: the layout decides
    # which BLAS routine multiplies them, and so the last bit
    j_pos = np.empty((num_joints, 3)).T
    j_ori = np.empty((num_joints, 3)).T
    j_full = np.empty((num_joints, 6)).T
    arm_mass = np.empty((num_joints, num_joints)).T
    joint_pos = np.empty(num_joints)
    joint_vel = np.empty(num_joints)
    ee_pos = np.empty(3)
    ee_ori = np.empty((3, 3))
    for _ in range(num_substeps):
        _mj_forward_skip(model, data, _NOTHING_DONE, _SKIP_SENSORS)
        _mj_forward_skip(model, data, _VELOCITY_DONE, _SKIP_SENSORS)

        for i in range(3):
            ee_pos[i] = site_xpos[site, i]
            for j in range(3):
                ee_ori[i, j] = site_xmat[site, 3 * i + j]
        _mj_jac_site(model, data, jac_pos.ctypes.data, jac_ori.ctypes.data, site)
        _mj_full_m(model, full_m[0], full_m[1])
        for k in range(num_joints):
            joint_pos[k] = qpos[qpos_index[k]]
            joint_vel[k] = qvel[qvel_index[k]]
            for i in range(3):
                j_pos[i, k] = jac_pos[i, qvel_index[k]]
                j_ori[i, k] = jac_ori[i, qvel_index[k]]
                j_full[i, k] = j_pos[i, k]
                j_full[3 + i, k] = j_ori[i, k]
            for i in range(num_joints):
                arm_mass[i, k] = mass[qvel_index[i], qvel_index[k]]
        ee_pos_vel = np.dot(jac_pos, qvel)
        ee_ori_vel = np.dot(jac_ori, qvel)

        ori_error = orientation_error(goal_ori, ee_ori)
        force = (goal_pos - ee_pos) * kp[0:3] + (-ee_pos_vel) * kd[0:3]
        torque = ori_error * kp[3:6] + (-ee_ori_vel) * kd[3:6]
        _, lambda_pos, lambda_ori, nullspace = opspace_matrices(arm_mass, j_full, j_pos, j_ori)
        wrench = np.concatenate((np.dot(lambda_pos, force), np.dot(lambda_ori, torque)))
        torques = np.dot(j_full.T, wrench)
        for k in range(num_joints):
            torques[k] = torques[k] + qfrc_bias[qvel_index[k]]
        torques += nullspace_torques(arm_mass, nullspace, initial_joint, joint_pos, joint_vel)

        for k in range(num_joints):
            ctrl[arm_index[k]] = min(max(torques[k], torque_low[k]), torque_high[k])
        for k in range(grip_index.shape[0]):
            grip_command[k] = min(max(grip_command[k] + grip_delta[k], -1.0), 1.0)
            ctrl[grip_index[k]] = grip_bias[k] + grip_weight[k] * grip_command[k]

        _mj_check_pos(model, data)
        _mj_check_vel(model, data)
        _mj_step2(model, data)
