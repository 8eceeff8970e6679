# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""GRPOLoss: figures worked by hand, and parity with what it generalises."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torchrl.objectives import ClipPPOLoss

from torchrl_dvla.objectives import GRPOLoss

REDUCTIONS = ["token_mean", "sequence_mean", "fixed_length"]
LEVELS = ["token", "sequence", "sequence_mean"]


# -- by hand ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # gains: min(2, 1.28) * 1, min(1/2, 4/5) * 1 and 1 * -2
        ({}, (1.28 + 0.5 - 2) / 3),
        ({"reduction": "sequence_mean"}, ((1.28 + 0.5) / 2 - 2) / 2),
        ({"reduction": "fixed_length"}, (1.28 + 0.5 - 2) / 4),
        ({"reduction": "sum"}, 1.28 + 0.5 - 2),
        # one ratio per decision: 2 * 1/2 = 1 and 1
        ({"ratio_level": "sequence"}, (1 - 2) / 2),
        ({"ratio_level": "sequence_mean"}, (1 - 2) / 2),
    ],
)
def test_objective_by_hand(table, options, expected):
    policy, batch = table
    loss = GRPOLoss(policy, **options)(batch)
    assert loss["loss_objective"].item() == pytest.approx(-expected, rel=1e-5)


def test_metrics_by_hand(table):
    policy, batch = table
    out = GRPOLoss(policy, entropy_coeff=0.1)(batch)
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert out["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert out["loss_entropy"].item() == pytest.approx(-0.1 * entropy, rel=1e-5)
    assert out["clip_fraction"].item() == pytest.approx(2 / 3)  # 2 and 1/2 are out, 1 is not
    assert out["max_ratio"].item() == pytest.approx(2.0)
    assert out["ESS"].item() == pytest.approx(3.5**2 / (3 * (4 + 0.25 + 1)))
    k3 = (2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)) + 0
    assert out["kl_approx"].item() == pytest.approx(k3 / 3, rel=1e-5)
    assert out["advantage_mean"].item() == -0.5
    assert out["advantage_std"].item() == 1.5


def test_one_ratio_per_decision_metrics(table):
    policy, batch = table
    batch["vla_action", "log_probs"][0, 1] = math.log(0.125)  # ratios 2, 2 | 1
    for level, ratio in (("sequence", 4.0), ("sequence_mean", 2.0)):
        out = GRPOLoss(policy, ratio_level=level)(batch)
        assert out["max_ratio"].item() == pytest.approx(ratio)
        assert out["clip_fraction"].item() == 0.5
        assert out["loss_objective"].item() == pytest.approx(-(1.28 - 2) / 2, rel=1e-5)


def test_decoupled_by_hand(table):
    policy, batch = table
    # proximal probabilities 0.4, 0.5, 0.2: trust ratios 5/4, 1/2, 5/4; weights 8/5, 1 and 4/5
    batch["proximal_log_prob"] = torch.tensor([[[0.4], [0.5]], [[0.2], [0.9]]]).log()
    loss = GRPOLoss(policy, importance="decoupled", clip_epsilon=0.2, behavior_weight_cap=1.5)
    out = loss(batch)
    gains = 1.5 * 1.2 + 1.0 * 0.5 + 0.8 * 1.25 * -2
    assert out["loss_objective"].item() == pytest.approx(-gains / 3, rel=1e-5)
    assert out["behavior_weight"].item() == pytest.approx((1.5 + 1 + 0.8) / 3)
    assert out["clip_fraction"].item() == pytest.approx(1.0)
    assert out["max_ratio"].item() == pytest.approx(2.0)  # to the behaviour policy, uncut


def test_dual_clip(table):
    policy, batch = table
    batch["vla_action", "log_probs"][1, 0] = math.log(0.025)  # ratio 10, advantage -2
    free = GRPOLoss(policy)(batch)["loss_objective"].item()
    bounded = GRPOLoss(policy, dual_clip=3.0)(batch)["loss_objective"].item()
    assert free - bounded == pytest.approx((20 - 6) / 3, rel=1e-5)


def test_row_weight(table):
    policy, batch = table
    batch["importance"] = torch.tensor([[0.5], [3.0]])
    loss = GRPOLoss(policy)
    loss.set_keys(weight="importance")
    expected = (0.5 * (1.28 + 0.5) + 3.0 * -2) / (0.5 * 2 + 3.0)
    assert loss(batch)["loss_objective"].item() == pytest.approx(-expected, rel=1e-5)


def test_kl_to_reference_by_hand(table):
    policy, batch = table
    ref = torch.tensor([[[0.25], [0.25]], [[0.5], [0.9]]])
    batch["ref_log_prob"] = ref.log()  # log ref / pi: -log 2, 0, log 2
    k3 = (0.5 - 1 + math.log(2)) + 0 + (2 - 1 - math.log(2))
    for estimator, expected in (("k3", k3 / 3), ("k2", math.log(2) ** 2 / 3)):
        out = GRPOLoss(policy, kl_to_ref_coeff=0.5, kl_estimator=estimator)(batch)
        assert out["kl_to_ref"].item() == pytest.approx(expected, rel=1e-5)
        assert out["loss_kl"].item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_exact_kl_by_hand(table):
    policy, batch = table
    reference = type(policy)([0.25, 0.5, 0.25])
    loss = GRPOLoss(policy, kl_to_ref_coeff=1.0, kl_estimator="exact", reference_network=reference)
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert loss(batch)["loss_kl"].item() == pytest.approx(expected, rel=1e-5)


# -- parity ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [0.2, (0.1, 0.3)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_same_loss_and_gradient_as_clip_ppo(cases, clip, level):
    policy = cases.make_policy(log_probs_mode=level)
    batch = cases.make_batch(policy)
    ours, theirs = batch, batch.clone()
    if level == "sequence":  # same distribution; ours wants its tokens one by one
        token_policy = policy.get_new_version(log_probs_mode="token")
        ours = token_policy.log_prob(batch.clone())
    cases.drift(policy)
    reference = ClipPPOLoss(
        policy, critic_network=None, clip_epsilon=clip, entropy_coeff=0.0, entropy_bonus=False
    )
    reference.set_keys(action=("vla_action", "tokens"), sample_log_prob=("vla_action", "log_probs"))
    expected = reference(theirs)
    expected["loss_objective"].backward()
    expected_grads = cases.gradients(policy)
    out = GRPOLoss(policy, clip_epsilon=clip, ratio_level=level)(ours)
    out["loss_objective"].backward()
    assert 0 < expected["clip_fraction"].item() < 1  # the clip is at work
    torch.testing.assert_close(out["loss_objective"], expected["loss_objective"])
    torch.testing.assert_close(out["clip_fraction"], expected["clip_fraction"])
    torch.testing.assert_close(out["max_ratio"], expected["max_ratio"])
    torch.testing.assert_close(cases.gradients(policy), expected_grads, rtol=1e-4, atol=1e-6)


def test_same_entropy_bonus_as_clip_ppo(cases):
    policy = cases.make_policy()
    batch = cases.make_batch(policy)
    reference = ClipPPOLoss(policy, critic_network=None, entropy_coeff=0.3)
    reference.set_keys(action=("vla_action", "tokens"), sample_log_prob=("vla_action", "log_probs"))
    reference(batch.clone())["loss_entropy"].backward()
    expected = cases.gradients(policy)
    GRPOLoss(policy, entropy_coeff=0.3)(batch)["loss_entropy"].backward()
    torch.testing.assert_close(cases.gradients(policy), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("importance", ["behavior", "decoupled"])
def test_fresh_data_gives_the_reinforce_gradient(cases, level, importance):
    policy = cases.make_policy()
    batch = cases.make_batch(policy)
    loss = GRPOLoss(policy, ratio_level=level, importance=importance, reduction="sum")
    loss.write_proximal_log_prob(batch)
    out = loss(batch)
    out["loss_objective"].backward()
    ours = cases.gradients(policy)
    log_prob = policy.get_dist(batch).log_prob(batch["vla_action", "tokens"])
    weighted = batch["advantage"].squeeze(-1) * log_prob.sum((-2, -1))
    if level == "sequence_mean":
        weighted = weighted / log_prob[0].numel()
    (-weighted.sum()).backward()
    torch.testing.assert_close(ours, cases.gradients(policy), rtol=1e-4, atol=1e-5)
    assert out["ESS"].item() == pytest.approx(1.0)
    assert out["clip_fraction"].item() == 0.0
    assert out["kl_approx"].item() == pytest.approx(0.0, abs=1e-6)


# -- invariances -----------------------------------------------------------------------------------
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_sum_to_the_whole_batch(cases, level, reduction):
    policy = cases.make_policy()
    batch = cases.make_batch(policy, pads=True)
    cases.drift(policy)
    reference = copy.deepcopy(policy)
    cases.drift(reference)
    loss = GRPOLoss(
        policy,
        ratio_level=level,
        reduction=reduction,
        entropy_coeff=0.1,
        kl_to_ref_coeff=0.1,
        reference_network=reference,
    )
    names = ("loss_objective", "loss_entropy", "loss_kl")
    whole = loss(batch)
    sum(whole[name] for name in names).backward()
    expected = cases.gradients(policy)
    total = loss.normaliser(batch)
    parts = []
    for part in batch.split([1, 3, 2]):
        out = loss(part, normaliser=total)
        sum(out[name] for name in names).backward()
        parts.append(out.detach())
    for name in names:
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name].detach())
    torch.testing.assert_close(cases.gradients(policy), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("garbage", [0.0, torch.nan, torch.inf])
def test_what_was_never_executed_does_not_count(cases, level, garbage):
    policy = cases.make_policy()
    batch = cases.make_batch(policy, pads=True)
    cases.drift(policy)
    loss = GRPOLoss(policy, ratio_level=level)
    expected = loss(batch)
    expected["loss_objective"].backward()
    grads = cases.gradients(policy)
    pad = batch["action_is_pad"]
    batch["vla_action", "log_probs"][pad] = garbage
    batch["vla_action", "tokens"][pad] = 0
    out = loss(batch)
    out["loss_objective"].backward()
    torch.testing.assert_close(out.detach(), expected.detach())
    torch.testing.assert_close(cases.gradients(policy), grads)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_executed_and_zero_advantage(cases, level, reduction):
    policy = cases.make_policy()
    loss = GRPOLoss(policy, ratio_level=level, reduction=reduction)
    batch = cases.make_batch(policy, 2)
    batch["advantage"].zero_()
    padded = batch.clone()
    padded["advantage"].fill_(1.0)
    padded["action_is_pad"].fill_(True)
    cases.drift(policy)
    for case in (batch, padded, padded[:1]):
        out = loss(case)
        out["loss_objective"].backward()
        assert out["loss_objective"].item() == 0.0
        assert all(bool(value.isfinite()) for value in out.values())
        assert all(not grad.any() for grad in cases.gradients(policy))


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_any_batch_size(cases, num_rows):
    policy = cases.make_policy()
    batch = cases.make_batch(policy, num_rows)
    out = GRPOLoss(policy, entropy_coeff=0.1)(batch)
    assert all(value.shape == () and bool(value.isfinite()) for value in out.values())


@pytest.mark.parametrize("log_prob", [-1e6, -torch.inf])
def test_impossible_behaviour_stays_finite(cases, log_prob):
    policy = cases.make_policy()
    batch = cases.make_batch(policy, 3)
    batch["vla_action", "log_probs"][0] = log_prob
    for level in LEVELS:
        out = GRPOLoss(policy, ratio_level=level, dual_clip=3.0)(batch)
        out["loss_objective"].backward()
        assert all(bool(value.isfinite()) for value in out.values())
        assert all(bool(grad.isfinite().all()) for grad in cases.gradients(policy))


def test_reduction_none_keeps_the_elements(table):
    policy, batch = table
    out = GRPOLoss(policy, reduction="none")(batch)
    expected = torch.tensor([[[-1.28], [-0.5]], [[2.0], [0.0]]])
    torch.testing.assert_close(out["loss_objective"].detach(), expected)
