# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The network that all libraries train."""

from __future__ import annotations

import torch
from torch import nn

#: Layers as channels, side of the kernel, stride.
CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (128, 3, 2))
NUM_FEATURES = 512
MINIBATCH, EPOCHS = 128, 2
LEARNING_RATE, CLIP, GAMMA, GAE_LAMBDA = 3e-4, 0.2, 0.99, 0.95
LOG_STD = -0.5


class Torso(nn.Module):
    """Images ``[*B, 3, 64, 64]``, uint8 or already between 0 and 1, to features ``[*B, 512]``."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out, kernel, stride in CONVOLUTIONS:
            layers += [nn.Conv2d(channels, out, kernel, stride), nn.ReLU()]
            channels = out
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, NUM_FEATURES), nn.ReLU())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        flat = image.reshape(-1, *image.shape[-3:])
        if flat.dtype == torch.uint8:
            flat = flat.float() / 255
        features: torch.Tensor = self.layers(flat)
        return features.reshape(*image.shape[:-3], NUM_FEATURES)


class GaussianHead(nn.Module):
    """Features to mean and standard deviation ``[*B, action_dim]``."""

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(NUM_FEATURES, action_dim)
        self.log_std = nn.Parameter(torch.full((action_dim,), LOG_STD))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.mean(features)
        return mean, self.log_std.exp().expand_as(mean)
