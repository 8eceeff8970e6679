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
from tensordict import TensorDict
from torchrl.objectives.llm import MCAdvantage

from torchrl_dvla.functional import (
    ADVANTAGES,
    group_advantage,
    has_contrast,
    leave_one_out_advantage,
)

groups = st.lists(st.integers(-50, 50), min_size=2, max_size=8)


def test_group_advantage_by_hand():
    # mean 2, unbiased variance (4 + 0 + 4) / 2 = 4
    advantage = group_advantage(torch.tensor([0.0, 2.0, 4.0]))
    torch.testing.assert_close(advantage, torch.tensor([-1.0, 0.0, 1.0]))
    # one success of four: mean 1/4, deviation sqrt((9/16 + 3/16) / 3) = 1/2
    advantage = group_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(advantage, torch.tensor([1.5, -0.5, -0.5, -0.5]))


def test_biased_deviation_by_hand():
    # mean 1/4, variance (9/16 + 3/16) / 4 = 3/16
    advantage = group_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]), correction=0)
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / math.sqrt(3 / 16)
    torch.testing.assert_close(advantage, expected)


def test_leave_one_out_by_hand():
    # means of the others: 3, 2, 1; those of a group of two are each other
    advantage = leave_one_out_advantage(torch.tensor([0.0, 2.0, 4.0]))
    torch.testing.assert_close(advantage, torch.tensor([-3.0, 0.0, 3.0]))
    assert leave_one_out_advantage(torch.tensor([[1, 0], [5, 5]])).tolist() == [[1, -1], [0, 0]]


def numpy_advantage(name: str, returns: np.ndarray) -> np.ndarray:
    if name == "leave_one_out":
        return np.array([r - np.delete(returns, k).mean() for k, r in enumerate(returns)])
    centred = returns - returns.mean()
    return centred / returns.std(ddof=1) if name == "mean_std" else centred


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_as_the_formulas_in_numpy_and_their_gradients(name: str):
    returns = torch.tensor([0.3, -1.2, 2.0, 0.7, 0.7], dtype=torch.float64, requires_grad=True)
    advantage = ADVANTAGES[name](returns)
    expected = torch.from_numpy(numpy_advantage(name, returns.detach().numpy()))
    torch.testing.assert_close(advantage.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ADVANTAGES[name], returns)


def test_groups_do_not_mix():
    returns = torch.tensor([[[0.0, 1.0], [5.0, 7.0]], [[3.0, 3.0], [9.0, 1.0]]])
    advantage = group_advantage(returns)
    for row in range(2):
        for column in range(2):
            alone = group_advantage(returns[row, column])
            torch.testing.assert_close(advantage[row, column], alone)


def test_same_figures_as_torchrl_mc_advantage():
    returns = torch.tensor([1.0, 0.0, 0.25, 0.0])
    transform = MCAdvantage(4, prompt_key="group_id", trajectory_return="sum")
    out = None
    for value in returns:
        ended = {"reward": value.view(1, 1), "done": torch.ones(1, 1, dtype=torch.bool)}
        group_id = torch.zeros(1, dtype=torch.int64)
        out = transform.inv(TensorDict({"group_id": group_id, "next": TensorDict(ended, [1])}, [1]))
    torch.testing.assert_close(out["advantage"].squeeze(-1), group_advantage(returns))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, -7.7])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_returns_give_exactly_zero(value: float, size: int):
    # 0.1 is not representable: its float32 mean over 3 differs from it in the last bit, and a
    # deviation of rounding noise would make that an advantage of order one.
    returns = torch.full((size,), value)
    for estimator in ADVANTAGES.values():
        assert torch.equal(estimator(returns), torch.zeros(size))


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(-1000, 1000))
def test_shift_invariance(values: list[int], shift: int):
    returns = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(group_advantage(returns + shift), group_advantage(returns))


@settings(max_examples=60, deadline=None)
@given(groups, st.sampled_from([0.5, 2.0, 64.0]))
def test_scale(values: list[int], scale: float):
    returns = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(group_advantage(scale * returns), group_advantage(returns))
    plain = group_advantage(returns, normalise_std=False)
    scaled = group_advantage(scale * returns, normalise_std=False)
    torch.testing.assert_close(scaled, scale * plain)


@settings(max_examples=60, deadline=None)
@given(groups)
def test_sums_to_zero_with_unit_deviation(values: list[int]):
    returns = torch.tensor(values, dtype=torch.float64)
    advantage = group_advantage(returns)
    assert abs(float(advantage.sum())) < 1e-9
    if has_contrast(returns):
        assert math.isclose(float(advantage.std()), 1.0)


def test_integer_and_boolean_returns():
    expected = torch.tensor([0.5, -0.5])
    for returns in (torch.tensor([1, 0]), torch.tensor([True, False])):
        torch.testing.assert_close(group_advantage(returns, normalise_std=False), expected)


def test_has_contrast():
    returns = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    assert has_contrast(returns).tolist() == [True, False, True]
    # noise in the seventh digit, relative to the largest return
    noisy = torch.tensor([[1e3, 1e3 + 1e-3], [0.0, 1e-7], [0.0, 1e-3], [0.0, torch.nan]])
    assert has_contrast(noisy, tolerance=1e-6).tolist() == [False, False, True, True]


@pytest.mark.parametrize("returns", [torch.tensor(1.0), torch.ones(3, 1)])
def test_group_of_one_is_refused(returns: torch.Tensor):
    for function in (group_advantage, leave_one_out_advantage, has_contrast):
        with pytest.raises(ValueError, match=r"at least two rollouts.*raise group_size"):
            function(returns)


def test_eps_of_zero_is_refused():
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        group_advantage(torch.ones(2), eps=0.0)
