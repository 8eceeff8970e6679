# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The checklist of a policy: what is right, and each thing that can be wrong, with its remedy."""

from __future__ import annotations

import functools
import re
import threading

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import distributions as d
from torch import nn
from torchrl.envs import ToyVLAEnv
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules.vla import TinyVLA

from torchrl_dvla import check_policy_protocol
from torchrl_dvla.collectors.policy_protocol import PolicyReport
from torchrl_dvla.collectors.validation import match_policy
from torchrl_dvla.envs import ChunkEnv
from torchrl_dvla.findings import Finding, Status
from torchrl_dvla.swimlane.env_worker import describe_env
from torchrl_dvla.testing import CountingChunkEnv

from .counting_task import make_env, make_policy

CHUNK, TOKENS, LOG_PROBS = (("vla_action", name) for name in ("chunk", "tokens", "log_probs"))
STATE = ("observation", "state")
NAMES = [
    "environment", "reads", "writes", "values", "shapes", "get_dist", "log-probs", "gradient",
    "sampling", "batch", "mode", "weights", "process",
]  # fmt: skip


class Gaussian(TensorDictModuleBase):
    """A Gaussian policy for the counting task; what is wrong with it is a method replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(4, 8)
        self.log_std = nn.Parameter(torch.zeros(4, 2))
        self.in_keys, self.out_keys = [STATE], [CHUNK, LOG_PROBS]

    def loc(self, state):
        return self.mean(state).unflatten(-1, (4, 2))

    def dist(self, loc):
        return d.Normal(loc, self.log_std.exp())

    def get_dist(self, tensordict):
        return self.dist(self.loc(tensordict[STATE]))

    def draw(self, dist):
        return dist.mean if exploration_type() == ExplorationType.DETERMINISTIC else dist.sample()

    def record(self, dist, chunk):
        return dist.log_prob(chunk)

    def forward(self, tensordict):
        dist = self.get_dist(tensordict)
        chunk = self.draw(dist)
        tensordict[CHUNK], tensordict[LOG_PROBS] = chunk, self.record(dist, chunk)
        return tensordict


def findings(policy, env=make_env) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_policy_protocol(policy, env).findings}


def failures(policy, env=make_env) -> list[str]:
    return [name for name, found in findings(policy, env).items() if found.status is Status.FAIL]


@pytest.mark.parametrize("make", [Gaussian, make_policy])
def test_what_is_right(make):
    report = check_policy_protocol(make().eval(), make_env())
    assert [finding.name for finding in report.findings] == NAMES
    assert report.ok and str(report).endswith("13 ok, 0 warn, 0 fail")
    assert "\nok    get_dist " in str(report)


def test_nothing_is_changed_and_an_environment_that_it_made_is_closed():
    policy, closed = Gaussian().train(), []

    class Env(CountingChunkEnv):
        def close(self, **kwargs):
            closed.append(self)

    before = {name: value.clone() for name, value in policy.state_dict().items()}
    assert check_policy_protocol(policy, Env).ok and len(closed) == 1
    assert check_policy_protocol(policy, Env()).ok and len(closed) == 1
    assert policy.training and policy.mean.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    gym = functools.partial(ChunkEnv, ToyVLAEnv(action_dim=2, state_dim=4), chunk_size=4)
    assert check_policy_protocol(policy, functools.partial(gym, success="terminated")).ok


def wrong(**methods):
    """A Gaussian policy with other methods."""
    return type("Wrong", (Gaussian,), methods)()


def forward_after(change):
    def forward(self, tensordict):
        change(self)
        return Gaussian.forward(self, tensordict)

    return forward


class Drops(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.detach()


def with_layer(layer):
    policy = Gaussian()
    policy.mean = nn.Sequential(layer, nn.Linear(4, 8))
    return policy


def frozen():
    return Gaussian().requires_grad_(False)


def unused():
    policy = Gaussian()
    policy.value = nn.Linear(4, 1)
    return policy


def unpicklable():
    policy = Gaussian()
    policy.lock = threading.Lock()
    return policy


def counting():
    policy = wrong(forward=forward_after(lambda self: self.count.add_(1)))
    policy.register_buffer("count", torch.zeros(()))
    return policy


def infinite_gradient():
    policy = wrong(dist=lambda self, loc: d.Normal(loc, self.log_std.abs().sqrt() + 1))
    assert not policy.log_std.any()
    return policy


@pytest.mark.parametrize(
    ("policy", "name", "detail", "remedy"),
    [
        (wrong(draw=lambda _, dist: dist.sample()), "sampling", "under ExplorationType.DET", "Ask"),
        (
            wrong(draw=lambda _, dist: dist.mean),
            "sampling",
            "must be drawn under .*RANDOM",
            "group",
        ),
        (
            wrong(record=lambda _, dist, chunk: dist.log_prob(chunk.clamp(-0.1, 0.1))),
            "log-probs",
            "those of get_dist for the same decision, got a mean difference",
            "before it is clipped",
        ),
        (
            wrong(dist=lambda self, loc: d.Normal(loc.detach(), 1.0)),
            "gradient",
            "must depend on the parameters, got no gradient",
            "detach nothing",
        ),
        (infinite_gradient(), "gradient", "must be finite, got others in log_std", "from below"),
        (frozen(), "gradient", "parameters that require a gradient, got none", "unfreeze"),
        (
            wrong(loc=lambda self, s: Gaussian.loc(self, s - (s.mean(0) if len(s) > 1 else 0))),
            "batch",
            "must not depend on each other, got log-probs that differ by",
            "running ones",
        ),
        (counting(), "weights", "leave weights and buffers alone, got others in count", "training"),
        (with_layer(Drops(4, 4)), "process", "Missing key.*mean.0.bias", ""),
        (unpicklable(), "process", "cloudpickle can send it", "Make what cannot be sent"),
        (
            wrong(record=lambda _, dist, chunk: dist.log_prob(chunk).sum((-2, -1))),
            "shapes",
            r"one log-prob a token, .*got chunk \[4, 2\] of chunks \[4, 2\] and log-probs \[\]",
            "not summed over the chunk",
        ),
        (
            wrong(record=lambda _, dist, chunk: torch.zeros(len(chunk), 4, 2, dtype=torch.int64)),
            "shapes",
            r"real numbers as .*log_probs'\), got torch.int64",
            "indices of tokens",
        ),
        (
            wrong(record=lambda _, dist, chunk: dist.log_prob(chunk) / 0.0),
            "values",
            "log_probs'. of Wrong must be finite, got -?inf in 3 of 3 rows",
            "too large",
        ),
    ],
)
def test_one_thing_that_is_wrong(policy, name, detail, remedy):
    found = findings(policy)[name]
    assert found.status is Status.FAIL
    text = f"{found.detail}. {found.remedy}"
    for part in (detail, remedy):
        assert re.search(part, text, re.DOTALL), text


GENERATOR = torch.Generator()


def own_generator(policy, dist):
    if exploration_type() == ExplorationType.DETERMINISTIC:
        return dist.mean
    return dist.mean + dist.stddev * torch.randn(dist.mean.shape, generator=GENERATOR)


@pytest.mark.parametrize(
    ("policy", "name", "detail", "remedy"),
    [
        (unused(), "gradient", "2 of 5 parameters get none: value.weight, value.bias", "Freeze"),
        (with_layer(nn.BatchNorm1d(4)), "mode", r"mean.0 \(BatchNorm1d\)", "policy.eval()"),
        (
            wrong(dist=lambda self, loc: d.Independent(d.Normal(loc, self.log_std.exp()), 1)),
            "get_dist",
            r"Normal, one log-prob for each of \[4\], the env steps",
            "ratio_level='env_step'",
        ),
        (wrong(draw=own_generator), "sampling", "one seed draws different actions", "default"),
    ],
)
def test_what_is_to_be_known(policy, name, detail, remedy):
    found = findings(policy)
    assert found[name].status is Status.WARN and check_policy_protocol(policy, make_env).ok
    assert re.search(detail, found[name].detail) and remedy in found[name].remedy


def test_a_protocol_half_spoken_names_all_that_is_missing():
    policy = TensorDictModule(nn.Linear(4, 8), in_keys=[STATE], out_keys=["action"])
    report = findings(policy)
    assert failures(policy) == ["writes", "get_dist"]
    detail = report["writes"].detail
    assert all(str(key) in detail for key in (TOKENS, CHUNK, LOG_PROBS)) and "['action']" in detail
    assert "get_dist(...).log_prob(...)" in report["writes"].remedy
    assert "TensorDictSequential has none" in report["get_dist"].remedy
    assert report["gradient"].status is Status.WARN
    assert report["gradient"].detail == "not checked: it needs a distribution"


def test_all_failures_are_collected():
    policy = counting()
    policy.in_keys = [("observation", "pixels")]
    policy.out_keys = [CHUNK]
    found = findings(policy)
    assert failures(policy) == ["reads", "writes"]
    assert "got in_keys with [('observation', 'pixels')]" in found["reads"].detail
    assert "image_key=" in found["reads"].remedy
    assert str(LOG_PROBS) in found["writes"].detail
    policy.in_keys, policy.out_keys = [STATE], [CHUNK, LOG_PROBS]
    policy.lock = threading.Lock()
    assert failures(policy) == ["weights", "process"]


def test_modules_and_environments_that_are_none():
    report = findings(nn.Linear(4, 8))
    assert "by in_keys and out_keys what it reads and writes" in report["reads"].detail
    assert "TensorDictModule" in report["reads"].remedy
    for env in (lambda: 3, lambda: ToyVLAEnv(), 3):
        report = findings(Gaussian(), env)
        assert report["environment"].status is Status.FAIL and "ChunkEnv" in str(report)
        assert report["writes"].detail == "not checked: it needs observations"


def test_a_policy_for_another_environment():
    found = findings(Gaussian(), CountingChunkEnv(chunk_size=3))["shapes"]
    assert "chunks of [chunk_size=3, action_dim=2]" in found.detail and "got [4, 2]" in found.detail
    assert "for this environment" in found.remedy


def test_a_head_that_regresses():
    policy = TinyVLA(action_dim=2, chunk_size=4, return_vla_action_container=False)
    assert failures(policy) == ["writes", "get_dist"]
    assert "must have action_head='tokens'" in findings(policy)["get_dist"].detail


def test_the_collector_asks_for_the_same(make_collector):
    layout = match_policy(Gaussian(), describe_env(make_env()))
    assert layout[CHUNK] == layout[LOG_PROBS] == (torch.Size([4, 2]), torch.float32)
    assert TOKENS not in layout
    summed = wrong(record=lambda _, dist, chunk: dist.log_prob(chunk).sum(-1))
    assert match_policy(summed, describe_env(make_env()))[LOG_PROBS][0] == (4,)
    other = wrong(record=lambda _, dist, chunk: torch.zeros(len(chunk), 4, 2))
    other.dist = lambda loc: d.Normal(loc.mean(-1, keepdim=True), torch.ones(4, 1))
    other.draw = lambda dist: dist.sample().expand(-1, 4, 2)
    with pytest.raises(ValueError, match=r"of shape \[1, 4, 2\], got \[1, 4, 1\] .* by Normal"):
        match_policy(other, describe_env(make_env()))
    policy = Gaussian()
    policy.out_keys.append(TOKENS)  # which it does not write
    with pytest.raises(ValueError, match=r"must write \(.*'tokens'\), got .*and no tokens"):
        make_collector(policy=policy)
    policy = Gaussian()
    policy.in_keys = ["pixels"]
    with pytest.raises(ValueError, match=r"what the environment observes, .*in_keys with .'pixels"):
        make_collector(policy=policy)


def test_a_report_is_ok_without_a_failure():
    warned = Finding("mode", Status.WARN, "in training mode")
    assert PolicyReport([warned]).ok
    assert not PolicyReport([warned, Finding("reads", Status.FAIL, "nothing")]).ok
