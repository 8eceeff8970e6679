# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import numpy as np
import pytest
import torch

from torchrl_dvla.functional import (
    executed_mask,
    masked_mean,
    masked_quantile,
    reduction_normaliser,
    reduction_weights,
)

# Three decisions of two env steps and two action dimensions: whole, half executed, never executed.
PAD = torch.tensor([[False, False], [False, True], [True, True]])
VALUES = torch.arange(1.0, 13.0).view(3, 2, 2)


def test_executed_mask():
    mask = executed_mask(PAD, 2)
    assert mask.shape == (3, 2, 2)
    assert mask.flatten(1).tolist() == [[True] * 4, [True, True, False, False], [False] * 4]


def test_executed_mask_refuses_integers():
    with pytest.raises(ValueError, match=r"must be boolean, got torch.int64"):
        executed_mask(torch.zeros(2, 2, dtype=torch.int64), 2)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", (1 + 2 + 3 + 4 + 5 + 6) / 6),
        ("sequence_mean", ((1 + 2 + 3 + 4) / 4 + (5 + 6) / 2) / 2),
        ("fixed_length", (1 + 2 + 3 + 4 + 5 + 6) / 12),
        ("sum", 21.0),
    ],
)
def test_reductions_by_hand(reduction: str, expected: float):
    mask = executed_mask(PAD, 2)
    total = (VALUES * reduction_weights(mask, reduction)).sum()
    assert float(total / reduction_normaliser(mask, reduction)) == pytest.approx(expected)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "fixed_length"])
def test_normaliser_is_additive(reduction: str):
    mask = executed_mask(PAD, 2)
    parts = sum(reduction_normaliser(part, reduction) for part in mask.split(1))
    assert float(parts) == float(reduction_normaliser(mask, reduction))


def test_normaliser_counts_row_weights():
    mask = executed_mask(PAD, 2)
    weight = torch.tensor([0.5, 2.0, 9.0]).view(3, 1, 1)
    assert float(reduction_normaliser(mask, "token_mean", weight)) == 0.5 * 4 + 2 * 2
    assert float(reduction_normaliser(mask, "sequence_mean", weight)) == 0.5 + 2
    assert float(reduction_normaliser(mask, "fixed_length", weight)) == 4 * (0.5 + 2 + 9)


def test_every_rollout_weighs_the_same_with_a_row_weight():
    # a rollout of one decision and one of two, of which the last was cut after one env step
    pad = torch.tensor([[False, False], [False, False], [False, True]])
    values = torch.tensor([[1.0, 3.0], [4.0, 6.0], [8.0, 99.0]]).unsqueeze(-1)
    mask, row_weight = executed_mask(pad, 1), torch.tensor([1.0, 0.5, 0.5]).view(3, 1, 1)
    weights = reduction_weights(mask, "trajectory_mean") * row_weight
    total = reduction_normaliser(mask, "trajectory_mean", row_weight)
    assert total.item() == 2.0  # rollouts
    assert ((values * weights).sum() / total).item() == (2 + (5 + 8) / 2) / 2
    parts = [reduction_normaliser(mask[k], "trajectory_mean", row_weight[k]) for k in range(3)]
    assert sum(parts).item() == 2.0  # a rollout may be split


def test_masked_quantiles_by_hand_and_as_numpy():
    mask = torch.tensor([[True, False], [True, True]])
    values = torch.tensor([[10.0, torch.nan], [0.0, 4.0]])
    shares = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert masked_quantile(values, mask, shares).tolist() == [0.0, 2.0, 4.0, 10.0]
    assert masked_quantile(values, mask & False, shares).tolist() == [0.0] * 4
    assert masked_quantile(values[:1], mask[:1], shares).tolist() == [10.0] * 4
    values = torch.randn(501, dtype=torch.float64)
    shares, mask = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), values > -1
    expected = np.quantile(values[mask].numpy(), shares.numpy())
    np.testing.assert_allclose(masked_quantile(values, mask, shares).numpy(), expected, rtol=1e-12)


def test_masked_values_never_count():
    values = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    mask = torch.tensor([True, False, False])
    out = masked_mean(values, mask)
    out.backward()
    assert out.item() == 1.0
    assert values.grad.tolist() == [1.0, 0.0, 0.0]


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(3), torch.zeros(3, dtype=torch.bool)).item() == 0.0
    out = masked_mean(VALUES, executed_mask(PAD, 2), dim=(-2, -1))
    assert out.tolist() == [2.5, 5.5, 0.0]


def test_unknown_reduction():
    for function in (reduction_weights, reduction_normaliser):
        with pytest.raises(ValueError, match=r"reduction must be one of .*got 'average'"):
            function(executed_mask(PAD, 2), "average")
