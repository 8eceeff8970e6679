# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Augmentation of observations for supervised training."""

from __future__ import annotations

from typing import NoReturn

import torch
from tensordict import TensorDictBase
from torchrl.envs.transforms import Transform

from torchrl_dvla.data.schema import CAMERA_KEYS, STATE_KEY
from torchrl_dvla.validation import Range, check

__all__ = ["RandomShift", "StateNoise", "shift_image"]


def shift_image(image: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Move images by whole pixels; the border pixels fill what comes in.

    Args:
        image (torch.Tensor): images ``[B, C, H, W]`` of any dtype.
        shift (torch.Tensor): int64 ``[B, 2]``, rows down and columns to the right.

    Returns:
        torch.Tensor: images ``[B, C, H, W]``.

    Examples:
        >>> import torch
        >>> shift_image(torch.tensor([[[[1, 2, 3]]]]), torch.tensor([[0, 1]]))
        tensor([[[[1, 1, 2]]]])
    """
    num, _, height, width = image.shape
    rows = torch.arange(height, device=image.device) - shift[:, :1]
    columns = torch.arange(width, device=image.device) - shift[:, 1:]
    batch = torch.arange(num, device=image.device)[:, None, None]
    # indexing [B, H, W, C] keeps the channels of a pixel together, one gather for all of them
    moved = image.permute(0, 2, 3, 1)[
        batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    return moved.permute(0, 3, 1, 2)


def _refuse_environment(self: Transform, next_tensordict: TensorDictBase) -> NoReturn:
    raise NotImplementedError(
        f"{type(self).__name__} disturbs sampled batches and must not be part of an environment. "
        "Pass it to the replay buffer as transform."
    )


class RandomShift(Transform):
    """Shifts each sampled image by up to a few pixels, the same for a whole image.

    With a camera at the wrist, its images are shifted too, independently of the others.

    Args:
        max_shift (int): largest shift of rows and of columns, in pixels. Defaults to 4.

    Raises:
        ValueError: if *max_shift* is negative.

    Reference:
        Kostrikov, Yarats, Fergus, "Image Augmentation Is All You Need", 2020,
        https://arxiv.org/abs/2004.13649.
    """

    def __init__(self, max_shift: int = 4) -> None:
        remedy = "0 leaves images as they are."
        max_shift = check("max_shift", max_shift, int, Range(0, remedy=remedy))
        super().__init__()
        self.max_shift = max_shift

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Shift the images ``[*B, C, H, W]`` of a sampled batch."""
        limits = (-self.max_shift, self.max_shift + 1)
        for key in CAMERA_KEYS:
            image = tensordict.get(key, None)
            if image is not None:
                shift = torch.randint(*limits, (image.shape[:-3].numel(), 2), device=image.device)
                shifted = shift_image(image.reshape(-1, *image.shape[-3:]), shift)
                tensordict.set(key, shifted.reshape(image.shape))
        return tensordict

    _call = _refuse_environment


class StateNoise(Transform):
    """Adds Gaussian noise to the proprioception of a sampled batch.

    A policy that may trust its joint readings to the last digit learns to replay trajectories by
    them; a little noise takes those digits away. It does not make a policy look where nothing has
    to be seen: ``evaluate --suite --rendering blank`` says whether one does.

    Args:
        scale (float): standard deviation, in the state's own units. Defaults to 0.003.

    Raises:
        ValueError: if *scale* is negative.
    """

    def __init__(self, scale: float = 0.003) -> None:
        scale = check("scale", scale, float, Range(0, remedy="0 leaves states as they are."))
        super().__init__()
        self.scale = scale

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Disturb the states of a sampled batch."""
        state = tensordict.get(STATE_KEY)
        return tensordict.set(STATE_KEY, state + self.scale * torch.randn_like(state))

    _call = _refuse_environment
