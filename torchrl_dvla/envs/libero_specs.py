# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Specs of an environment whose step is one decision."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torchrl.data.tensor_specs import Bounded, Categorical, Composite, NonTensor, Unbounded

from torchrl_dvla.data.schema import VLA_ACTION_KEY

__all__ = ["DecisionSpecs", "decision_specs"]


class DecisionSpecs(NamedTuple):
    """What a decision-level environment reads and writes.

    Attributes:
        observation (Composite): observation, instruction, success and padding mask.
        action (Composite): the action chunk.
        reward (Bounded): success as 0 or 1.
        done (Composite): the done flags.
    """

    observation: Composite
    action: Composite
    reward: Bounded
    done: Composite


def decision_specs(
    *,
    low: np.ndarray,
    high: np.ndarray,
    chunk_size: int,
    state_dim: int,
    height: int,
    width: int,
    instruction: str,
    has_wrist_image: bool = False,
    has_pixels: bool = False,
    device: torch.device | None = None,
) -> DecisionSpecs:
    """Build the specs.

    Keyword Args:
        low (np.ndarray): smallest action ``[A]``.
        high (np.ndarray): largest action ``[A]``.
        chunk_size (int): env steps in a chunk.
        state_dim (int): size of the proprioceptive state.
        height (int): frame height.
        width (int): frame width.
        instruction (str): an example instruction.
        has_wrist_image (bool): whether there is a second camera.
        has_pixels (bool): whether the frame is also written as ``"pixels"`` ``[H, W, 3]``.
        device (torch.device, optional): device of the tensors.

    Returns:
        the :class:`DecisionSpecs`.

    Examples:
        >>> specs = decision_specs(
        ...     low=np.array([-1.0]), high=np.array([1.0]), chunk_size=4, state_dim=2,
        ...     height=8, width=8, instruction="lift",
        ... )
        >>> specs.action["vla_action", "chunk"].shape
        torch.Size([4, 1])
    """

    def flag(size: int) -> Categorical:
        return Categorical(2, dtype=torch.bool, shape=(size,), device=device)

    def frame() -> Unbounded:
        return Unbounded(shape=(3, height, width), dtype=torch.uint8, device=device)

    observation = Composite(
        image=frame(),
        state=Unbounded(shape=(state_dim,), dtype=torch.float32, device=device),
        shape=(),
    )
    if has_wrist_image:
        observation["wrist_image"] = frame()
    root = Composite(
        observation=observation,
        language_instruction=NonTensor(shape=(), example_data=instruction, device=device),
        success=flag(1),
        action_is_pad=flag(chunk_size),
        shape=(),
    )
    if has_pixels:
        root["pixels"] = Unbounded(shape=(height, width, 3), dtype=torch.uint8, device=device)
    shape = (chunk_size, len(low))
    chunk = Bounded(
        low=torch.as_tensor(low, dtype=torch.float32).expand(shape),
        high=torch.as_tensor(high, dtype=torch.float32).expand(shape),
        shape=shape,
        dtype=torch.float32,
        device=device,
    )
    return DecisionSpecs(
        observation=root,
        action=Composite({VLA_ACTION_KEY: Composite(chunk=chunk, shape=())}, shape=()),
        reward=Bounded(low=0.0, high=1.0, shape=(1,), device=device),
        done=Composite(done=flag(1), terminated=flag(1), truncated=flag(1), shape=()),
    )
