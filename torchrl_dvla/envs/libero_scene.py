# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Scenes that depend on seed and init state alone, whatever the simulator did before."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["LiberoScene", "SceneSampler"]

# robosuite and LIBERO draw from numpy's global generator
_GLOBAL_RNG_LOCK = threading.RLock()
_MAX_PLACEMENT_TRIES = 50
_FREE_JOINT = 0  # mjtJoint
_REST_SPEED = 0.05  # m/s
# an object lies lower than this below the table's surface only if it fell off
_SURFACE_TOLERANCE_M = 0.1


class SceneSampler:
    """A stream of random numbers lent to code that draws from ``numpy.random``'s global generator.

    Within :meth:`lend` the global generator *is* this stream; before and after, the program's own
    global state is untouched. So a seed decides a scene in full, several environments of a process
    do not draw from each other's streams, and user code keeps its own.

    Args:
        seed (int): seed of the stream.

    Examples:
        >>> sampler = SceneSampler(3)
        >>> with sampler.lend():
        ...     first = np.random.uniform()
        >>> first == np.random.RandomState(3).uniform()
        True
    """

    def __init__(self, seed: int) -> None:
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Start the stream anew, as ``numpy.random.seed(seed)`` does."""
        self._state: Any = np.random.RandomState(seed).get_state()

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Put the stream in place of the global generator."""
        with _GLOBAL_RNG_LOCK:
            outer = np.random.get_state()
            np.random.set_state(self._state)
            try:
                yield
            finally:
                self._state = np.random.get_state()
                np.random.set_state(outer)


class LiberoScene:
    """Resets of a robosuite environment that keep model and textures.

    robosuite's own soft reset starts from whatever the last episode left behind: where the fixtures
    stood, how far the gripper command had moved, which indicator lights were on. Two rollouts with
    equal seed and init state then start ~1e-4 apart, which is enough to end differently. This
    reset puts all of that back to what a newly built model has, and repeats the forward passes a
    hard reset makes (they warm-start the contact solver), so that its outcome equals a hard reset
    bit for bit at a hundredth of the cost.

    Args:
        robosuite_env: the environment, freshly constructed and never stepped.

    Keyword Args:
        shuffle_objects (bool): let the objects on the work surface exchange their places at each
            reset, those excepted that the goal names as a destination. Each stays at its height
            and turned as it was. Defaults to ``False``.

    Raises:
        ValueError: if objects are to be shuffled and fewer than two can be.
    """

    def __init__(self, robosuite_env: Any, *, shuffle_objects: bool = False) -> None:
        self._env = robosuite_env
        self._places = _places(robosuite_env) if shuffle_objects else None
        model = robosuite_env.sim.model._model
        self._site_rgba = model.site_rgba.copy()
        self._body_pos = model.body_pos.copy()
        self._body_quat = model.body_quat.copy()
        self._restore_fixture_poses()
        # each hard reset appends the joint samplers once more and so draws more numbers
        self._property_samplers = list(robosuite_env.object_property_initializers)

    def _restore_fixture_poses(self) -> None:
        # Construction has already placed the fixtures; the XML still has where they were
        from robosuite.utils.mjcf_utils import string_to_array

        env = self._env
        for fixture in env.fixtures_dict.values():
            body = env.sim.model.body_name2id(fixture.root_body)
            element = env.model.root.find(f".//body[@name='{fixture.root_body}']")
            if element is None:
                continue
            self._body_pos[body] = string_to_array(element.get("pos", "0 0 0"))
            quat = string_to_array(element.get("quat", "1 0 0 0"))
            self._body_quat[body] = quat / np.linalg.norm(quat)

    def reset(self, init_state: np.ndarray | None) -> int:
        """Start an episode. Draws from ``numpy.random``'s global generator where things stand.

        Args:
            init_state (np.ndarray, optional): flattened simulator state ``[D]``. ``None`` keeps the
                placements just drawn.

        Returns:
            how many forced sensor reads robosuite would have made by now.

        Raises:
            RuntimeError: if no valid placement is found.
        """
        env = self._env
        self._restore()
        self._place()
        env.sim.forward()
        env._obs_cache = {}
        env.visualize(vis_settings=dict.fromkeys(env._visualizations, False))
        if init_state is None:
            if self._places is not None:
                self._shuffle(self._places)
                env.sim.forward()
            return 1
        env.sim.set_state_from_flattened(init_state)
        if self._places is not None:
            self._shuffle(self._places)
        env.sim.forward()
        env._check_success()
        env._post_process()
        return 2

    def _restore(self) -> None:
        env = self._env
        model = env.sim.model._model
        model.site_rgba[:] = self._site_rgba
        model.body_pos[:] = self._body_pos
        model.body_quat[:] = self._body_quat
        env.object_property_initializers[:] = self._property_samplers
        for robot in env.robots:
            # the gripper command is integrated over substeps and survives robosuite's soft reset
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        env.sim.reset()
        # A hard reset makes two forward passes here, for the new simulation and for the new render
        # context. They leave the contact solver's warm start behind.
        env.sim.forward()
        env.sim.forward()

    def _place(self) -> None:
        from robosuite.utils.errors import RandomizationError

        for _ in range(_MAX_PLACEMENT_TRIES):
            try:
                self._env._reset_internal()
            except RandomizationError:
                self._restore()
                continue
            return
        raise RuntimeError(
            f"object placements must be found within {_MAX_PLACEMENT_TRIES} tries, got none. "
            "Pass an init_state_id, or another seed."
        )

    def _shuffle(self, places: np.ndarray) -> None:
        qpos = self._env.sim.data._data.qpos
        qpos[places] = qpos[np.random.permutation(places)]

    def is_settled(self) -> bool:
        """Whether all movable objects rest, none of them below the work surface."""
        model, data = self._env.sim.model._model, self._env.sim.data._data
        free = model.jnt_type == _FREE_JOINT
        speeds = [np.linalg.norm(data.qvel[a : a + 3]) for a in model.jnt_dofadr[free]]
        heights = data.qpos[model.jnt_qposadr[free] + 2]
        lowest = self._env.workspace_offset[2] - _SURFACE_TOLERANCE_M
        return bool(max(speeds, default=0.0) <= _REST_SPEED and np.all(heights >= lowest))


def _places(env: Any) -> np.ndarray:
    """Addresses in ``qpos`` of the horizontal places ``[N, 2]`` that objects may exchange."""
    problem = env.parsed_problem
    destinations = {word for atom in problem["goal_state"] for word in atom[2:]}
    destinations |= {problem["regions"].get(name, {}).get("target") for name in destinations}
    addresses = []
    for atom in problem["initial_state"]:
        region = problem["regions"].get(atom[-1], {})
        name = atom[1]
        stands_free = region.get("target") == env.workspace_name and name in env.objects_dict
        if stands_free and name not in destinations:
            first, _ = env.sim.model.get_joint_qpos_addr(env.objects_dict[name].joints[0])
            addresses.append((first, first + 1))
    if len(addresses) < 2:
        raise ValueError(
            "shuffle_objects must be False where fewer than two objects stand on the work surface "
            f"besides the goal's destination, got {len(addresses)}. Choose another task."
        )
    return np.array(addresses)
