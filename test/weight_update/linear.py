# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A layer whose weights are all one number, so that a mix of two versions shows."""

from __future__ import annotations

import torch
from torch import nn

from torchrl_dvla.weight_update import WeightReader, WeightStore


def constant(value: float, **kwargs: int) -> nn.Linear:
    module = nn.Linear(kwargs.get("width", 4), 2)
    return set_constant(module, value)


def set_constant(module: nn.Linear, value: float) -> nn.Linear:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def value_of(module: nn.Module) -> float:
    (value,) = {float(v) for p in module.parameters() for v in p.detach().reshape(-1)}
    return value


def readers_of(store: WeightStore, count: int) -> list[tuple[WeightReader, nn.Linear]]:
    return [(store.reader(index), constant(-1.0)) for index in range(count)]
