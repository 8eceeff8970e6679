# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
r"""Flow matching, and the stochastic denoising steps that give a flow policy log-probabilities.

Time runs from 1, noise :math:`\epsilon`, to 0, the action :math:`a`: :math:`x_t = t \epsilon +
(1 - t) a`, as in pi0. A network gives the velocity :math:`v(x_t, t) \approx \epsilon - a`, hence
estimates of both ends: :math:`\hat x_0 = x - t v` and :math:`\hat x_1 = x + (1 - t) v`. A decision
takes ``K`` denoising steps, each from a time :math:`t` to :math:`t' = t - \delta` with
:math:`\delta = 1 / K`.

Points and velocities are ``[*B]``; times, noise levels and standard deviations broadcast to them.
A step of noise level zero is the step of the ODE, for every kind of step.
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "bounded_std",
    "cps_step",
    "flow_matching_pair",
    "flow_time",
    "ode_step",
    "sde_step",
    "transition_entropy",
    "transition_log_prob",
]


def flow_time(step: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Time :math:`t_i = 1 - i / K` before denoising step ``i``.

    Args:
        step (torch.Tensor): step numbers from 0 ``[*B]``.
        num_steps (int): ``K``.

    Returns:
        torch.Tensor: times ``[*B]`` from 1 down, float32.

    Examples:
        >>> import torch
        >>> flow_time(torch.arange(5), 4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
    """
    # One rounding: the networks read the time in periods of 1 / 250.
    return (num_steps - step) / num_steps


def flow_matching_pair(
    action: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Input and target of conditional flow matching.

    The network is to predict at :math:`x_t = t \epsilon + (1 - t) a` the velocity
    :math:`\epsilon - a`; the loss is their mean squared difference.

    Args:
        action (torch.Tensor): expert actions ``[*B]``.
        noise (torch.Tensor): samples of N(0, 1) ``[*B]``.
        time (torch.Tensor): times in ``[0, 1]``.

    Returns:
        tuple of torch.Tensor: the point :math:`x_t` and the target velocity, ``[*B]``.

    Examples:
        >>> import torch
        >>> flow_matching_pair(torch.tensor(2.0), torch.tensor(-2.0), torch.tensor(0.25))
        (tensor(1.), tensor(-4.))

    Reference:
        Lipman et al., "Flow Matching for Generative Modeling", 2022,
        https://arxiv.org/abs/2210.02747; Black et al., "pi0: A Vision-Language-Action Flow Model
        for General Robot Control", 2024, https://arxiv.org/abs/2410.24164.
    """
    return time * noise + (1 - time) * action, noise - action


def ode_step(
    x: torch.Tensor, velocity: torch.Tensor, time: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    r"""Euler step of the flow's ODE, :math:`x - \delta v`: greedy denoising.

    Args:
        x (torch.Tensor): points ``[*B]``.
        velocity (torch.Tensor): velocities there ``[*B]``.
        time (torch.Tensor): their times, in ``(0, 1]``.
        after (torch.Tensor): times after the step.

    Returns:
        torch.Tensor: the next points ``[*B]``.

    Examples:
        >>> import torch
        >>> ode_step(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.75))
        tensor(0.5000)
    """
    return x - (time - after) * velocity


def sde_step(
    x: torch.Tensor,
    velocity: torch.Tensor,
    time: torch.Tensor,
    after: torch.Tensor,
    noise_level: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Flow-SDE: Euler-Maruyama step of an SDE with the marginals of the flow's ODE.

    .. math::
        \sigma = \eta \sqrt{t / (1 - t)}, \qquad
        \mathcal{N}\Bigl(x - \delta v - \frac{\delta \sigma^2}{2 t} \hat x_1,\;
            \delta \sigma^2\Bigr)

    At :math:`t = 1`, :math:`\delta` takes the place of :math:`1 - t`.

    Args:
        x (torch.Tensor): points ``[*B]``.
        velocity (torch.Tensor): velocities there ``[*B]``.
        time (torch.Tensor): their times, in ``(0, 1]``.
        after (torch.Tensor): times after the step.
        noise_level (torch.Tensor or float): :math:`\eta`.

    Returns:
        tuple of torch.Tensor: mean ``[*B]`` and standard deviation of the next points.

    Examples:
        >>> import torch
        >>> time, after = torch.tensor(0.5), torch.tensor(0.25)
        >>> sde_step(torch.tensor(1.0), torch.tensor(0.0), time, after, noise_level=1.0)
        (tensor(0.7500), tensor(0.5000))

    Reference:
        Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL", 2025,
        https://arxiv.org/abs/2505.05470; Chen et al., "piRL: Online RL Fine-tuning for Flow-based
        Vision-Language-Action Models", 2025, https://arxiv.org/abs/2510.25889.
    """
    delta = time - after
    rest = torch.where(time < 1, 1 - time, delta)
    variance = noise_level**2 * time / rest
    noise = x + (1 - time) * velocity
    mean = x - delta * velocity - delta * variance / (2 * time) * noise
    return mean, (delta * variance).sqrt()


def cps_step(
    x: torch.Tensor,
    velocity: torch.Tensor,
    time: torch.Tensor,
    after: torch.Tensor,
    noise_level: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Flow-CPS: part of the estimated noise is replaced by fresh noise.

    .. math::
        \mathcal{N}\bigl((1 - t') \hat x_0 + t' \cos(\pi \eta / 2) \hat x_1,\;
            t'^2 \sin^2(\pi \eta / 2)\bigr)

    The noise at :math:`t'` keeps its size, up to the error of :math:`\hat x_1`: marginals come out
    a little too narrow, whatever ``K``. The last step is deterministic.

    Args:
        x (torch.Tensor): points ``[*B]``.
        velocity (torch.Tensor): velocities there ``[*B]``.
        time (torch.Tensor): their times, in ``(0, 1]``.
        after (torch.Tensor): times after the step.
        noise_level (torch.Tensor or float): :math:`\eta` in ``[0, 1]``.

    Returns:
        tuple of torch.Tensor: mean ``[*B]`` and standard deviation of the next points.

    Examples:
        >>> import torch
        >>> time, after = torch.tensor(1.0), torch.tensor(0.5)
        >>> cps_step(torch.tensor(1.0), torch.tensor(0.0), time, after, noise_level=1.0)
        (tensor(0.5000), tensor(0.5000))

    Reference:
        Wang and Yu, "Coefficients-Preserving Sampling for Reinforcement Learning with Flow
        Matching", 2025, https://arxiv.org/abs/2509.05952.
    """
    angle = torch.as_tensor(noise_level, dtype=x.dtype, device=x.device) * (math.pi / 2)
    action, noise = x - time * velocity, x + (1 - time) * velocity
    mean = (1 - after) * action + after * angle.cos() * noise
    return mean, after * angle.sin()


def bounded_std(raw: torch.Tensor, low: float = 0.08, high: float = 0.16) -> torch.Tensor:
    r"""Flow-noise: standard deviation that a network has chosen, between two bounds.

    :math:`\tanh` of the network's output sets the log-variance between those of the bounds.

    Args:
        raw (torch.Tensor): outputs of the network ``[*B]``.
        low (float): least standard deviation.
        high (float): largest standard deviation.

    Returns:
        torch.Tensor: standard deviations ``[*B]``.

    Examples:
        >>> import torch
        >>> bounded_std(torch.tensor([-20.0, 0.0, 20.0]), low=0.1, high=0.4)
        tensor([0.1000, 0.2000, 0.4000])

    Reference:
        Zhang et al., "ReinFlow: Fine-tuning Flow Matching Policy with Online Reinforcement
        Learning", 2025, https://arxiv.org/abs/2505.22094; Chen et al., "piRL", 2025,
        https://arxiv.org/abs/2510.25889.
    """
    return low * (high / low) ** ((raw.tanh() + 1) / 2)


def transition_log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Log-density of single numbers under normal distributions; zero for a deterministic step.

    Args:
        x (torch.Tensor): points ``[*B]``.
        mean (torch.Tensor): means ``[*B]``.
        std (torch.Tensor): standard deviations.

    Returns:
        torch.Tensor: log-densities ``[*B]``; 0, without gradient, where *std* is zero.

    Examples:
        >>> import torch
        >>> mean, std = torch.zeros(2), torch.tensor([1.0, 0.0])
        >>> transition_log_prob(torch.tensor([2.0, 5.0]), mean, std)
        tensor([-2.9189,  0.0000])
    """
    safe = torch.where(std > 0, std, torch.ones_like(std))
    log_prob = -0.5 * ((x - mean) / safe).square() - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(std > 0, log_prob, torch.zeros_like(log_prob))


def transition_entropy(std: torch.Tensor) -> torch.Tensor:
    """Entropy of normal distributions; zero for a deterministic step.

    Args:
        std (torch.Tensor): standard deviations ``[*B]``.

    Returns:
        torch.Tensor: entropies ``[*B]``.

    Examples:
        >>> import torch
        >>> transition_entropy(torch.tensor([1.0, 0.0]))
        tensor([1.4189, 0.0000])
    """
    safe = torch.where(std > 0, std, torch.ones_like(std))
    entropy = safe.log() + 0.5 * math.log(2 * math.pi * math.e)
    return torch.where(std > 0, entropy, torch.zeros_like(entropy))
