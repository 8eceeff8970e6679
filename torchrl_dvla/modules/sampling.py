# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Sampling of action tokens."""

from __future__ import annotations

import torch

__all__ = ["inverse_cdf_sample"]


def inverse_cdf_sample(probs: torch.Tensor) -> torch.Tensor:
    """Sample from categorical distributions with one uniform number a row.

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
        >>> from torchrl_dvla.modules.sampling import inverse_cdf_sample
        >>> inverse_cdf_sample(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        tensor([1, 2])

    Reference:
        Devroye, "Non-Uniform Random Variate Generation", 1986, chapter III.2.
    """
    cumulative = probs.cumsum(-1)
    total = cumulative[..., -1:]
    if not bool(torch.isfinite(total).all()):
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
