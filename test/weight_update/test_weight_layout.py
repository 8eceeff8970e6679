# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_dvla.weight_update import WeightStore
from torchrl_dvla.weight_update.weight_layout import WeightLayout, named_weights


def test_entries_are_contiguous_by_dtype_on_cache_lines():
    source = {
        "a": torch.zeros(3),  # 12 bytes
        "count": torch.zeros((), dtype=torch.int64),
        "b": torch.zeros(5, 4),  # 80 bytes
    }
    layout = WeightLayout(source)
    placed = [(e.name, e.dtype, e.offset_bytes) for e in layout.entries]
    # float32 comes first in the source: a at 0, b on the next line at 64; 64 + 80 = 144 -> 192.
    expected = [("a", torch.float32, 0), ("b", torch.float32, 64), ("count", torch.int64, 192)]
    assert placed == expected
    assert [(b.dtype, b.offset_bytes, b.numel) for b in layout.buckets] == [
        (torch.float32, 0, 48),  # 192 bytes
        (torch.int64, 192, 8),  # 64 bytes
    ]
    assert layout.slot_bytes == 4096
    assert layout.weight_bytes == 12 + 80 + 8


def test_a_module_and_its_tensordict_have_the_same_layout():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    from_module = WeightLayout(module)
    from_tensordict = WeightLayout(TensorDict.from_module(module))
    assert sorted(from_module.index_of) == sorted(from_tensordict.index_of)
    assert from_module.differences(TensorDict.from_module(module)) == []
    assert from_tensordict.differences(module) == []


def test_tied_weights_are_one_entry_with_two_names():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    layout = WeightLayout(module)
    assert [entry.names for entry in layout.entries] == [("0.weight", "1.weight")]
    assert layout.weight_bytes == 64
    untied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    difference = "0.weight, 1.weight: one tensor in the store, several here"
    assert layout.differences(untied) == [difference]
    assert layout.differences(untied, as_reader=True) == []


def test_dense_strides_are_kept_and_others_made_contiguous():
    source = {
        "transposed": torch.zeros(2, 3).t(),
        "channels_last": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.zeros(1, 3).expand(2, 3),
        "sliced": torch.zeros(4, 4)[:, ::2],
    }
    strides = {entry.name: entry.stride for entry in WeightLayout(source).entries}
    assert strides == dict(zip(source, [(1, 3), (48, 1, 12, 3), (3, 1), (2, 1)]))


def test_frozen_parameters_leave_the_slots():
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    module[0].requires_grad_(False)
    layout = WeightLayout(module, trainable_only=True)
    assert [e.name for e in layout.entries if e.is_frozen] == ["0.weight", "0.bias"]
    assert layout.frozen_bytes == 4096
    # weight, bias, running_mean, running_var of 8 floats and one int64
    assert layout.weight_bytes == 4 * 32 + 8
    module[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"keep '0.weight' frozen"):
        layout.tensors_of(module)
    with pytest.raises(ValueError, match="all frozen"):
        WeightLayout(nn.Linear(2, 2).requires_grad_(False), trainable_only=True)


def test_transport_dtype_narrows_floats_only():
    layout = WeightLayout(nn.BatchNorm1d(2), transport_dtype=torch.bfloat16)
    dtypes = {entry.name: (entry.dtype, entry.source_dtype) for entry in layout.entries}
    assert dtypes["weight"] == (torch.bfloat16, torch.float32)
    assert dtypes["num_batches_tracked"] == (torch.int64, torch.int64)
    with pytest.raises(ValueError, match="floating-point"):
        WeightLayout(nn.Linear(1, 1), transport_dtype=torch.int8)


def test_each_difference_is_named():
    layout = WeightLayout({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)})
    other = {"a": torch.zeros(4), "b": torch.zeros(3, dtype=torch.float64), "d": torch.zeros(1)}
    assert layout.differences(other) == [
        "c: missing",
        "a: shape (4,), the store has (2,)",
        "b: torch.float64, the store has torch.float32",
        "d: not in the store, shape (1,)",
    ]
    with pytest.raises(ValueError, match=r"got 4 differences:\n  c: missing"):
        layout.tensors_of(other)


def test_live_tensors_come_in_the_order_of_the_entries():
    source = {"a": torch.zeros(1), "n": torch.zeros(1, dtype=torch.int64), "b": torch.ones(1)}
    layout = WeightLayout(source)
    assert [t.item() for t in layout.tensors_of(source)] == [0.0, 1.0, 0]
    nested = layout.unflatten(layout.tensors_of(source))
    assert nested["b"].item() == 1.0


def test_nothing_and_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        WeightLayout(nn.ReLU())
    with pytest.raises(ValueError, match="uninitialised"):
        named_weights(nn.LazyLinear(2))


# -- sources that change between two publishes -----------------------------------------------------
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs))


class Adapted(nn.Module):
    """What PEFT puts in the place of a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "head", nn.Linear(2, 2)),
        lambda net: setattr(net.head, "bias", nn.Parameter(torch.full((2,), 5.0))),
        lambda net: setattr(net.head.weight, "data", torch.ones(2, 2)),
    ],
    ids=["layer", "parameter", "memory"],
)
@pytest.mark.parametrize("is_published_before", [False, True])
def test_what_was_replaced_in_a_module_is_published(change, is_published_before):
    learner, served, inputs = Net(), Net(), torch.ones(1, 2)
    with WeightStore(learner) as store:
        reader = store.reader("a")
        if is_published_before:
            store.publish(), reader.adopt_into(served)
        change(learner)
        for weights in (None, learner):
            reader.adopt_into(served), store.publish(weights)
            assert reader.adopt_into(served) == store.version
            torch.testing.assert_close(served(inputs), learner(inputs), rtol=0, atol=0)
            with torch.no_grad():
                learner.head.weight.add_(1.0)
        reader.close()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda m: setattr(m, "head", Adapted(m.head)), "head.lora_A.weight: not in the store"),
        (lambda m: setattr(m, "body", nn.Sequential(m.body)), "body.0.weight: not in the store"),
        (lambda m: setattr(m, "head", nn.Linear(2, 3)), r"head.weight: shape \(3, 2\), the store"),
        (lambda m: setattr(m.head, "bias", None), "head.bias: missing"),
        (lambda m: setattr(m.head, "extra", nn.Parameter(torch.zeros(1))), "head.extra: not in"),
        (lambda m: m.head.register_buffer("extra", torch.zeros(1)), "head.extra: not in"),
        (lambda m: m.double(), "torch.float64, the store has torch.float32"),
    ],
)
def test_a_module_that_no_longer_fits_is_refused_by_name(change, difference):
    learner = Net()
    with WeightStore(learner) as store:
        store.publish()
        change(learner)
        with pytest.raises(ValueError, match=difference):
            store.publish()
        assert store.version == 1


def test_weights_tied_or_untied_after_the_store_was_made():
    def publish(learner: Net, served: Net, change: Callable[[Net], None]) -> None:
        with WeightStore(learner) as store:
            change(learner)
            store.publish()
            store.reader("a").adopt_into(served)
            for name, weight in named_weights(learner).items():
                assert named_weights(served)[name].equal(weight)

    def tie(net: Net) -> Net:
        net.head.weight = net.body.weight
        return net

    def untie(net: Net) -> None:
        net.head.weight = nn.Parameter(net.body.weight.detach() + 1.0)

    def step(net: Net) -> None:
        with torch.no_grad():
            net.body.weight.add_(1.0)

    publish(tie(Net()), tie(Net()), step)  # one entry, and one copy
    publish(Net(), Net(), tie)  # two entries that are equal
    with pytest.raises(ValueError, match="body.weight, head.weight: one tensor in the store, sev"):
        publish(tie(Net()), tie(Net()), untie)
