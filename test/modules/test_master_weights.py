# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Float32 masters: steps that bfloat16 would lose, gradients that it would."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrl_dvla.modules.master_weights import MasterWeights


def make(dtype=torch.bfloat16):
    layer = nn.Linear(2, 1, bias=False, dtype=dtype)
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
    return layer


def test_small_steps_add_up():
    # 1 - 2**-9 is half a unit in the last place of bfloat16 below 1, and rounds to even: 1.
    layer = make()
    masters = MasterWeights(layer.parameters())
    optimizer = torch.optim.SGD(masters.stepped, lr=2**-9)
    masters.follow(optimizer)
    plain = make()
    alone = torch.optim.SGD(plain.parameters(), lr=2**-9)
    seen = []
    for _ in range(4):
        layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        assert layer.weight.grad is None  # it exists once, in float32
        optimizer.step()
        optimizer.zero_grad()
        seen.append(layer.weight[0, 0].item())
        plain(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        alone.step()
        alone.zero_grad()
    assert masters.stepped[0][0].tolist() == [1 - 4 * 2**-9, 2 - 4 * 2**-9]
    assert seen[-1] == 1 - 4 * 2**-9 and layer.weight.dtype == torch.bfloat16
    assert plain.weight[0, 0].item() == 1.0  # without masters nothing happens


def test_gradients_of_micro_batches_are_added_in_float32():
    # In bfloat16 256 + 1 is 256.
    layer = make()
    masters = MasterWeights(layer.parameters())
    for size in (256.0, 1.0, 1.0):
        layer(torch.tensor([[size, 0.0]], dtype=torch.bfloat16)).sum().backward()
    assert masters.stepped[0].grad.tolist() == [[258.0, 0.0]]
    assert masters.stepped[0].grad.dtype == torch.float32


def test_what_is_float32_is_its_own_master():
    layers = nn.ModuleList([make(torch.float32), make()])
    masters = MasterWeights(layers.parameters())
    assert masters.stepped[0] is layers[0].weight and len(masters.masters) == 1
    assert masters.stepped[1] is masters.masters[0]


def test_a_run_that_is_resumed_goes_on_from_the_masters():
    layer = make()
    masters = MasterWeights(layer.parameters())
    masters.masters[0].data += 2**-12  # not in bfloat16
    state = masters.state_dict()
    again = MasterWeights(make().parameters())
    again.load_state_dict(state)
    assert torch.equal(again.stepped[0], masters.stepped[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        MasterWeights(nn.Linear(3, 1, dtype=torch.bfloat16).parameters()).load_state_dict(state)
