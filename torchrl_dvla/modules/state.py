# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Proprioception as one token of the stream."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["StateProjector"]


class StateProjector(nn.Module):
    """Standardise a proprioception vector and project it into the token stream.

    Mean and standard deviation are buffers: they travel with the weights.

    Args:
        state_dim (int): size ``S`` of the vector.
        hidden_size (int): width ``D`` of the token stream.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.state import StateProjector
        >>> projector = StateProjector(8, 32)
        >>> projector.set_statistics(torch.zeros(8), torch.full((8,), 2.0))
        >>> projector(torch.ones(5, 8)).shape
        torch.Size([5, 1, 32])
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, state_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))
        self.layers = nn.Sequential(
            nn.Linear(state_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    @torch.no_grad()
    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set what states are standardised with, usually from demonstrations.

        Args:
            mean (torch.Tensor): ``[S]``.
            std (torch.Tensor): ``[S]``, positive.

        Raises:
            ValueError: if a shape is wrong, or an entry of ``std`` is not positive.
        """
        if mean.shape != self.mean.shape or std.shape != self.std.shape or not (std > 0).all():
            raise ValueError(
                f"mean and std must have shape {tuple(self.mean.shape)} and std must be positive, "
                f"got {tuple(mean.shape)}, {tuple(std.shape)} and a smallest std of "
                f"{float(std.min()):g}. Clamp the std of entries that never change."
            )
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Map states ``[B, S]`` to tokens ``[B, 1, D]``."""
        return self.layers((state.to(self.mean.dtype) - self.mean) / self.std).unsqueeze(1)
