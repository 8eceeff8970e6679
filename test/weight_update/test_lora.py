# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Low-rank adapters, in layers with the names and attributes that PEFT gives them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrl_dvla.weight_update import WeightStore
from torchrl_dvla.weight_update.weight_layout import WeightLayout


class LoraLinear(nn.Module):
    """A linear layer with adapters; ``x @ W.T + bias + sum(scaling * x @ A.T @ B.T)``."""

    def __init__(
        self, base: nn.Linear, rank: int = 2, alpha: float = 3.0, adapters: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        names = adapters or ("default",)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        for name in names:
            self.lora_A[name] = nn.Linear(base.in_features, rank, bias=False)
            self.lora_B[name] = nn.Linear(rank, base.out_features, bias=False)
        self.scaling = {name: alpha / rank * (1 + i) for i, name in enumerate(names)}
        self.active_adapters = list(names)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(inputs)
        for name in self.active_adapters:
            out = out + self.scaling[name] * self.lora_B[name](self.lora_A[name](inputs))
        return out


class Model(nn.Module):
    """Two layers and a norm with buffers; only the first layer is ever adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.norm(self.first(inputs))))


class Wrapped(nn.Module):
    """The two levels that PEFT puts around an adapted model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base_model.model(inputs)


def adapted(adapters: tuple[str, ...] = (), *, wrapped: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Model().requires_grad_(False).eval()
    model.first = LoraLinear(model.first, adapters=adapters)
    return Wrapped(model) if wrapped else model


def layer_of(learner: nn.Module) -> LoraLinear:
    return learner.get_submodule("base_model.model.first")  # type: ignore[return-value]


def train(learner: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if "lora_" in name:
                parameter.normal_()


INPUTS = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("option", ["trainable_only", "lora_only"])
@pytest.mark.parametrize("adapters", [(), ("one", "two")])
def test_a_plain_model_serves_the_merged_weights(option, adapters):
    learner, served = adapted(adapters), Model().requires_grad_(False).eval()
    train(learner)
    with WeightStore(learner, **{option: True}) as store:  # type: ignore[arg-type]
        reader = store.reader("a")
        for version in range(4):
            assert reader.adopt_into(served) == version
            torch.testing.assert_close(served(INPUTS), learner(INPUTS), rtol=1e-5, atol=1e-5)
            train(learner)
            store.publish()


def test_frozen_weights_travel_once_and_only_adapted_layers_are_private():
    learner, served = adapted(), Model().requires_grad_(False).eval()
    with WeightStore(learner, lora_only=True) as store:
        # A is [2, 6], B is [5, 2], of 4 bytes each: 22 elements, once at the start and once more.
        assert store.layout.weight_bytes == 4 * 22
        first, second = store.reader("first"), store.reader("second")
        other = Model().requires_grad_(False).eval()
        first.adopt_into(served), second.adopt_into(other)
        store.publish()
        assert store.stats().bytes_total == 2 * 4 * 22
        # The frozen weights are the store's, one copy for all; the merged one is each reader's own.
        assert served.second.weight.data_ptr() == other.second.weight.data_ptr()
        assert served.norm.running_mean.data_ptr() == other.norm.running_mean.data_ptr()
        assert served.first.weight.data_ptr() != other.first.weight.data_ptr()
        # Nothing of a slot is read after the merge, so nothing stays pinned.
        for _ in range(5):
            store.publish()
        assert store.stats().num_deferred == 0


def test_a_reader_on_an_old_slot_keeps_its_adapters_while_new_ones_are_published():
    learner, old = adapted(), adapted()
    with WeightStore(learner, lora_only=True) as store:
        holder, late = store.reader("holder"), store.reader("late")
        train(learner)
        assert store.publish() == 1
        assert holder.adopt_into(old) == 1
        before = learner(INPUTS)
        for version in range(2, 6):  # more versions than there are slots
            train(learner)
            assert store.publish() == version
            torch.testing.assert_close(old(INPUTS), before, rtol=0, atol=0)
        assert (store.visible_version, store.stats().num_deferred) == (5, 0)
        plain = Model().requires_grad_(False).eval()
        assert late.adopt_into(plain) == 5  # merges from the latest slot beside the held one
        torch.testing.assert_close(plain(INPUTS), learner(INPUTS), rtol=1e-5, atol=1e-5)
        assert holder.adopt_into(old) == 5
        torch.testing.assert_close(old(INPUTS), learner(INPUTS), rtol=0, atol=0)
        assert store.stats().bytes_total == 6 * 4 * 22  # 22 elements of the adapters, six times


def test_merging_again_and_again_adds_no_error():
    learner, served = adapted(), Model().requires_grad_(False).eval()
    train(learner)
    with WeightStore(learner, lora_only=True) as store:
        reader = store.reader("a")
        reader.adopt_into(served)
        expected = served.first.weight.clone()
        factors = [p.detach().clone() for n, p in learner.named_parameters() if "lora_" in n]
        for _ in range(50):  # far away, and back
            train(learner)
            store.publish()
            reader.adopt_into(served)
        with torch.no_grad():
            adapters = [p for n, p in learner.named_parameters() if "lora_" in n]
            torch._foreach_copy_(adapters, factors)
        store.publish()
        reader.adopt_into(served)
        torch.testing.assert_close(served.first.weight, expected, rtol=0, atol=0)
        base = layer_of(learner).base_layer.weight
        a, b = factors
        torch.testing.assert_close(expected, base + 1.5 * (b @ a))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_reader_of_another_precision_and_one_on_the_meta_device(dtype):
    learner = adapted(wrapped=False)
    train(learner)
    narrow = Model().to(dtype).requires_grad_(False).eval()
    with torch.device("meta"):
        meta = Model().requires_grad_(False).eval()
    with WeightStore(learner, lora_only=True) as store:
        readers = [store.reader(index) for index in range(2)]
        readers[0].adopt_into(narrow), readers[1].adopt_into(meta)
        torch.testing.assert_close(meta(INPUTS), learner(INPUTS), rtol=1e-5, atol=1e-5)
        exact = learner.first.base_layer.weight + 1.5 * (  # type: ignore[union-attr, operator]
            learner.first.lora_B["default"].weight @ learner.first.lora_A["default"].weight  # type: ignore[union-attr, index, operator]
        )
        torch.testing.assert_close(narrow.first.weight, exact.to(dtype))
        assert narrow.first.weight.dtype == dtype


def test_an_adapter_without_a_name_and_a_transposed_base():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Module()
            self.base_layer.weight = nn.Parameter(torch.randn(6, 5), requires_grad=False)
            self.lora_A = nn.Linear(6, 2, bias=False)
            self.lora_B = nn.Linear(2, 5, bias=False)
            self.scaling = 0.5
            self.fan_in_fan_out = True

    learner = Layer()
    served = nn.Module()
    served.weight = nn.Parameter(torch.zeros(6, 5), requires_grad=False)
    with WeightStore(learner, lora_only=True) as store:
        reader = store.reader("a")
        reader.adopt_into(served)
        delta = 0.5 * learner.lora_B.weight @ learner.lora_A.weight
        torch.testing.assert_close(served.weight.data, learner.base_layer.weight.data + delta.t())


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("use_dora", {"default": True}, "first.weight: it is a DoRA adapter"),
        ("lora_bias", {"default": True}, "it has a bias"),
        ("merged", True, "unmerge it"),
        ("scaling", {}, "no number `scaling`"),
    ],
)
def test_what_cannot_be_merged_is_named(attribute, value, message):
    learner = adapted()
    setattr(layer_of(learner), attribute, value)
    with WeightStore(learner, lora_only=True) as store:
        reader = store.reader("a")
        with pytest.raises(ValueError, match=message):
            reader.adopt_into(Model())
        reader.adopt_into(adapted())  # with the adapters there is nothing to merge


@pytest.mark.parametrize("name", ["lora_embedding_A", "lora_A"])
def test_an_adapter_of_another_form_is_named(name):
    learner = adapted(wrapped=False)
    learner.second = nn.Module()  # its base has no "weight", or its factors are no modules
    learner.second.base_layer = nn.Linear(5, 3, bias=False) if name != "lora_A" else nn.Module()
    factor = nn.Linear(5, 2, bias=False) if name == "lora_A" else nn.Parameter(torch.ones(5, 2))
    container = nn.ModuleDict if name == "lora_A" else nn.ParameterDict
    learner.second.add_module(name, container({"default": factor}))
    updates = WeightLayout(learner).lora_updates
    assert set(updates) == {"first.weight", *[n for n in updates if n.startswith(f"second.{name}")]}
    assert [bool(update.obstacle) for update in updates.values()] == [False, True]
    learner.second.active_adapters = []
    assert set(WeightLayout(learner).lora_updates) == {"first.weight"}


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_a_weight_that_only_one_of_its_two_names_adapts_is_not_tied_in_the_reader(order):
    def tied(names):
        model = nn.Module()
        for name in names:
            model.add_module(name, nn.Linear(4, 4, bias=False))
        model.second.weight = model.first.weight
        return model.requires_grad_(False)

    learner, served = tied(order), tied(order)
    learner.first = LoraLinear(learner.first)
    with WeightStore(learner, lora_only=True) as store:
        with pytest.raises(ValueError, match="must not tie .* one with and one without an adapter"):
            store.reader("a").adopt_into(served)
        with torch.device("meta"):
            missing = tied(order)
        store.reader("b").adopt_into(missing)  # which leaves nothing tied
    assert torch.equal(missing.second.weight, learner.second.weight)
    assert not torch.equal(missing.first.weight, missing.second.weight)


def test_an_inactive_adapter_is_left_out():
    learner = adapted(("one", "two"))
    layer_of(learner).active_adapters = ["two"]
    layout = WeightLayout(learner, lora_only=True)
    (update,) = layout.lora_updates.values()
    assert [scaling for _, _, scaling in update.factors] == [3.0]


def test_differences_of_a_plain_reader_use_its_names():
    with WeightStore(adapted(), lora_only=True) as store:
        wide = Model()
        wide.first = nn.Linear(7, 5)
        with pytest.raises(ValueError, match=r"first.weight: shape \(5, 7\), the store has \(5, 6"):
            store.reader("a").adopt_into(wide)


def test_lora_only_needs_adapters_and_nothing_else_that_is_trained():
    with pytest.raises(ValueError, match="lora_only must leave something to publish"):
        WeightStore(Model(), lora_only=True)
    learner = adapted()
    learner.get_submodule("base_model.model.second").requires_grad_(True)
    with pytest.raises(ValueError, match=r"must keep 'base_model.model.second.\w+' frozen"):
        WeightStore(learner, lora_only=True)
