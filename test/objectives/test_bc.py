# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical, Independent

from torchrl_dvla.functional import flow_matching_pair
from torchrl_dvla.objectives.bc import ActionTokenBCLoss, FlowMatchingLoss


class TablePolicy(TensorDictModule):
    """Token policy over 3 bins whose logits are its only parameter, ``[chunk=2, A=1, 3]``."""

    def __init__(self, logits, token_level=True):
        super().__init__(nn.Identity(), in_keys=["observation"], out_keys=["observation"])
        self.table = nn.Parameter(torch.tensor(logits))
        self.token_level = token_level

    def get_dist(self, tensordict):
        dist = Categorical(logits=self.table.expand(len(tensordict), -1, -1, -1))
        return dist if self.token_level else Independent(dist, 2)


# probabilities 1/4, 1/4, 1/2 at the first env step, uniform at the second
LOGITS = [[[0.0, 0.0, math.log(2.0)]], [[0.0, 0.0, 0.0]]]


def batch(pad=(False, False)):
    return TensorDict(
        {
            "observation": torch.zeros(2, 1),
            "vla_action": {"tokens": torch.tensor([[[2], [0]], [[0], [1]]])},
            "action_is_pad": torch.tensor([[False, False], list(pad)]),
        },
        [2],
    )


def test_loss_is_the_mean_negative_log_likelihood():
    data = batch()
    out = ActionTokenBCLoss(TablePolicy(LOGITS))(data)
    assert set(data.keys(True)) == set(batch().keys(True))  # left alone
    expected = (math.log(2) + math.log(3) + math.log(4) + math.log(3)) / 4
    assert out["loss_bc"].item() == pytest.approx(expected)
    # likely tokens are 2 and 0: right in the first row, wrong in the second
    assert out["accuracy"].item() == pytest.approx(0.5)


def test_padded_env_steps_do_not_count():
    out = ActionTokenBCLoss(TablePolicy(LOGITS))(batch(pad=(False, True)))
    assert out["loss_bc"].item() == pytest.approx((math.log(2) + math.log(3) + math.log(4)) / 3)
    assert out["accuracy"].item() == pytest.approx(2 / 3)


def test_gradient_is_probability_minus_target():
    loss = ActionTokenBCLoss(TablePolicy(LOGITS), reduction="sum")
    loss(batch())["loss_bc"].backward()
    (grad,) = (p.grad for p in loss.parameters())
    # two rows: 2 * (1/4, 1/4, 1/2) - targets {2, 0}, and 2 * 1/3 - targets {0, 1}
    assert grad[0, 0].tolist() == pytest.approx([-0.5, 0.5, 0.0])
    assert grad[1, 0].tolist() == pytest.approx([-1 / 3, -1 / 3, 2 / 3])


def test_sequence_level_policies_are_refused():
    loss = ActionTokenBCLoss(TablePolicy(LOGITS, token_level=False))
    with pytest.raises(ValueError, match='log_probs_mode="token"'):
        loss(batch())


def test_entries_that_are_missing_or_of_another_shape_are_refused():
    loss, data = ActionTokenBCLoss(TablePolicy(LOGITS)), batch()
    message = r"'action_is_pad' must have shape \[2, 2\].* got \[2, 1\]"
    with pytest.raises(ValueError, match=message):
        loss(data.clone().set("action_is_pad", data["action_is_pad"][:, :1]))
    for key, name in ((("vla_action", "tokens"), "expert's tokens"), ("observation", "inputs")):
        with pytest.raises(KeyError, match=f"the batch must hold .*{name}.* got "):
            loss(data.clone().exclude(key))


def test_what_cannot_be_an_experts_token_is_refused_unless_padded():
    data = batch(pad=(False, True))
    data["vla_action", "tokens"][1, 1] = -100
    loss = ActionTokenBCLoss(TablePolicy(LOGITS))
    assert loss(data)["loss_bc"].isfinite()
    data["vla_action", "tokens"][1, 0] = 3
    with pytest.raises(ValueError, match="action tokens must be .* got 3 in 1 of 2 rows"):
        loss(data)


# -- flows -----------------------------------------------------------------------------------------
class ConstantFlow(TensorDictModule):
    """Flow policy whose velocity is its one parameter, seen at noise 1 and time 1 / 4."""

    def __init__(self, velocity=0.5):
        super().__init__(nn.Identity(), in_keys=["observation"], out_keys=["observation"])
        self.velocity = nn.Parameter(torch.tensor(velocity))

    def flow_matching_error(self, tensordict, chunk):
        _, target = flow_matching_pair(chunk, torch.ones_like(chunk), torch.tensor(0.25))
        return (self.velocity - target).square()


def flow_batch(pad=(False, False)):
    data = batch(pad).exclude(("vla_action", "tokens"))
    chunk = torch.tensor([[[0.0], [1.0]], [[2.0], [-2.0]]])
    return data.set(("vla_action", "chunk"), chunk)


def test_flow_matching_by_hand():
    # targets noise - action: 1, 0, -1 and 3; errors of 1/2: 1/4, 1/4, 9/4, 25/4
    policy = ConstantFlow()
    loss = FlowMatchingLoss(policy)(flow_batch())["loss_bc"]
    assert loss.item() == pytest.approx(9 / 4)
    loss.backward()
    # 2 * mean of -1/2, 1/2, 3/2, -5/2
    assert policy.velocity.grad.item() == pytest.approx(-0.5)
    padded = flow_batch(pad=(False, True))
    padded["vla_action", "chunk"][1, 1] = torch.nan
    assert FlowMatchingLoss(policy)(padded)["loss_bc"].item() == pytest.approx(11 / 12)
    total = FlowMatchingLoss(policy, reduction="sum")(flow_batch())["loss_bc"]
    assert total.item() == pytest.approx(9)


def test_what_no_flow_can_be_matched_to_is_refused():
    with pytest.raises(ValueError, match="flow_matching_error, got TablePolicy.*ActionTokenBCLoss"):
        FlowMatchingLoss(TablePolicy(LOGITS))
    loss, data = FlowMatchingLoss(ConstantFlow()), flow_batch()
    data["vla_action", "chunk"][1, 0] = torch.nan
    with pytest.raises(ValueError, match="the expert's chunk must be finite, .* in 1 of 2 rows"):
        loss(data)
    with pytest.raises(KeyError, match="the batch must hold the expert's chunk .* got "):
        loss(data.exclude(("vla_action", "chunk")))
    with pytest.raises(ValueError, match="velocity error must be finite"):
        FlowMatchingLoss(ConstantFlow(math.inf))(flow_batch())
