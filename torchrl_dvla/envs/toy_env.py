# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's toy task as an environment whose step is one decision: learned in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import ToyVLAEnv

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    SEED_KEY,
    VLA_ACTION_KEY,
)
from torchrl_dvla.validation import Count, Positive, Range, check

__all__ = ["ToyChunkEnv"]

#: Pixels between the middle of a square in the image and its side.
_RADIUS = 2


class ToyChunkEnv(ToyVLAEnv):
    """:class:`torchrl.envs.ToyVLAEnv` in tracking mode, where one step is one decision.

    Every episode hides a target action in ``[-0.5, 0.5]^A``. The state shows the last executed
    action and the target, the image draws both (the base class has noise there), and the episode
    succeeds once ``success_steps`` env steps in a row came within ``success_tol`` of it. A
    uniformly random policy succeeds sometimes, one that reads the target always.

    The same task as ``TransformedEnv(ToyVLAEnv(...), MultiAction.from_vla(stack_rewards=False))``,
    but several times faster, and it says which env steps of the chunk were executed. Two
    environments that are given the same seed before their resets get the same targets.

    With ``batch_size=[N]`` it is one environment of ``N`` episodes: an episode that is reset with a
    ``"seed"`` ``[N, 1]`` in the tensordict gets the target that a single environment of this seed
    gets.

    Keyword Args:
        action_dim (int): ``A``. Defaults to ``2``.
        chunk_size (int): env steps in an action chunk. Defaults to ``4``.
        image_size (int): side of the square image. Defaults to ``32``.
        success_steps (int): env steps in a row within the tolerance. Defaults to ``2``.
        success_tol (float): tolerance, in each dimension. Defaults to ``0.35``.
        seed (int, optional): as for :meth:`set_seed`.
        batch_size (sequence of int): ``[N]``. Defaults to ``()``, one episode.

    Raises:
        ValueError: for a number out of range.

    Examples:
        >>> import torch
        >>> env = ToyChunkEnv(chunk_size=4, seed=0)
        >>> td = env.reset()
        >>> td["observation", "image"].shape
        torch.Size([3, 32, 32])
        >>> target = td["observation", "state"][2:]
        >>> td["vla_action", "chunk"] = target.expand(4, 2)
        >>> td = env.step(td)["next"]
        >>> bool(td["success"]), td["action_is_pad"].tolist()
        (True, [False, False, True, True])
    """

    def __init__(
        self,
        *,
        action_dim: int = 2,
        chunk_size: int = 4,
        image_size: int = 32,
        success_steps: int = 2,
        success_tol: float = 0.35,
        seed: int | None = None,
        batch_size: Sequence[int] = (),
    ) -> None:
        chunk_size = check("chunk_size", chunk_size, int, Range(1, remedy="Use the policy's."))
        action_dim = check("action_dim", action_dim, Count)
        image_size = check("image_size", image_size, int, Range(1, 4096))
        success_steps = check("success_steps", success_steps, Count)
        success_tol = check("success_tol", success_tol, Positive)
        seed = check("seed", seed, int | None)
        super().__init__(
            action_dim=action_dim,
            state_dim=2 * action_dim,
            image_shape=(3, image_size, image_size),
            render_size=image_size,
            success_steps=success_steps,
            success_tol=success_tol,
            seed=seed,
            batch_size=torch.Size(batch_size),
        )
        self.chunk_size = chunk_size
        batch = self.batch_size
        chunk = Bounded(-1.0, 1.0, shape=(*batch, chunk_size, action_dim), device=self.device)
        action = Composite({"chunk": chunk}, shape=batch)
        self.full_action_spec = Composite({VLA_ACTION_KEY: action}, shape=batch)
        self.observation_spec[ACTION_IS_PAD_KEY] = Categorical(
            2, dtype=torch.bool, shape=(*batch, chunk_size), device=self.device
        )
        if batch:
            seeds = Unbounded(shape=(*batch, 1), dtype=torch.int64, device=self.device)
            self.state_spec = Composite({SEED_KEY: seeds}, shape=batch)
        colours = torch.tensor([(30, 30, 30), (220, 60, 60), (60, 200, 60)], dtype=torch.uint8)
        self.register_buffer("_colours", colours.view(3, 3, 1, 1), persistent=False)
        # Wrapped once: a tensordict takes 40 us to wrap a bare string.
        self._text = NonTensorData(self.instruction, batch_size=batch)
        self._target: torch.Tensor
        self._streak: torch.Tensor

    def _obs(self, state: torch.Tensor) -> TensorDict:
        observation = TensorDict({"image": self._draw(state), "state": state}, self.batch_size)
        return TensorDict(
            {"observation": observation, "language_instruction": self._text},
            self.batch_size,
            device=self.device,
        )

    def _draw(self, state: torch.Tensor) -> torch.Tensor:
        """Squares at the last action, red, and at the target, green, ``[*B, 3, S, S]``."""
        side = torch.arange(self.render_size, device=self.device)
        points = state.unflatten(-1, (2, self.action_dim))[..., :2]
        if self.action_dim == 1:
            points = torch.nn.functional.pad(points, (0, 1), value=-1.0)
        pixels = ((points.clamp(-1.0, 1.0) + 1.0) * 0.5 * (self.render_size - 1)).round()
        x, y = ((side - pixels.unsqueeze(-1)).abs() <= _RADIUS).unbind(-2)
        action, target = (y.unsqueeze(-1) & x.unsqueeze(-2)).unsqueeze(-3).unbind(-4)
        ground, red, green = self._colours
        return torch.where(target, green, torch.where(action, red, ground))

    def _seeded_target(self, is_reset: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        indices = is_reset.flatten().nonzero().flatten()
        generators = (self._rng.manual_seed(seed) for seed in seeds.flatten()[indices].tolist())
        drawn = [torch.rand(self.action_dim, generator=generator) for generator in generators]
        target = self._target.clone()
        target[indices] = (torch.stack(drawn) - 0.5).to(self.device)
        return target

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        batch, device = self.batch_size, self.device
        is_reset = seeds = None
        if tensordict is not None and batch:
            is_reset, seeds = tensordict.get("_reset", None), tensordict.get(SEED_KEY, None)
        if is_reset is None:
            is_reset = torch.ones(*batch, 1, dtype=torch.bool, device=device)
        target = self._sample_target() if seeds is None else self._seeded_target(is_reset, seeds)
        self._target = torch.where(is_reset, target, self._target)
        self._streak = torch.where(is_reset, 0, self._streak)
        out = self._obs(self._make_state(None))
        for name in ("success", "terminated", "done"):
            out[name] = torch.zeros(*batch, 1, dtype=torch.bool, device=device)
        out[ACTION_IS_PAD_KEY] = torch.zeros(
            *batch, self.chunk_size, dtype=torch.bool, device=device
        )
        if batch:
            no_seeds = torch.zeros(*batch, 1, dtype=torch.int64, device=device)
            out[SEED_KEY] = no_seeds if seeds is None else seeds.clone()
        return out

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        chunk = tensordict.get(ACTION_CHUNK_KEY)
        error = chunk - self._target.unsqueeze(-2)
        is_close = (error.abs() <= self.success_tol).all(-1)
        # Length of the row of close env steps that each env step ends, from that of its last miss.
        number = torch.arange(self.chunk_size, device=chunk.device)
        streak = number - torch.where(is_close, -1 - self._streak, number).cummax(-1).values
        is_solved = streak >= self.success_steps
        reward = is_solved.any(-1, keepdim=True)
        last = torch.where(reward, is_solved.int().argmax(-1, keepdim=True), self.chunk_size - 1)
        streak = streak.gather(-1, last)
        at_last = last.unsqueeze(-1).expand(*last.shape, self.action_dim)
        state = self._make_state(chunk.gather(-2, at_last).squeeze(-2))
        if (mask := tensordict.get("_step", None)) is not None:
            mask = mask.view(streak.shape)
            streak, reward = torch.where(mask, streak, self._streak), reward & mask
        self._streak = streak
        success = streak >= self.success_steps
        out = self._obs(state)
        out["success"] = success
        out["reward"] = reward.float()
        out["terminated"], out["done"] = success.clone(), success.clone()
        out[ACTION_IS_PAD_KEY] = number > last
        return out
