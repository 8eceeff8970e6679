# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A learner of several processes takes the steps of a single one."""

from __future__ import annotations

import pytest
import torch

from torchrl_dvla.recipes.dvla_grpo import utils

from .conftest import weights_of

pytestmark = pytest.mark.filterwarnings("ignore:the policy must give decisions of its own version")


@pytest.mark.parametrize(
    ("strategy", "name"), [("ddp", "toy"), ("fsdp", "toy"), ("fsdp", "toy_flow")]
)
def test_two_ranks_take_the_steps_of_one(make_learners, strategy, name):
    # Adam divides by the size of each gradient: rounding in the smallest of them counts by the rate.
    learners = make_learners(
        "optim.lr=1e-4", "optim.micro_batch_size=2", "optim.max_grad_norm=0.05", name=name
    )
    minibatches = learners.minibatches()
    policy, _, norms = learners.learn_alone(minibatches)
    with learners.ranks(2, strategy) as ranks:
        steps = learners.learn(ranks, minibatches)
        found = weights_of(ranks)
    assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.05  # clipped, by the norm over all ranks
    # 6 rows are 3 a rank, 5 are 2 and 3: two passes each, on both ranks.
    assert [[size for size, *_ in parts] for parts, _ in steps] == [[1, 2, 1, 2], [1, 1, 1, 2]]
    expected = dict(policy.named_parameters())
    assert set(expected) == set(found.keys()) & set(expected)
    begun = dict(utils.make_policy(learners.cfg).named_parameters())
    assert max(float((found[name] - begun[name].data).abs().max()) for name in expected) > 1e-4
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter.data, rtol=0, atol=1e-6)
