# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Stepping robosuite without its observables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["LiberoPhysics", "SamplingClock"]


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

    Keyword Args:
        compiled (bool): use compiled code where possible. Results are equal bit for bit. Defaults
            to ``True``.
    """

    def __init__(
        self, robosuite_env: Any, on_sample: Callable[[], None], *, compiled: bool = True
    ) -> None:
        self._env = robosuite_env
        self._on_sample = on_sample
        self._num_substeps = int(robosuite_env.control_timestep / robosuite_env.model_timestep)
        self.clock = SamplingClock(robosuite_env.model_timestep, 1.0 / robosuite_env.control_freq)
        self._loop = _CompiledLoop(robosuite_env) if compiled and _is_stock(robosuite_env) else None

    @property
    def is_compiled(self) -> bool:
        """Whether the substeps run in compiled code."""
        return self._loop is not None

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
        if self.clock.tick():
            self._on_sample()
        if self._loop is not None:
            self._loop.begin(action)
        num_pending = 0
        for _ in range(1, self._num_substeps):
            if self._loop is None:
                self._robosuite_substep(action, is_first=False)
            else:
                num_pending += 1
            if self.clock.tick():
                num_pending = self._run_pending(num_pending)
                self._on_sample()
        self._run_pending(num_pending)

    def _run_pending(self, num_pending: int) -> int:
        if self._loop is not None and num_pending:
            self._loop.run(num_pending)
        return 0

    def _robosuite_substep(self, action: np.ndarray, is_first: bool) -> None:
        env = self._env
        env.sim.forward()
        env._pre_action(action, is_first)
        env.sim.step()


def _is_stock(env: Any) -> bool:
    """Whether the robot and its controller are the ones the compiled loop reproduces."""
    import robosuite.macros as macros
    from robosuite.controllers.osc import OperationalSpaceController
    from robosuite.models.grippers.panda_gripper import PandaGripper

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
    """The views and scratch arrays that :func:`~.libero_kernel.run_substeps` works on."""

    def __init__(self, env: Any) -> None:
        from torchrl_dvla.envs.libero_kernel import full_mass_matrix_arguments, run_substeps

        self._run = run_substeps
        self._robot = robot = env.robots[0]
        model, data = env.sim.model._model, env.sim.data._data
        # the addresses below are only good while these live
        self._owners = (model, data)
        site = env.sim.model.site_name2id(robot.controller.eef_name)
        mass = np.zeros((model.nv, model.nv))
        self._before = (
            model._address,
            data._address,
        )
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
        self._run(*self._before, num_substeps, *self._state, *self._towards)
