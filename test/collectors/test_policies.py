# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Policies of every kind, trained in whole runs until they solve the counting task."""

from __future__ import annotations

import copy
import functools
import sys

import cloudpickle
import pytest
import torch
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
)
from torch import distributions as d
from torch import nn
from torchrl.data.vla import UniformActionTokenizer
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import TanhNormal

from torchrl_dvla import EpisodeSpec, GroupConfig, GRPOLoss, check_policy_protocol
from torchrl_dvla.objectives.validation import agreement_of
from torchrl_dvla.testing import CountingChunkEnv

# Workers and the inference process cannot import this module: they get its functions whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

CHUNK, TOKENS, LOG_PROBS, PATH = (
    ("vla_action", name) for name in ("chunk", "tokens", "log_probs", "path")
)
IMAGE, STATE = ("observation", "image"), ("observation", "state")
NUM_STEPS, NUM_BINS = 4, 2
make_env = functools.partial(CountingChunkEnv, action_dim=1, chunk_size=NUM_STEPS, max_env_steps=8)
OPTIONS = {
    "batch_size": 64,
    "num_epochs": 2,
    # A policy that has learned it all has no contrast left: its groups are kept, nobody waits.
    "group": GroupConfig(
        8, groups_per_update=4, max_policy_lag=0, max_no_signal_groups=1, on_no_signal="keep"
    ),
    "workers": {"envs_per_worker": 16, "max_decisions": 2},
}
HELD_OUT = [EpisodeSpec("default", seed=1_000 + k) for k in range(16)]


# -- the policies ----------------------------------------------------------------------------------
class CNN(nn.Module):
    """Logits [B, chunk, 1, bins] of an image and a state."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.state = nn.Linear(3, 12)
        self.head = nn.Linear(16, NUM_STEPS * NUM_BINS)

    def forward(self, image, state):
        image, state = self.image(image / 255), self.state(state)
        hidden = torch.cat([image, state], -1).tanh()
        return self.head(hidden).unflatten(-1, (NUM_STEPS, 1, NUM_BINS))


class PlainCNN(TensorDictModule):
    """A user's own class: the three entries and get_dist, in ten lines."""

    def __init__(self) -> None:
        super().__init__(CNN(), in_keys=[IMAGE, STATE], out_keys=[TOKENS, LOG_PROBS, CHUNK])

    def get_dist(self, tensordict):
        return d.Categorical(logits=self.module(tensordict[IMAGE], tensordict[STATE]))

    def forward(self, tensordict):
        dist = self.get_dist(tensordict)
        is_greedy = exploration_type() == ExplorationType.DETERMINISTIC
        tokens = dist.mode if is_greedy else dist.sample()
        tensordict[TOKENS], tensordict[LOG_PROBS] = tokens, dist.log_prob(tokens)
        return tensordict.set(CHUNK, 2.0 * tokens - 1)


def drawn(distribution, in_keys, out_key, **kwargs) -> ProbabilisticTensorDictModule:
    return ProbabilisticTensorDictModule(
        in_keys=in_keys,
        out_keys=[out_key],
        distribution_class=distribution,
        distribution_kwargs=kwargs,
        return_log_prob=True,
        log_prob_key=LOG_PROBS,
    )


def tokens_of(*modules: TensorDictModule) -> ProbabilisticTensorDictSequential:
    """Modules that make logits, with a draw of tokens and what they decode to."""
    tokenizer = UniformActionTokenizer(NUM_BINS, low=-1.0, high=1.0)
    decode = TensorDictModule(tokenizer.decode, in_keys=[TOKENS], out_keys=[CHUNK])
    draw = drawn(d.Categorical, ["logits"], TOKENS)
    return ProbabilisticTensorDictSequential(*modules, draw, decode)


def to_chunk(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Unflatten(-1, (NUM_STEPS, 1, NUM_BINS)))


def sequence():
    return tokens_of(
        TensorDictModule(nn.Sequential(nn.Linear(3, 16), nn.Tanh()), [STATE], ["hidden"]),
        TensorDictModule(to_chunk(nn.Linear(16, NUM_STEPS * NUM_BINS)), ["hidden"], ["logits"]),
    )


def batch_norm():
    layers = [nn.BatchNorm1d(3), nn.Linear(3, 16), nn.Tanh()]
    network = to_chunk(*layers, nn.Linear(16, NUM_STEPS * NUM_BINS))
    return tokens_of(TensorDictModule(network, [STATE], ["logits"]))


def tied():
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    network[2].weight = network[4].weight
    return tokens_of(TensorDictModule(to_chunk(*network), [STATE], ["logits"]))


class HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, NUM_STEPS * NUM_BINS)]
        self.network = to_chunk(*layers).bfloat16()

    def forward(self, state):
        return self.network(state.bfloat16())


def half_precision():
    return tokens_of(TensorDictModule(HalfPrecision(), [STATE], ["logits"]))


class MeanAndStd(nn.Module):
    """A mean that depends on the state, and a learned standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, NUM_STEPS))
        self.log_std = nn.Parameter(torch.full((NUM_STEPS, 1), -0.5))

    def forward(self, state):
        mean = self.mean(state).unsqueeze(-1)
        return mean, self.log_std.exp().expand_as(mean)


def gaussian(distribution=d.Normal):
    return ProbabilisticTensorDictSequential(
        TensorDictModule(MeanAndStd(), in_keys=[STATE], out_keys=["loc", "scale"]),
        drawn(distribution, ["loc", "scale"], CHUNK),
    )


# -- whole runs ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make_policy", "ratio_level"),
    [
        (PlainCNN, "token"),
        (sequence, "token"),
        (batch_norm, "token"),
        (tied, "token"),
        (half_precision, "token"),
        (gaussian, "token"),
        (functools.partial(gaussian, TanhNormal), "env_step"),
    ],
    ids=["cnn", "sequence", "batch norm", "tied", "bfloat16", "gaussian", "tanh normal"],
)
@pytest.mark.filterwarnings("error:the policy must give decisions")
def test_a_policy_learns_and_the_lane_has_what_was_published(
    make_collector, make_policy, ratio_level
):
    torch.manual_seed(0)
    policy = make_policy().eval()
    report = check_policy_protocol(policy, make_env)
    assert report.ok, str(report)
    before, dtypes = copy.deepcopy(policy.state_dict()), {p.dtype for p in policy.parameters()}
    collector = make_collector(make_env, policy=policy, **OPTIONS)
    collector.start()
    first = collector.evaluate(HELD_OUT).result(60.0).success_rate
    loss = GRPOLoss(policy, ratio_level=ratio_level)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    for update in range(8):
        for index, batch in enumerate(collector.replay_buffer):
            out = loss(batch)
            if index == 0:  # of decisions that these very weights and buffers have taken
                assert (batch["policy_version"] == update).all()
                assert out["log_prob_difference"] < agreement_of(dtypes) / 10
            out["loss_objective"].backward()
            optimizer.step()
            optimizer.zero_grad()
            policy.train()
            with torch.no_grad():
                policy(batch.select(*policy.in_keys))  # statistics of the next version
            policy.eval()
        collector.update_policy_weights_()
        loss.version = collector.policy_version
        if collector.stats()["collector/success_rate"] > 0.9:
            break
    last = collector.evaluate(HELD_OUT).result(60.0).success_rate
    changed = {name for name, value in policy.state_dict().items() if (value != before[name]).any()}
    assert changed == set(before), "all weights and statistics have changed"
    assert first < 0.8 and last >= 0.9


# -- what rows hold --------------------------------------------------------------------------------
def test_rows_hold_what_was_drawn_not_what_was_executed(start_collector):
    policy = gaussian()
    policy[0].module.log_std.data.fill_(1.0)  # most actions are out of bounds, where they are cut
    collector = start_collector(make_env, policy=policy, **OPTIONS)
    rows = torch.cat([batch.clone() for batch in collector.replay_buffer])
    assert TOKENS not in rows.keys(True)
    assert rows[CHUNK].dtype == torch.float32 and rows[CHUNK].abs().max() > 1
    dist = policy.get_dist(rows.select(STATE))
    torch.testing.assert_close(dist.log_prob(rows[CHUNK]).detach(), rows[LOG_PROBS])
    assert collector.stats()["collector/env_steps_clipped"] > 0


class Walk(TensorDictModuleBase):
    """Two states of a walk, whose second is the chunk, and a number that its log-prob needs."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.5))
        self.in_keys = [STATE]
        self.out_keys = [CHUNK, LOG_PROBS, PATH, ("vla_action", "index"), ("vla_action", "logits")]

    def get_dist(self, tensordict):
        assert (tensordict["vla_action", "index"] == 3).all()
        return WalkDistribution(tensordict[PATH][:, 0] + self.step)

    def forward(self, tensordict):
        start = torch.randn(len(tensordict), NUM_STEPS, 1)
        noise = 0.0 if exploration_type() == ExplorationType.DETERMINISTIC else torch.randn(1)
        tensordict[PATH] = torch.stack([start, start + self.step + noise], 1)
        tensordict["vla_action", "index"] = torch.full((len(tensordict),), 3, dtype=torch.int32)
        tensordict["vla_action", "logits"] = torch.zeros(len(tensordict), 1000)
        tensordict[CHUNK] = tensordict[PATH][:, 1]
        return tensordict.set(LOG_PROBS, self.get_dist(tensordict).log_prob(tensordict[PATH]))


class WalkDistribution(d.Normal):
    def __init__(self, mean) -> None:
        super().__init__(mean, 1.0)

    def log_prob(self, path):
        return super().log_prob(path[:, 1])


def test_rows_hold_the_path_that_a_loss_needs(start_collector):
    policy = Walk()
    collector = start_collector(make_env, policy=policy, **OPTIONS)
    batch = next(iter(collector.replay_buffer))
    assert batch[PATH].shape[1:] == (2, NUM_STEPS, 1)
    assert batch["vla_action", "index"].dtype == torch.int32
    assert ("vla_action", "logits") not in batch.keys(True), "large, and the loss makes its own"
    out = GRPOLoss(policy)(batch)
    assert out["log_prob_difference"] < 1e-6
    out["loss_objective"].backward()
    assert policy.step.grad is not None
