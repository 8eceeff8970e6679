# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ManiSkill environment whose step is one decision of a chunked policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    SEED_KEY,
    VLA_ACTION_KEY,
)
from torchrl_dvla.envs.maniskill_setup import (
    choose_vulkan_driver,
    drawing_errors,
    prompts_refused,
    validate_maniskill,
)
from torchrl_dvla.validation import Count, Range, check

__all__ = ["ManiSkillChunkEnv"]

_CAMERA_NAMES = ("image", "wrist_image")
#: The observation mode that computes and draws nothing.
_NOTHING = "none"


class ManiSkillChunkEnv(EnvBase):
    """ManiSkill environment whose step is one decision of a chunked policy.

    ManiSkill draws every camera at every env step, of which a policy that decides every
    ``replan_interval`` env steps sees one frame. Here the env steps of a chunk are taken in
    ManiSkill's observation mode ``"none"`` and the cameras that were asked for are drawn once,
    after the last: frames, states, success and done flags at the decision boundaries are those of
    ManiSkill's own environment, bit for bit, for the same seed and actions.

    Observations are ``("observation", "image")`` uint8 ``[*B, 3, H, W]``, with a second camera
    ``("observation", "wrist_image")``, and ``("observation", "state")`` float32 ``[*B, S]``: joint
    positions and velocities, then what the task observes besides (of PickCube whether the cube is
    grasped, the pose of the gripper and the position of the goal), as ManiSkill's
    ``FlattenRGBDObservationWrapper`` has them. Markers of goals are hidden from the cameras, as in
    ManiSkill. The action is ``("vla_action", "chunk")`` float32 ``[*B, chunk_size, A]``. The reward
    of a decision is 1 if an env step of it solved the task. ``"action_is_pad"`` bool ``[*B,
    chunk_size]`` is true for the env steps that were not executed.

    **Which scene.** It follows from the seed alone, in any process and after any history: that of
    :meth:`set_seed` before a reset, and of ``"seed"`` in the tensordict of a reset for a batch. The
    members of a GRPO group pass the same and start bit-identical.

    **Batches.** With ``num_envs=1``, physics runs on the CPU and ``B`` is empty; several
    environments in one process or many processes are cheap. With more, one batch of ManiSkill's GPU
    simulation has ``B = [num_envs]``: a step executes a chunk in each, a reset with ``"_reset"``
    ``[N, 1]`` begins new episodes where it is true, from int64 ``"seed"`` ``[N, 1]``. An episode
    that ends inside a chunk is simulated on to the end of the chunk; its reward and flags are those
    of its end, its last frame is not. *The batch has not been run on a GPU: only its bookkeeping is
    tested, on a stand-in for the simulation.*

    Args:
        task (str): id of the task, such as ``"PickCube-v1"``; any that ManiSkill registers, tells
            success, takes one vector of actions and has its assets on this machine.

    Keyword Args:
        num_envs (int): environments of the batch; more than one needs a CUDA device. Defaults to 1.
        chunk_size (int): env steps in an action chunk. Defaults to 8.
        replan_interval (int, optional): env steps executed per decision. Defaults to
            ``chunk_size``.
        camera_height (int): frame height in pixels. Defaults to 128.
        camera_width (int): frame width in pixels. Defaults to 128.
        cameras (sequence of str): one or two camera names. Defaults to ``("base_camera",)``; robots
            with a camera at the wrist have ``"hand_camera"``.
        max_episode_steps (int, optional): truncation horizon in env steps. Defaults to the task's.
        instruction (str, optional): what the policy is told. Defaults to that of
            :data:`~torchrl_dvla.envs.MANISKILL_INSTRUCTIONS`.
        control_mode (str): what an action means to the robot's controllers. Defaults to
            ``"pd_ee_delta_pose"``: change of position and orientation of the gripper, and gripper,
            each in [-1, 1].
        env_kwargs (Mapping, optional): further arguments of ManiSkill's ``gym.make``, such as
            ``{"robot_uids": "panda_wristcam"}``; its ``"sensor_configs"`` add to those above, such
            as ``{"fov": 0.8}`` for a closer look.

    Attributes:
        maniskill_env: ManiSkill's environment underneath, for privileged reads (experts, probes).

    Raises:
        ValueError: for an unknown task or camera, or a number out of range.
        ImportError: if ManiSkill is not installed.
        FileNotFoundError: if assets of the task have to be downloaded first.
        RuntimeError: if there is no Vulkan device.

    Examples:
        >>> from torchrl_dvla.envs import ManiSkillChunkEnv
        >>> env = ManiSkillChunkEnv("PickCube-v1", chunk_size=8)  # doctest: +SKIP
        >>> env.rollout(3)["observation", "image"].shape  # doctest: +SKIP
        torch.Size([3, 3, 128, 128])

    Reference:
        Tao et al., *ManiSkill3: GPU Parallelized Robotics Simulation and Rendering for
        Generalizable Embodied AI*, https://arxiv.org/abs/2410.00425.
    """

    def __init__(
        self,
        task: str,
        *,
        num_envs: int = 1,
        chunk_size: int = 8,
        replan_interval: int | None = None,
        camera_height: int = 128,
        camera_width: int = 128,
        cameras: Sequence[str] = ("base_camera",),
        max_episode_steps: int | None = None,
        instruction: str | None = None,
        control_mode: str = "pd_ee_delta_pose",
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        env_kwargs = dict(env_kwargs or {})
        words = validate_maniskill(
            task,
            camera_height=camera_height,
            camera_width=camera_width,
            chunk_size=chunk_size,
            replan_interval=replan_interval,
            instruction=instruction,
            robot=env_kwargs.get("robot_uids"),
        )
        num_envs = check("num_envs", num_envs, Count)
        if num_envs > 1 and not torch.cuda.is_available():
            raise ValueError(
                f"num_envs must be 1 without a CUDA device, got {num_envs}. ManiSkill batches on "
                "GPUs only: ask for more workers, or more environments of a worker."
            )
        if isinstance(cameras, str) or not 1 <= len(cameras) <= 2:
            raise ValueError(
                f"cameras must be a sequence of one or two names, got {cameras!r}. The first "
                "becomes 'image', the second 'wrist_image'."
            )
        check("max_episode_steps", max_episode_steps, int | None, Range(1, remedy="Count them."))
        sensors = {"shader_pack": "minimal", "width": camera_width, "height": camera_height}
        sensors |= env_kwargs.pop("sensor_configs", {})
        self.maniskill_env = base = _make(
            task, num_envs, sensor_configs=sensors, control_mode=control_mode, **env_kwargs
        )
        super().__init__(device=base.device, batch_size=[num_envs] if num_envs > 1 else [])
        self.task = task
        self.num_envs = num_envs
        self.instruction = words
        self.chunk_size = chunk_size
        self.replan_interval = chunk_size if replan_interval is None else replan_interval
        self.max_episode_steps = max_episode_steps or _horizon(task)
        self._cameras = dict(zip(_CAMERA_NAMES, cameras))
        self._mode = base.obs_mode
        base._obs_mode = _NOTHING
        self._elapsed = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        # reproducible under torch.manual_seed until set_seed is called
        self._seed: int | None = None
        self._generator = torch.Generator().manual_seed(int(torch.randint(2**31 - 1, ())))
        self._info: dict[str, Any] = base.get_info()
        try:
            self._make_specs()
        except Exception:
            self.close()
            raise

    # ------------------------------------------------------------------ construction

    def _make_specs(self) -> None:
        base, batch = self.maniskill_env, self.batch_size
        space = base.single_action_space
        if getattr(space, "shape", None) is None or len(space.shape) != 1:
            raise ValueError(
                f"task must take one vector of actions, got {space} from {self.task!r}. Tasks of "
                "several robots are not supported."
            )
        if "success" not in self._info:
            raise ValueError(
                f"task must tell whether it is solved, got {sorted(self._info)} from "
                f"{self.task!r}. Choose one whose info has 'success'."
            )
        known = [name for name, sensor in base._sensors.items() if hasattr(sensor, "camera")]
        if unknown := [name for name in self._cameras.values() if name not in known]:
            raise ValueError(
                f"cameras must be among {', '.join(known)}, got {unknown[0]!r}. Correct the name, "
                "or choose a robot that has it: env_kwargs={'robot_uids': 'panda_wristcam'}."
            )
        flag = Categorical(2, dtype=torch.bool, shape=(*batch, 1), device=self.device)
        leaves = {
            name: Unbounded(value.shape, dtype=value.dtype, device=self.device)
            for name, value in self._observe().items()
        }
        pad = Categorical(2, dtype=torch.bool, shape=(*batch, self.chunk_size), device=self.device)
        self.observation_spec = Composite(
            {
                OBSERVATION_KEY: Composite(leaves, shape=batch, device=self.device),
                INSTRUCTION_KEY: NonTensor(shape=batch, example_data=self.instruction),
                "success": flag,
                ACTION_IS_PAD_KEY: pad,
            },
            shape=batch,
            device=self.device,
        )
        if batch:
            seed = Unbounded((*batch, 1), dtype=torch.int64, device=self.device)
            self.state_spec = Composite({SEED_KEY: seed}, shape=batch, device=self.device)
        shape = (*batch, self.chunk_size, *space.shape)
        low, high = (torch.as_tensor(bound).expand(shape) for bound in (space.low, space.high))
        chunk = Bounded(low, high, shape, dtype=torch.float32, device=self.device)
        self.full_action_spec = Composite(
            {VLA_ACTION_KEY: Composite({"chunk": chunk}, shape=batch)}, shape=batch
        )
        self.reward_spec = Unbounded((*batch, 1), device=self.device)
        flags = ("done", "terminated", "truncated")
        self.full_done_spec = Composite({name: flag.clone() for name in flags}, shape=batch)

    # ------------------------------------------------------------------ reset

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._seed = seed
            self._generator.manual_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        num_envs = self.num_envs
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        seeds = None if tensordict is None else tensordict.get(SEED_KEY, None)
        if seeds is None:
            seeds = torch.randint(2**31 - 1, (num_envs,), generator=self._generator)
            if self._seed is not None:
                seeds, self._seed = self._seed + torch.arange(num_envs), None
        rows = range(num_envs) if chosen is None else chosen.flatten().nonzero()[:, 0].tolist()
        self._begin_episodes(seeds.flatten().tolist(), rows)
        if len(rows) == num_envs and not self.maniskill_env.reconfiguration_freq:
            # What is pressed upon is known from the last physics step, which was in the scene
            # before: one is taken in this scene, which then begins once more. Of a batch whose
            # other episodes go on, such observations are those of the episode before.
            self.maniskill_env.scene.step()
            self._begin_episodes(seeds.flatten().tolist(), rows)
        never = torch.zeros_like(self._elapsed, dtype=torch.bool)
        out = self._outcome(never, terminated=never, truncated=never, num_executed=self.chunk_size)
        if self.batch_size:
            out[SEED_KEY] = seeds.reshape(num_envs, 1).to(self.device)
        return out

    def _begin_episodes(self, seeds: list[int], rows: Sequence[int]) -> None:
        for row in rows:
            # One by one: a task draws the scenes of a reset from one stream, seeded by the first
            # seed, so those of a common reset would depend on who else is reset.
            index = torch.tensor([row], device=self.device)
            seed = seeds[row] % 2**32  # NumPy takes 32 bits
            _, self._info = self.maniskill_env.reset(
                seed=[seed] * self.num_envs, options={"env_idx": index}
            )
            self._elapsed[row] = 0

    # ------------------------------------------------------------------ step

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        chunk = tensordict.get(ACTION_CHUNK_KEY)
        shape = self.full_action_spec[ACTION_CHUNK_KEY].shape
        if chunk.shape != shape:
            raise ValueError(
                f"{ACTION_CHUNK_KEY} must have shape {list(shape)}, got {list(chunk.shape)}. Build "
                "the policy and the environment with the same chunk_size and action dimension."
            )
        actions = chunk.reshape(-1, *shape[-2:])[:, : self.replan_interval]
        return self._decision(actions.unbind(1))

    def step_with(self, controller: Callable[[], Any]) -> TensorDictBase:
        """Execute one decision, asking *controller* for the action of each env step.

        A scripted expert closes its loop on the simulator's state at each env step, a policy only
        at each decision. Here the expert drives the env steps between two observations, so its
        demonstrations show the very frames a policy will see, and as few of them are drawn.

        Args:
            controller (callable): returns an action ``[*B, A]``, tensor or array; called
                ``replan_interval`` times, or less where the episode ends.

        Returns:
            What :meth:`step` would write under ``"next"``.
        """
        return self._decision(
            torch.as_tensor(controller(), dtype=torch.float32).reshape(self.num_envs, -1)
            for _ in range(self.replan_interval)
        )

    def _decision(self, actions: Iterable[torch.Tensor]) -> TensorDictBase:
        """Execute actions ``[N, A]`` until every episode has ended; flags are ``[N]`` in here."""
        num_executed = torch.zeros_like(self._elapsed)
        success, terminated, truncated = torch.zeros(
            3, len(num_executed), dtype=torch.bool, device=self.device
        )
        for action in actions:
            running = ~(terminated | truncated)
            _, _, ended, _, self._info = self.maniskill_env.step(action)
            num_executed += running
            self._elapsed += running
            success |= running & self._info["success"]
            terminated |= running & ended
            truncated |= running & (self._elapsed >= self.max_episode_steps)
            if bool((terminated | truncated).all()):
                break
        out = self._outcome(
            success,
            terminated=terminated,
            truncated=truncated & ~terminated,
            num_executed=num_executed[:, None],
        )
        return out.set("reward", out["success"].to(torch.float32))

    # ------------------------------------------------------------------ what it returns

    def _outcome(
        self,
        success: torch.Tensor,
        *,
        terminated: torch.Tensor,
        truncated: torch.Tensor,
        num_executed: torch.Tensor | int,
    ) -> TensorDict:
        batch = self.batch_size
        flags = {"success": success, "terminated": terminated, "truncated": truncated}
        flags["done"] = terminated | truncated
        pad = torch.arange(self.chunk_size, device=self.device) >= num_executed
        return TensorDict(
            {
                OBSERVATION_KEY: TensorDict(self._observe(), batch, device=self.device),
                INSTRUCTION_KEY: NonTensorData(self.instruction, batch_size=batch),
                ACTION_IS_PAD_KEY: pad.expand(len(success), -1).reshape(*batch, -1),
                **{name: flag.reshape(*batch, 1).clone() for name, flag in flags.items()},
            },
            batch,
            device=self.device,
        )

    def _observe(self) -> dict[str, torch.Tensor]:
        """What a policy sees now: the only place where something is drawn."""
        base, batch = self.maniskill_env, self.batch_size
        # A task that builds its scene anew at a reset has all its cameras again.
        for name in set(base._sensors) - set(self._cameras.values()):
            del base._sensors[name]
        base._obs_mode = self._mode
        try:
            observed = base.get_obs(self._info, unflattened=True)
        finally:
            base._obs_mode = _NOTHING
        found = {}
        for name, camera in self._cameras.items():
            frames = observed["sensor_data"][camera]["rgb"].movedim(-1, -3)
            # ManiSkill may draw the next frame into the same buffer.
            found[name] = frames.clone(memory_format=torch.contiguous_format)
        parts = [part for name in ("agent", "extra") for part in _leaves(observed[name])]
        state = [part.reshape(self.num_envs, -1).float() for part in parts if part.numel()]
        found["state"] = torch.cat(state, 1)
        return {name: value.reshape(*batch, *value.shape[1:]) for name, value in found.items()}

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Free the simulation and its renderer."""
        base = self.__dict__.pop("maniskill_env", None)
        if base is not None:
            base.close()
        super().close(raise_if_closed=raise_if_closed)


def _make(task: str, num_envs: int, **kwargs: Any) -> Any:
    """ManiSkill's environment without its wrappers, in a mode that observes frames."""
    import gymnasium

    render_backend = choose_vulkan_driver()
    import mani_skill.envs  # noqa: F401  it registers the tasks
    from mani_skill.utils.registration import REGISTERED_ENVS

    cls = REGISTERED_ENVS[task].cls
    # Some tasks paste their objects into photographs, which takes a second texture.
    modes = [mode for mode in cls.SUPPORTED_OBS_MODES if mode.startswith("rgb")]
    if "any_textures" in cls.SUPPORTED_OBS_MODES:
        modes.insert(0, "rgb")
    rewards = cls.SUPPORTED_REWARD_MODES
    try:
        with prompts_refused(), drawing_errors():
            env = gymnasium.make(
                task,
                num_envs=num_envs,
                obs_mode=modes[0],
                reward_mode="none" if "none" in rewards else rewards[0],
                sim_backend="physx_cpu" if num_envs == 1 else "physx_cuda",
                render_backend=render_backend,
                **kwargs,
            )
    except AssertionError as error:
        if "supported modes" not in str(error):
            raise
        raise ValueError(
            f"control_mode must be one of the robot's, got {error}. Choose one of these."
        ) from error
    return env.unwrapped


def _leaves(observed: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Entries of nested dictionaries, in their order."""
    for value in observed.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield torch.as_tensor(value)


def _horizon(task: str) -> int:
    from mani_skill.utils.registration import REGISTERED_ENVS

    return int(REGISTERED_ENVS[task].max_episode_steps)
