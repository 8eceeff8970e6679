# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_dvla.functional import (
    behavior_weight,
    clipped_surrogate,
    effective_sample_size,
    gaussian_surrogate,
    kl_k1,
    kl_k2,
    kl_k3,
    log_ratio,
    outside_clip,
)

log_ratios = st.floats(-30, 30, allow_nan=False)


def test_log_ratio_is_clamped_and_detaches_the_behaviour():
    log_prob = torch.tensor([-1.0, -0.5, -60.0, -torch.inf, -1.0], requires_grad=True)
    behavior = torch.tensor([-2.0, -50.0, -1.0, -1.0, -torch.inf], requires_grad=True)
    out = log_ratio(log_prob, behavior)
    assert out.tolist() == [1.0, 20.0, -20.0, -20.0, 20.0]
    out.sum().backward()
    assert log_prob.grad.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]  # none beyond the bound
    assert behavior.grad is None


def test_log_ratio_promotes_half_precision():
    log_prob = torch.tensor([-1.0], dtype=torch.bfloat16)
    out = log_ratio(log_prob, torch.tensor([-1.003]))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.tensor([0.003]), atol=1e-6, rtol=0)


def test_log_ratio_refuses_to_broadcast():
    with pytest.raises(ValueError, match="shape of log_prob"):
        log_ratio(torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        # slope = d gain / d log ratio: ratio * advantage where the sample pulls, else zero
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 1.28 * 2.0, 0.0),  # good and already likelier: clipped above
        (0.5, 2.0, 1.0, 1.0),  # good but unlikelier: pulls back
        (1.5, -2.0, -3.0, -3.0),  # bad and likelier: pushes without a bound
        (0.5, -2.0, 0.8 * -2.0, 0.0),  # bad and already unlikelier: clipped below
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, gain: float, slope: float):
    log = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    out = clipped_surrogate(log, torch.tensor(advantage), clip_low=0.2, clip_high=0.28)
    out.backward()
    assert math.isclose(out.item(), gain, rel_tol=1e-6, abs_tol=1e-9)
    assert math.isclose(log.grad.item(), slope, rel_tol=1e-6, abs_tol=1e-9)


def test_dual_clip_bounds_negative_advantages_only():
    log = torch.tensor([5.0, 2.0, 5.0]).log().requires_grad_()
    advantage = torch.tensor([-1.0, -1.0, 1.0])
    out = clipped_surrogate(log, advantage, dual_clip=3.0)
    torch.testing.assert_close(out.detach(), torch.tensor([-3.0, -2.0, 1.2]))
    out.sum().backward()
    torch.testing.assert_close(log.grad, torch.tensor([0.0, -2.0, 0.0]))


@settings(max_examples=100, deadline=None)
@given(log_ratios, st.floats(-5, 5, allow_nan=False))
def test_surrogate_is_a_finite_lower_bound(log: float, advantage: float):
    clamped = log_ratio(torch.tensor(log), torch.tensor(0.0))
    gain = clipped_surrogate(clamped, torch.tensor(advantage))
    unclipped = clamped.exp() * torch.tensor(advantage)
    assert bool(gain.isfinite())
    assert float(gain) <= float(unclipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain"),
    [
        (1.0, 2.0, 2.0),
        (math.e, 2.0, 2 * math.e * math.exp(-0.5 / 0.25)),  # one unit of log-ratio, 2 deviations
        (1 / math.e, -3.0, -3 / math.e * math.exp(-2.0)),
        (math.exp(20), 1.0, 0.0),
    ],
)
def test_gaussian_surrogate_by_hand(ratio: float, advantage: float, gain: float):
    log = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    out = gaussian_surrogate(log, torch.tensor(advantage), std=0.5)
    out.backward()
    assert math.isclose(out.item(), gain, rel_tol=1e-9, abs_tol=1e-9)
    # the weight is a constant: d (w r A) / d log r is the gain itself
    assert math.isclose(log.grad.item(), gain, rel_tol=1e-9, abs_tol=1e-9)


def numpy_clipped(log, advantage):
    ratio = np.exp(log)
    gain = np.minimum(ratio * advantage, ratio.clip(0.9, 1.3) * advantage)
    return np.where(advantage < 0, np.maximum(gain, 3.0 * advantage), gain)


def numpy_gaussian(log, advantage, centre=None):
    centre = log if centre is None else centre
    return np.exp(-((centre / 0.7) ** 2) / 2) * np.exp(log) * advantage


def test_surrogates_as_their_formulas_in_numpy_and_their_gradients():
    torch.manual_seed(0)
    log = (1.5 * torch.randn(64, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(64, dtype=torch.float64)
    centre, numbers, step = log.detach().numpy(), advantage.numpy(), 1e-6
    clip = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0}
    for out, formula in (
        (clipped_surrogate(log, advantage, **clip), lambda x: numpy_clipped(x, numbers)),
        # its weight stays where it is while the ratio moves
        (gaussian_surrogate(log, advantage, std=0.7), lambda x: numpy_gaussian(x, numbers, centre)),
    ):
        np.testing.assert_allclose(out.detach().numpy(), formula(centre), rtol=1e-12)
        (grad,) = torch.autograd.grad(out.sum(), log)
        slope = (formula(centre + step) - formula(centre - step)) / (2 * step)
        np.testing.assert_allclose(grad.numpy(), slope, rtol=1e-6, atol=1e-8)


def test_outside_clip_is_blind_to_the_advantage():
    ratio = torch.tensor([0.79, 0.81, 1.27, 1.29], dtype=torch.float64)
    out = outside_clip(ratio.log(), clip_low=0.2, clip_high=0.28)
    assert out.tolist() == [True, False, False, True]


def test_behavior_weight():
    log = torch.tensor([0.25, 1.0, 8.0]).log().requires_grad_()
    weight = behavior_weight(log, cap=2.0)
    assert weight.tolist() == [0.25, 1.0, 2.0]
    assert not weight.requires_grad
    torch.testing.assert_close(behavior_weight(log), torch.tensor([0.25, 1.0, 8.0]))


def test_masked_behavior_weight():
    log = torch.tensor([0.25, 2.0, 2.1, 8.0]).log()
    weight = behavior_weight(log, cap=2.0, mask=True)
    torch.testing.assert_close(weight, torch.tensor([0.25, 2.0, 0.0, 0.0]))
    torch.testing.assert_close(behavior_weight(log, mask=True), log.exp())  # no bound, no mask
    ratio = np.exp(log.double().numpy())
    for mask, expected in ((True, np.where(ratio > 3, 0, ratio)), (False, np.minimum(ratio, 3))):
        weight = behavior_weight(log.double(), cap=3.0, mask=mask)
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-12)


def test_effective_sample_size_by_hand():
    # weights 1, 1, 2: (4^2) / (3 * 6)
    log = torch.tensor([1.0, 1.0, 2.0]).log()
    torch.testing.assert_close(effective_sample_size(log), torch.tensor(16 / 18))
    # one sample carries everything
    log = torch.tensor([20.0, -20.0, -20.0, -20.0])
    torch.testing.assert_close(effective_sample_size(log), torch.tensor(0.25))


def test_effective_sample_size_mask():
    log = torch.tensor([[1.0, 3.0], [7.0, 1.0]]).log()
    mask = torch.tensor([[True, True], [False, False]])
    torch.testing.assert_close(effective_sample_size(log, mask), torch.tensor(0.8))
    assert effective_sample_size(log, torch.zeros_like(mask)).item() == 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(log_ratios, min_size=1, max_size=10), log_ratios)
def test_effective_sample_size_range_and_scale(values: list[float], shift: float):
    log = torch.tensor(values, dtype=torch.float64)
    share = float(effective_sample_size(log))
    assert 1 / len(values) - 1e-9 <= share <= 1 + 1e-9
    assert math.isclose(share, float(effective_sample_size(log + shift)), rel_tol=1e-9)


# -- divergences -----------------------------------------------------------------------------------
def test_kl_by_hand():
    log = torch.tensor(2.0).log()
    assert math.isclose(kl_k1(log).item(), -math.log(2), rel_tol=1e-6)
    assert math.isclose(kl_k2(log).item(), math.log(2) ** 2 / 2, rel_tol=1e-6)
    assert math.isclose(kl_k3(log).item(), 2 - 1 - math.log(2), rel_tol=1e-6)


def test_k1_and_k3_are_unbiased():
    # The expectation over q, taken exactly, is the divergence.
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    p = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = (q * (q / p).log()).sum()
    torch.testing.assert_close((q * kl_k3((p / q).log())).sum(), exact)
    torch.testing.assert_close((q * kl_k1((p / q).log())).sum(), exact)


def test_k2_and_k3_agree_to_second_order_and_are_never_negative():
    log = torch.linspace(-3, 3, 61, dtype=torch.float64)
    assert bool((kl_k2(log) >= 0).all()) and bool((kl_k3(log) >= 0).all())
    small = torch.tensor(1e-3, dtype=torch.float64)
    assert abs(float(kl_k3(small) - kl_k2(small))) < 1e-9


def test_k3_does_not_cancel_near_one():
    # In float32 (exp(x) - 1) - x would be 0 or 1e-7 here, off by a factor of 20 000.
    log = torch.tensor(3e-6)
    assert kl_k3(log).item() >= 0
    assert kl_k3(log).item() < 1e-9


@pytest.mark.parametrize("estimate", [kl_k1, kl_k2])
def test_gradient_of_k1_and_k2_is_that_of_the_divergence(estimate):
    logits = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    log_q = logits.log_softmax(0)
    q = log_q.exp()
    (exact,) = torch.autograd.grad((q * (log_q - p.log())).sum(), logits, retain_graph=True)
    # samples are drawn, not differentiated: weights q without gradient
    (sampled,) = torch.autograd.grad((q.detach() * estimate(p.log() - log_q)).sum(), logits)
    torch.testing.assert_close(sampled, exact)


def test_estimates_as_their_formulas_in_numpy_and_their_gradients():
    log = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    x = log.detach().numpy()
    for estimate, value, slope in (
        (kl_k1, -x, x),  # the gradient of k2, see its docstring
        (kl_k2, x**2 / 2, x),
        (kl_k3, np.exp(x) - 1 - x, np.exp(x) - 1),
    ):
        out = estimate(log)
        (grad,) = torch.autograd.grad(out.sum(), log)
        np.testing.assert_allclose(out.detach().numpy(), value, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(grad.numpy(), slope, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(kl_k2, log) and torch.autograd.gradcheck(kl_k3, log)
