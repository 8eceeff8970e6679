# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from torchrl_dvla.memory import ModelPool
from torchrl_dvla.swimlane.managed_process import pickled
from torchrl_dvla.weight_update import WeightStore
from torchrl_dvla.weight_update import reader as reader_module
from torchrl_dvla.weight_update.segment import slot_byte

from .linear import constant, readers_of, value_of


class Zoo(nn.Module):
    """Tied weights, a transposed parameter, channels_last, buffers of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.randn(4, 4)[:, ::2], persistent=False)
        self.blocks = nn.ModuleList([nn.Linear(2, 2)] * 2)  # one module in two places


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same(served: nn.Module, source: nn.Module) -> None:
    for name, tensor in weights_of(source).items():
        torch.testing.assert_close(weights_of(served)[name], tensor, rtol=0, atol=0)


@pytest.fixture
def zoo() -> Iterator[tuple[Zoo, WeightStore]]:
    source = Zoo()
    with WeightStore(source) as store:
        yield source, store


def test_every_kind_of_weight_is_adopted_in_place(zoo):
    source, store = zoo
    served, reader = Zoo(), store.reader("a")
    before = weights_of(served)
    reader.adopt_into(served)
    assert_same(served, source)
    # The Parameter objects stay: optimizers, hooks and references to them do not notice.
    assert all(weights_of(served)[name] is tensor for name, tensor in before.items())
    assert served.head.weight is served.embedding.weight
    assert served.transposed.stride() == source.transposed.stride() == (1, 5)
    assert served.conv.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for tensor in weights_of(source).values():
            tensor.add_(1)
    store.publish()
    assert reader.adopt_into(served) == 1
    assert_same(served, source)


def test_readers_share_memory_instead_of_copying_it(zoo):
    _, store = zoo
    first, second = Zoo(), Zoo()
    readers = store.reader("a"), store.reader("b")
    for reader, module in zip(readers, (first, second), strict=True):
        reader.adopt_into(module)
    with torch.no_grad():
        first.conv.weight[0, 0, 0, 0] = 123.0
    assert second.conv.weight[0, 0, 0, 0].item() == 123.0


def test_modules_on_the_meta_device_get_real_weights(zoo):
    source, store = zoo
    with torch.device("meta"):
        served = Zoo()
    reader = store.reader("a")
    reader.adopt_into(served)
    assert_same(served, source)
    assert served.head.weight is served.embedding.weight
    assert not any(p.requires_grad for p in served.parameters())
    with torch.no_grad():
        source.conv.bias.fill_(4.0)
    store.publish()
    reader.adopt_into(served)
    assert_same(served, source)


def test_a_module_of_another_precision_keeps_it_and_lets_the_slot_go():
    source, served = nn.Linear(4, 2), nn.Linear(4, 2).double()
    with WeightStore(source) as store:
        reader = store.reader("a")
        reader.adopt_into(served)
        assert served.weight.dtype == torch.float64
        torch.testing.assert_close(served.weight, source.weight.double(), rtol=0, atol=0)
        # Nothing is pinned, so three slots never defer, however long this reader rests.
        for _ in range(5):
            store.publish()
        assert store.stats().num_deferred == 0


def test_what_is_frozen_is_copied_once():
    source, served = nn.Linear(4, 2), nn.Linear(4, 2).double()
    source.bias.requires_grad_(False)
    with WeightStore(source, trainable_only=True) as store:
        reader = store.reader("a")
        reader.adopt_into(served)
        torch.testing.assert_close(served.bias, source.bias.double(), rtol=0, atol=0)
        with torch.no_grad():
            served.bias.fill_(5.0)  # which another copy would undo
            source.weight.fill_(1.0)
        store.publish()
        assert reader.adopt_into(served) == 1
        assert served.bias.tolist() == [5.0, 5.0]
        assert bool((served.weight == 1.0).all())


def test_learner_store_and_readers_have_frozen_weights_once():
    learner, served = nn.Linear(4, 2), nn.Linear(4, 2)
    learner.bias.requires_grad_(False)
    bias = learner.bias.tolist()
    pool = ModelPool("1MB")
    with WeightStore(learner, trainable_only=True, model_pool=pool) as store:
        reader = store.reader("a")
        reader.adopt_into(served)
        assert learner.bias.tolist() == served.bias.tolist() == bias
        with torch.no_grad():
            served.bias.fill_(5.0)
            served.weight[0] = learner.weight[0]
        assert learner.bias.tolist() == [5.0, 5.0], "it is the same memory"
        copied = reader.copy_of(served)
        with torch.no_grad():
            learner.weight.fill_(1.0)
        store.publish()
        reader.adopt_into(served)
        assert bool((served.weight == 1.0).all())
        assert not bool((copied.weight == 1.0).any()), "it stays at its version"
        assert copied.bias is served.bias
    pool.close()
    del served, copied, reader
    assert learner.bias.tolist() == [5.0, 5.0], "the learner goes on with them"


@pytest.mark.parametrize("options", [{}, {"trainable_only": True, "transport_dtype": torch.half}])
def test_what_the_store_has_otherwise_stays_with_the_learner(options):
    learner = nn.Linear(4, 2)
    learner.bias.requires_grad_(False)
    addresses = learner.weight.data_ptr(), learner.bias.data_ptr()
    with WeightStore(learner, **options):
        assert (learner.weight.data_ptr(), learner.bias.data_ptr()) == addresses


def test_a_module_is_sent_without_what_the_store_provides():
    source = nn.LSTM(64, 64)  # it keeps a list of its parameters besides
    with WeightStore(source) as store:
        provided = store.provides(source)
        sent = pickled(source, "policy", without=provided)
        assert len(provided) == 4
        assert len(sent) < source.weight_ih_l0.nbytes / 4
        served = pickle.loads(sent)
        store.reader("a").adopt_into(served)
        x = torch.ones(1, 1, 64)
        torch.testing.assert_close(served(x)[0], source(x)[0], rtol=0, atol=0)
    with WeightStore(source, transport_dtype=torch.bfloat16) as store:
        assert store.provides(source) == [], "its reader keeps what it came with, and rounds"


def test_a_copying_reader_leaves_the_modules_memory_alone(zoo):
    source, store = zoo
    served, reader = Zoo(), store.reader("a")
    addresses = {name: t.data_ptr() for name, t in weights_of(served).items()}
    reader.adopt_into(served, copy=True)
    assert_same(served, source)
    assert addresses == {name: t.data_ptr() for name, t in weights_of(served).items()}


def test_all_modules_of_a_reader_move_together(store):
    (reader, actor), evaluator = readers_of(store, 1)[0], constant(-1.0)
    reader.adopt_into(actor), reader.adopt_into(evaluator)
    store.publish(constant(8.0))
    assert reader.adopt_into(actor) == 1
    assert value_of(evaluator) == 8.0
    # ... and so does what pin() moves.
    store.publish(constant(9.0))
    version, weights = reader.pin()
    assert (version, weights["weight"].unique().item()) == (2, 9.0)
    assert value_of(actor) == 9.0


def test_after_unpin_the_next_adoption_points_at_whole_weights_again(store):
    ((reader, served),) = readers_of(store, 1)
    reader.adopt_into(served)
    reader.unpin()
    for value in range(1, 5):
        store.publish(constant(value))
    assert reader.adopt_into(served) == 4
    assert value_of(served) == 4.0
    assert reader.pin()[0] == reader.pin()[0] == 4  # nothing new: the same pin


def test_the_published_module_and_a_second_reader_are_refused(learner, store):
    (first, served), (second, _) = readers_of(store, 2)
    with pytest.raises(ValueError, match="learner's own"):
        first.adopt_into(learner)
    first.adopt_into(served)
    with pytest.raises(ValueError, match="reader '0' serves"):
        second.adopt_into(served)
    first.close()
    second.adopt_into(served)


def test_a_reader_tied_otherwise_than_the_store_is_refused():
    def build(tied: bool) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        if tied:
            model[1].weight = model[0].weight
        return model

    with WeightStore(build(tied=False)) as store:
        with pytest.raises(ValueError, match=r"must not tie '1.weight' to '0.weight'"):
            store.reader("a").adopt_into(build(tied=True))
    with WeightStore(build(tied=True)) as store:  # the other way round every name has its tensor
        served = build(tied=False)
        store.reader("a").adopt_into(served)
        assert served[0].weight.data_ptr() == served[1].weight.data_ptr()


def test_a_module_keeps_its_reader_alive(store):
    served = constant(-1.0)
    store.reader("a").adopt_into(served)
    gc.collect()
    for value in range(1, 6):
        store.publish(constant(value))
    assert value_of(served) == 0.0  # still pinned
    del served
    gc.collect()
    with pytest.raises(RuntimeError, match=r"\['a'\] died"):
        store.wait(timeout_s=0.0)
    store.release("a")


def test_one_reader_serves_one_holder(store):
    reader = store.reader("a")
    twin = copy.copy(reader)  # as two children that were given one reader would have
    reader.pin()
    with pytest.raises(RuntimeError, match="in use by another"):
        twin.pin()
    reader.close()
    with pytest.raises(RuntimeError, match="released"):
        twin.pin()


def test_reading_inside_inference_mode(store):
    ((reader, served),) = readers_of(store, 1)
    with torch.inference_mode():
        reader.adopt_into(served)
    store.publish(constant(2.0))
    with torch.inference_mode():
        assert reader.adopt_into(served) == 1
        assert served(torch.ones(4)).tolist() == [10.0, 10.0]
    assert not served.weight.is_inference()


def test_a_slot_stays_pinned_until_its_copy_to_a_device_has_ended(monkeypatch):
    """The order alone: what CUDA does is not run here."""
    is_free: list[bool] = []
    with WeightStore(nn.Linear(1, 1)) as store:
        reader, other = store.reader("a"), store._segment.locks.open()

        def is_slot_free() -> bool:
            return not other.is_held_by_others(slot_byte(store._ledger.latest_slot))

        monkeypatch.setattr(
            reader_module, "wait_for_devices", lambda tensors: is_free.append(is_slot_free())
        )
        served = nn.Linear(1, 1)
        reader.adopt_into(served, copy=True)
        assert is_free == [False]
        assert is_slot_free()
        reader.close()
