# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""From camera images to what a vision tower reads."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from torchrl_dvla.modules.backbones import PixelStyle

__all__ = ["PixelNormalizer"]


class PixelNormalizer(nn.Module):
    """Scale, resize and normalise images in three tensor operations.

    Args:
        style (PixelStyle): mean, standard deviation and interpolation.

    Keyword Args:
        image_size (tuple of int): height and width wanted.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.backbones import PixelStyle
        >>> from torchrl_dvla.modules.pixels import PixelNormalizer
        >>> normalize = PixelNormalizer(PixelStyle(), image_size=(2, 2))
        >>> pixels = normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
        ...     .expand(2, 3, 2, 2))
        >>> pixels[:, 0, 0, 0]
        tensor([-1.,  1.])
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, style: PixelStyle, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self._image_size = image_size
        self._interpolation = style.interpolation
        mean = torch.tensor(style.mean).view(3, 1, 1)
        std = torch.tensor(style.std).view(3, 1, 1)
        # (x / 255 - mean) / std == x * scale + shift
        self.register_buffer("scale", 1.0 / (255.0 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normalise ``[N, 3, h, w]``.

        Args:
            images (torch.Tensor): uint8 in [0, 255] or floating point in [0, 1].
            dtype (torch.dtype): dtype of the result.

        Returns:
            Normalised pixels ``[N, 3, height, width]``.
        """
        # A copy in any case: it is changed in place below.
        pixels = images.to(torch.float32, copy=True)
        if images.dtype != torch.uint8:
            pixels.mul_(255.0)
        if pixels.shape[-2:] != self._image_size:
            pixels = F.interpolate(
                pixels,
                size=self._image_size,
                mode=self._interpolation,
                align_corners=False,
                antialias=True,
            ).clamp_(0.0, 255.0)
        return pixels.mul_(self.scale).add_(self.shift).to(dtype)
