# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from torchrl_dvla.weight_update import WeightStore
from torchrl_dvla.weight_update.layout import WeightLayout
from torchrl_dvla.weight_update.source import ModuleTensors


def make_module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_the_live_tensors_are_found_without_a_walk() -> None:
    module = make_module()
    tensors = ModuleTensors(module, WeightLayout(module))
    first = tensors.get()
    assert first is not None
    assert first[0] is module[0].weight
    module[0].weight.data = torch.ones(2, 2)  # the same Parameter with other memory
    second = tensors.get()
    assert second is not None
    assert second[0].data_ptr() == module[0].weight.data_ptr()


def test_every_change_of_the_module_is_noticed() -> None:
    for change in (
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(2, 2))),
        lambda m: setattr(m[0].weight, "data", torch.zeros(3, 2)),
        lambda m: setattr(m[0], "extra", nn.Parameter(torch.zeros(1))),
        lambda m: m[0].register_buffer("extra", torch.zeros(1)),
        lambda m: m.append(nn.Linear(1, 1)),
        lambda m: setattr(m[0], "bias", None),
    ):
        module = make_module()
        tensors = ModuleTensors(module, WeightLayout(module))
        change(module)
        assert tensors.get() is None


def test_a_store_follows_replaced_parameters_and_refuses_new_ones() -> None:
    module = make_module()
    with WeightStore(module) as store:
        module[0].bias = nn.Parameter(torch.full((2,), 5.0))
        store.publish()
        assert store.reader("a").pin()[1]["0", "bias"].tolist() == [5.0, 5.0]
        module.append(nn.Linear(1, 1, bias=False))
        with pytest.raises(ValueError, match=r"2.weight: not in the store"):
            store.publish()


def test_another_published_module_is_not_kept_alive() -> None:
    with WeightStore(make_module()) as store:
        other = make_module()
        store.publish(other)
        gone = weakref.ref(other)
        del other
        gc.collect()
        assert gone() is None
