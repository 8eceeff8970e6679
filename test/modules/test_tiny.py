# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small policies: what they read, and that all of it is learned."""

from __future__ import annotations

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from torchrl_dvla.modules import FlowVLA, tiny_token_policy

IMAGE, STATE = ("observation", "image"), ("observation", "state")


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({}, {IMAGE, STATE}),
        ({"use_state": False}, {IMAGE}),
        ({"use_image": False}, {STATE}),
    ],
)
def test_the_policy_reads_what_it_is_told_to(settings, reads):
    policy = tiny_token_policy(2, 4, vocab_size=8, **settings)
    assert set(policy.in_keys) == {*reads, "language_instruction"}
    observed = {IMAGE: torch.ones(3, 3, 16, 16, dtype=torch.uint8), STATE: torch.ones(3, 5)}
    td = TensorDict({"language_instruction": NonTensorStack("a", "b", "a")}, [3])
    td.update({key: observed[key] for key in reads})
    action = policy(td)["vla_action"]
    assert action["tokens"].shape == action["log_probs"].shape == action["chunk"].shape == (3, 4, 2)
    distribution = policy.get_dist(td)
    log_probs = distribution.log_prob(action["tokens"])
    torch.testing.assert_close(log_probs, action["log_probs"])
    log_probs.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    torch.testing.assert_close(policy.get_dist(td[0]).logits, distribution.logits[0])  # no batch
    # The words, and each of the inputs, change what it does.
    logits = distribution.logits
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])
    for key in reads:
        changed = policy.get_dist(td.clone().set(key, observed[key] * 2)).logits
        assert not torch.equal(changed, logits)


def test_a_policy_that_observes_nothing():
    with pytest.raises(ValueError, match="use_image or use_state must be True, got neither"):
        tiny_token_policy(2, 4, use_image=False, use_state=False)


@pytest.mark.parametrize("seed", range(4))
def test_a_flow_policy_begins_within_reach_of_its_exploration(seed):
    policy = FlowVLA.tiny(["push it"], action_dim=2, chunk_size=4, state_dim=5, seed=seed)
    observation = {IMAGE: torch.zeros(8, 3, 64, 64, dtype=torch.uint8), STATE: torch.rand(8, 5)}
    td = TensorDict({"language_instruction": NonTensorStack(*["push it"] * 8), **observation}, [8])
    with torch.no_grad():
        actions = policy(td)["vla_action", "chunk"]  # greedy: from zero along the velocities
    # Velocities are those of a head of deviation 0.1 / sqrt(width) on inputs of unit size.
    assert 0 < actions.abs().max() < 0.5
