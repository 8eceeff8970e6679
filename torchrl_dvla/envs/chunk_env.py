# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Any single-step environment as one whose step is one decision."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import (
    NestedKey,
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_non_tensor,
)
from torchrl.data import Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase, GymEnv, GymWrapper, MultiAction, SerialEnv, TransformedEnv

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    INIT_STATE_ID_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    SEED_KEY,
    VLA_ACTION_KEY,
)
from torchrl_dvla.envs.libero_setup import choose_gl_backend

__all__ = ["ChunkEnv", "make_chunk_env", "registered_env"]

#: Names of the cameras of a list.
_CAMERA_NAMES = ("image", "wrist_image")
#: The camera that gymnasium's ``render()`` is.
_RENDER = "render"
#: Names that success goes by in gymnasium's info.
_SUCCESS_NAMES = ("success", "is_success")


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

    A base environment of batch size ``[N]`` makes one of ``[N]`` episodes: each ends, is padded,
    keeps its last observation and is reset by itself (TorchRL's ``"_reset"``), from its seed in the
    ``"seed"`` ``[N, 1]`` of the tensordict of the reset. An episode that is over, or is left out by
    TorchRL's ``"_step"``, is stepped no further where the base environment respects ``"_step"``,
    and its outcome is ignored where it does not.

    Args:
        base_env (EnvBase or gymnasium.Env or str): an environment with one continuous action
            ``[A]``, or the id of one that gymnasium has registered. A batched one is a
            :class:`~torchrl.envs.SerialEnv`, or declares ``"seed"`` in its ``state_spec`` and
            begins each episode from it.

    Keyword Args:
        chunk_size (int, optional): env steps in an action chunk. Defaults to those of the chunk
            that it is given, which is the policy's choice; the specs have -1 there.
        replan_interval (int, optional): env steps executed per decision. Defaults to all of the
            chunk's.
        image_key (NestedKey, list or Mapping, optional): entry of the base environment with uint8
            frames ``[H, W, 3]`` or ``[3, H, W]``, called ``"image"``; a list of two, the second
            called ``"wrist_image"``; or entries by name. ``"render"`` is what a gymnasium
            environment's ``render()`` returns, called once a decision. Defaults to ``None``, no
            camera.
        state_key (NestedKey or list, optional): entry with the state, of any shape; the entries of
            a list are concatenated. Defaults to ``None``, no state.

            With neither key the policy observes all there is: what lies under ``"observation"``, as
            TorchRL's VLA environments have it; else the entry with frames, or ``"render"`` where
            there is none and the environment was made with ``render_mode="rgb_array"``, and all
            other numbers as the state, in the order of the observation spec.
        instruction (str, tuple or Callable, optional): the words; or the key of the entry of the
            observation, or of gymnasium's info, that holds them, as a tuple; or a function of the
            reset tensordict, of a batch a list of ``N``. Defaults to the entry
            ``"language_instruction"`` if there is one, else to no words.
        success (NestedKey or Callable, optional): whether the task is solved: an entry of the
            observation, or of gymnasium's info, after every env step; ``"terminated"`` where
            episodes terminate only when solved; or a function of an env step's tensordict. Defaults
            to ``"success"`` or ``"is_success"``, which the base environment must have then.
        max_episode_steps (int, optional): env steps after which an episode is truncated, beside the
            base environment's own limit. Defaults to ``None``.

    Raises:
        TypeError: if ``base_env`` is no environment, or the instruction no string.
        ValueError: if the base environment lacks an entry, or has something else there, or if a
            function of yours raises; the message lists the entries.

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
        chunk_size: int | None = None,
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
        if chunk_size is not None and (replan_interval or 0) > chunk_size:
            raise ValueError(
                f"replan_interval must be at most chunk_size={chunk_size}, got {replan_interval}. "
                "A chunk has no more env steps."
            )
        base_env = _as_torchrl(base_env)
        super().__init__(device=base_env.device, batch_size=base_env.batch_size)
        self.base_env = base_env
        self.chunk_size = chunk_size
        self.replan_interval = replan_interval or chunk_size
        self.max_episode_steps = max_episode_steps
        innermost = _innermost(base_env)
        self._gym_env: Any = innermost if isinstance(innermost, GymWrapper) else None
        self._serial_env = innermost if isinstance(innermost, SerialEnv) else None
        if self.batch_size and self._serial_env is None and SEED_KEY not in base_env.state_spec:
            raise ValueError(
                f"base_env of batch size {list(self.batch_size)} must begin each episode from a "
                f"seed of its own, got no {SEED_KEY!r} in its state_spec. Declare it there, int64 "
                f"{[*self.batch_size, 1]}, and read it from the tensordict in _reset; or pass a "
                "SerialEnv of single environments. Workers are processes already: no ParallelEnv."
            )
        #: That of gymnasium's last reset or env step.
        self._info: dict[str, Any] = {}
        if self._gym_env is not None:
            self._gym_env.set_info_dict_reader(self._keep_info)
        self._seed: int | None = None
        #: Env steps of the episode, of a batch ``[N, 1]``.
        self._elapsed: Any = 0
        self._action_key, action_spec = _only_action(base_env)
        #: What the next env step starts from.
        self._current = base_env.reset()
        if instruction is None:
            has_words = INSTRUCTION_KEY in self._current or INSTRUCTION_KEY in self._info
            instruction = (INSTRUCTION_KEY,) if has_words else ""
        self._instruction = instruction
        self._texts: list[str] = []
        self._words = self._read_instruction()
        self._find_observations(image_key, state_key)
        following = self._env_step(action_spec.project(action_spec.zero()))
        if success is None:
            found = [name for name in _SUCCESS_NAMES if name in following or name in self._info]
            success = [*found, "success"][0]
        self._success = success
        self._solved(following)
        self._make_specs(action_spec)

    def _keep_info(self, info: dict[str, Any], tensordict: TensorDictBase) -> None:
        self._info = info

    # ------------------------------------------------------------------ construction

    def _find_observations(self, image_key: Any, state_key: Any) -> None:
        """Keys of the cameras, with whether channels come last, and of the parts of the state."""
        if image_key is None and state_key is None:
            image_key, state_key = self._default_keys()
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
            shape = image.shape[len(self.batch_size) :]
            if image.dtype != torch.uint8 or len(shape) != 3 or 3 not in shape[::2]:
                raise ValueError(
                    "image_key must name frames of uint8 [H, W, 3] or [3, H, W], got "
                    f"{_describe(key, image)}. Convert them in the base environment, or leave this "
                    "entry out."
                )
            self._cameras[name] = key, shape[0] != 3
        if not self._cameras and not self._state_keys:
            raise ValueError(
                "image_key or state_key must name what the policy observes, got neither. "
                f"{self._listing()}"
            )

    def _default_keys(self) -> tuple[dict[str, NestedKey], list[NestedKey]]:
        """Keys of the cameras by name, and of the parts of the state, of all there is to observe.

        Raises:
            ValueError: if there are several cameras, and which is which does not show.
        """
        nested = self._current.get(OBSERVATION_KEY, None)
        if isinstance(nested, TensorDictBase):
            names = sorted(nested.keys())
            keys = {name: (OBSERVATION_KEY, name) for name in names if name != "state"}
            return keys, [(OBSERVATION_KEY, "state")] if "state" in names else []
        cameras: list[NestedKey] = []
        states: list[NestedKey] = []
        for key in self.base_env.observation_spec.keys(True, True):
            value = self._current.get(key, None)
            if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
                continue  # words, and flags
            ndim = value.ndim - len(self.batch_size)
            if ndim > 2 or (ndim == 2 and value.dtype is torch.uint8):
                cameras.append(key)
            elif key not in (*_SUCCESS_NAMES, INIT_STATE_ID_KEY):
                states.append(key)
        if not cameras and getattr(self._gym_env, "render_mode", None) == "rgb_array":
            cameras = [_RENDER]
        if _CAMERA_NAMES[0] in cameras:
            return {key if isinstance(key, str) else key[-1]: key for key in cameras}, states
        if len(cameras) > 1:
            named = dict(zip(_CAMERA_NAMES, cameras))
            raise ValueError(
                f"image_key must say which camera is which, got frames by {cameras}. Name them: "
                f"ChunkEnv(env, image_key={named}, state_key={states})."
            )
        return dict(zip(_CAMERA_NAMES, cameras)), states

    def _entry(self, setting: str, key: NestedKey) -> tuple[NestedKey, torch.Tensor]:
        """A key as TorchRL names it, and the tensor there."""
        if key == "state" and self._gym_env is not None and key not in self._current:
            key = "observation"  # TorchRL's name for a gymnasium environment's "state"
        if key == _RENDER and self._gym_env is not None and key not in self._current:
            choose_gl_backend()
            return key, self._render()
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
        info = f", those of its info {sorted(self._info)}" if self._info else ""
        return f"Its entries are {', '.join(found)}{info}."

    def _make_specs(self, action_spec: Any) -> None:
        batch, device = self.batch_size, self.device
        flag = Categorical(2, dtype=torch.bool, shape=(*batch, 1), device=device)
        observed = self._observe(self._current)
        leaves = {
            name: Unbounded(value.shape, dtype=value.dtype, device=device)
            for name, value in observed[OBSERVATION_KEY].items()
        }
        size = self.chunk_size or -1
        pad = Categorical(2, dtype=torch.bool, shape=(*batch, size), device=device)
        self.observation_spec = Composite(
            {
                OBSERVATION_KEY: Composite(leaves, shape=batch, device=device),
                INSTRUCTION_KEY: NonTensor(shape=batch, example_data=self._texts[0]),
                "success": flag,
                ACTION_IS_PAD_KEY: pad,
            },
            shape=batch,
            device=device,
        )
        states = {}
        if batch:
            states[SEED_KEY] = Unbounded((*batch, 1), dtype=torch.int64, device=device)
        if INIT_STATE_ID_KEY in self.base_env.state_spec:
            states[INIT_STATE_ID_KEY] = self.base_env.state_spec[INIT_STATE_ID_KEY].clone()
        self.state_spec = Composite(states, shape=batch, device=device)
        shape = (*batch, size, action_spec.shape[-1])
        chunk = Composite(
            chunk=action_spec.to(torch.float32).unsqueeze(-2).expand(shape), shape=batch
        )
        self.full_action_spec = Composite({VLA_ACTION_KEY: chunk}, shape=batch)
        self.reward_spec = Unbounded((*batch, 1), device=device)
        flags = ("done", "terminated", "truncated")
        self.full_done_spec = Composite(
            {name: flag.clone() for name in flags}, shape=batch, device=device
        )

    # ------------------------------------------------------------------ reset and step

    def _set_seed(self, seed: int | None) -> None:
        if self._gym_env is None:
            self.base_env.set_seed(seed, static_seed=True)
        self._seed = seed

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        if self.batch_size:
            return self._reset_batch(tensordict, **kwargs)
        if self._gym_env is not None and self._seed is not None:
            # GymWrapper.set_seed() would reset once, and the reset to come draws a second scene.
            kwargs["seed"], self._seed = self._seed, None
        if tensordict is not None:
            tensordict = tensordict.select(INIT_STATE_ID_KEY, strict=False)
        self._current = self.base_env.reset(tensordict, **kwargs)
        self._elapsed = 0
        self._words = self._read_instruction()
        no = torch.tensor([False], device=self.device)
        return self._reset_output(no)

    def _reset_batch(
        self, tensordict: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictBase:
        keys = ("_reset", *self.state_spec.keys())
        request = TensorDict({}, self.batch_size, device=self.device)
        if tensordict is not None:
            request = tensordict.select(*keys, strict=False)
        everyone = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)
        is_reset = request.get("_reset", everyone).reshape(self.batch_size)
        seeds = request.get(SEED_KEY, self.state_spec[SEED_KEY].zero())
        if self._serial_env is not None and SEED_KEY in request:
            kwargs["list_of_kwargs"] = self._seed_single_envs(is_reset.tolist(), seeds.tolist())
        if not is_reset.all():
            request = self._current.update(request)
        self._current = self.base_env.reset(None if request.is_empty() else request, **kwargs)
        self._elapsed = torch.where(is_reset.unsqueeze(-1), 0, self._elapsed)
        self._words = self._read_instruction(is_reset.tolist())
        no = torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        return self._reset_output(no).set(SEED_KEY, seeds.clone())

    def _seed_single_envs(
        self, is_reset: list[bool], seeds: list[list[int]]
    ) -> list[dict[str, int]]:
        """Seed environments of a :class:`~torchrl.envs.SerialEnv`; returns what resets take."""
        assert self._serial_env is not None
        settings: list[dict[str, int]] = [{} for _ in seeds]
        for number, env in enumerate(self._serial_env._envs):
            if is_reset[number]:
                if isinstance(_innermost(env), GymWrapper):
                    settings[number]["seed"] = seeds[number][0]
                else:
                    env.set_seed(seeds[number][0], static_seed=True)
        return settings

    def _reset_output(self, no: torch.Tensor) -> TensorDict:
        out = self._observe(self._current)
        if INIT_STATE_ID_KEY in self.state_spec:
            out[INIT_STATE_ID_KEY] = self._current.get(INIT_STATE_ID_KEY).clone()
        out[INSTRUCTION_KEY] = self._words
        out[ACTION_IS_PAD_KEY] = no.expand(*self.batch_size, self.chunk_size or 1).clone()
        for name in ("success", "terminated", "truncated", "done"):
            out[name] = no.clone()
        return out

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        chunk = tensordict.get(ACTION_CHUNK_KEY)
        shape = self.full_action_spec[ACTION_CHUNK_KEY].shape
        size = self.chunk_size or chunk.shape[-2:-1].numel()
        if chunk.shape != (*self.batch_size, size, shape[-1]):
            raise ValueError(
                f"{ACTION_CHUNK_KEY} must have shape {list(shape)}, got {list(chunk.shape)}. Build "
                "the policy and the environment with the same chunk_size and action dimension."
            )
        if self.batch_size:
            return self._step_batch(chunk, tensordict.get("_step", None))
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
        values = {"success": success, "terminated": terminated}
        values["truncated"] = truncated and not terminated
        outcome = {key: torch.tensor([value], device=self.device) for key, value in values.items()}
        outcome["reward"] = torch.tensor([reward], dtype=torch.float32, device=self.device)
        return self._step_output(self._observe(self._current), num_executed, len(chunk), outcome)

    def _step_batch(self, chunk: torch.Tensor, mask: torch.Tensor | None) -> TensorDictBase:
        """The same for ``N`` episodes, or those of ``mask``, each with an end of its own."""
        no = torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        goes_on = ~no if mask is None else mask.reshape(no.shape)
        num_executed, reward = no.long(), no.double()
        success, terminated, truncated = no, no, no
        # Last observations of those that take no further env step.
        is_kept, kept = ~goes_on, None if mask is None else self._observe(self._current)
        for action in chunk[:, : self.replan_interval].unbind(1):
            following = self._env_step(action, goes_on)
            num_executed = num_executed + goes_on
            self._elapsed = self._elapsed + goes_on
            paid = following.get(self.base_env.reward_key).reshape(no.shape)
            reward = reward + torch.where(goes_on, paid, 0.0)
            success = success | (goes_on & self._solved(following))
            ends = goes_on & following.get("terminated").reshape(no.shape)
            is_late = following.get("done").reshape(no.shape)
            if self.max_episode_steps is not None:
                is_late = is_late | (self._elapsed == self.max_episode_steps)
            terminated, truncated = terminated | ends, truncated | (goes_on & is_late & ~ends)
            is_over = goes_on & (terminated | truncated)
            goes_on = goes_on & ~is_over
            if not goes_on.any():
                break
            if is_over.any():
                now = self._observe(self._current)
                kept = now if kept is None else now.where(is_over.squeeze(-1), kept)
                is_kept = is_kept | is_over
        observed = self._observe(self._current)
        if kept is not None:
            observed = kept.where(is_kept.squeeze(-1), observed)
        outcome = {"success": success, "terminated": terminated, "truncated": truncated}
        outcome["reward"] = reward.to(torch.float32)
        return self._step_output(observed, num_executed, chunk.shape[1], outcome)

    def _step_output(
        self,
        out: TensorDict,
        num_executed: int | torch.Tensor,
        chunk_size: int,
        outcome: dict[str, torch.Tensor],
    ) -> TensorDict:
        # One from gymnasium's info is that of the reset.
        if isinstance(self._instruction, tuple) and self._instruction in self._current.keys(True):
            self._words = self._read_instruction()
        out[INSTRUCTION_KEY] = self._words
        out[ACTION_IS_PAD_KEY] = self._pad_after(num_executed, chunk_size)
        outcome["done"] = outcome["terminated"] | outcome["truncated"]
        return out.update(outcome)

    def _env_step(
        self, action: torch.Tensor, goes_on: torch.Tensor | None = None
    ) -> TensorDictBase:
        """One env step of the base environment; returns what it wrote under ``"next"``."""
        dtype = self.base_env.full_action_spec[self._action_key].dtype
        self._current.set(self._action_key, action.to(dtype))
        if goes_on is not None and not goes_on.all():
            self._current.set("_step", goes_on.squeeze(-1))
        stepped = self.base_env.step(self._current)
        stepped.pop("_step", None)
        following: TensorDictBase = stepped.pop("next")
        self._current = stepped.update(following)
        return following

    # ------------------------------------------------------------------ what it returns

    def _observe(self, tensordict: TensorDictBase) -> TensorDict:
        observed = {}
        for name, (key, is_channels_last) in self._cameras.items():
            image = self._render() if key == _RENDER else tensordict.get(key)
            image = image.movedim(-1, -3) if is_channels_last else image
            # A renderer may draw the next frame into the same buffer.
            observed[name] = image.clone(memory_format=torch.contiguous_format)
        batch = self.batch_size
        if self._state_keys:
            parts = [tensordict.get(key).reshape(*batch, -1) for key in self._state_keys]
            observed["state"] = torch.cat([part.to(torch.float32) for part in parts], -1)
        return TensorDict({OBSERVATION_KEY: TensorDict(observed, batch)}, batch, device=self.device)

    def _render(self) -> torch.Tensor:
        frame = self._gym_env.render()
        if not isinstance(frame, np.ndarray):
            raise ValueError(
                f"image_key='render' must get an array from render(), got {type(frame).__name__}. "
                "Make the environment with render_mode='rgb_array'."
            )
        return torch.from_numpy(np.ascontiguousarray(frame))

    def _read_instruction(self, is_reset: list[bool] | None = None) -> Any:
        source, size = self._instruction, self.batch_size.numel()
        text = self._call("instruction", self._current) if callable(source) else source
        if isinstance(source, tuple):
            text = self._current.get(source, self._info.get(source[0]))
            text = text.tolist() if is_non_tensor(text) else text
        texts: list[Any] = [text] * size
        if self.batch_size and isinstance(text, list):
            texts = text
        if len(texts) != size or not all(isinstance(one, str) for one in texts):
            raise TypeError(
                f"instruction must give a string, got {type(text).__name__} by {source!r}. Pass "
                "the words, a tuple that is the key of a string, or a function of the reset "
                f"tensordict. {self._listing()}"
            )
        if callable(source) and is_reset is not None:  # called once an episode
            of_each = zip(is_reset, texts, self._texts, strict=True)
            texts = [new if begins else old for begins, new, old in of_each]
        self._texts = texts
        if len(set(texts)) == 1:
            return NonTensorData(texts[0], batch_size=self.batch_size)
        return NonTensorStack(*[NonTensorData(one) for one in texts])

    def _solved(self, following: TensorDictBase) -> Any:
        source = self._success
        if callable(source):
            value = self._call("success", following)
        else:
            value = following.get(source, self._info.get(source))
        if value is None or torch.as_tensor(value).numel() != self.batch_size.numel():
            got = "nothing" if value is None else f"{list(torch.as_tensor(value).shape)}"
            raise ValueError(
                f"success must give one flag after every env step, got {got} by {source!r}. Pass "
                "torchrl_dvla.envs.ChunkEnv(env, success=...) the key of a flag in the step's "
                "observation or info, 'terminated' if episodes terminate only when solved, or a "
                f"function of the step's tensordict, lambda td: td['reward'] > 0. {self._listing()}"
            )
        return value.reshape(*self.batch_size, 1).bool() if self.batch_size else bool(value)

    def _call(self, setting: str, tensordict: TensorDictBase) -> Any:
        """What a function of the user's returns."""
        try:
            return getattr(self, f"_{setting}")(tensordict)
        except Exception as error:
            raise ValueError(
                f"{setting} must not raise, got {type(error).__name__}: {error}. Correct the "
                f"function that ChunkEnv was given. {self._listing()}"
            ) from error

    def _pad_after(self, num_executed: int | torch.Tensor, chunk_size: int) -> torch.Tensor:
        return torch.arange(chunk_size, device=self.device) >= num_executed

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the base environment too."""
        if not self.base_env.is_closed:
            self.base_env.close()
        super().close(raise_if_closed=raise_if_closed)


def make_chunk_env(make: Callable[[], Any]) -> EnvBase:
    """Environment of a factory, chunked by :class:`ChunkEnv` unless it is already.

    Args:
        make (Callable): returns an environment of TorchRL or gymnasium.
    """
    choose_gl_backend()  # a worker has no display, and MuJoCo's renderer tries that first
    env = make()
    is_chunked = isinstance(env, EnvBase) and ACTION_CHUNK_KEY in env.action_keys
    return env if is_chunked else ChunkEnv(env)


def registered_env(env_id: str, argument: str) -> Any:
    """What gymnasium has registered under an id; ``"package:Id"`` imports the package first.

    Args:
        env_id (str): the id.
        argument (str): where it was given, for the error.

    Raises:
        ValueError: for an id that gymnasium does not know.
        ImportError: without gymnasium.

    Examples:
        >>> registered_env("Pendulum-v1", "base_env").id
        'Pendulum-v1'
    """
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(
            f"{argument}={env_id!r} needs gymnasium: pip install gymnasium"
        ) from error
    package, _, name = env_id.rpartition(":")
    try:
        if package:
            importlib.import_module(package)
        return gymnasium.spec(name)
    except (ImportError, gymnasium.error.Error) as error:
        raise ValueError(
            f"{argument} must be an id that gymnasium knows, got {env_id!r}: "
            f"{str(error).rstrip('.')}. One that another package registers is written "
            "'package:Id', as 'gymnasium_robotics:FetchReach-v4'; or pass a function that makes "
            "the environment."
        ) from None


def _innermost(env: EnvBase) -> EnvBase:
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env


def _as_torchrl(base_env: Any) -> EnvBase:
    if isinstance(base_env, str):
        registered_env(base_env, "base_env")
        base_env = GymEnv(base_env)
    elif not isinstance(base_env, EnvBase) and hasattr(base_env, "action_space"):
        base_env = GymWrapper(base_env)
    if not isinstance(base_env, EnvBase):
        raise TypeError(
            "base_env must be an environment of TorchRL or gymnasium, or the id of one, got "
            f"{base_env!r}. Pass an instance."
        )
    size = base_env.batch_size.numel()
    if len(base_env.batch_size) > 1 or not size:
        raise ValueError(
            f"base_env must have at most one batch dimension, got {list(base_env.batch_size)}. "
            "Flatten it to [N]."
        )
    if any(isinstance(part, MultiAction) for part in base_env.modules()):
        raise ValueError(
            "base_env must take single actions, got an environment with MultiAction: it is chunked "
            "already. Leave that transform out."
        )
    if len(base_env.reward_keys) != 1 or base_env.reward_spec.shape.numel() != size:
        raise ValueError(
            f"base_env must give one reward, got {base_env.full_reward_spec}. Sum it up there."
        )
    return base_env


def _only_action(env: EnvBase) -> tuple[NestedKey, Any]:
    specs = {key: env.full_action_spec[key] for key in env.action_keys}
    leaves = list(specs.values())
    ndim = 1 + len(env.batch_size)
    if len(leaves) != 1 or leaves[0].ndim != ndim or not leaves[0].dtype.is_floating_point:
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
