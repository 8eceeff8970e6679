# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Gradient checkpointing: the same numbers from fewer tensors that are kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla import GRPOLoss

from .policies import make_flow_policy, make_observation, make_policy

MAKE = {
    "tokens": make_policy,
    **{
        kind: lambda kind=kind, **kwargs: make_flow_policy(kind, **kwargs)
        for kind in ("pi0", "pi05", "smolvla")
    },
}


def gradients(policy, td):
    """Loss and gradients of one step of GRPO, and bytes that were kept for the backward pass."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    loss = GRPOLoss(policy)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = loss(td.clone())
    num_bytes = sum(kept.values())
    losses["loss_objective"].backward()
    found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return losses["loss_objective"].detach(), found, num_bytes


@pytest.mark.parametrize("kind", MAKE)
def test_gradients_are_the_same_and_fewer_tensors_are_kept(kind):
    torch.manual_seed(0)
    policy = MAKE[kind]()
    td = make_observation(3)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        td = policy(td)
    td["action_is_pad"] = torch.zeros(3, policy.chunk_size, dtype=torch.bool)
    td["advantage"] = torch.tensor([[1.0], [-1.0], [0.5]])
    other = MAKE[kind](gradient_checkpointing=True) if kind != "tokens" else rebuilt(policy)
    other.load_state_dict(policy.state_dict())
    assert other.config.gradient_checkpointing
    expected, of_all, all_bytes = gradients(policy, td)
    found, of_few, few_bytes = gradients(other, td)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert of_few.keys() == of_all.keys()
    for name, gradient in of_all.items():
        torch.testing.assert_close(of_few[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert any(gradient.abs().max() > 0 for gradient in of_all.values())
    assert few_bytes < 0.6 * all_bytes


def rebuilt(policy):
    """The same with gradient checkpointing."""
    config = type(policy.config).from_dict(
        {**policy.config.to_dict(), "gradient_checkpointing": True}
    )
    return type(policy)(config, tokenizer=policy.tokenizer)


def test_copies_own_their_layers():
    policy = make_flow_policy("pi0", gradient_checkpointing=True)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        layers = [m for m in other.modules() if "forward" in vars(m)]
        assert layers and all(vars(m)["forward"].layer is m for m in layers)
