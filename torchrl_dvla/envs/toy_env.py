# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's toy task as an environment whose step is one decision: learned in seconds."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite
from torchrl.envs import ToyVLAEnv

from torchrl_dvla.data.schema import ACTION_CHUNK_KEY, ACTION_IS_PAD_KEY, VLA_ACTION_KEY
from torchrl_dvla.validation import Count, Positive, Range, check

__all__ = ["ToyChunkEnv"]


class ToyChunkEnv(ToyVLAEnv):
    """:class:`torchrl.envs.ToyVLAEnv` in tracking mode, where one step is one decision.

    Every episode hides a target action in ``[-0.5, 0.5]^A``. The state shows the last executed
    action and the target, the image draws both (the base class has noise there), and the episode
    succeeds once ``success_steps`` env steps in a row came within ``success_tol`` of it. A
    uniformly random policy succeeds sometimes, one that reads the target always.

    The same task as ``TransformedEnv(ToyVLAEnv(...), MultiAction.from_vla(stack_rewards=False))``,
    but several times faster, and it says which env steps of the chunk were executed. Two
    environments that are given the same seed before their resets get the same targets.

    Keyword Args:
        action_dim (int): ``A``. Defaults to ``2``.
        chunk_size (int): env steps in an action chunk. Defaults to ``4``.
        image_size (int): side of the square image. Defaults to ``32``.
        success_steps (int): env steps in a row within the tolerance. Defaults to ``2``.
        success_tol (float): tolerance, in each dimension. Defaults to ``0.35``.
        seed (int, optional): as for :meth:`set_seed`.

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
        )
        self.chunk_size = chunk_size
        chunk = Bounded(-1.0, 1.0, shape=(chunk_size, action_dim), device=self.device)
        self.full_action_spec = Composite({VLA_ACTION_KEY: Composite({"chunk": chunk})})
        self.observation_spec[ACTION_IS_PAD_KEY] = Categorical(
            2, dtype=torch.bool, shape=(chunk_size,), device=self.device
        )

    def _obs(self, state: torch.Tensor) -> TensorDict:
        image = self._render(state).permute(2, 0, 1).contiguous()
        return TensorDict(
            {
                "observation": {"image": image, "state": state},
                "language_instruction": self.instruction,
            },
            device=self.device,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        out = super()._reset(None, **kwargs)
        out[ACTION_IS_PAD_KEY] = torch.zeros(self.chunk_size, dtype=torch.bool)
        return out

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        chunk = tensordict.get(ACTION_CHUNK_KEY)
        error = chunk - self._target
        streak, num_executed = int(self._streak), 0
        for is_close in (error.abs() <= self.success_tol).all(-1).tolist():
            streak = streak + 1 if is_close else 0
            num_executed += 1
            if streak >= self.success_steps:
                break
        self._streak.fill_(streak)
        success = torch.tensor([streak >= self.success_steps])
        out = self._obs(self._make_state(chunk[num_executed - 1]))
        out["success"] = success
        out["reward"] = success.float()
        out["terminated"], out["done"] = success.clone(), success.clone()
        out[ACTION_IS_PAD_KEY] = torch.arange(self.chunk_size) >= num_executed
        return out
