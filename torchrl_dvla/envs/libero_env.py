# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""LIBERO environment whose step is one decision of a chunked policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite
from torchrl.envs import LiberoEnv

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    INIT_STATE_HASH_KEY,
    INIT_STATE_ID_KEY,
    VLA_ACTION_KEY,
)
from torchrl_dvla.envs.libero_render import FrameRenderer
from torchrl_dvla.envs.libero_scene import LiberoScene, SceneSampler
from torchrl_dvla.envs.libero_setup import (
    check_init_state_id,
    choose_gl_backend,
    hash_init_state,
    load_init_states,
    quiet_imports,
    validate_libero,
)
from torchrl_dvla.validation import Natural, Range, check

__all__ = ["LiberoChunkEnv"]

_MAX_SCENE_TRIES = 20
# some definitions drop objects from a metre above the table
_MAX_EXTRA_SETTLE_STEPS = 60
# robosuite's own limit, in env steps since the reset, settling included
_ROBOSUITE_HORIZON = 1000


class LiberoChunkEnv(LiberoEnv):
    """LIBERO environment whose step is one decision of a chunked policy.

    :class:`torchrl.envs.LiberoEnv` renders two cameras at every env step, of which a policy that
    decides every ``replan_interval`` env steps reads one frame from one camera. This environment
    executes the whole chunk, stops inside it at success or truncation, and renders once, only the
    cameras it was asked for. Frames, states, rewards and done flags at decision boundaries are
    those of ``TransformedEnv(LiberoEnv(...), MultiAction.from_vla(stack_rewards=False))``, bit for
    bit, for the same seed, init state and actions.

    Observations have the keys of :class:`~torchrl.envs.LiberoEnv`: ``("observation", "image")``
    uint8 ``[3, H, W]``, with a second camera ``("observation", "wrist_image")``,
    ``("observation", "state")`` float32 ``[S]``, ``"language_instruction"``, ``"success"`` bool
    ``[1]``. The action is ``("vla_action", "chunk")`` float32 ``[chunk_size, 7]``. Each step also
    writes ``"action_is_pad"`` bool ``[chunk_size]``: ``True`` for env steps of the chunk that were
    not executed, since the episode ended or ``replan_interval`` was reached.

    **Which scene.** ``env.set_seed(seed)`` before ``env.reset(tensordict)`` makes the scene exactly
    repeatable, in any process and after any history: the members of a GRPO group pass the same seed
    and ``"init_state_id"`` (int64 ``[1]`` in the reset tensordict) and start bit-identical. The id
    picks one of the task's 50 benchmark init states, which fixes the movable objects; the seed also
    fixes the fixtures, which LIBERO places anew at each reset, and who stands where if objects are
    shuffled. ``-1``, or no key, samples the
    movable objects too, from the distribution in the task's definition; such scenes are not among
    the 50 of the benchmark, and are drawn again where an object would not come to rest or the goal
    already holds. A reset returns the id that it plays, and as ``"init_state_hash"`` the
    :func:`~torchrl_dvla.envs.libero_setup.hash_init_state` of the state before it settles. Before
    the first ``set_seed``, scenes follow :func:`torch.manual_seed`.

    Args:
        task_suite (str): one of :data:`~torchrl_dvla.envs.LIBERO_SUITES`.
        task_id (int): task index inside the suite.

    Keyword Args:
        chunk_size (int): env steps in an action chunk. Defaults to 8.
        replan_interval (int, optional): env steps executed per decision. Defaults to
            ``chunk_size``.
        camera_height (int): frame height in pixels. Defaults to 128.
        camera_width (int): frame width in pixels. Defaults to 128.
        cameras (sequence of str): one or two camera names. Defaults to ``("agentview",)``; add
            ``"robot0_eye_in_hand"`` for the wrist.
        max_episode_steps (int): truncation horizon in env steps. Defaults to 512.
        shadows (bool): render shadows and reflections. Defaults to ``True``.
        msaa (bool): render with 4 samples per pixel. Defaults to ``True``.
        max_mesh_faces (int, optional): draw larger meshes with about so many faces. 4000 changes
            few pixels of a 128 px frame and cuts the time of a fast one to a third. Defaults to
            ``None``, all faces.
        settle_steps (int): env steps without motion at the start. Defaults to 10.
        orientation (str): of the gripper in the state: ``"quaternion"``, four numbers, or
            ``"axis_angle"``, three, with which pi0, pi0.5, SmolVLA and OpenVLA-OFT were trained.
            Defaults to ``"quaternion"``.
        shuffle_objects (bool): let the objects on the work surface exchange their places at each
            reset, also those of an init state, so that a policy has to look where what it is to
            fetch stands; the goal's destination stays. For tasks whose instruction names objects,
            as ``libero_object``. The benchmark does not. Defaults to ``False``.
        env_kwargs (dict, optional): further arguments of LIBERO's ``ControlEnv``.

    Attributes:
        robosuite_env: robosuite's environment underneath, for privileged reads (experts, probes).

    Raises:
        ValueError: for an unknown suite, camera, task id or image size, or if there is nothing to
            shuffle.
        ImportError: if LIBERO is not installed.
        FileNotFoundError: if LIBERO's files are incomplete.

    Examples:
        >>> from torchrl_dvla.envs import LiberoChunkEnv
        >>> env = LiberoChunkEnv("libero_object", 0, chunk_size=8)  # doctest: +SKIP
        >>> env.rollout(3)["observation", "image"].shape  # doctest: +SKIP
        torch.Size([3, 3, 128, 128])

    Reference:
        Liu et al., *LIBERO: Benchmarking Knowledge Transfer for Lifelong Robot Learning*,
        https://arxiv.org/abs/2306.03310.
    """

    # close() may run on an instance whose arguments were refused
    _renderer: FrameRenderer | None = None

    def __init__(
        self,
        task_suite: str,
        task_id: int,
        *,
        chunk_size: int = 8,
        replan_interval: int | None = None,
        camera_height: int = 128,
        camera_width: int = 128,
        cameras: Sequence[str] = ("agentview",),
        max_episode_steps: int = 512,
        shadows: bool = True,
        msaa: bool = True,
        max_mesh_faces: int | None = None,
        settle_steps: int = 10,
        orientation: Literal["quaternion", "axis_angle"] = "quaternion",
        shuffle_objects: bool = False,
        env_kwargs: dict[str, Any] | None = None,
    ) -> None:
        task = validate_libero(
            task_suite,
            task_id,
            camera_height=camera_height,
            camera_width=camera_width,
            chunk_size=chunk_size,
            replan_interval=replan_interval,
        )
        if isinstance(cameras, str) or not 1 <= len(cameras) <= 2:
            raise ValueError(
                "cameras must be a sequence of one or two names, got "
                f"{cameras!r}. The first becomes 'image', the second 'wrist_image'."
            )
        check("max_episode_steps", max_episode_steps, int, Range(1, remedy="Count env steps."))
        check("max_mesh_faces", max_mesh_faces, int | None, Range(1, remedy="Try 4000."))
        check("settle_steps", settle_steps, Natural)
        check("shadows", shadows, bool)
        check("msaa", msaa, bool)
        check("orientation", orientation, Literal["quaternion", "axis_angle"])
        check("shuffle_objects", shuffle_objects, bool)
        choose_gl_backend()
        self._task = task
        self.chunk_size = chunk_size
        self.replan_interval = chunk_size if replan_interval is None else replan_interval
        self._camera_names = tuple(cameras)
        self._orientation = orientation
        self._shuffle_objects = shuffle_objects
        self._render_kwargs: dict[str, Any] = {
            "height": camera_height,
            "width": camera_width,
            "shadows": shadows,
            "msaa": msaa,
            "max_mesh_faces": max_mesh_faces,
        }
        # reproducible under torch.manual_seed until set_seed is called
        self._sampler = SceneSampler(int(torch.randint(2**31 - 1, ())))
        self._observed: dict[str, np.ndarray] = {}
        horizon = max_episode_steps + settle_steps + _MAX_EXTRA_SETTLE_STEPS + 1
        super().__init__(
            task_suite=task_suite,
            task_id=task_id,
            camera_height=camera_height,
            camera_width=camera_width,
            env_kwargs={"horizon": max(_ROBOSUITE_HORIZON, horizon), **(env_kwargs or {})},
            instruction=task.instruction,
            init_states=load_init_states(task),
            camera=self._camera_names[0],
            wrist_camera=self._camera_names[1] if len(cameras) == 2 else None,
            max_episode_steps=max_episode_steps,
            settle_steps=settle_steps,
        )

    # ------------------------------------------------------------------ construction

    def _build_env(
        self,
        task_suite: str,
        task_id: int,
        camera_height: int,
        camera_width: int,
        env_kwargs: dict[str, Any],
    ) -> Any:
        with quiet_imports():
            from libero.libero.envs.env_wrapper import ControlEnv

            # robosuite's renderer and image observables stay off: see FrameRenderer
            with SceneSampler(0).lend():
                env = ControlEnv(
                    bddl_file_name=str(self._task.bddl_file),
                    has_renderer=False,
                    has_offscreen_renderer=False,
                    use_camera_obs=False,
                    hard_reset=False,
                    **env_kwargs,
                )
            # imports the simulator, after MUJOCO_GL is set
            from torchrl_dvla.envs.libero_physics import LiberoPhysics
        self.task_suite = task_suite
        self.task_id = task_id
        self.robosuite_env = env.env
        self._scene = LiberoScene(env.env, shuffle_objects=self._shuffle_objects)
        self._physics = LiberoPhysics(env.env, self._sample)
        self._renderer = FrameRenderer(
            env.env.sim.model._model, self._camera_names, **self._render_kwargs
        )
        return env

    def _make_specs(self, env: Any) -> None:
        # LiberoEnv reads its specs off a reset; here the state is read and no frame is drawn
        self._sample_state()
        blank = np.zeros((self._render_kwargs["height"], self._render_kwargs["width"], 3), np.uint8)
        seen = {**self._observed, **{f"{camera}_image": blank for camera in self._camera_names}}
        super()._make_specs(SimpleNamespace(env=env.env, reset=lambda: seen))
        self.observation_spec[ACTION_IS_PAD_KEY] = Categorical(
            2, dtype=torch.bool, shape=(self.chunk_size,), device=self.device
        )
        ids = Bounded(-1, len(self.init_states) - 1, (1,), dtype=torch.int64, device=self.device)
        self.state_spec = Composite({INIT_STATE_ID_KEY: ids})
        self.observation_spec[INIT_STATE_ID_KEY] = ids.clone()
        hashes = Bounded(0, 2**63 - 1, (1,), dtype=torch.int64, device=self.device)
        self.observation_spec[INIT_STATE_HASH_KEY] = hashes
        chunk = self.action_spec.expand(self.chunk_size, self._action_dim)
        self.full_action_spec = Composite({VLA_ACTION_KEY: Composite(chunk=chunk)})

    # ------------------------------------------------------------------ views

    @property
    def num_env_steps(self) -> int:
        """Env steps executed in this episode, settling not counted."""
        return self._elapsed

    # ------------------------------------------------------------------ reset

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._sampler.seed(seed % 2**32)
            self._rng.manual_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        wanted = None if tensordict is None else tensordict.get(INIT_STATE_ID_KEY, None)
        index = -1 if wanted is None else int(wanted.item())
        check_init_state_id(index, len(self.init_states))
        with self._sampler.lend():
            success = self._start_sampled() if index < 0 else self._start(self.init_states[index])
        self._elapsed, self._init_state_id = 0, index
        self._episode_count += 1
        pad = torch.zeros(self.chunk_size, dtype=torch.bool)
        out = self._observation(success=success, pad=pad)
        out.update(self.full_done_spec.zero())
        return out

    def _start(self, init_state: np.ndarray | None) -> bool:
        """Set up one episode and let it settle; returns whether the goal holds."""
        num_forced = self._scene.reset(init_state)
        state = self.robosuite_env.sim.get_state().flatten()
        self._init_state_hash = hash_init_state(state)
        self._physics.clock.start(num_forced)
        self._sample()
        success = bool(self.robosuite_env._check_success())
        for _ in range(self.settle_steps):
            success = self._physics.env_step(self._dummy_action)
        return success

    def _start_sampled(self) -> bool:
        """As :meth:`_start` with placements from the task's definition, until they are valid."""
        for _ in range(_MAX_SCENE_TRIES):
            success = self._start(None)
            for _ in range(_MAX_EXTRA_SETTLE_STEPS):
                if self._scene.is_settled():
                    break
                success = self._physics.env_step(self._dummy_action)
            if self._scene.is_settled() and not success:
                return success
        raise RuntimeError(
            f"a sampled scene must come to rest unsolved within {_MAX_SCENE_TRIES} tries, got "
            "none. Use the benchmark's init states for this task."
        )

    # ------------------------------------------------------------------ step

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        chunk = tensordict.get(ACTION_CHUNK_KEY)
        actions = chunk.detach().cpu().numpy().astype(np.float64)
        if actions.shape != (self.chunk_size, self._action_dim):
            raise ValueError(
                f"{ACTION_CHUNK_KEY} must have shape [{self.chunk_size}, {self._action_dim}], got "
                f"{list(actions.shape)}. Build the policy and the environment with the same "
                "chunk_size and action dimension."
            )
        return self._decision(actions[: self.replan_interval])

    def step_with(self, controller: Callable[[], np.ndarray]) -> TensorDictBase:
        """Execute one decision, asking *controller* for the action of each env step.

        A scripted expert closes its loop on the simulator's state at each env step, a policy only
        at each decision. Here the expert drives the env steps between two observations, so its
        demonstrations show the very frames a policy will see, and as few of them are rendered.

        Args:
            controller (callable): returns an action ``[A]``; called ``replan_interval`` times, or
                less where the episode ends.

        Returns:
            What :meth:`step` would write under ``"next"``.
        """
        return self._decision(
            np.asarray(controller(), dtype=np.float64) for _ in range(self.replan_interval)
        )

    def _decision(self, actions: Iterable[np.ndarray]) -> TensorDictBase:
        num_executed = 0
        success = truncated = False
        for action in actions:
            success = self._physics.env_step(action)
            num_executed += 1
            self._elapsed += 1
            truncated = bool(self.robosuite_env.done) or self._elapsed >= self.max_episode_steps
            if success or truncated:
                break
        pad = torch.arange(self.chunk_size) >= num_executed
        out = self._observation(success=success, pad=pad)
        out["reward"] = torch.tensor([float(success)])
        out["terminated"] = torch.tensor([success])
        out["truncated"] = torch.tensor([truncated and not success])
        out["done"] = torch.tensor([success or truncated])
        return out

    # ------------------------------------------------------------------ observation

    def _sample(self) -> None:
        """Take down what robosuite's sensors would read now."""
        self._sample_state()
        assert self._renderer is not None
        self._renderer.capture(self.robosuite_env.sim.data._data)

    def _sample_state(self) -> None:
        observables = self.robosuite_env._observables
        cache: dict[str, np.ndarray] = {}
        for key in self.proprio_keys:
            self._observed[key] = cache[key] = np.array(observables[key]._sensor(cache))

    def _read_state(self, obs: dict[str, Any]) -> torch.Tensor:
        if self._orientation == "axis_angle":
            obs = {**obs, "robot0_eef_quat": _axis_angle(obs["robot0_eef_quat"])}
        return super()._read_state(obs)

    def _observation(self, *, success: bool, pad: torch.Tensor) -> TensorDict:
        assert self._renderer is not None
        frames = self._renderer.draw()
        observed = dict(self._observed)
        for camera, frame in zip(self._camera_names, frames, strict=True):
            observed[f"{camera}_image"] = frame
        out = self._read_obs(observed, success=success)
        out[ACTION_IS_PAD_KEY] = pad
        out[INIT_STATE_ID_KEY] = torch.tensor([self._init_state_id])
        out[INIT_STATE_HASH_KEY] = torch.tensor([self._init_state_hash])
        return out

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Free the simulator and its GL resources."""
        if self._renderer is not None:
            self._renderer.close()
        super().close(raise_if_closed=raise_if_closed)
        # two gigabytes hang on these
        for name in ("_renderer", "_physics", "_scene", "robosuite_env"):
            self.__dict__.pop(name, None)


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle in [0, 2 pi] of a rotation ``(x, y, z, w)``; robosuite's convention.

    Examples:
        >>> import numpy as np
        >>> _axis_angle(np.array([1.0, 0.0, 0.0, 0.0])).round(4).tolist()
        [3.1416, 0.0, 0.0]
        >>> _axis_angle(np.array([0.0, 0.0, 0.0, 1.0])).tolist()
        [0.0, 0.0, 0.0]
    """
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    length = math.sqrt(1.0 - w * w)
    if math.isclose(length, 0.0):
        return np.zeros(3)
    return quaternion[:3] * (2.0 * math.acos(w) / length)
