# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Policies and batches for the loss tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import distributions as d
from torch import nn
from torchrl.modules.vla import TinyVLA

CHUNK, ACTION_DIM, VOCAB = 4, 2, 8


class TablePolicy(TensorDictModuleBase):
    """A policy whose probabilities are read off a table: one row of logits for all tokens."""

    def __init__(self, probs: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probs).log())
        self.in_keys = ["observation"]
        self.out_keys = [("vla_action", "tokens")]
        self.num_forwards = 0

    def get_dist(self, tensordict: TensorDictBase) -> d.Categorical:
        self.num_forwards += 1
        batch = tensordict["observation"].shape[:-1]
        return d.Categorical(logits=self.logits.expand(*batch, 2, 1, -1))


@pytest.fixture
def table():
    """Two decisions of two tokens under pi = (1/2, 1/4, 1/4); the last token never executed."""
    policy = TablePolicy([0.5, 0.25, 0.25])
    batch = TensorDict(
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
    return policy, batch


def make_policy(**kwargs) -> TinyVLA:
    options = {"log_probs_mode": "token", "return_vla_action_container": False, **kwargs}
    policy = TinyVLA(
        action_dim=ACTION_DIM,
        chunk_size=CHUNK,
        action_head="tokens",
        vocab_size=VOCAB,
        hidden_dim=16,
        mode="sample",
        **options,
    )
    with torch.no_grad():
        policy(make_observation(1))  # materialises the lazy layers
    return policy


def make_observation(num_rows: int) -> TensorDict:
    return TensorDict(
        {
            "observation": {
                "image": torch.randint(0, 256, (num_rows, 3, 8, 8), dtype=torch.uint8),
                "state": torch.randn(num_rows, 3),
            },
            "language_instruction": NonTensorStack(*["push", "pull"] * num_rows)[:num_rows],
        },
        batch_size=[num_rows],
    )


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


@torch.no_grad()
def drift(policy: nn.Module, scale: float = 0.1) -> None:
    """Move the policy away from the one that took the data."""
    for param in policy.parameters():
        param.add_(scale * torch.randn_like(param))


def gradients(policy: nn.Module) -> list[torch.Tensor]:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    return grads


@pytest.fixture
def cases() -> SimpleNamespace:
    """What the tests of this folder share."""
    return SimpleNamespace(
        make_policy=make_policy, make_batch=make_batch, drift=drift, gradients=gradients
    )
