# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Critic-free advantages: each rollout is judged against the others of its group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

__all__ = [
    "ADVANTAGES",
    "Advantage",
    "group_advantage",
    "has_contrast",
    "leave_one_out_advantage",
]

#: Names in :data:`ADVANTAGES`.
Advantage = Literal["mean_std", "mean", "leave_one_out"]


def group_advantage(
    returns: torch.Tensor, *, normalise_std: bool = True, correction: int = 1, eps: float = 1e-6
) -> torch.Tensor:
    r"""Advantage of each rollout relative to the mean of its group.

    .. math::
        A_i = \frac{R_i - \operatorname{mean}_j R_j}{\max(\operatorname{std}_j R_j, \epsilon)}

    with the unbiased standard deviation (``N - 1``), the figures that
    :class:`torchrl.objectives.llm.MCAdvantage` computes; ``correction=0`` makes it the biased one
    (``N``), by which all advantages grow by ``sqrt(N / (N - 1))``. ``normalise_std=False`` leaves
    the denominator out (Dr. GRPO): dividing by the deviation gives groups that are nearly always or
    nearly never solved a larger weight than groups at 50 %.

    A group whose returns are all equal gets exactly zero, at any magnitude: returns are first taken
    relative to the group's first one, so no rounding noise is left for the deviation to blow up.

    Args:
        returns (torch.Tensor): episode returns ``[*G, N]``, the ``N >= 2`` rollouts of a group in
            the last dimension. Integer and boolean returns are cast to the default float type.

    Keyword Args:
        normalise_std (bool): whether to divide by the group's deviation. Defaults to ``True``.
        correction (int): what is taken from ``N`` in the deviation. Defaults to ``1``.
        eps (float): lower bound of the deviation. Defaults to ``1e-6``.

    Returns:
        torch.Tensor: advantages ``[*G, N]``; they sum to zero over each group.

    Raises:
        ValueError: if *returns* has no group dimension of at least two rollouts, or *eps* is not
            positive.

    Examples:
        >>> import torch
        >>> group_advantage(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
        tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
        >>> group_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]), normalise_std=False)
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500])

    Reference:
        Shao et al., "DeepSeekMath", 2024, https://arxiv.org/abs/2402.03300 (GRPO);
        Liu et al., "Understanding R1-Zero-Like Training", 2025, https://arxiv.org/abs/2503.20783
        (Dr. GRPO).
    """
    if not eps > 0:
        raise ValueError(
            f"eps must be positive, got {eps}. It keeps a group of equal returns finite."
        )
    returns = _checked(returns)
    relative = returns - returns[..., :1]
    advantage = relative - relative.mean(-1, keepdim=True)
    if normalise_std:
        std = advantage.std(-1, keepdim=True, correction=correction)
        advantage = advantage / std.clamp_min(eps)
    return advantage


def leave_one_out_advantage(returns: torch.Tensor) -> torch.Tensor:
    r"""Advantage of each rollout relative to the mean of the *others* of its group (RLOO).

    .. math::
        A_i = R_i - \frac{1}{N - 1} \sum_{j \ne i} R_j

    A baseline that does not depend on the rollout's own return leaves the policy gradient unbiased.
    It is the difference to the mean of all, times ``N / (N - 1)``.

    Args:
        returns (torch.Tensor): as of :func:`group_advantage`, ``[*G, N]``.

    Returns:
        torch.Tensor: advantages ``[*G, N]``; they sum to zero over each group.

    Raises:
        ValueError: if *returns* has no group dimension of at least two rollouts.

    Examples:
        >>> import torch
        >>> leave_one_out_advantage(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]))
        tensor([ 0.7500, -0.5000, -0.5000,  0.7500, -0.5000])

    Reference:
        Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019,
        https://openreview.net/forum?id=r1lgTGL5DE; Ahmadian et al., "Back to Basics", 2024,
        https://arxiv.org/abs/2402.14740.
    """
    advantage = group_advantage(returns, normalise_std=False)
    size = returns.shape[-1]
    return advantage * (size / (size - 1))


#: Ready estimators by name: each takes the returns ``[N]`` of a group to its advantages ``[N]``.
ADVANTAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_std": group_advantage,
    "mean": partial(group_advantage, normalise_std=False),
    "leave_one_out": leave_one_out_advantage,
}


def has_contrast(returns: torch.Tensor, *, tolerance: float = 0.0) -> torch.Tensor:
    """Whether a group can teach anything: its rollouts differ.

    The rule of dynamic sampling. A group of equal returns has zero advantage everywhere, so it
    would only dilute the batch.

    Args:
        returns (torch.Tensor): episode returns ``[*G, N]`` with ``N >= 2``.

    Keyword Args:
        tolerance (float): returns that differ by at most this, times their largest magnitude or 1
            if that is larger, count as equal. Defaults to ``0.0``.

    Returns:
        torch.Tensor: boolean ``[*G]``, ``True`` = keep the group.

    Raises:
        ValueError: if *returns* has no group dimension of at least two rollouts.

    Examples:
        >>> import torch
        >>> returns = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
        >>> has_contrast(returns)
        tensor([False,  True, False])

    Reference:
        Yu et al., "DAPO", 2025, https://arxiv.org/abs/2503.14476 (dynamic sampling).
    """
    returns = _checked(returns)
    spread = returns.amax(-1) - returns.amin(-1)
    # Asked this way round, so that a return that is not finite differs from the others.
    return ~(spread <= tolerance * returns.abs().amax(-1).clamp_min(1.0))


def _checked(returns: torch.Tensor) -> torch.Tensor:
    if returns.ndim == 0 or returns.shape[-1] < 2:
        raise ValueError(
            f"returns must hold at least two rollouts in the last dimension, got shape "
            f"{list(returns.shape)}. A group of one has nothing to be compared with: raise "
            "group_size."
        )
    if not returns.is_floating_point():
        returns = returns.to(torch.get_default_dtype())
    return returns
