# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""GRPOLoss: figures worked by hand, parity with what it generalises, the LossModule contract."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import distributions as d
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.vla import TinyVLA
from torchrl.objectives import ClipPPOLoss

from torchrl_dvla.modules import TransformersVLA
from torchrl_dvla.objectives import GRPOLoss

CHUNK = 4
REDUCTIONS = ["token_mean", "sequence_mean", "fixed_length"]
LEVELS = ["token", "sequence", "sequence_mean"]


class TablePolicy(TensorDictModuleBase):
    """A policy whose probabilities are read off a table: one row of logits for all tokens."""

    def __init__(self, probs: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probs).log())
        self.in_keys = ["observation"]
        self.out_keys = [("vla_action", "tokens")]
        self.num_forwards = 0

    def get_dist(self, tensordict):
        self.num_forwards += 1
        batch = tensordict["observation"].shape[:-1]
        return d.Categorical(logits=self.logits.expand(*batch, 2, 1, -1))


@pytest.fixture
def table():
    return TablePolicy([0.5, 0.25, 0.25])


@pytest.fixture
def decisions():
    """Two decisions of two tokens under pi = (1/2, 1/4, 1/4); the last token never executed."""
    return TensorDict(
        {
            "observation": torch.zeros(2, 1),
            "vla_action": {
                "tokens": torch.tensor([[[0], [1]], [[1], [2]]]),
                # behaviour: ratios 2, 1/2 | 1, (1/100, masked)
                "log_probs": torch.tensor([[[0.25], [0.5]], [[0.25], [25.0]]]).log(),
            },
            "action_is_pad": torch.tensor([[False, False], [False, True]]),
            "advantage": torch.tensor([[1.0], [-2.0]]),
        },
        batch_size=[2],
    )


def make_policy(**kwargs) -> TinyVLA:
    options = {"log_probs_mode": "token", "return_vla_action_container": False, **kwargs}
    options |= {"action_head": "tokens", "vocab_size": 8, "hidden_dim": 16, "mode": "sample"}
    policy = TinyVLA(action_dim=2, chunk_size=CHUNK, **options)
    with torch.no_grad():
        policy(make_observation(1))  # materialises the lazy layers
    return policy


def make_observation(num_rows: int, *, image_size: int = 8, state_dim: int = 3) -> TensorDict:
    image = torch.randint(0, 256, (num_rows, 3, image_size, image_size), dtype=torch.uint8)
    instructions = NonTensorStack(*["push", "pull"] * num_rows)[:num_rows]
    observation = {"image": image, "state": torch.randn(num_rows, state_dim)}
    data = {"observation": observation, "language_instruction": instructions}
    return TensorDict(data, [num_rows])


def make_batch(policy: TinyVLA, num_rows: int = 6, *, pads: bool = False) -> TensorDict:
    """Decisions of *policy*, as the replay buffer hands them out."""
    with torch.no_grad():
        batch = policy(make_observation(num_rows))
    batch["advantage"] = torch.randn(num_rows, 1)
    pad = torch.zeros(num_rows, CHUNK, dtype=torch.bool)
    if pads:
        executed = torch.tensor([4, 1, 0, 3, 4, 2])[:num_rows]
        pad = torch.arange(CHUNK) >= executed[:, None]
    batch["action_is_pad"] = pad
    return batch


@pytest.fixture
def policy():
    return make_policy()


@pytest.fixture
def batch(policy):
    return make_batch(policy)


@torch.no_grad()
def drift(policy, scale=0.1):
    """Move the policy away from the one that took the data."""
    for param in policy.parameters():
        param.add_(scale * torch.randn_like(param))


def gradients(policy, loss):
    """Gradients of the policy, which are cleared."""
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    return grads


# -- by hand ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # gains: min(2, 1.28) * 1, min(1/2, 4/5) * 1 and 1 * -2
        ({}, (1.28 + 0.5 - 2) / 3),
        ({"reduction": "sequence_mean"}, ((1.28 + 0.5) / 2 - 2) / 2),
        ({"reduction": "fixed_length"}, (1.28 + 0.5 - 2) / 4),
        ({"reduction": "sum"}, 1.28 + 0.5 - 2),
        ({"reduction": "none"}, [[[1.28], [0.5]], [[-2.0], [0.0]]]),
        # one ratio per decision: 2 * 1/2 = 1 and 1
        ({"ratio_level": "sequence"}, (1 - 2) / 2),
        ({"ratio_level": "sequence_mean"}, (1 - 2) / 2),
    ],
)
def test_objective_by_hand(table, decisions, options, expected):
    loss = GRPOLoss(table, **options)(decisions)["loss_objective"].detach()
    torch.testing.assert_close(loss, -torch.as_tensor(expected))


def test_metrics_by_hand(table, decisions):
    out = GRPOLoss(table, entropy_coeff=0.1)(decisions)
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert out["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert out["loss_entropy"].item() == pytest.approx(-0.1 * entropy, rel=1e-5)
    assert out["clip_fraction"].item() == pytest.approx(2 / 3)  # 2 and 1/2 are out, 1 is not
    assert out["max_ratio"].item() == pytest.approx(2.0)
    assert out["ESS"].item() == pytest.approx(3.5**2 / (3 * (4 + 0.25 + 1)))
    k3 = (2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)) + 0
    assert out["kl_approx"].item() == pytest.approx(k3 / 3, rel=1e-5)
    assert out["log_prob_difference"].item() == pytest.approx(2 * math.log(2) / 3, rel=1e-5)
    assert out["advantage_mean"].item() == -0.5
    assert out["advantage_std"].item() == 1.5


def test_one_ratio_per_decision_metrics(table, decisions):
    decisions["vla_action", "log_probs"][0, 1] = math.log(0.125)  # ratios 2, 2 | 1
    for level, ratio in (("sequence", 4.0), ("sequence_mean", 2.0)):
        out = GRPOLoss(table, ratio_level=level)(decisions)
        assert out["max_ratio"].item() == pytest.approx(ratio)
        assert out["clip_fraction"].item() == 0.5
        assert out["loss_objective"].item() == pytest.approx(-(1.28 - 2) / 2, rel=1e-5)


def test_decoupled_by_hand(table, decisions):
    # proximal probabilities 0.4, 0.5, 0.2: trust ratios 5/4, 1/2, 5/4; weights 8/5, 1 and 4/5
    decisions["proximal_log_prob"] = torch.tensor([[[0.4], [0.5]], [[0.2], [0.9]]]).log()
    loss = GRPOLoss(table, importance="decoupled", clip_epsilon=0.2, behavior_weight_cap=1.5)
    out = loss(decisions)
    gains = 1.5 * 1.2 + 1.0 * 0.5 + 0.8 * 1.25 * -2
    assert out["loss_objective"].item() == pytest.approx(-gains / 3, rel=1e-5)
    assert out["behavior_weight"].item() == pytest.approx((1.5 + 1 + 0.8) / 3)
    assert out["clip_fraction"].item() == pytest.approx(1.0)
    assert out["max_ratio"].item() == pytest.approx(2.0)  # to the behaviour policy, uncut


def test_row_weight_and_dual_clip(table, decisions):
    decisions["importance"] = torch.tensor([[0.5], [3.0]])
    loss = GRPOLoss(table)
    loss.set_keys(weight="importance")
    expected = (0.5 * (1.28 + 0.5) + 3.0 * -2) / (0.5 * 2 + 3.0)
    assert loss(decisions)["loss_objective"].item() == pytest.approx(-expected, rel=1e-5)
    decisions["vla_action", "log_probs"][1, 0] = math.log(0.025)  # ratio 10, advantage -2
    free = GRPOLoss(table)(decisions)["loss_objective"].item()
    bounded = GRPOLoss(table, dual_clip=3.0)(decisions)["loss_objective"].item()
    assert free - bounded == pytest.approx((20 - 6) / 3, rel=1e-5)


def test_kl_to_reference_by_hand(table, decisions):
    ref = torch.tensor([[[0.25], [0.25]], [[0.5], [0.9]]])
    decisions["ref_log_prob"] = ref.log()  # log ref / pi: -log 2, 0, log 2
    k3 = (0.5 - 1 + math.log(2)) + 0 + (2 - 1 - math.log(2))
    for estimator, expected in (("k3", k3 / 3), ("k2", math.log(2) ** 2 / 3)):
        out = GRPOLoss(table, kl_to_ref_coeff=0.5, kl_estimator=estimator)(decisions)
        assert out["kl_to_ref"].item() == pytest.approx(expected, rel=1e-5)
        assert out["loss_kl"].item() == pytest.approx(0.5 * expected, rel=1e-5)
    reference = type(table)([0.25, 0.5, 0.25])
    loss = GRPOLoss(table, kl_to_ref_coeff=1.0, kl_estimator="exact", reference_network=reference)
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert loss(decisions)["loss_kl"].item() == pytest.approx(expected, rel=1e-5)


# -- parity ----------------------------------------------------------------------------------------
def make_clip_ppo(policy: TinyVLA, **options) -> ClipPPOLoss:
    loss = ClipPPOLoss(policy, critic_network=None, **options)
    loss.set_keys(action=("vla_action", "tokens"), sample_log_prob=("vla_action", "log_probs"))
    return loss


@pytest.mark.parametrize("clip", [0.2, (0.1, 0.3)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_same_loss_and_gradient_as_clip_ppo(clip, level):
    policy = make_policy(log_probs_mode=level)
    batch = make_batch(policy)
    ours, theirs = batch, batch.clone()
    if level == "sequence":  # same distribution; ours wants its tokens one by one
        token_policy = policy.get_new_version(log_probs_mode="token")
        ours = token_policy.log_prob(batch.clone())
    drift(policy)
    reference = make_clip_ppo(policy, clip_epsilon=clip, entropy_coeff=0.0, entropy_bonus=False)
    expected = reference(theirs)
    expected_grads = gradients(policy, expected["loss_objective"])
    out = GRPOLoss(policy, clip_epsilon=clip, ratio_level=level)(ours)
    assert 0 < expected["clip_fraction"].item() < 1  # the clip is at work
    torch.testing.assert_close(out["loss_objective"], expected["loss_objective"])
    torch.testing.assert_close(out["clip_fraction"], expected["clip_fraction"])
    torch.testing.assert_close(out["max_ratio"], expected["max_ratio"])
    grads = gradients(policy, out["loss_objective"])
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


def test_same_entropy_bonus_as_clip_ppo(policy, batch):
    theirs, ours = make_clip_ppo(policy, entropy_coeff=0.3), GRPOLoss(policy, entropy_coeff=0.3)
    expected = gradients(policy, theirs(batch.clone())["loss_entropy"])
    torch.testing.assert_close(gradients(policy, ours(batch)["loss_entropy"]), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("importance", ["behavior", "decoupled"])
def test_fresh_data_gives_the_reinforce_gradient(policy, batch, level, importance):
    loss = GRPOLoss(policy, ratio_level=level, importance=importance, reduction="sum")
    loss.write_proximal_log_prob(batch)
    out = loss(batch)
    ours = gradients(policy, out["loss_objective"])
    log_prob = policy.get_dist(batch).log_prob(batch["vla_action", "tokens"])
    weighted = batch["advantage"].squeeze(-1) * log_prob.sum((-2, -1))
    if level == "sequence_mean":
        weighted = weighted / log_prob[0].numel()
    torch.testing.assert_close(ours, gradients(policy, -weighted.sum()), rtol=1e-4, atol=1e-5)
    assert out["ESS"].item() == pytest.approx(1.0)
    assert out["clip_fraction"].item() == 0.0
    assert out["kl_approx"].item() == pytest.approx(0.0, abs=1e-6)


# -- invariances -----------------------------------------------------------------------------------
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_sum_to_the_whole_batch(policy, level, reduction):
    batch = make_batch(policy, pads=True)
    drift(policy)
    reference = copy.deepcopy(policy)
    drift(reference)
    options = {"entropy_coeff": 0.1, "kl_to_ref_coeff": 0.1, "reference_network": reference}
    loss = GRPOLoss(policy, ratio_level=level, reduction=reduction, **options)
    names = ("loss_objective", "loss_entropy", "loss_kl")
    whole = loss(batch)
    expected = gradients(policy, sum(whole[name] for name in names))
    total = loss.normaliser(batch)
    parts = [loss(part, normaliser=total) for part in batch.split([1, 3, 2])]
    for name in names:
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])
    grads = gradients(policy, sum(part[name] for part in parts for name in names))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("garbage", [0.0, torch.nan, torch.inf])
def test_what_was_never_executed_does_not_count(policy, level, garbage):
    batch = make_batch(policy, pads=True)
    drift(policy)
    loss = GRPOLoss(policy, ratio_level=level)
    expected = loss(batch)
    grads = gradients(policy, expected["loss_objective"])
    pad = batch["action_is_pad"]
    batch["vla_action", "log_probs"][pad] = garbage
    batch["vla_action", "tokens"][pad] = -100
    out = loss(batch)
    torch.testing.assert_close(out.detach(), expected.detach())
    torch.testing.assert_close(gradients(policy, out["loss_objective"]), grads)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_executed_and_zero_advantage(policy, level, reduction):
    loss = GRPOLoss(policy, ratio_level=level, reduction=reduction)
    batch = make_batch(policy, 2)
    batch["advantage"].zero_()
    padded = batch.clone()
    padded["advantage"].fill_(1.0)
    padded["action_is_pad"].fill_(True)
    drift(policy)
    for case in (batch, padded, padded[:1]):
        out = loss(case)
        assert out["loss_objective"].item() == 0.0
        assert all(bool(value.isfinite()) for value in out.values())
        assert all(not grad.any() for grad in gradients(policy, out["loss_objective"]))


@pytest.mark.parametrize(("num_rows", "log_prob"), [(1, -1e6), (2, -torch.inf), (5, -1.0)])
def test_any_batch_size_and_impossible_behaviour_stay_finite(policy, num_rows, log_prob):
    batch = make_batch(policy, num_rows)
    batch["vla_action", "log_probs"][0] = log_prob
    for level in LEVELS:
        options = {"dual_clip": 3.0, "entropy_coeff": 0.1, "check_finite": False}
        out = GRPOLoss(policy, ratio_level=level, **options)(batch)
        grads = gradients(policy, out["loss_objective"] + out["loss_entropy"])
        assert all(value.shape == () and bool(value.isfinite()) for value in out.values())
        assert all(bool(grad.isfinite().all()) for grad in grads)


# -- the finite check ------------------------------------------------------------------------------
TOKENS, LOG_PROBS = ("vla_action", "tokens"), ("vla_action", "log_probs")
STATE = ("observation", "state")


def make_full_batch(policy):
    """Six decisions of groups 40 to 45 with every entry that the loss can read, and the loss."""
    loss = GRPOLoss(policy, importance="decoupled", kl_to_ref_coeff=0.1)
    loss.set_keys(weight="weight")
    batch = loss.write_proximal_log_prob(make_batch(policy))
    batch["ref_log_prob"] = batch["proximal_log_prob"].clone()
    batch["weight"] = torch.ones(6, 1)
    batch["group_id"] = torch.arange(40, 46).unsqueeze(-1)
    batch["policy_version"] = torch.zeros(6, 1, dtype=torch.int64)
    batch["collector", "mask"] = torch.ones(6, 1, dtype=torch.bool)
    return loss, batch


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (TOKENS, 8, "action tokens must be finite, at least 0, at most 7, got 8"),
        (LOG_PROBS, torch.nan, "sample_log_prob must be finite, at most 0.001, got nan"),
        (LOG_PROBS, -torch.inf, "sample_log_prob must be .* got -inf"),
        ("proximal_log_prob", torch.nan, "proximal_log_prob must be .* got nan"),
        ("ref_log_prob", 1.0, "ref_log_prob must be .* got 1"),
        ("advantage", torch.inf, "advantage must be .* at most 1e\\+06, got inf"),
        ("advantage", 1e30, "advantage must be .* got 1e\\+30"),
        ("weight", -1.0, "weight must be finite, at least 0, .* got -1"),
    ],
)
def test_values_out_of_range_are_refused_by_name_and_row(key, value, message):
    loss, batch = make_full_batch(make_policy())
    batch.get(key)[[2, 4]] = value
    with pytest.raises(ValueError, match=f"{message} in 2 of 6 rows, first in row 2, group_id 42"):
        loss(batch)


def test_a_token_that_the_policy_forbids_and_what_has_no_rows(policy):
    loss, batch = make_full_batch(policy)
    for normaliser in (math.nan, -1.0):
        with pytest.raises(ValueError, match="normaliser must be finite, at least 0, got .*loss.n"):
            loss(batch, normaliser=normaliser)
    loss.entropy_coeff = math.nan
    with pytest.raises(ValueError, match="loss_entropy must be finite, got nan. Are coefficients"):
        loss(batch)
    loss.check_finite = False
    assert loss(batch)["loss_entropy"].isnan()
    mask = torch.ones(6, CHUNK, 2, 8, dtype=torch.bool)
    batch["vla_action", "mask"] = mask.scatter_(-1, batch[TOKENS].unsqueeze(-1), False)
    with pytest.raises(ValueError, match="of the policy must be .* -inf in 6 of 6 .*forbid"):
        GRPOLoss(policy)(batch)


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("advantage", torch.zeros(6), r"advantage must have shape \[6, 1\].*unsqueeze"),
        ("action_is_pad", torch.zeros(6, 3).bool(), "'action_is_pad' must have shape.*chunk size"),
        (LOG_PROBS, torch.zeros(6), "sample_log_prob must have the shape of the tokens"),
        ("advantage", torch.complex64, "advantage must hold real .* got torch.complex64"),
        ("advantage", torch.int64, "advantage must hold real .* got torch.int64"),
        (LOG_PROBS, torch.complex64, "sample_log_prob must hold real"),
        ("weight", torch.int64, "weight must hold real"),
        (TOKENS, torch.float32, "action must hold integers for a Categorical .* torch.float32"),
        (TOKENS, torch.bool, "action must hold integers"),
        ("policy_version", torch.float32, "policy_version must hold integers"),
        ("action_is_pad", torch.uint8, "action_is_pad must be boolean"),
        (("collector", "mask"), torch.float32, "must hold one boolean for each decision"),
        (STATE, torch.zeros(6, 9), r"hold inputs that the policy takes, .*state'\): \(\[6, 9\]"),
        (STATE, torch.full((6, 3), 1j), "the policy's inputs must be real, got complex .*state"),
    ],
)
def test_wrong_shapes_and_dtypes(key, wrong, message):
    loss, batch = make_full_batch(make_policy())
    batch[key] = wrong if isinstance(wrong, torch.Tensor) else batch[key].to(wrong)
    with pytest.raises(ValueError, match=message):
        loss(batch)


def test_empty_batches_and_distributions_that_would_broadcast(table, decisions):
    with pytest.raises(ValueError, match=r"at least one token, got tokens \[0, 2, 1\]"):
        GRPOLoss(table)(decisions[:0])
    for key in (TOKENS, LOG_PROBS):
        decisions[key] = decisions[key].expand(2, 2, 3)
    with pytest.raises(ValueError, match=r"for each token, of shape \[2, 2, 3\], got \[2, 2, 1\]"):
        GRPOLoss(table)(decisions)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_in_range_gives_finite_losses_and_gradients(data):
    extreme = st.floats(-1e4, 1e4, width=32)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    policy, reference = TablePolicy([0.5, 0.25, 0.25]).to(dtype), TablePolicy([0.2, 0.2, 0.6])
    policy.logits.data[:2] = torch.tensor(data.draw(st.tuples(extreme, extreme)))
    policy.logits.data[2] = data.draw(extreme | st.just(-torch.inf))
    reference.logits.data[:] = torch.tensor(data.draw(st.tuples(extreme, extreme, extreme)))
    log_probs = data.draw(st.lists(st.floats(-(2.0**126), 0, width=32), min_size=4, max_size=4))
    vla_action = {"tokens": torch.tensor(data.draw(st.tuples(*[st.integers(0, 1)] * 4)))}
    vla_action |= {"log_probs": torch.tensor(log_probs).to(dtype)}
    batch = TensorDict(
        {
            "observation": torch.zeros(2, 1),
            "vla_action": {key: value.reshape(2, 2, 1) for key, value in vla_action.items()},
            "advantage": torch.tensor(data.draw(st.tuples(*[st.floats(-1e6, 1e6)] * 2)))[:, None],
        },
        [2],
    )
    loss = GRPOLoss(
        policy,
        **data.draw(st.sampled_from([{}, {"dual_clip": 3.0}, {"trust_std": 0.5}])),
        ratio_level=data.draw(st.sampled_from(LEVELS)),
        reduction=data.draw(st.sampled_from([*REDUCTIONS, "sum"])),
        kl_estimator=data.draw(st.sampled_from(["k1", "k2", "k3", "exact"])),
        entropy_coeff=10.0,
        kl_to_ref_coeff=10.0,
        reference_network=reference,
    )
    out = loss(batch)
    sum(value for key, value in out.items() if key.startswith("loss_")).backward()
    assert all(bool(value.isfinite()) for value in out.values())
    assert bool(policy.logits.grad.isfinite().all())


# -- train and eval mode ---------------------------------------------------------------------------
class LayerPolicy(TablePolicy):
    """A table whose logits go through a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__([0.5, 0.25, 0.25])
        self.layer = layer

    def get_dist(self, tensordict):
        logits = super().get_dist(tensordict).logits
        return d.Categorical(logits=self.layer(logits.flatten(0, 2)).view_as(logits))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        # on equal rows a batch norm in training mode gives 1/3 to every token: log 3/2, 2 log 4/3
        (nn.BatchNorm1d(3, momentum=0.0), r"of 0\.33 .* version 0.*eval\(\).* \(BatchNorm1d\)"),
        (nn.Dropout(0.5), r"layer \(Dropout\)"),
    ],
)
def test_another_mode_than_the_inference_lanes_is_told_once(decisions, layer, message):
    batch, policy = decisions, LayerPolicy(layer)
    batch["policy_version"] = torch.tensor([[0], [0]])
    # as the lane writes them, in eval mode
    batch[LOG_PROBS] = torch.tensor([[[0.5], [0.25]], [[0.25], [0.25]]]).log()
    loss = GRPOLoss(policy)
    with pytest.warns(UserWarning, match=message):
        assert loss(batch)["log_prob_difference"].item() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(batch)
        GRPOLoss(policy)(batch.set("policy_version", torch.tensor([[3], [4]])))  # others may differ
        loss = GRPOLoss(policy.eval())
        loss.version = 3
        loss(batch)
        policy.train()
        loss(batch)  # where an optimiser step would have come between
        loss.version = loss.compared_version = 4  # resumed in the middle of this one
        loss(batch)
    loss.compared_version = 3
    loss.version = 4  # published
    with pytest.warns(UserWarning, match="at version 4"):
        loss(batch)


# -- as a LossModule -------------------------------------------------------------------------------
def test_coefficients_may_be_set_at_any_time(table, decisions):
    decisions["ref_log_prob"] = torch.tensor([[[0.25], [0.25]], [[0.5], [0.9]]]).log()
    loss = GRPOLoss(table)
    assert loss(decisions)["loss_entropy"].item() == 0.0
    loss.entropy_coeff, loss.kl_to_ref_coeff, loss.clip_epsilon = 0.5, 0.5, (0.1, 0.5)
    out = loss(decisions)
    assert set(out.keys()) == set(loss.out_keys)
    assert "ref_log_prob" in loss.in_keys
    assert out["loss_entropy"].item() == pytest.approx(-0.5 * 1.5 * math.log(2), rel=1e-5)
    assert out["loss_kl"].item() == pytest.approx(0.5 * 0.5 / 3, rel=1e-5)  # as by hand above
    assert out["loss_objective"].item() == pytest.approx(-(1.5 + 0.5 - 2) / 3, abs=1e-6)
    loss.load_state_dict(GRPOLoss(table, entropy_coeff=0.25).state_dict())
    out = loss(decisions)
    assert out["loss_entropy"].item() == pytest.approx(-0.25 * 1.5 * math.log(2), rel=1e-5)
    with pytest.raises(ValueError, match="0 <= low < 1"):
        loss.clip_epsilon = 1.5


def test_networks_of_a_loss_module(policy):
    loss = GRPOLoss(policy, kl_to_ref_coeff=0.1, reference_network=copy.deepcopy(policy))
    other = copy.deepcopy(loss.get_stateful_net("actor_network"))
    drift(other)
    loss.from_stateful_net("actor_network", other)
    torch.testing.assert_close(list(policy.parameters()), list(other.parameters()))
    loss.reset_parameters_recursive()
    assert any((a != b).any() for a, b in zip(policy.parameters(), other.parameters(), strict=True))
    with pytest.raises(NotImplementedError, match="without a value estimator.*group_advantage"):
        loss.make_value_estimator()

    batch, params = make_batch(policy), TensorDict.from_module(loss).data

    def objective(params):
        with params.to_module(loss):
            return loss(batch)["loss_objective"]

    drift(policy)
    found = torch.vmap(objective)(torch.stack([params, params.clone()]))
    torch.testing.assert_close(found, loss(batch)["loss_objective"].detach().expand(2))


def test_only_the_actor_is_trained(policy):
    reference = copy.deepcopy(policy)
    loss = GRPOLoss(policy, kl_to_ref_coeff=0.1, reference_network=reference)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in policy.parameters()}
    batch = make_batch(policy)
    out = loss(batch)
    assert out["loss_kl"].item() == pytest.approx(0.0, abs=1e-6)
    drift(policy)
    out = loss(batch)
    grads = gradients(policy, out["loss_objective"] + out["loss_kl"])
    assert out["kl_to_ref"].item() > 0
    assert all(p.grad is None for p in reference.parameters())
    assert any(grad.any() for grad in grads)


def test_one_forward_pass_gives_losses_with_gradient_and_leaves_the_batch_alone(table, decisions):
    before = decisions.clone()
    out = GRPOLoss(table, entropy_coeff=0.1)(decisions)
    assert table.num_forwards == 1
    for name, value in out.items():
        assert value.requires_grad == name.startswith("loss_"), name
    assert set(decisions.keys(True, True)) == set(before.keys(True, True))
    assert (decisions == before).all()


@pytest.mark.parametrize("container", [False, True])
def test_stored_logits_do_not_replace_the_forward_pass(container):
    policy = make_policy(return_logits=True, return_vla_action_container=container)
    batch = make_batch(policy)
    assert batch["vla_action"].logits is not None if container else True
    assert any(grad.any() for grad in gradients(policy, GRPOLoss(policy)(batch)["loss_objective"]))


def test_masks_of_torchrl_samplers_and_scheduled_coefficients_count(table, decisions):
    loss = GRPOLoss(table)
    loss.clip_epsilon_high = 0.5
    assert loss.clip_epsilon_high.dtype == torch.float32
    assert loss(decisions)["loss_objective"].item() == pytest.approx(-(1.5 + 0.5 - 2) / 3, abs=1e-6)
    decisions["collector", "mask"] = torch.tensor([[True], [False]])
    assert loss(decisions)["loss_objective"].item() == pytest.approx(-(1.5 + 0.5) / 2, rel=1e-5)


def test_policy_lag(table, decisions):
    loss = GRPOLoss(table)
    loss.version = 8
    for stamps in ([[7], [4]], [7, 4]):  # as this project's lane, and as TorchRL's servers do
        out = loss(decisions.set("policy_version", torch.tensor(stamps)))
        assert out["policy_lag_mean"].item() == 2.5
        assert out["policy_lag_max"].item() == 4.0
    loss.version = None
    assert "policy_lag_mean" not in loss(decisions)


def test_write_proximal_log_prob_centres_the_clip_range(policy, batch):
    drift(policy, 0.5)
    loss = GRPOLoss(policy, importance="decoupled", behavior_weight_cap=None)
    with pytest.raises(KeyError, match="write_proximal_log_prob"):
        loss(batch)
    assert loss.write_proximal_log_prob(batch) is batch
    out = loss(batch)
    assert out["clip_fraction"].item() == 0.0
    assert out["max_ratio"].item() > 1.5
    # at the centre, weight * 1 * advantage: plain importance sampling
    ratio = (batch["proximal_log_prob"] - batch["vla_action", "log_probs"]).exp()
    expected = -(ratio * batch["advantage"].unsqueeze(-1)).mean()
    torch.testing.assert_close(out["loss_objective"].detach(), expected)


def test_set_keys(policy, batch):
    loss = GRPOLoss(policy)
    expected = loss(batch)
    batch.rename_key_("advantage", "adv")
    del batch["action_is_pad"]  # optional
    loss.set_keys(advantage="adv")
    assert "adv" in loss.in_keys and "advantage" not in loss.in_keys
    torch.testing.assert_close(loss(batch).detach(), expected.detach())
    loss.set_keys(advantage=None)
    assert loss.tensor_keys.advantage == "advantage"
    with pytest.raises(ValueError, match="not an accepted"):
        loss.set_keys(value="v")


def test_called_without_a_tensordict(policy):
    batch = make_batch(policy, 2)
    loss = GRPOLoss(policy)
    expected = loss(batch)["loss_objective"]
    loss.select_out_keys("loss_objective")
    got = loss(
        observation_image=batch["observation", "image"],
        observation_state=batch["observation", "state"],
        language_instruction=NonTensorStack("push", "pull"),
        vla_action_tokens=batch["vla_action", "tokens"],
        vla_action_log_probs=batch["vla_action", "log_probs"],
        advantage=batch["advantage"],
        action_is_pad=batch["action_is_pad"],
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "options", [{}, {"entropy_coeff": 0.1}, {"importance": "decoupled"}, {"kl_to_ref_coeff": 0.1}]
)
def test_out_keys_are_what_is_written(policy, options):
    loss = GRPOLoss(policy, **options)
    batch = loss.write_proximal_log_prob(make_batch(policy))
    batch["ref_log_prob"] = batch["vla_action", "log_probs"]
    assert set(loss(batch).keys()) == set(loss.out_keys)
    assert all(key in batch.keys(True) for key in loss.in_keys if key != "policy_version")


def test_transformers_policy():
    policy = TransformersVLA.tiny(["push", "pull"], action_dim=2, chunk_size=3, state_dim=4)
    batch = make_observation(3, image_size=128, state_dim=4)
    batch["action_is_pad"] = torch.tensor([[False] * 3, [False, True, True], [True] * 3])
    batch["advantage"] = torch.tensor([[1.0], [-1.0], [0.5]])
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        batch = policy(batch)
    options = {"kl_estimator": "exact", "reference_network": copy.deepcopy(policy)}
    out = GRPOLoss(policy, kl_to_ref_coeff=0.1, **options)(batch)
    assert out["ESS"].item() == pytest.approx(1.0, abs=1e-4)
    assert out["loss_kl"].item() == pytest.approx(0.0, abs=1e-5)
    assert out["loss_objective"].item() == pytest.approx(-(6 - 2) / 8, abs=1e-4)
    out["loss_objective"].backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    reached = sum(p.numel() for p in trained if p.grad is not None and p.grad.any())
    assert reached > 0.5 * sum(p.numel() for p in trained)


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "writer"),
    [
        (("vla_action", "tokens"), "policy writes it while collecting"),
        (("vla_action", "log_probs"), "log_probs_mode='token'"),
        ("advantage", "group_advantage"),
        (("observation", "image"), "Environment workers write observations"),
    ],
)
def test_missing_entry_names_its_writer(policy, batch, key, writer):
    del batch[key]
    with pytest.raises(KeyError) as error:
        GRPOLoss(policy)(batch)
    assert writer in str(error.value)
    assert str(key) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_epsilon": (0.1, 0.2, 0.3)}, "Pass a number or .low, high."),
        ({"clip_epsilon": 1.0}, "0 <= low < 1"),
        ({"clip_epsilon": (0.2, -0.1)}, "high >= 0"),
        ({"dual_clip": 1.2}, "dual_clip must be greater than 1"),
        ({"dual_clip": math.inf}, "dual_clip must be a finite number"),
        ({"behavior_weight_cap": 0.5}, "behavior_weight_cap must be at least 1"),
        ({"ratio_level": "word"}, "ratio_level must be one of"),
        ({"importance": "prox"}, "importance must be one of"),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of"),
        ({"kl_to_ref_coeff": math.nan}, "kl_to_ref_coeff must be a finite number"),
        ({"kl_estimator": "exact"}, "without a reference_network"),
        ({"kl_to_ref_coeff": -1.0}, "kl_to_ref_coeff must be at least 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOLoss(make_policy(), **options)


def test_policies_and_references_that_make_no_sense(policy):
    with pytest.raises(KeyError, match="Pass reference_network"):
        GRPOLoss(policy, kl_to_ref_coeff=0.1)(make_batch(policy))
    with pytest.raises(ValueError, match="must not share parameters"):
        GRPOLoss(policy, kl_to_ref_coeff=0.1, reference_network=policy)
    with pytest.raises(ValueError, match="must come with kl_to_ref_coeff"):
        GRPOLoss(policy, reference_network=copy.deepcopy(policy))
    with pytest.raises(ValueError, match="must have action_head='tokens', got 'continuous'"):
        GRPOLoss(TinyVLA(action_dim=2, chunk_size=4))
    with pytest.raises(ValueError, match=r"must have a get_dist method.*got Linear"):
        GRPOLoss(nn.Linear(2, 2))
