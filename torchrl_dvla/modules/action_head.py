# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Action queries and the head that reads them."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ActionQueryHead"]


class ActionQueryHead(nn.Module):
    """Learned placeholders for the actions of a chunk, and a linear read-out of them.

    Query ``q`` stands for env step ``q // tokens_per_step`` of the chunk and predicts
    ``action_dim / tokens_per_step`` consecutive action dimensions.

    Args:
        hidden_size (int): width ``D`` of the token stream.

    Keyword Args:
        chunk_size (int): env steps per decision.
        action_dim (int): action dimension ``A``.
        vocab_size (int): action tokens per dimension ``V``.
        tokens_per_step (int): queries per env step.
        query_std (float): standard deviation the queries are drawn with.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.action_head import ActionQueryHead
        >>> head = ActionQueryHead(16, chunk_size=4, action_dim=6, vocab_size=32, tokens_per_step=2)
        >>> head.queries.shape
        torch.Size([8, 16])
        >>> head(torch.zeros(5, 8, 16)).shape
        torch.Size([5, 4, 6, 32])
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        chunk_size: int,
        action_dim: int,
        vocab_size: int,
        tokens_per_step: int = 1,
        query_std: float = 0.02,
    ) -> None:
        super().__init__()
        self._shape = (chunk_size, action_dim, vocab_size)
        num_outputs = action_dim // tokens_per_step * vocab_size
        self.queries = nn.Parameter(torch.randn(chunk_size * tokens_per_step, hidden_size))
        self.projection = nn.Linear(hidden_size, num_outputs)
        with torch.no_grad():
            self.queries.mul_(query_std)
            # Small logits: the first policy is nearly uniform, and no token is out of reach.
            nn.init.normal_(self.projection.weight, std=0.1 * hidden_size**-0.5)
            nn.init.zeros_(self.projection.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states ``[B, queries, D]`` to logits ``[B, chunk, A, V]``."""
        logits = self.projection(hidden.to(self.projection.weight.dtype))
        return logits.view(hidden.shape[0], *self._shape)
