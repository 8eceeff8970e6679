# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
r"""Importance ratios and divergences between the learner's policy and the ones the data came from.

The ``kl_`` functions estimate :math:`KL(q \| p)` from actions drawn from :math:`q`, given
``log_ratio = log p(a) - log q(a)``. Mind which policy took the actions: the divergence from the
behaviour policy to the learner's takes the learner in the numerator.
"""

from __future__ import annotations

import torch

__all__ = [
    "LOG_RATIO_BOUND",
    "behavior_weight",
    "clipped_surrogate",
    "effective_sample_size",
    "gaussian_surrogate",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "log_ratio",
    "outside_clip",
]

#: Largest magnitude of a log-ratio. ``exp(20)`` is 4.9e8: far outside of any trust region, yet its
#: square and a sum of thousands of them are finite in float32.
LOG_RATIO_BOUND = 20.0


def log_ratio(log_prob: torch.Tensor, behavior_log_prob: torch.Tensor) -> torch.Tensor:
    r"""Log of the importance ratio :math:`\log \pi_\theta(a) - \log \pi_b(a)`, clamped.

    The result is clamped to :data:`LOG_RATIO_BOUND` in magnitude, so that its exponential can
    neither overflow nor turn a product with a zero advantage into NaN. A sample beyond the bound
    keeps its value but passes no gradient. Half-precision inputs are promoted to float32 first:
    bfloat16 keeps eight bits, which would make a ratio of 1.003 equal to one.

    Args:
        log_prob (torch.Tensor): log-probabilities under the policy in the numerator ``[*B]``.
        behavior_log_prob (torch.Tensor): log-probabilities under the policy in the denominator
            ``[*B]``; treated as a constant.

    Returns:
        torch.Tensor: log-ratios ``[*B]``.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> import torch
        >>> log_ratio(torch.tensor([-1.0, 0.0]), torch.tensor([-1.5, -100.0]))
        tensor([ 0.5000, 20.0000])
    """
    if log_prob.shape != behavior_log_prob.shape:
        raise ValueError(
            f"behavior_log_prob must have the shape of log_prob {list(log_prob.shape)}, got "
            f"{list(behavior_log_prob.shape)}. Broadcasting would pair samples with the wrong "
            "probabilities."
        )
    difference = _promoted(log_prob) - _promoted(behavior_log_prob.detach())
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def clipped_surrogate(
    log_ratio: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_low: float | torch.Tensor = 0.2,
    clip_high: float | torch.Tensor = 0.2,
    dual_clip: float | None = None,
) -> torch.Tensor:
    r"""Pessimistic surrogate gain of PPO with separate lower and upper clips.

    .. math::
        g = \min\bigl(r A, \operatorname{clip}(r, 1 - \epsilon_l, 1 + \epsilon_h) A\bigr),
        \qquad r = e^{\text{log\_ratio}}

    With ``dual_clip=c`` the gain of a negative advantage is further bounded below by :math:`c A`:
    a stale sample whose ratio has grown without limit then stops pulling instead of dominating the
    batch.

    Args:
        log_ratio (torch.Tensor): log-ratios to the policy that the trust region is centred on
            ``[*B]``.
        advantage (torch.Tensor): advantages, broadcastable to ``[*B]``.

    Keyword Args:
        clip_low (float or torch.Tensor): :math:`\epsilon_l` in ``[0, 1)``. Defaults to ``0.2``.
        clip_high (float or torch.Tensor): :math:`\epsilon_h >= 0`; larger than *clip_low* leaves
            unlikely actions room to grow (clip-higher). Defaults to ``0.2``.
        dual_clip (float, optional): bound :math:`c > 1 + \epsilon_h` on the ratio of negative
            advantages.

    Returns:
        torch.Tensor: gains ``[*B]``, to be maximised.

    Examples:
        >>> import torch
        >>> ratio = torch.tensor([0.5, 1.0, 1.25, 2.0])
        >>> clipped_surrogate(ratio.log(), torch.tensor(1.0), clip_low=0.2, clip_high=0.28)
        tensor([0.5000, 1.0000, 1.2500, 1.2800])
        >>> clipped_surrogate(torch.tensor(10.0).log(), torch.tensor(-1.0), dual_clip=3.0)
        tensor(-3.)

    Reference:
        Schulman et al., "Proximal Policy Optimization Algorithms", 2017,
        https://arxiv.org/abs/1707.06347; Yu et al., "DAPO", 2025,
        https://arxiv.org/abs/2503.14476 (clip-higher); Ye et al., "Mastering Complex Control in
        MOBA Games", 2020, https://arxiv.org/abs/1912.09729 (dual clip).
    """
    ratio = log_ratio.exp()
    low = 1 - torch.as_tensor(clip_low, dtype=ratio.dtype, device=ratio.device)
    high = 1 + torch.as_tensor(clip_high, dtype=ratio.dtype, device=ratio.device)
    gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)
    return gain


def gaussian_surrogate(
    log_ratio: torch.Tensor, advantage: torch.Tensor, *, std: float
) -> torch.Tensor:
    r"""Surrogate gain under a Gaussian trust weight instead of a clip (GIPO).

    .. math::
        g = \operatorname{sg}\Bigl[\exp\Bigl(-\frac{(\log r)^2}{2 \sigma^2}\Bigr)\Bigr] r A,
        \qquad r = e^{\text{log\_ratio}}

    where sg is a constant to the gradient. Gains of far ratios fade, of both signs of the advantage
    alike, but none is cut to a gradient of zero as by :func:`clipped_surrogate`.

    Args:
        log_ratio (torch.Tensor): log-ratios to the policy that the weight is centred on ``[*B]``.
        advantage (torch.Tensor): advantages, broadcastable to ``[*B]``.

    Keyword Args:
        std (float): :math:`\sigma`, positive: the log-ratio at which the weight is 0.61.

    Returns:
        torch.Tensor: gains ``[*B]``, to be maximised.

    Examples:
        >>> import torch
        >>> gaussian_surrogate(torch.tensor([0.0, 1.0]), torch.tensor(2.0), std=1.0)
        tensor([2.0000, 3.2974])

    Reference:
        Lu et al., "GIPO: Gaussian Importance Sampling Policy Optimization", 2026,
        https://arxiv.org/abs/2603.03955.
    """
    trust = (-0.5 * (log_ratio.detach() / std).square()).exp()
    return trust * log_ratio.exp() * advantage


def outside_clip(
    log_ratio: torch.Tensor,
    *,
    clip_low: float | torch.Tensor = 0.2,
    clip_high: float | torch.Tensor = 0.2,
) -> torch.Tensor:
    """Which ratios have left the trust region, whatever the sign of their advantage.

    Args:
        log_ratio (torch.Tensor): log-ratios ``[*B]``.

    Keyword Args:
        clip_low (float or torch.Tensor): lower clip. Defaults to ``0.2``.
        clip_high (float or torch.Tensor): upper clip. Defaults to ``0.2``.

    Returns:
        torch.Tensor: boolean ``[*B]``, ``True`` = outside of ``[1 - clip_low, 1 + clip_high]``.

    Examples:
        >>> import torch
        >>> outside_clip(torch.tensor([0.7, 0.9, 1.25]).log(), clip_high=0.28)
        tensor([ True, False, False])
    """
    ratio = log_ratio.exp()
    return (ratio < 1 - clip_low) | (ratio > 1 + clip_high)


def behavior_weight(
    proximal_log_ratio: torch.Tensor, *, cap: float | None = None, mask: bool = False
) -> torch.Tensor:
    r"""Truncated or masked weight that corrects the decoupled objective for stale data.

    The trust region of PPO does not have to be centred on the policy that took the data. Decoupled
    PPO centres it on a recent *proximal* policy and corrects for the age of the data by a constant
    factor:

    .. math::
        w = \min\Bigl(\frac{\pi_{prox}(a)}{\pi_b(a)}, c\Bigr), \qquad
        J = \mathbb{E}_{\pi_b}\bigl[w \cdot g(\pi_\theta / \pi_{prox}, A)\bigr]

    with :math:`g` the :func:`clipped_surrogate`. Truncation at :math:`c` trades a little bias for a
    bounded variance. A masked weight is zero above :math:`c`: a ratio that far out says more of a
    mismatch between the two policies than of the action.

    Args:
        proximal_log_ratio (torch.Tensor): ``log_ratio(proximal_log_prob, behavior_log_prob)``
            ``[*B]``.

    Keyword Args:
        cap (float, optional): the bound :math:`c`. ``None`` leaves the weight as it is.
        mask (bool): whether weights above the bound are zero instead of the bound. Defaults to
            ``False``.

    Returns:
        torch.Tensor: weights ``[*B]`` without gradient.

    Examples:
        >>> import torch
        >>> log_ratio = torch.tensor([0.5, 4.0]).log()
        >>> behavior_weight(log_ratio, cap=2.0), behavior_weight(log_ratio, cap=2.0, mask=True)
        (tensor([0.5000, 2.0000]), tensor([0.5000, 0.0000]))

    Reference:
        Hilton et al., "Batch size-invariance for policy optimization", 2022,
        https://arxiv.org/abs/2110.00641; Fu et al., "AReaL", 2025,
        https://arxiv.org/abs/2505.24298; Espeholt et al., "IMPALA", 2018,
        https://arxiv.org/abs/1802.01561 (truncated weights); Ling team, "Every Step Evolves", 2025,
        https://arxiv.org/abs/2510.18855 (IcePop: masked weights).
    """
    weight = proximal_log_ratio.detach().exp()
    if cap is None:
        return weight
    return weight.masked_fill(weight > cap, 0.0) if mask else weight.clamp_max(cap)


def effective_sample_size(
    log_ratio: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Share of the samples that the importance weights leave effective.

    .. math::
        \frac{1}{n} \frac{(\sum_i r_i)^2}{\sum_i r_i^2} \in [1 / n, 1]

    One when all ratios are equal; near ``1 / n`` when a single sample carries the batch. Ratios are
    scaled by their maximum first, so none can overflow.

    Args:
        log_ratio (torch.Tensor): log-ratios ``[*B]``.
        mask (torch.Tensor, optional): boolean ``[*B]``, ``True`` = the sample counts.

    Returns:
        torch.Tensor: scalar; zero if no sample counts.

    Examples:
        >>> import torch
        >>> effective_sample_size(torch.tensor([1.0, 3.0]).log())
        tensor(0.8000)

    Reference:
        Kong, "A note on importance sampling using standardized weights", 1992.
    """
    values = log_ratio.detach()
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    values = values.masked_fill(~mask, -torch.inf)
    # Scaled to a maximum of one; an empty selection keeps exp(-inf) = 0 everywhere.
    weight = (values - values.amax().clamp_min(-1e30)).exp()
    num_samples = mask.sum().clamp_min(1)
    return weight.sum().square() / (num_samples * weight.square().sum().clamp_min(1e-30))


def kl_k1(log_ratio: torch.Tensor) -> torch.Tensor:
    r"""Unbiased estimate :math:`-\log r` of high variance, which may be negative.

    Its own gradient with respect to the sampling policy has a mean of zero: as a loss it would do
    nothing. It is given that of :func:`kl_k2`, which in expectation is the divergence's.

    Args:
        log_ratio (torch.Tensor): ``log p(a) - log q(a)`` for ``a ~ q`` ``[*B]``.

    Returns:
        torch.Tensor: estimates ``[*B]``.

    Examples:
        >>> import torch
        >>> log_ratio = torch.tensor([0.5, -2.0], requires_grad=True)
        >>> estimate = kl_k1(log_ratio)
        >>> estimate.sum().backward()
        >>> estimate.tolist(), log_ratio.grad.tolist()
        ([-0.5, 2.0], [0.5, -2.0])

    Reference:
        Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html;
        Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL", 2025,
        https://arxiv.org/abs/2506.09477 (the gradients).
    """
    k2 = kl_k2(log_ratio)
    return k2 - (k2 + log_ratio).detach()


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


def _promoted(log_prob: torch.Tensor) -> torch.Tensor:
    return log_prob.float() if log_prob.dtype in (torch.float16, torch.bfloat16) else log_prob
