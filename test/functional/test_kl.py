# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import pytest
import torch

from torchrl_dvla.functional import kl_k1, kl_k2, kl_k3


def test_by_hand():
    log = torch.tensor(2.0).log()
    assert math.isclose(kl_k1(log).item(), -math.log(2), rel_tol=1e-6)
    assert math.isclose(kl_k2(log).item(), math.log(2) ** 2 / 2, rel_tol=1e-6)
    assert math.isclose(kl_k3(log).item(), 2 - 1 - math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_unbiased(estimator):
    # The expectation over q, taken exactly, is the divergence.
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    p = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = (q * (q / p).log()).sum()
    torch.testing.assert_close((q * estimator((p / q).log())).sum(), exact)


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


def test_k2_gradient_is_that_of_the_divergence():
    logits = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    log_q = logits.log_softmax(0)
    q = log_q.exp()
    (exact,) = torch.autograd.grad((q * (log_q - p.log())).sum(), logits, retain_graph=True)
    # samples are drawn, not differentiated: weights q without gradient
    (sampled,) = torch.autograd.grad((q.detach() * kl_k2(p.log() - log_q)).sum(), logits)
    torch.testing.assert_close(sampled, exact)
