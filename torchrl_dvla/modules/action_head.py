# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Action head: learned queries, the logits read from them, and tokens sampled from those."""

from __future__ import annotations

import torch
from tensordict import is_batchedtensor
from torch import nn

__all__ = ["ActionQueryHead", "inverse_cdf_sample"]


class ActionQueryHead(nn.Module):
    """Action queries (learned embeddings, one or more per env step) and their linear read-out.

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
        """Logits of hidden states ``[B, queries, D]``: ``[B, chunk, A, V]``."""
        logits = self.projection(hidden.to(self.projection.weight.dtype))
        return logits.view(hidden.shape[0], *self._shape)


def inverse_cdf_sample(probs: torch.Tensor) -> torch.Tensor:
    """Samples of categorical distributions, from one uniform number a row.

    ``torch.multinomial`` draws ``V`` exponentials a row on a CPU, which for a chunk of 8 x 7 tokens
    takes as long as a good part of a small backbone.

    Args:
        probs (torch.Tensor): probabilities ``[..., V]``.

    Returns:
        Token ids ``[...]``, int64. A token of probability zero is never returned.

    Raises:
        ValueError: if there is a NaN or infinity.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.action_head import inverse_cdf_sample
        >>> inverse_cdf_sample(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        tensor([1, 2])

    Reference:
        Devroye, "Non-Uniform Random Variate Generation", 1986, chapter III.2.
    """
    # Half precision has fewer steps between 0 and 1 than there are tokens.
    cumulative = probs.cumsum(-1, dtype=torch.promote_types(probs.dtype, torch.float32))
    total = cumulative[..., -1:]
    # Nothing can be decided by the values of an ensemble, inside of torch.vmap.
    if not is_batchedtensor(total) and not bool(torch.isfinite(total).all()):
        raise ValueError(
            "logits must be finite, got NaN or infinity. The weights have diverged: go back to an "
            "older checkpoint and lower the learning rate."
        )
    # The product may round up to the total, where an impossible token could be found.
    threshold = torch.minimum(
        torch.rand_like(total) * total, torch.nextafter(total, torch.zeros_like(total))
    )
    # First token whose cumulative probability exceeds the threshold: never one of probability 0.
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
