# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""GRPOLoss of policies whose log-probabilities are densities: by hand, parity, refusals."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import distributions as d
from torch import nn
from torchrl.data.vla import UniformActionTokenizer
from torchrl.modules import TanhNormal
from torchrl.modules.vla import TinyVLA
from torchrl.objectives import ClipPPOLoss

from torchrl_dvla.objectives import GRPOLoss

CHUNK, LOG_PROBS, PATH = (("vla_action", name) for name in ("chunk", "log_probs", "path"))
STATE = ("observation", "state")
DENSITY = 0.467356  # log of 1 / (0.25 sqrt(2 pi)), the density of N(0, 1/4) at its mean: above one


class TableGaussian(TensorDictModuleBase):
    """N(mean, std) for every action; ``wrap`` makes other distributions of loc and scale."""

    def __init__(self, mean=0.0, std=0.25, wrap=d.Normal, action_dim=1) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())
        self.wrap, self.action_dim = wrap, action_dim
        self.in_keys, self.out_keys = ["observation"], [CHUNK, LOG_PROBS]

    def get_dist(self, tensordict):
        shape = (*tensordict["observation"].shape[:-1], 2, self.action_dim)
        return self.wrap(self.mean.expand(shape), self.log_std.exp().expand(shape))


@pytest.fixture
def decisions():
    """Two decisions of two env steps, of N(0, 1/4); the last env step was never executed.

    z-scores 1, 1 | 0 under the policy, 1/2, 3/2 | 0 when they were taken: the log-ratios are half
    the difference of their squares.
    """
    behavior = DENSITY - torch.tensor([[[0.5], [1.5]], [[0.0], [torch.nan]]]).square() / 2
    return TensorDict(
        {
            "observation": torch.zeros(2, 1),
            "vla_action": {
                "chunk": torch.tensor([[[0.25], [0.25]], [[0.0], [torch.nan]]]),
                "log_probs": behavior,
            },
            "action_is_pad": torch.tensor([[False, False], [False, True]]),
            "advantage": torch.tensor([[1.0], [-2.0]]),
        },
        [2],
    )


# -- by hand ---------------------------------------------------------------------------------------
DOWN, UP = math.exp(-0.375), math.exp(0.625)  # ratios 0.687 and 1.868


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # gains: 0.687 * 1, min(1.868, 1.28) * 1 and 1 * -2
        ({}, (DOWN + 1.28 - 2) / 3),
        ({"ratio_level": "env_step"}, (DOWN + 1.28 - 2) / 3),
        ({"reduction": "sequence_mean"}, ((DOWN + 1.28) / 2 - 2) / 2),
        # one ratio per decision: exp(-0.375 + 0.625) is above 1.28, its root is not
        ({"ratio_level": "sequence"}, (1.28 - 2) / 2),
        ({"ratio_level": "sequence_mean"}, (math.exp(0.125) - 2) / 2),
    ],
)
def test_objective_by_hand(decisions, options, expected):
    loss = GRPOLoss(TableGaussian(), **options)(decisions)["loss_objective"]
    assert loss.item() == pytest.approx(-expected, rel=1e-5)


def test_gradients_and_metrics_by_hand(decisions):
    policy = TableGaussian()
    out = GRPOLoss(policy, entropy_coeff=0.1)(decisions)
    out["loss_objective"].backward()
    # of a log-prob: z / std by the mean, z^2 - 1 by the logarithm of std; 1.868 is clipped
    assert policy.mean.grad.item() == pytest.approx(-DOWN * (1 / 0.25) / 3, rel=1e-5)
    assert policy.log_std.grad.item() == pytest.approx(-(1.0 * -2 * -1) / 3, rel=1e-5)
    entropy = 0.5 + 0.5 * math.log(2 * math.pi) + math.log(0.25)  # negative, as densities may have
    assert out["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert out["loss_entropy"].item() == pytest.approx(-0.1 * entropy, rel=1e-5)
    assert out["max_ratio"].item() == pytest.approx(UP, rel=1e-5)
    assert out["clip_fraction"].item() == pytest.approx(2 / 3)
    assert out["log_prob_difference"].item() == pytest.approx((0.375 + 0.625) / 3, rel=1e-5)


def test_one_ratio_per_env_step_multiplies_its_action_dimensions():
    policy = TableGaussian(action_dim=2)
    log_ratio = torch.tensor([[[-0.375, 0.625], [0.25, -0.5]]])
    batch = TensorDict(
        {
            "observation": torch.zeros(1, 1),
            "vla_action": {"chunk": torch.zeros(1, 2, 2), "log_probs": DENSITY - log_ratio},
            "advantage": torch.ones(1, 1),
        },
        [1],
    )
    out = GRPOLoss(policy, ratio_level="env_step")(batch)
    gains = [1.28, math.exp(-0.25)]  # exp(0.25) = 1.284 is clipped
    assert out["loss_objective"].item() == pytest.approx(-sum(gains) / 2, rel=1e-5)
    assert out["clip_fraction"].item() == 1.0
    none = GRPOLoss(policy, ratio_level="env_step", reduction="none")(batch)
    assert none["loss_objective"].shape == (1, 2, 1)
    # the same from log-probs that the policy has summed itself
    batch[LOG_PROBS] = batch[LOG_PROBS].sum(-1)
    for wrap in (d.Normal, lambda *args: d.Independent(d.Normal(*args), 1)):
        policy.wrap = wrap
        again = GRPOLoss(policy, ratio_level="env_step")(batch)
        for name in ("loss_objective", "clip_fraction", "ESS", "max_ratio"):
            torch.testing.assert_close(again[name], out[name])
        assert again["entropy"].item() == pytest.approx(2 * out["entropy"].item())  # both at once


def test_divergence_from_a_reference_by_hand(decisions):
    policy, reference = TableGaussian(), TableGaussian(mean=0.25, std=0.5)
    loss = GRPOLoss(policy, kl_to_ref_coeff=0.5, kl_estimator="exact", reference_network=reference)
    # log(std ratio) + (var + gap of means squared) / (2 var of the reference) - 1/2
    expected = math.log(2) + (1 / 16 + 1 / 16) / (2 / 4) - 0.5
    assert loss(decisions)["kl_to_ref"].item() == pytest.approx(expected, rel=1e-5)
    k2 = GRPOLoss(policy, kl_to_ref_coeff=0.5, kl_estimator="k2", reference_network=reference)
    # log-probs: DENSITY - z^2 / 2, less log 2 for the reference, whose z are 0, 0 | -1/2
    gaps = [-0.5 + math.log(2), -0.5 + math.log(2), 0.125 + math.log(2)]
    expected = sum(gap**2 / 2 for gap in gaps) / 3
    assert k2(decisions)["kl_to_ref"].item() == pytest.approx(expected, rel=1e-5)


# -- a NumPy reference in float64 ------------------------------------------------------------------
def reference_loss(mean, std, batch, level, reduction, low, high):
    """The objective, written as its formula in NumPy."""
    chunk, behavior = batch[CHUNK].numpy(), batch[LOG_PROBS].numpy()
    log_prob = -((chunk - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
    mask = np.broadcast_to(~batch["action_is_pad"].numpy()[..., None], chunk.shape)
    total, count, num_decisions = 0.0, 0, 0
    for row, advantage in enumerate(batch["advantage"][:, 0].tolist()):
        log_ratios = np.where(mask[row], log_prob[row] - behavior[row], 0.0)
        if level == "token":
            ratios = np.exp(log_ratios)[mask[row]]
        elif level == "env_step":
            ratios = np.exp(log_ratios.sum(-1))[mask[row].any(-1)]
        else:
            log_ratio = log_ratios.sum()
            log_ratio = log_ratio / mask[row].sum() if level == "sequence_mean" else log_ratio
            ratios = np.exp(log_ratio)[None]
        gains = np.minimum(ratios * advantage, ratios.clip(1 - low, 1 + high) * advantage)
        total += gains.mean() if reduction == "sequence_mean" else gains.sum()
        count, num_decisions = count + gains.size, num_decisions + 1
    return -total / (num_decisions if reduction == "sequence_mean" else count)


@pytest.mark.parametrize("level", ["token", "env_step", "sequence", "sequence_mean"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_as_the_formula_in_numpy_and_its_gradient(level, reduction):
    torch.set_default_dtype(torch.float64)
    try:
        policy = TableGaussian(mean=0.1, std=0.7, action_dim=3)
        batch = TensorDict({"observation": torch.zeros(5, 1), "advantage": torch.randn(5, 1)}, [5])
        batch["vla_action"] = TensorDict({"chunk": torch.randn(5, 2, 3)}, [5])
        behavior = d.Normal(0.0, 0.8).log_prob(batch[CHUNK])
        batch["vla_action", "log_probs"] = behavior
        batch["action_is_pad"] = torch.arange(2) >= torch.tensor([2, 1, 2, 1, 2])[:, None]
        loss = GRPOLoss(policy, ratio_level=level, reduction=reduction)
        out = loss(batch)["loss_objective"]
        expected = reference_loss(0.1, 0.7, batch, level, reduction, 0.2, 0.28)
        assert out.item() == pytest.approx(expected, rel=1e-6)  # the clip range is float32
        out.backward()
        step = 1e-6
        up, down = (
            reference_loss(0.1 + sign * step, 0.7, batch, level, reduction, 0.2, 0.28)
            for sign in (1, -1)
        )
        assert policy.mean.grad.item() == pytest.approx((up - down) / (2 * step), rel=1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


# -- TorchRL's own modules and losses --------------------------------------------------------------
class MeanAndStd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)
        self.log_std = nn.Parameter(torch.full((4, 2), -0.5))

    def forward(self, state):
        loc = self.linear(state).unflatten(-1, (4, 2))
        return loc, self.log_std.exp().expand_as(loc)


def make_policy(distribution=d.Normal, **kwargs) -> ProbabilisticTensorDictSequential:
    return ProbabilisticTensorDictSequential(
        TensorDictModule(MeanAndStd(), in_keys=[STATE], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=[CHUNK],
            distribution_class=distribution,
            distribution_kwargs=kwargs,
            default_interaction_type="random",
            return_log_prob=True,
            log_prob_key=LOG_PROBS,
        ),
    )


def make_batch(policy, num_rows=6) -> TensorDict:
    batch = TensorDict({"observation": {"state": torch.randn(num_rows, 3)}}, [num_rows])
    with torch.no_grad():
        batch = policy(batch)
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return batch.set("advantage", torch.randn(num_rows, 1))


def summed(num_dims):
    return lambda loc, scale: d.Independent(d.Normal(loc, scale), num_dims)


@pytest.mark.parametrize(
    ("distribution", "level"),
    [(d.Normal, "token"), (summed(1), "env_step"), (TanhNormal, "env_step")],
)
def test_same_loss_gradient_and_entropy_bonus_as_clip_ppo(distribution, level):
    policy = make_policy(distribution)
    batch = make_batch(policy)
    has_entropy = distribution is not TanhNormal
    theirs = ClipPPOLoss(
        policy, critic_network=None, clip_epsilon=0.2, entropy_bonus=has_entropy, entropy_coeff=0.3
    )
    theirs.set_keys(action=CHUNK, sample_log_prob=LOG_PROBS)
    # TorchRL lines advantages up with a log-prob of the event, one for each env step
    expected = theirs(batch.clone())
    coeff = 0.3 if has_entropy else 0.0
    out = GRPOLoss(policy, clip_epsilon=0.2, ratio_level=level, entropy_coeff=coeff)(batch)
    assert 0 < out["clip_fraction"].item() < 1
    torch.testing.assert_close(out["loss_objective"], expected["loss_objective"])
    torch.testing.assert_close(out["clip_fraction"], expected["clip_fraction"])
    names = ["loss_objective", "loss_entropy"][: 1 + has_entropy]
    grads = [
        torch.autograd.grad(sum(losses[name] for name in names), list(policy.parameters()))
        for losses in (out, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_tokens_by_modules_of_torchrl():
    tokenizer = UniformActionTokenizer(8, low=-1.0, high=1.0)
    logits = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(-1, (4, 2, 8)))
    modules = [
        TensorDictModule(logits, in_keys=[STATE], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=[("vla_action", "tokens")],
            distribution_class=d.Categorical,
            default_interaction_type="random",
            return_log_prob=True,
            log_prob_key=LOG_PROBS,
        ),
        TensorDictModule(tokenizer.decode, in_keys=[("vla_action", "tokens")], out_keys=[CHUNK]),
    ]
    policy = ProbabilisticTensorDictSequential(*modules)
    batch = make_batch(policy)
    out = GRPOLoss(policy, entropy_coeff=0.1)(batch)
    out["loss_objective"].backward()
    assert all(p.grad.any() for p in policy.parameters())
    dist = d.Categorical(logits=logits(batch[STATE]))
    torch.testing.assert_close(out["entropy"], dist.entropy().mean())
    ratio = (dist.log_prob(batch["vla_action", "tokens"]) - batch[LOG_PROBS]).exp()
    torch.testing.assert_close(out["max_ratio"], ratio.max())
    with pytest.raises(ValueError, match=r"ProbabilisticTensorDictSequential \(a TensorDictSeq"):
        GRPOLoss(TensorDictSequential(*modules))


def test_entropy_without_a_closed_form():
    policy = make_policy(TanhNormal, event_dims=0)
    batch = make_batch(policy)
    state = torch.get_rng_state()
    out = GRPOLoss(policy)(batch)
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn for a metric alone"
    log_prob = policy.get_dist(batch.select(STATE)).log_prob(batch[CHUNK])
    torch.testing.assert_close(out["entropy"], -log_prob.mean().detach())
    # the gradient of one reparametrised sample reaches the standard deviation
    grad = torch.autograd.grad(
        GRPOLoss(policy, entropy_coeff=0.5)(batch)["loss_entropy"], policy.module[0].module.log_std
    )
    assert grad[0].abs().sum() > 0

    class NoSample(TanhNormal):
        has_rsample = False

    policy = make_policy(NoSample)
    loss = GRPOLoss(policy, ratio_level="env_step", entropy_coeff=0.1)
    with pytest.raises(ValueError, match="entropy_coeff must be 0.0 for a NoSample"):
        loss(make_batch(policy))


def test_proximal_log_probs_have_the_shape_of_the_recorded_ones():
    policy = make_policy(summed(1))
    batch = make_batch(policy)
    loss = GRPOLoss(policy, importance="decoupled", ratio_level="sequence")
    assert loss.write_proximal_log_prob(batch)["proximal_log_prob"].shape == (6, 4)
    out = loss(batch)
    # the policy is its own proximal one: all ratios to it are one
    assert out["clip_fraction"].item() == 0.0
    assert out["behavior_weight"].item() != 1.0


# -- a path, of which the log-probabilities are conditional ----------------------------------------
class PathPolicy(TensorDictModuleBase):
    """Two states of a walk [*B, 2, chunk, A], of which the second was drawn around the first."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.5))
        self.in_keys, self.out_keys = ["observation"], [CHUNK, LOG_PROBS, PATH]

    def get_dist(self, tensordict):
        return StepDistribution(tensordict[PATH][..., 0, :, :] + self.step)


class StepDistribution(d.Distribution):
    arg_constraints: dict = {}

    def __init__(self, mean) -> None:
        super().__init__(mean.shape[:1], mean.shape[1:])
        self.normal = d.Normal(mean, 1.0)

    def log_prob(self, path):
        return self.normal.log_prob(path[..., 1, :, :])

    def entropy(self):
        return self.normal.entropy()


def test_the_distribution_of_a_path_reads_the_path():
    policy = PathPolicy()
    path = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 1)
    behavior = torch.full((1, 2, 1), -0.5 * math.log(2 * math.pi))  # of a step of one
    batch = TensorDict(
        {
            "observation": torch.zeros(1, 1),
            "vla_action": {"path": path, "log_probs": behavior, "chunk": path[:, 1]},
            "advantage": torch.ones(1, 1),
        },
        [1],
    )
    loss = GRPOLoss(policy)
    assert loss.tensor_keys.action == PATH
    out = loss(batch)
    out["loss_objective"].backward()
    ratio = math.exp(-0.125)  # the drawn step is half a standard deviation from the mean
    assert out["loss_objective"].item() == pytest.approx(-ratio, rel=1e-5)
    assert policy.step.grad.item() == pytest.approx(-ratio * 0.5, rel=1e-5)


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("distribution", "shape", "options", "message"),
    [
        (summed(1), (2, 2), {}, "ratio_level must be 'env_step', .*one an env step.*got 'token'"),
        (d.Normal, (2,), {}, "sample_log_prob must have the shape.*got .2. for .*'chunk'"),
        (d.Normal, (2, 1), {}, "sample_log_prob must have the shape.*cannot leave unexecuted"),
        (TanhNormal, (2, 2, 3), {}, r"recorded ones, \[2, 2, 3\], got \[2, 2\] by TanhNormal"),
        (
            lambda loc, scale: d.Normal(loc[..., :1], scale[..., :1]),
            (2, 2, 3),
            {},
            r"of shape \[2, 2, 3\], got \[2, 2, 1\] of events \[\] by Normal",
        ),
        (
            lambda loc, _: d.Categorical(logits=loc.unsqueeze(-1).expand(*loc.shape, 5)),
            (2, 2, 3),
            {},
            "action must hold integers for a Categorical .*got torch.float32.*as tokens",
        ),
    ],
)
def test_log_probs_and_distributions_that_do_not_fit(distribution, shape, options, message):
    policy = TableGaussian(wrap=distribution, action_dim=3)
    vla_action = {"chunk": torch.zeros(2, 2, 3), "log_probs": torch.zeros(shape)}
    batch = TensorDict({"observation": torch.zeros(2, 1), "advantage": torch.ones(2, 1)}, [2])
    batch["vla_action"] = vla_action
    with pytest.raises(ValueError, match=message):
        GRPOLoss(policy, **options)(batch)


def test_a_loss_configured_for_what_the_policy_does_not_sample():
    with pytest.raises(ValueError, match=r"what the policy samples, \(.*'chunk'\) .*got .*'tokens"):
        GRPOLoss(TableGaussian()).set_keys(action=("vla_action", "tokens"))
    tokens = TinyVLA(action_dim=2, chunk_size=4, action_head="tokens", vocab_size=8)
    with pytest.raises(ValueError, match=r"samples, \(.*'tokens'\) .*got .*'chunk'.*Leave it out"):
        GRPOLoss(tokens).set_keys(action=CHUNK)


def test_infinite_densities_and_actions_outside_of_the_support(decisions):
    decisions[LOG_PROBS][0, 0] = torch.inf
    with pytest.raises(ValueError, match="sample_log_prob must be finite, got inf in 1 of 2 rows"):
        GRPOLoss(TableGaussian())(decisions)

    def positive(loc, scale):
        return d.LogNormal(loc, scale)

    decisions[LOG_PROBS][0, 0] = 0.0
    decisions[CHUNK][0, 0] = -1.0
    with pytest.raises(ValueError, match="log-probabilities of the policy must be finite, got nan"):
        GRPOLoss(TableGaussian(wrap=positive))(decisions)


def test_a_reference_without_a_known_divergence(decisions):
    policy, reference = TableGaussian(), TableGaussian(wrap=d.Cauchy)
    loss = GRPOLoss(policy, kl_to_ref_coeff=0.1, kl_estimator="exact", reference_network=reference)
    with pytest.raises(ValueError, match="kl_estimator must be 'k2' or 'k3' for Normal and Cauchy"):
        loss(decisions)
    sampled = GRPOLoss(policy, kl_to_ref_coeff=0.1, reference_network=copy.deepcopy(reference))
    assert sampled(decisions)["loss_kl"].isfinite()
