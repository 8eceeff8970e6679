# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Any single-step environment as one whose step is one decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import NestedKey, NonTensorData, TensorDict, TensorDictBase
from torchrl.data import Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase, GymEnv, GymWrapper, TransformedEnv
from torchrl.envs.gym_like import BaseInfoDictReader

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    INIT_STATE_ID_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    VLA_ACTION_KEY,
)

__all__ = ["ChunkEnv"]

#: Names of the cameras of a list.
_CAMERA_NAMES = ("image", "wrist_image")


class ChunkEnv(EnvBase):
    """Single-step environment, of TorchRL or gymnasium, whose step becomes one decision.

    A decision executes the env steps of an action chunk until the episode ends or
    ``replan_interval`` is reached. Its reward is the sum over the env steps that were executed, its
    ``"success"`` is true if the task was solved at any of them, and ``"action_is_pad"``
    ``[chunk_size]`` is true for those that were not executed. Observations are those after the last
    env step: ``("observation", "image")`` uint8 ``[3, H, W]`` and others by camera,
    ``("observation", "state")`` float32 ``[S]``, ``"language_instruction"``. The action is
    ``("vla_action", "chunk")`` float32 ``[chunk_size, A]``, within the bounds of the base
    environment's.

    The scene follows from :meth:`set_seed` before the reset: a gymnasium environment gets the seed
    as ``reset(seed=...)``, any other by its own ``set_seed``. To build the specs, the constructor
    resets the base environment and takes one env step.

    Args:
        base_env (EnvBase or gymnasium.Env or str): an environment without batch dimensions, with
            one continuous action ``[A]``; or the id of one that gymnasium has registered.

    Keyword Args:
        chunk_size (int): env steps in an action chunk.
        replan_interval (int, optional): env steps executed per decision. Defaults to
            ``chunk_size``.
        image_key (NestedKey, list or Mapping, optional): entry of the base environment with uint8
            frames ``[H, W, 3]`` or ``[3, H, W]``, called ``"image"``; a list of two, the second
            called ``"wrist_image"``; or entries by name. Defaults to ``None``, no camera.
        state_key (NestedKey or list, optional): entry with the state, of any shape; the entries of
            a list are concatenated. Defaults to ``None``, no state. With neither key, cameras and
            state are those under ``"observation"``, as TorchRL's VLA environments have them.
        instruction (str, tuple or Callable, optional): the words; or the key of the entry that
            holds them, as a tuple; or a function of the reset tensordict. Defaults to the entry
            ``"language_instruction"`` if there is one, else to no words.
        success (NestedKey or Callable, optional): whether the task is solved: an entry of the
            observation, or of gymnasium's info, after every env step; ``"terminated"`` where
            episodes terminate only when solved; or a function of an env step's tensordict. Defaults
            to ``"success"``, which the base environment must have then.
        max_episode_steps (int, optional): env steps after which an episode is truncated, beside the
            base environment's own limit. Defaults to ``None``.

    Raises:
        TypeError: if ``base_env`` is no environment, or the instruction no string.
        ValueError: if the base environment lacks an entry, or has something else there; the message
            lists its entries.

    Examples:
        >>> from torchrl.envs import SuccessReward, ToyVLAEnv, TransformedEnv
        >>> from torchrl_dvla.envs import ChunkEnv
        >>> toy = ToyVLAEnv(action_dim=2, state_dim=4, success_steps=2)
        >>> env = ChunkEnv(TransformedEnv(toy, SuccessReward()), chunk_size=4)
        >>> td = env.reset()
        >>> td["vla_action", "chunk"] = td["observation", "state"][2:].expand(4, 2)
        >>> td = env.step(td)["next"]
        >>> float(td["reward"]), bool(td["success"]), td["action_is_pad"].tolist()
        (1.0, True, [False, False, True, True])
    """

    def __init__(
        self,
        base_env: Any,
        *,
        chunk_size: int,
        replan_interval: int | None = None,
        image_key: NestedKey | list[NestedKey] | Mapping[str, NestedKey] | None = None,
        state_key: NestedKey | list[NestedKey] | None = None,
        instruction: str | tuple[str, ...] | Callable[[TensorDictBase], str] | None = None,
        success: NestedKey | Callable[[TensorDictBase], Any] | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        limits = {
            "chunk_size": chunk_size,
            "replan_interval": replan_interval,
            "max_episode_steps": max_episode_steps,
        }
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}. Count env steps.")
        if replan_interval is not None and replan_interval > chunk_size:
            raise ValueError(
                f"replan_interval must be at most chunk_size={chunk_size}, got {replan_interval}. "
                "A chunk has no more env steps."
            )
        base_env = _as_torchrl(base_env)
        super().__init__(device=base_env.device, batch_size=torch.Size([]))
        self.base_env = base_env
        self.chunk_size = chunk_size
        self.replan_interval = replan_interval or chunk_size
        self.max_episode_steps = max_episode_steps
        innermost = base_env
        while isinstance(innermost, TransformedEnv):
            innermost = innermost.base_env
        self._gym_env = innermost if isinstance(innermost, GymWrapper) else None
        self._seed: int | None = None
        self._elapsed = 0
        self._action_key, action_spec = _only_action(base_env)
        #: What the next env step starts from.
        self._current = base_env.reset()
        if instruction is None:
            instruction = (INSTRUCTION_KEY,) if INSTRUCTION_KEY in self._current else ""
        self._instruction = instruction
        self._words = self._read_instruction()
        self._find_observations(image_key, state_key)
        self._success = key = "success" if success is None else success
        if self._gym_env is not None and isinstance(key, str) and key not in self._current:
            self._gym_env.set_info_dict_reader(_InfoFlag(key))
            base_env.empty_cache()  # of the specs that transforms have made of the old ones
        self._solved(self._env_step(action_spec.project(action_spec.zero())))
        self._make_specs(action_spec)

    # ------------------------------------------------------------------ construction

    def _find_observations(self, image_key: Any, state_key: Any) -> None:
        """Keys of the cameras, with whether channels come last, and of the parts of the state."""
        canonical = self._current.get(OBSERVATION_KEY, None)
        if image_key is None and state_key is None and isinstance(canonical, TensorDictBase):
            names = set(canonical.keys())
            image_key = {name: (OBSERVATION_KEY, name) for name in sorted(names - {"state"})}
            state_key = (OBSERVATION_KEY, "state") if "state" in names else None
        if isinstance(image_key, list) and len(image_key) > len(_CAMERA_NAMES):
            raise ValueError(
                f"image_key must be a mapping of names to keys for more than {len(_CAMERA_NAMES)} "
                f"cameras, got a list of {len(image_key)}. Name them."
            )
        if not isinstance(image_key, Mapping):
            image_key = dict(zip(_CAMERA_NAMES, _as_list(image_key)))
        self._state_keys = [self._entry("state_key", key)[0] for key in _as_list(state_key)]
        self._cameras: dict[str, tuple[NestedKey, bool]] = {}
        for name, wanted in image_key.items():
            key, image = self._entry("image_key", wanted)
            if image.dtype != torch.uint8 or image.ndim != 3 or 3 not in image.shape[::2]:
                raise ValueError(
                    "image_key must name frames of uint8 [H, W, 3] or [3, H, W], got "
                    f"{_describe(key, image)}. Convert them in the base environment, or leave this "
                    "entry out."
                )
            self._cameras[name] = key, image.shape[0] != 3
        if not self._cameras and not self._state_keys:
            raise ValueError(
                "image_key or state_key must name what the policy observes, got neither. "
                f"{self._listing()}"
            )

    def _entry(self, setting: str, key: NestedKey) -> tuple[NestedKey, torch.Tensor]:
        """A key as TorchRL names it, and the tensor there."""
        if key == "state" and self._gym_env is not None and key not in self._current:
            key = "observation"  # TorchRL's name for a gymnasium environment's "state"
        value = self._current.get(key, None)
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{setting} must name a tensor of the base environment, got {key!r}. "
                f"{self._listing()}"
            )
        return key, value

    def _listing(self) -> str:
        entries = self._current.exclude("next", self._action_key, *self.base_env.reward_keys)
        found = [_describe(key, value) for key, value in entries.items(True, True)]
        return f"Its entries are {', '.join(found)}."

    def _make_specs(self, action_spec: Any) -> None:
        flag = Categorical(2, dtype=torch.bool, shape=(1,), device=self.device)
        observed = self._observe(self._current)
        leaves = {
            name: Unbounded(value.shape, dtype=value.dtype, device=self.device)
            for name, value in observed[OBSERVATION_KEY].items()
        }
        pad = Categorical(2, dtype=torch.bool, shape=(self.chunk_size,), device=self.device)
        self.observation_spec = Composite(
            {
                OBSERVATION_KEY: Composite(leaves, device=self.device),
                INSTRUCTION_KEY: NonTensor(shape=(), example_data=self._words.data),
                "success": flag,
                ACTION_IS_PAD_KEY: pad,
            },
            device=self.device,
        )
        if INIT_STATE_ID_KEY in self.base_env.state_spec:
            self.state_spec = Composite(
                {INIT_STATE_ID_KEY: self.base_env.state_spec[INIT_STATE_ID_KEY].clone()},
                device=self.device,
            )
        chunk = action_spec.to(torch.float32).expand(self.chunk_size, *action_spec.shape)
        self.full_action_spec = Composite({VLA_ACTION_KEY: Composite(chunk=chunk)})
        self.reward_spec = Unbounded((1,), device=self.device)
        flags = ("done", "terminated", "truncated")
        self.full_done_spec = Composite({name: flag.clone() for name in flags}, device=self.device)

    # ------------------------------------------------------------------ reset and step

    def _set_seed(self, seed: int | None) -> None:
        if self._gym_env is None:
            self.base_env.set_seed(seed, static_seed=True)
        self._seed = seed

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        if self._gym_env is not None and self._seed is not None:
            # GymWrapper.set_seed() would reset once, and the reset to come draws a second scene.
            kwargs["seed"], self._seed = self._seed, None
        if tensordict is not None:
            tensordict = tensordict.select(INIT_STATE_ID_KEY, strict=False)
        self._current = self.base_env.reset(tensordict, **kwargs)
        self._elapsed = 0
        out = self._observe(self._current)
        if INIT_STATE_ID_KEY in self.state_spec:
            out[INIT_STATE_ID_KEY] = self._current.get(INIT_STATE_ID_KEY)
        self._words = self._read_instruction()
        out[INSTRUCTION_KEY] = self._words
        out[ACTION_IS_PAD_KEY] = self._pad_after(self.chunk_size)
        return out.update(self._flags(success=False, terminated=False, truncated=False))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        chunk = tensordict.get(ACTION_CHUNK_KEY)
        shape = self.full_action_spec[ACTION_CHUNK_KEY].shape
        if chunk.shape != shape:
            raise ValueError(
                f"{ACTION_CHUNK_KEY} must have shape {list(shape)}, got {list(chunk.shape)}. Build "
                "the policy and the environment with the same chunk_size and action dimension."
            )
        num_executed, reward = 0, 0.0
        success = terminated = truncated = False
        for action in chunk[: self.replan_interval]:
            following = self._env_step(action)
            num_executed += 1
            self._elapsed += 1
            reward += float(following.get(self.base_env.reward_key))
            success |= self._solved(following)
            terminated = bool(following.get("terminated"))
            truncated = bool(following.get("done")) or self._elapsed == self.max_episode_steps
            if terminated or truncated:
                break
        if isinstance(self._instruction, tuple):
            self._words = self._read_instruction()
        out = self._observe(self._current)
        out[INSTRUCTION_KEY] = self._words
        out[ACTION_IS_PAD_KEY] = self._pad_after(num_executed)
        out["reward"] = torch.tensor([reward], dtype=torch.float32, device=self.device)
        truncated = truncated and not terminated
        flags = self._flags(success=success, terminated=terminated, truncated=truncated)
        return out.update(flags)

    def _env_step(self, action: torch.Tensor) -> TensorDictBase:
        """One env step of the base environment; returns what it wrote under ``"next"``."""
        dtype = self.base_env.full_action_spec[self._action_key].dtype
        stepped = self.base_env.step(self._current.set(self._action_key, action.to(dtype)))
        following: TensorDictBase = stepped.pop("next")
        self._current = stepped.update(following)
        return following

    # ------------------------------------------------------------------ what it returns

    def _observe(self, tensordict: TensorDictBase) -> TensorDict:
        observed = {}
        for name, (key, is_channels_last) in self._cameras.items():
            image = tensordict.get(key)
            image = image.permute(2, 0, 1) if is_channels_last else image
            # A renderer may draw the next frame into the same buffer.
            observed[name] = image.clone(memory_format=torch.contiguous_format)
        if self._state_keys:
            parts = [tensordict.get(key).flatten().to(torch.float32) for key in self._state_keys]
            observed["state"] = torch.cat(parts)
        return TensorDict({OBSERVATION_KEY: TensorDict(observed)}, device=self.device)

    def _read_instruction(self) -> NonTensorData:
        source = self._instruction
        text = source(self._current) if callable(source) else source
        if isinstance(source, tuple):
            text = self._current[source]
        if not isinstance(text, str):
            raise TypeError(
                f"instruction must give a string, got {type(text).__name__}. Pass the words, a "
                "tuple that is the key of a string, or a function of the reset tensordict."
            )
        return NonTensorData(text)

    def _solved(self, following: TensorDictBase) -> bool:
        source = self._success
        value = source(following) if callable(source) else following.get(source, None)
        if value is None or torch.as_tensor(value).numel() != 1:
            raise ValueError(_success_error(source, value, self._listing()))
        return bool(value)

    def _flags(self, **flags: bool) -> dict[str, torch.Tensor]:
        flags["done"] = flags["terminated"] or flags["truncated"]
        return {key: torch.tensor([value], device=self.device) for key, value in flags.items()}

    def _pad_after(self, num_executed: int) -> torch.Tensor:
        return torch.arange(self.chunk_size, device=self.device) >= num_executed

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the base environment too."""
        if not self.base_env.is_closed:
            self.base_env.close()
        super().close(raise_if_closed=raise_if_closed)


class _InfoFlag(BaseInfoDictReader):
    """Entry of gymnasium's info as a flag ``[1]``; a reset need not have it.

    Args:
        key (str): the entry.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        is_reset = "reward" not in tensordict
        if not is_reset and self.key not in info_dict:
            found = f"The info has {sorted(info_dict)}."
            raise ValueError(_success_error(self.key, None, found))
        flag = torch.as_tensor(info_dict.get(self.key, False))
        return tensordict.set(self.key, flag.reshape(-1).bool())

    @property
    def info_spec(self) -> Composite:
        return Composite({self.key: Categorical(2, dtype=torch.bool, shape=(1,))})


def _success_error(source: Any, value: Any, found: str) -> str:
    got = "nothing" if value is None else f"{list(torch.as_tensor(value).shape)}"
    return (
        f"success must give one flag after every env step, got {got} by {source!r}. Pass success= "
        "the key of a flag in the step's observation or info, 'terminated' if episodes terminate "
        f"only when solved, or a function of the step's tensordict. {found}"
    )


def _as_torchrl(base_env: Any) -> EnvBase:
    if isinstance(base_env, str):
        base_env = GymEnv(base_env)
    elif not isinstance(base_env, EnvBase) and hasattr(base_env, "action_space"):
        base_env = GymWrapper(base_env)
    if not isinstance(base_env, EnvBase):
        raise TypeError(
            "base_env must be an environment of TorchRL or gymnasium, or the id of one, got "
            f"{base_env!r}. Pass an instance."
        )
    if base_env.batch_size:
        raise ValueError(
            f"base_env must have no batch dimensions, got {list(base_env.batch_size)}. Pass one "
            "environment; the collector makes as many as it needs."
        )
    if len(base_env.reward_keys) != 1 or base_env.reward_spec.shape.numel() != 1:
        raise ValueError(
            f"base_env must give one reward, got {base_env.full_reward_spec}. Sum it up there."
        )
    return base_env


def _only_action(env: EnvBase) -> tuple[NestedKey, Any]:
    specs = {key: env.full_action_spec[key] for key in env.action_keys}
    leaves = list(specs.values())
    if len(leaves) != 1 or leaves[0].ndim != 1 or not leaves[0].dtype.is_floating_point:
        found = [f"{key!r} {list(spec.shape)} {spec.dtype}" for key, spec in specs.items()]
        raise ValueError(
            f"base_env must take one action of real numbers [A], got {', '.join(found)}. Discrete "
            "choices: let it take a number for each and execute the largest. A chunk: it is "
            "chunked already, leave MultiAction out."
        )
    return next(iter(specs.items()))


def _as_list(keys: Any) -> list[NestedKey]:
    if keys is None:
        return []
    return keys if isinstance(keys, list) else [keys]


def _describe(key: NestedKey, value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{key!r} ({type(value).__name__})"
    return f"{key!r} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
