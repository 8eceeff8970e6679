# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from torchrl_dvla.memory import SharedArena
from torchrl_dvla.weight_update import WeightStore
from torchrl_dvla.weight_update.reader import memory_of

from .linear import constant, readers_of, set_constant, value_of


def test_versions_count_up_from_the_first(store, learner):
    assert (store.version, store.visible_version) == (0, 0)
    assert [store.publish(), store.publish()] == [1, 2]
    assert store.publish(version=10) == 10
    with pytest.raises(ValueError, match="version must grow, got 10 after 10"):
        store.publish(version=10)
    assert store.version == store.visible_version == 10
    with WeightStore(learner, first_version=120) as resumed:
        assert (resumed.version, resumed.publish()) == (120, 121)


def test_a_reader_skips_versions_and_is_never_queued_for(store, learner):
    ((reader, served),) = readers_of(store, 1)
    for value in range(1, 8):
        store.publish(set_constant(learner, value))
    assert reader.adopt_into(served) == 7  # late: it gets the latest at once
    assert value_of(served) == 7.0
    for value in range(8, 11):
        store.publish(set_constant(learner, value))
    assert reader.adopt_into(served) == 10
    stats = store.adoption_stats()["0"]
    assert (stats.version, stats.num_adoptions, stats.num_skipped) == (10, 2, 2)
    assert 0.0 < stats.latency_p50_s <= stats.latency_p99_s
    assert store.adopted_versions() == {"0": 10}


def test_the_worked_trace_of_the_module(store, learner):
    (p, p_module), (q, q_module) = readers_of(store, 2)
    p.adopt_into(p_module), q.adopt_into(q_module)
    store.publish(constant(1.0))
    assert q.adopt_into(q_module) == 1
    store.publish(constant(2.0))
    assert store.stats().num_deferred == 0
    # Slots 0 and 1 are pinned and 2 is the latest: version 3 is taken at once, and deferred.
    assert store.publish(constant(3.0)) == 3
    assert (store.version, store.visible_version) == (3, 2)
    assert store.stats().num_deferred == 1
    assert p.adopt_into(p_module) == 2  # leaves slot 0, into which version 3 moves
    assert p.wait(3, timeout_s=30.0) == 3
    assert (value_of(p_module), value_of(q_module)) == (2.0, 1.0)
    assert p.adopt_into(p_module) == 3
    assert q.adopt_into(q_module) == 3
    assert value_of(p_module) == value_of(q_module) == 3.0
    assert store.stats().num_coalesced == 0


def test_deferred_versions_coalesce(store):
    (p, p_module), (q, q_module) = readers_of(store, 2)
    p.adopt_into(p_module), q.adopt_into(q_module)
    store.publish(constant(1.0))
    q.adopt_into(q_module)
    store.publish(constant(2.0))
    for value in range(3, 9):
        assert store.publish(constant(value)) == value
    assert (store.version, store.visible_version) == (8, 2)
    assert store.stats().num_coalesced == 5  # 3 to 7 were never seen
    with pytest.raises(ValueError, match="finite"):
        store.publish(constant(float("nan")))
    p.unpin()
    assert q.wait(8, timeout_s=30.0) == 8  # the refused version did not hurt the deferred one
    q.adopt_into(q_module)
    assert value_of(q_module) == 8.0


def test_weights_that_are_not_finite_are_refused(store, learner):
    ((reader, served),) = readers_of(store, 1)
    reader.adopt_into(served)
    store.publish(constant(1.0))
    bad = constant(2.0)
    with torch.no_grad():
        bad.weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"infinity in weight \(1 of 8 elements\)"):
        store.publish(bad)
    assert (store.version, store.visible_version, store.stats().num_refused) == (1, 1, 1)
    reader.adopt_into(served)
    assert value_of(served) == 1.0
    assert store.publish(constant(3.0)) == 2
    with WeightStore(bad, check_finite=False) as trusting:
        assert trusting.publish() == 1
    with pytest.raises(ValueError, match="finite"):
        WeightStore(bad)


def test_a_second_layout_is_listed(store):
    with pytest.raises(ValueError, match=r"weight: shape \(2, 5\), the store has \(2, 4\)"):
        store.publish(constant(0.0, width=5))
    ((reader, _),) = readers_of(store, 1)
    with pytest.raises(ValueError, match="module must have the parameters"):
        reader.adopt_into(constant(0.0, width=5))


def test_a_store_is_not_sent_to_another_process(store):
    with pytest.raises(TypeError, match="reader"):
        pickle.dumps(store)


def test_reader_slots(learner):
    with WeightStore(learner, max_readers=2) as store:
        first = store.reader("a")
        with pytest.raises(ValueError, match="'a'"):
            store.reader("a")
        store.reader("b")
        with pytest.raises(RuntimeError, match="All 2 reader slots"):
            store.reader("c")
        first.adopt_into(constant(0.0))
        with pytest.raises(RuntimeError, match="alive"):
            store.release("a")
        store.release(first)
        assert list(store.adopted_versions()) == ["b"]
        assert store.reader("c").reader_slot == first.reader_slot
        with pytest.raises(KeyError, match="No reader is called 'a'"):
            store.release("a")
        with pytest.raises(RuntimeError, match="closed"):
            first.adopt_into(constant(0.0))


def test_a_reader_may_be_released_while_another_thread_looks_at_all(store, monkeypatch):
    readers_of(store, 2)
    store.publish()
    registry, state = store._registry, store._registry._ledger.state

    def release_first(slot):
        registry._slots.pop("0", None)
        return state(slot)

    monkeypatch.setattr(registry._ledger, "state", release_first)
    assert "1" in registry.take_adoptions()


def test_wait_names_who_is_behind(store):
    (fast, fast_module), (slow, slow_module) = readers_of(store, 2)
    store.publish()
    fast.adopt_into(fast_module)
    with pytest.raises(TimeoutError, match=r"by \{'1': -1\}"):
        store.wait(timeout_s=0.0)
    slow.adopt_into(slow_module)
    store.wait(timeout_s=0.0)
    store.publish()
    with pytest.raises(TimeoutError, match=r"\{'0': 1, '1': 1\}"):
        store.wait(2, timeout_s=0.0)
    store.wait(1, timeout_s=0.0)


def test_a_closed_store_leaves_its_readers_their_weights(learner):
    store = WeightStore(set_constant(learner, 5.0))
    reader, served = store.reader("a"), constant(0.0)
    reader.adopt_into(served)
    store.close()
    store.close()
    assert value_of(served) == 5.0
    assert reader.adopt_into(served) == 0
    reader.unpin()
    assert reader.adopt_into(served) == 0  # what is visible can still be pinned
    assert not reader._is_writer_alive()
    with pytest.raises(TimeoutError, match="is gone"):
        reader.wait(1, timeout_s=0.0)
    assert store.adopted_versions() == {"a": 0}  # as it was at the end
    assert store.version == 0
    with pytest.raises(RuntimeError, match="closed"):
        store.publish()
    with pytest.raises(RuntimeError, match="closed"):
        store.wait()


def test_memory_goes_with_the_store_and_its_last_reader(learner):
    store = WeightStore(learner)
    arena = weakref.ref(store._segment._arena._map)
    reader, served = store.reader("a"), constant(0.0)
    reader.adopt_into(served)
    store.close()
    gc.collect()
    assert arena() is not None
    del reader, served
    gc.collect()
    assert arena() is None


def test_frozen_weights_are_stored_once_and_shared(learner):
    def build() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[0].requires_grad_(False)
        return model

    source, served = build(), build()
    with WeightStore(source, trainable_only=True) as store:
        reader = store.reader("a")
        reader.adopt_into(served)
        frozen, live = served[0].weight.data_ptr(), served[1].weight.data_ptr()
        torch.testing.assert_close(served[0].weight, source[0].weight, rtol=0, atol=0)
        with torch.no_grad():
            source[1].weight.add_(1.0)
        store.publish()
        reader.adopt_into(served)
        assert served[0].weight.data_ptr() == frozen
        assert served[1].weight.data_ptr() != live
        torch.testing.assert_close(served[1].weight, source[1].weight, rtol=0, atol=0)
        assert store.stats().bytes_total == 2 * 4 * (64 + 8)
        source[0] = nn.Linear(8, 8).requires_grad_(False)  # would never reach a reader
        with pytest.raises(ValueError, match="keep its frozen weights, got another '0.weight'"):
            store.publish()


def test_a_narrow_transport_is_widened_by_the_reader():
    source = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        source.weight.fill_(1.0 + 2.0**-9)  # between the bfloat16 values 1 and 1 + 2**-7
    with WeightStore(source, transport_dtype=torch.bfloat16) as store:
        exact, narrow = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False).bfloat16()
        reader = store.reader("a")
        reader.adopt_into(exact), reader.adopt_into(narrow)
        assert exact.weight.dtype == torch.float32
        assert exact.weight.item() == narrow.weight.item() == 1.0


def test_the_memory_can_come_from_a_pool(learner):
    class Pool:
        def arena(self, nbytes: int, name: str) -> SharedArena:
            taken.append((nbytes, name))
            return SharedArena(nbytes)

    taken: list[tuple[int, str]] = []
    with WeightStore(learner, num_slots=4, model_pool=Pool()) as store:  # type: ignore[arg-type]
        assert store.publish() == 1
    assert taken == [(WeightStore.bytes_for(learner, 4), "weight slots")]
    assert WeightStore.bytes_for(learner, 4) - WeightStore.bytes_for(learner, 3) == 4096


def test_counters(store):
    for _ in range(3):
        store.publish()
    stats = store.stats()
    assert stats.num_publishes == 4  # the first version counts
    assert stats.bytes_total == 4 * 4 * (8 + 2)
    assert 0.0 < stats.stall_last_s <= stats.stall_max_s


def test_a_deepcopy_of_a_served_module_owns_its_memory(store, learner):
    ((reader, served),) = readers_of(store, 1)
    reader.adopt_into(served)
    snapshot = copy.deepcopy(served)
    for value in range(1, 6):
        store.publish(constant(value))
        reader.adopt_into(served)
    assert value_of(snapshot) == 0.0
    assert value_of(served) == 5.0


def test_adoptions_are_taken_once(store):
    (first, first_module), (second, _) = readers_of(store, 2)
    first.adopt_into(first_module)
    store.publish(), store.publish()
    first.adopt_into(first_module)
    taken = store.take_adoptions()
    assert {name: [a.version for a in adoptions] for name, adoptions in taken.items()} == {
        "0": [0, 2],
        "1": [],
    }
    for adoption in taken["0"]:
        assert adoption.published_s <= adoption.start_s <= adoption.end_s
        assert adoption.latency_s == adoption.end_s - adoption.published_s
    second.pin()
    assert [len(adoptions) for adoptions in store.take_adoptions().values()] == [0, 1]
    for _ in range(70):  # nobody takes them meanwhile: the oldest are forgotten
        store.publish()
        first.adopt_into(first_module)
    # Of 64 places the next adoption's may be half written, so 63 are safe to read.
    assert [a.version for a in store.take_adoptions()["0"]] == list(range(10, 73))
    store.release(first)
    store.reader("0").pin()  # the next of that name begins anew
    assert [a.version for a in store.take_adoptions()["0"]] == [72]


# -- idle readers ----------------------------------------------------------------------------------
def test_readers_plus_two_slots_never_defer(learner):
    with WeightStore(learner, num_slots=5) as store:
        served = readers_of(store, 3)
        for version, (reader, module) in enumerate(served):
            assert reader.adopt_into(module) == version  # three readers on three versions
            store.publish()
        for _ in range(10):
            store.publish()
        assert store.stats().num_deferred == 0
        assert store.adopted_versions() == {"0": 0, "1": 1, "2": 2}


def test_an_idle_reader_holds_up_nobody_on_three_slots(store):
    (idle, idle_module), (busy, busy_module), (other, other_module) = readers_of(store, 3)
    idle.adopt_into(idle_module)  # version 0; it never comes to another batch
    for version in range(1, 21):
        assert store.publish(constant(version)) == version
        assert busy.adopt_into(busy_module) == version
        assert other.adopt_into(other_module) == version
        assert value_of(busy_module) == value_of(other_module) == version
    assert (store.stats().num_deferred, store.visible_version) == (0, 20)
    assert value_of(idle_module) == 0.0
    late = store.reader("late")
    assert late.pin()[0] == 20
    late.close()


def test_two_idle_readers_keep_the_others_at_the_latest_visible_version(store):
    (first, first_module), (second, second_module), (busy, busy_module) = readers_of(store, 3)
    first.adopt_into(first_module)
    store.publish(constant(1.0))
    second.adopt_into(second_module)
    store.publish(constant(2.0))
    assert busy.adopt_into(busy_module) == 2  # the third slot: now each has one
    for version in range(3, 8):
        assert store.publish(constant(version)) == version  # the learner goes on
        assert not busy.has_update() and busy.adopt_into(busy_module) == 2
    assert (store.visible_version, store.stats().num_deferred) == (2, 5)
    assert [value_of(m) for m in (first_module, second_module, busy_module)] == [0.0, 1.0, 2.0]
    first.unpin()  # what the guide asks of a reader before an idle time
    assert busy.wait(7, timeout_s=30.0) == 7
    assert busy.adopt_into(busy_module) == 7 and value_of(busy_module) == 7.0
    for version in range(8, 12):  # one alone is no obstacle
        store.publish(constant(version))
        assert busy.adopt_into(busy_module) == version
    assert store.stats().num_deferred == 5
    assert value_of(second_module) == 1.0


def test_weights_made_for_one_publication_are_not_taken_for_what_lives_where_they_were():
    with WeightStore(constant(0.0)) as store:
        made = constant(1.0)
        addresses = memory_of(made)
        store.publish(made)
        assert store.publishes_from(addresses)
        del made
        gc.collect()
        assert not store.publishes_from(addresses)


# -- weights that come one after the other ---------------------------------------------------------


def test_weights_that_come_one_by_one_are_copied_and_let_go(learner, store):
    alive, most = weakref.WeakSet(), 0

    def gathered():
        nonlocal most
        for name, parameter in learner.named_parameters():
            tensor = parameter.detach() + 1.0
            alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    served = copy.deepcopy(learner)
    reader = store.reader("worker 0")
    assert store.publish(gathered()) == 1
    assert reader.adopt_into(served) == 1
    for name, parameter in learner.named_parameters():
        assert torch.equal(served.get_parameter(name), parameter + 1.0)
    assert most == 1
    reader.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights[1:], "weight: missing"),
        (lambda weights: [*weights, ("other", torch.ones(1))], "other: not in the store"),
        (lambda weights: [(weights[0][0], torch.ones(7)), *weights[1:]], r"weight: \(7,\)"),
        (
            lambda weights: [(name, tensor * torch.nan) for name, tensor in weights],
            "must be finite",
        ),
    ],
)
def test_weights_one_by_one_are_checked_and_asked_for_to_the_end(learner, store, change, message):
    weights = iter(change([(name, p.detach()) for name, p in learner.named_parameters()]))
    with pytest.raises(ValueError, match=message):
        store.publish(weights)
    assert next(weights, None) is None
    assert store.version == 0
    assert store.publish() == 1  # the slot is free again
