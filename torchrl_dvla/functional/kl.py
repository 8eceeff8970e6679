# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
r"""Sample estimates of the Kullback-Leibler divergence.

All three estimate :math:`KL(q \| p)` from actions drawn from :math:`q`, given
``log_ratio = log p(a) - log q(a)``. Mind which policy took the actions: the divergence from the
behaviour policy to the learner's takes the learner in the numerator.
"""

from __future__ import annotations

import torch

__all__ = ["kl_k1", "kl_k2", "kl_k3"]


def kl_k1(log_ratio: torch.Tensor) -> torch.Tensor:
    """Unbiased estimate ``-log_ratio``: high variance, and negative on half of the samples.

    A metric only. Its expected gradient with respect to the sampling policy is zero.

    Args:
        log_ratio (torch.Tensor): ``log p(a) - log q(a)`` for ``a ~ q`` ``[*B]``.

    Returns:
        torch.Tensor: estimates ``[*B]``.

    Examples:
        >>> import torch
        >>> kl_k1(torch.tensor([0.5, 2.0]).log())
        tensor([ 0.6931, -0.6931])

    Reference:
        Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html.
    """
    return -log_ratio


def kl_k2(log_ratio: torch.Tensor) -> torch.Tensor:
    r"""Biased, low-variance estimate :math:`\tfrac12 (\log r)^2`; never negative.

    Its gradient with respect to the sampling policy *is* that of the divergence, in expectation.

    Args:
        log_ratio (torch.Tensor): ``log p(a) - log q(a)`` for ``a ~ q`` ``[*B]``.

    Returns:
        torch.Tensor: estimates ``[*B]``.

    Examples:
        >>> import torch
        >>> kl_k2(torch.tensor([0.0, 2.0]))
        tensor([0., 2.])

    Reference:
        Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html;
        Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL", 2025,
        https://arxiv.org/abs/2506.09477 (the gradients).
    """
    return 0.5 * log_ratio.square()


def kl_k3(log_ratio: torch.Tensor) -> torch.Tensor:
    r"""Unbiased estimate :math:`(r - 1) - \log r` of low variance; never negative.

    ``r - 1`` is a control variate of mean zero under :math:`q`. It is evaluated as
    ``expm1(log_ratio)``: near ``r = 1`` the plain difference would cancel to rounding noise.

    Args:
        log_ratio (torch.Tensor): ``log p(a) - log q(a)`` for ``a ~ q`` ``[*B]``.

    Returns:
        torch.Tensor: estimates ``[*B]``.

    Examples:
        >>> import torch
        >>> kl_k3(torch.tensor([1.0, 2.0]).log())
        tensor([0.0000, 0.3069])

    Reference:
        Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html;
        Shao et al., "DeepSeekMath", 2024, https://arxiv.org/abs/2402.03300 (as a penalty).
    """
    return log_ratio.expm1() - log_ratio
