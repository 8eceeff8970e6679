# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""robosuite's control loop as one compiled function.

An env step is 25 physics substeps. In each, robosuite 1.4 runs three forward passes and its
operational-space controller in Python, which takes longer than the physics. The loop below does the
same arithmetic in the same order on the same memory layouts, through MuJoCo's own C functions and
robosuite's own compiled maths, so that its results are equal bit for bit (``test_libero_physics``
holds it to that). It leaves out what provably has no effect:

- of the three forward passes of a substep, the second and third start from unchanged positions and
  velocities, so their position and velocity stages would recompute equal numbers. Their constraint
  solves stay: each starts from the last one's result and refines it;
- sensors, which nothing in LIBERO reads.

Importing this module needs ``numba`` and ``mujoco``; both come with robosuite.
"""

from __future__ import annotations

import os
from typing import Any

import llvmlite.binding
import mujoco
import numba
import numpy as np
from numba import types
from robosuite.utils.control_utils import (
    nullspace_torques,
    opspace_matrices,
    orientation_error,
)

__all__ = ["full_mass_matrix_arguments", "run_substeps"]


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
