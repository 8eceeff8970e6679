# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Variants of GRPOLoss: by hand, against NumPy in float64, against TorchRL's loss for LLMs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import distributions as d
from torch import nn
from torchrl.objectives.llm import GRPOLoss as LLMGRPOLoss

from torchrl_dvla.objectives import GRPOLoss, distribution

TOKENS, LOG_PROBS = ("vla_action", "tokens"), ("vla_action", "log_probs")


class TablePolicy(TensorDictModuleBase):
    """Logits ``[B, chunk, A, V]`` are the parameter."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.in_keys, self.out_keys = ["observation"], [TOKENS, LOG_PROBS]

    def get_dist(self, tensordict, logits_key=None):
        return d.Categorical(logits=self.logits)


def make_decisions(ratios, advantages, pad=None, **entries) -> tuple[TablePolicy, TensorDict]:
    """Tokens 0 of probability 1/2, and behaviour log-probs of which they have these ratios."""
    ratios = torch.tensor(ratios).unsqueeze(-1)
    tokens = torch.zeros(ratios.shape, dtype=torch.int64)
    batch = {
        "observation": torch.zeros(len(ratios), 1),
        "vla_action": {"tokens": tokens, "log_probs": (0.5 / ratios).log()},
        "advantage": torch.tensor(advantages).unsqueeze(-1),
        **entries,
    }
    if pad is not None:
        batch["action_is_pad"] = torch.tensor(pad)
    return TablePolicy(torch.zeros(*ratios.shape, 2)), TensorDict(batch, [len(ratios)])


# -- by hand ---------------------------------------------------------------------------------------
def test_gaussian_trust_weight_by_hand():
    # log-ratios log 2 and -log 2 are both one deviation away
    policy, batch = make_decisions([[2.0, 0.5], [1.0, 1.0]], [1.0, -2.0])
    out = GRPOLoss(policy, trust_std=math.log(2))(batch)
    trust = math.exp(-0.5)
    expected = trust * 2 + trust * 0.5 - 2 - 2
    assert out["loss_objective"].item() == pytest.approx(-expected / 4, rel=1e-5)
    out["loss_objective"].backward()
    # d log p / d logit is 1/2 for the token that was taken; the weight is a constant
    grads = [trust * 2, trust * 0.5, -2.0, -2.0]
    found = policy.logits.grad[..., 0].flatten().tolist()
    assert found == pytest.approx([-grad / 4 / 2 for grad in grads], rel=1e-5)
    assert out["clip_fraction"].item() == 0.5  # of the range, which does not clip here


def test_clip_fractions_and_quantiles_by_hand():
    # below, inside, above | above, cut by the dual clip, masked
    policy, batch = make_decisions(
        [[0.5, 1.0, 1.5], [2.0, 8.0, 99.0]], [1.0, -1.0], pad=[[False] * 3, [False, False, True]]
    )
    out = GRPOLoss(policy, dual_clip=3.0)(batch)
    assert out["clip_fraction_low"].item() == pytest.approx(1 / 5)
    assert out["clip_fraction_high"].item() == pytest.approx(3 / 5)
    assert out["clip_fraction"].item() == pytest.approx(4 / 5)
    assert out["clip_fraction_dual"].item() == pytest.approx(1 / 5)
    # 0.5, 1, 1.5, 2, 8: a fifth of the way from the first to the second, ...
    assert out["ratio_p05"].item() == pytest.approx(0.5 + 0.2 * 0.5, rel=1e-5)
    assert out["ratio_p50"].item() == pytest.approx(1.5, rel=1e-5)
    assert out["ratio_p95"].item() == pytest.approx(2 + 0.8 * 6, rel=1e-5)
    assert out["max_ratio"].item() == pytest.approx(8.0, rel=1e-5)
    assert set(out.keys()) == set(GRPOLoss(policy, dual_clip=3.0).out_keys)
    assert "clip_fraction_dual" not in GRPOLoss(policy)(batch)


def test_entropy_of_a_metric_is_that_of_the_bonus(monkeypatch):
    policy, batch = make_decisions([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [0.0] * 3)
    policy.logits.data[0, 0, 0] = torch.tensor([math.log(3.0), 0.0])  # 3/4 and 1/4
    policy.logits.data[1, 0, 0, 1] = -torch.inf  # without a choice
    entropy = (math.log(4) - 0.75 * math.log(3)) + 0 + 4 * math.log(2)
    for size in (2**20, 4, 1):  # all logits in one block, two rows, one row
        monkeypatch.setattr(distribution, "_BLOCK", size)
        for coeff in (0.0, 0.1):
            out = GRPOLoss(policy, entropy_coeff=coeff)(batch)
            assert out["entropy"].item() == pytest.approx(entropy / 6, rel=1e-5)


def test_masked_behavior_weight_by_hand():
    policy, batch = make_decisions([[2.0, 1.0]], [1.0])
    # proximal policy 0.4 and 0.9, behaviour 0.25 and 0.5: weights 1.6 and 1.8, ratios 1.25, 0.56
    batch["proximal_log_prob"] = torch.tensor([[[0.4], [0.9]]]).log()
    options = {"importance": "decoupled", "behavior_weight_cap": 1.7}
    out = GRPOLoss(policy, mask_behavior_weight=True, **options)(batch)
    assert out["loss_objective"].item() == pytest.approx(-(1.6 * 1.25 + 0) / 2, rel=1e-5)
    assert out["behavior_weight"].item() == pytest.approx(1.6 / 2, rel=1e-5)
    assert out["behavior_weight_bounded"].item() == 0.5
    out = GRPOLoss(policy, **options)(batch)
    expected = 1.6 * 1.25 + 1.7 * (0.5 / 0.9)
    assert out["loss_objective"].item() == pytest.approx(-expected / 2, rel=1e-5)
    assert out["behavior_weight_bounded"].item() == 0.5


def test_k1_has_its_value_and_the_gradient_of_k2():
    policy, batch = make_decisions([[1.0, 1.0]], [0.0])
    batch["ref_log_prob"] = torch.tensor([[[0.25], [0.9]]]).log()  # log pi - log ref: log 2, -0.588
    gaps = torch.tensor([math.log(2), math.log(0.5 / 0.9)])
    out = {
        name: GRPOLoss(policy, kl_to_ref_coeff=1.0, kl_estimator=name)(batch)["loss_kl"]
        for name in ("k1", "k2")
    }
    assert out["k1"].item() == pytest.approx(gaps.mean().item(), rel=1e-5)
    assert out["k2"].item() == pytest.approx((gaps.square() / 2).mean().item(), rel=1e-5)
    grads = [torch.autograd.grad(value, policy.logits)[0] for value in out.values()]
    torch.testing.assert_close(*grads)
    expected = gaps / 2 / 2  # mean of two, half a log-prob for each unit of logit
    torch.testing.assert_close(grads[0][0, :, 0, 0], expected)


def test_every_rollout_weighs_the_same_however_it_is_split():
    # a rollout of one decision, and one of three
    decisions = torch.tensor([[1], [3], [3], [3]])
    ratios = [[1.0, 1.1], [1.2, 1.0], [0.9, 0.9], [1.0, 99.0]]
    pad = [[False, False]] * 3 + [[False, True]]
    policy, batch = make_decisions(ratios, [1.0, 2.0, 2.0, 2.0], pad, num_decisions=decisions)
    batch["weight"] = torch.tensor([[1.0], [1.0], [1.0], [0.5]])
    loss = GRPOLoss(policy, reduction="trajectory_mean", entropy_coeff=0.5)
    assert "num_decisions" in loss.in_keys
    out = loss(batch)
    gains = 1.05 + 2 * (1.1 + 0.9 + 1.0) / 3
    assert out["loss_objective"].item() == pytest.approx(-gains / 2, rel=1e-5)
    assert out["loss_entropy"].item() == pytest.approx(-0.5 * math.log(2), rel=1e-5)
    total = loss.normaliser(batch)
    assert total.item() == pytest.approx(2.0)
    parts = []
    for k in range(4):
        part = GRPOLoss(TablePolicy(policy.logits[k : k + 1].detach()), reduction=loss.reduction)
        parts.append(part(batch[k : k + 1], normaliser=total)["loss_objective"].item())
    assert sum(parts) == pytest.approx(-gains / 2, rel=1e-5)
    loss.set_keys(weight="weight")
    gains = 1.05 + 2 * (1.1 + 0.9 + 0.5 * 1.0) / 3
    assert loss(batch)["loss_objective"].item() == pytest.approx(-gains / (1 + 2.5 / 3), rel=1e-5)
    loss.set_keys(num_decisions="length")
    with pytest.raises(KeyError, match="hold num_decisions under 'length'.*PooledReplayBuffer"):
        loss(batch)
    batch["length"] = decisions - 1
    with pytest.raises(ValueError, match="num_decisions must be finite, at least 1, got 0 in 1 of"):
        loss(batch)


def test_one_ratio_for_a_rollout_by_hand():
    # a rollout of two decisions, whose ratios multiply to 2.4 and 0.5, and one of one, 0.9
    ratios = [[1.2, 2.0], [0.9, 1.0], [0.5, 99.0]]
    pad = [[False, False], [False, False], [False, True]]
    ids, decisions = torch.tensor([[4], [1], [4]]), torch.tensor([[2], [1], [2]])
    entries = {"rollout_id": ids, "num_decisions": decisions}
    policy, batch = make_decisions(ratios, [1.0, -1.0, 1.0], pad, **entries)
    options = {"clip_epsilon": (0.2, 0.28), "reduction": "trajectory_mean"}
    loss = GRPOLoss(policy, ratio_level="trajectory", **options)
    assert loss.needs_whole_rollouts and {"rollout_id", "num_decisions"} < set(loss.in_keys)
    out = loss(batch)
    product = 1.2 * 2.0 * 0.5
    assert out["loss_objective"].item() == pytest.approx(-(product - 0.9) / 2, rel=1e-5)
    assert out["max_ratio"].item() == pytest.approx(product, rel=1e-5)
    out["loss_objective"].backward()
    # the gradient of a product is itself, times that of each log-prob: half a unit of its logit
    expected = [-product / 2 / 2] * 2 + [0.9 / 2 / 2] * 2 + [-product / 2 / 2, 0.0]
    assert policy.logits.grad[..., 0].flatten().tolist() == pytest.approx(expected, rel=1e-5)
    mean = product ** (1 / 3)  # of three executed tokens
    loss = GRPOLoss(policy, ratio_level="trajectory_mean", **options)
    assert loss(batch)["loss_objective"].item() == pytest.approx(-(mean - 0.9**0.5) / 2, rel=1e-5)
    # without that reduction, each decision weighs the same
    loss = GRPOLoss(policy, ratio_level="trajectory", clip_epsilon=(0.2, 0.28))
    objective = loss(batch)["loss_objective"].item()
    assert objective == pytest.approx(-(2 * product - 0.9) / 3, rel=1e-5)


def test_micro_batches_of_whole_rollouts_add_up_and_others_are_refused():
    ratios = [[1.2, 1.1], [0.9, 1.0], [0.8, 1.05]]
    entries = {
        "rollout_id": torch.tensor([[4], [4], [1]]),
        "num_decisions": torch.tensor([[2], [2], [1]]),
    }
    policy, batch = make_decisions(ratios, [1.0, 1.0, -1.0], **entries)
    options = {"ratio_level": "trajectory", "reduction": "trajectory_mean"}
    loss = GRPOLoss(policy, **options)
    whole, total = loss(batch)["loss_objective"], loss.normaliser(batch)
    parts = [
        GRPOLoss(TablePolicy(policy.logits[part].detach()), **options)(
            batch[part], normaliser=total
        )["loss_objective"]
        for part in (slice(0, 2), slice(2, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)
    policy, split = TablePolicy(torch.zeros(2, 2, 1, 2)), batch[1:]
    for check_finite in (True, False):
        with pytest.raises(ValueError, match=r"got 1 of the 2 of rollout 4 \(1 of 2 rollouts are"):
            GRPOLoss(policy, check_finite=check_finite, **options)(split)
    twice = batch[[0, 0]]
    twice["num_decisions"] = torch.ones(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got 2 of the 1 of rollout 4 .*whole_rollouts=True"):
        GRPOLoss(policy, **options)(twice)
    for key in ("rollout_id", "num_decisions"):
        with pytest.raises(KeyError, match=f"hold {key} under '{key}'.* writes it"):
            GRPOLoss(policy, **options)(split.exclude(key))


# -- a NumPy reference in float64 ------------------------------------------------------------------
LEVELS = {"token": (), "env_step": (2,), "sequence": (1, 2), "sequence_mean": (1, 2)}
LEVELS |= {"trajectory": (1, 2), "trajectory_mean": (1, 2)}
VARIANTS = {
    "clip": {"clip_epsilon": (0.125, 0.25)},  # exact in float32, of which the range is
    "dual": {"clip_epsilon": (0.125, 0.25), "dual_clip": 1.5},
    "gaussian": {"trust_std": 0.25},
    "truncated": {"importance": "decoupled", "behavior_weight_cap": 1.25, "clip_epsilon": 0.25},
    "masked": {"importance": "decoupled", "behavior_weight_cap": 1.25, "clip_epsilon": 0.25},
}
VARIANTS["masked"]["mask_behavior_weight"] = True


def numpy_loss(logits, batch, level, reduction, variant, centre):
    """The objective as its formula; *centre* are the logits at which weights are constants."""
    options, names = VARIANTS[variant], ("behavior", "proximal")
    mask = np.broadcast_to(~batch["action_is_pad"].numpy()[..., None], logits.shape[:-1])
    tokens = batch[TOKENS].numpy()
    entries = (LOG_PROBS, "proximal_log_prob")
    recorded = {name: batch[key].numpy() for name, key in zip(names, entries)}

    def log_prob(values):
        values = values - np.log(np.exp(values).sum(-1, keepdims=True))
        return np.take_along_axis(values, tokens[..., None], -1)[..., 0]

    def to_level(log_ratio):
        dims = LEVELS[level]
        total = np.where(mask, log_ratio, 0.0).sum(dims, keepdims=True)
        count = mask.sum(dims, keepdims=True)
        if level.startswith("trajectory"):
            for rollout in np.unique(ids := batch["rollout_id"].numpy()[:, 0]):
                total[ids == rollout] = total[ids == rollout].sum()
                count[ids == rollout] = count[ids == rollout].sum()
        return total / count if level.endswith("_mean") else total

    is_decoupled = options.get("importance") == "decoupled"
    trust = recorded["proximal" if is_decoupled else "behavior"]
    log_ratio, constant = (to_level(log_prob(values) - trust) for values in (logits, centre))
    advantage = batch["advantage"].numpy()[..., None]
    ratio = np.exp(log_ratio)
    if variant == "gaussian":
        gain = np.exp(-((constant / 0.25) ** 2) / 2) * ratio * advantage
    else:
        clip = options["clip_epsilon"]
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        gain = np.minimum(ratio * advantage, ratio.clip(1 - low, 1 + high) * advantage)
        if "dual_clip" in options:
            gain = np.where(advantage < 0, np.maximum(gain, 1.5 * advantage), gain)
    if is_decoupled:
        weight = np.exp(to_level(recorded["proximal"] - recorded["behavior"]))
        beyond = 0.0 if variant == "masked" else 1.25
        gain = gain * np.where(weight > 1.25, beyond, weight)
    counts = mask if not LEVELS[level] else mask.any(LEVELS[level], keepdims=True)
    gain = np.where(counts, gain, 0.0)
    if reduction == "token_mean":
        return -gain.sum() / counts.sum()
    if reduction == "fixed_length":
        return -gain.sum() / counts.size
    means = gain.sum((1, 2)) / counts.sum((1, 2))
    if reduction == "sequence_mean":
        return -means.mean()
    weights = 1 / batch["num_decisions"].numpy()[:, 0]
    return -(weights * means).sum() / weights.sum()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_the_formula_in_numpy_and_its_gradient(float64, level, variant):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3, 2, 4, generator=generator)
    policy = TablePolicy(logits.clone())
    tokens = torch.randint(4, (5, 3, 2), generator=generator)
    log_prob = d.Categorical(logits=logits).log_prob(tokens)
    noise = 0.2 * torch.randn(2, 5, 3, 2, generator=generator)
    batch = TensorDict(
        {
            "observation": torch.zeros(5, 1),
            "vla_action": {"tokens": tokens, "log_probs": (log_prob + noise[0]).clamp_max(0)},
            "proximal_log_prob": (log_prob + noise[1]).clamp_max(0),
            "advantage": torch.randn(5, 1, generator=generator),
            "action_is_pad": torch.arange(3) >= torch.tensor([3, 1, 3, 2, 3])[:, None],
            "num_decisions": torch.tensor([[1], [2], [2], [2], [2]]),
            "rollout_id": torch.tensor([[7], [3], [9], [9], [3]]),
        },
        [5],
    )
    direction, step = torch.randn(logits.shape, generator=generator), 1e-6
    for reduction in ("token_mean", "sequence_mean", "trajectory_mean", "fixed_length"):
        loss = GRPOLoss(policy, ratio_level=level, reduction=reduction, **VARIANTS[variant])
        objective = loss(batch)["loss_objective"]
        up, here, down = (
            numpy_loss((logits + sign * step * direction).numpy(), batch, level, reduction, variant,
                       logits.numpy())
            for sign in (1, 0, -1)
        )  # fmt: skip
        assert objective.item() == pytest.approx(here, rel=1e-10)
        (grad,) = torch.autograd.grad(objective, policy.logits)
        slope = (up - down) / (2 * step)
        assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


# -- TorchRL's loss for language models ------------------------------------------------------------
class Tokens(d.Categorical):
    """A distribution of tokens with the mask that TorchRL's loss for LLMs asks for."""

    @property
    def mask(self):
        return torch.ones(self.batch_shape, dtype=torch.bool)


class LanguagePolicy(TensorDictModuleBase):
    """The same logits as a sequence ``[B, T, V]``."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.in_keys, self.out_keys = logits, ["observation"], []

    def get_dist(self, tensordict, logits_key=None):
        return Tokens(logits=self.logits.flatten(1, 2))


@pytest.mark.parametrize(
    ("clip", "ours", "theirs"),
    [
        (0.2, "token_mean", "token_mean"),
        ((0.1, 0.3), "token_mean", "token_mean"),
        (0.2, "sequence_mean", "prompt_mean"),
    ],
)
def test_same_loss_gradient_and_metrics_as_torchrls_for_llms(clip, ours, theirs):
    torch.manual_seed(0)
    policy = TablePolicy(torch.randn(6, 3, 2, 5))
    tokens = policy.get_dist(None).sample()
    log_probs = policy.get_dist(None).log_prob(tokens).detach() + 0.2 * torch.randn(6, 3, 2)
    ref = (log_probs + 0.1 * torch.randn(6, 3, 2)).clamp_max(0)
    batch = TensorDict(
        {
            "observation": torch.zeros(6, 1),
            "vla_action": {"tokens": tokens, "log_probs": log_probs.clamp_max(0)},
            "ref_log_prob": ref,
            "advantage": torch.randn(6, 1),
        },
        [6],
    )
    theirs_batch = TensorDict(
        {
            "observation": batch["observation"],
            "tokens": {"full": tokens.flatten(1)},
            "log_probs": {"full": batch[LOG_PROBS].flatten(1)},
            "next": {"ref_log_probs": {"full": ref.flatten(1)}},
            "advantage": batch["advantage"].unsqueeze(-1).expand(6, 6, 1),
        },
        [6],
    )
    coeffs = {"entropy_coeff": 0.3, "kl_to_ref_coeff": 0.5}
    expected = LLMGRPOLoss(
        LanguagePolicy(policy.logits), clip_epsilon=clip, aggregation=theirs, **coeffs
    )(theirs_batch)
    out = GRPOLoss(policy, clip_epsilon=clip, reduction=ours, **coeffs)(batch)
    pairs = {
        "loss_objective": "loss_objective",
        "loss_entropy": "loss_entropy",
        "loss_kl": "loss_kl_to_ref",
        "kl_to_ref": "kl_to_ref",
        "clip_fraction": "clip_fraction",
        "ESS": "ESS",
        "entropy": "entropy",
    }
    assert 0 < out["clip_fraction"].item() < 1
    for name, other in pairs.items():
        found = getattr(expected, other).reshape(-1)
        torch.testing.assert_close(out[name].expand_as(found), found, rtol=1e-5, atol=1e-6)
    losses = [out["loss_objective"] + out["loss_entropy"] + out["loss_kl"]]
    losses += [sum(v.sum() for k, v in expected.items() if k.startswith("loss_"))]
    grads = [torch.autograd.grad(value, policy.logits)[0] for value in losses]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_std": 0.0}, "trust_std must be positive, got 0.0"),
        ({"trust_std": math.inf}, "trust_std must be a finite number or None"),
        ({"trust_std": 1.0, "dual_clip": 3.0}, "dual_clip must be None with trust_std=1.0"),
        ({"mask_behavior_weight": 1}, "mask_behavior_weight must be true or false"),
        (
            {"mask_behavior_weight": True, "behavior_weight_cap": None},
            "behavior_weight_cap must be a number with mask_behavior_weight, got None",
        ),
        ({"ratio_level": "group"}, "ratio_level must be one of"),
    ],
)
def test_options_that_have_no_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOLoss(TablePolicy(torch.zeros(1, 1, 1, 2)), **options)
