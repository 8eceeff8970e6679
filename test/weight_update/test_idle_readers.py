# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Readers that rest between two batches keep their slot: what that costs the others."""

from __future__ import annotations

from torchrl_dvla.weight_update import WeightStore

from .linear import constant, readers_of, value_of


def test_a_reader_that_rests_for_ever_on_three_slots_holds_up_nobody(store: WeightStore) -> None:
    (idle, idle_module), (busy, busy_module), (other, other_module) = readers_of(store, 3)
    idle.adopt_into(idle_module)  # version 0; it never comes to another batch
    for version in range(1, 21):
        assert store.publish(constant(version)) == version
        assert busy.adopt_into(busy_module) == version
        assert other.adopt_into(other_module) == version
        assert value_of(busy_module) == value_of(other_module) == version
    assert (store.stats().num_deferred, store.offered_version) == (0, 20)
    assert value_of(idle_module) == 0.0
    late = store.reader("late")
    assert late.pin()[0] == 20
    late.close()


def test_readers_that_rest_on_two_old_versions_keep_the_others_at_what_is_offered(
    store: WeightStore,
) -> None:
    (first, first_module), (second, second_module), (busy, busy_module) = readers_of(store, 3)
    first.adopt_into(first_module)
    store.publish(constant(1.0))
    second.adopt_into(second_module)
    store.publish(constant(2.0))
    assert busy.adopt_into(busy_module) == 2  # the third slot: now each has one
    for version in range(3, 8):
        assert store.publish(constant(version)) == version  # the learner goes on
        assert not busy.has_update() and busy.adopt_into(busy_module) == 2
    assert (store.offered_version, store.stats().num_deferred) == (2, 5)
    assert [value_of(m) for m in (first_module, second_module, busy_module)] == [0.0, 1.0, 2.0]
    first.unpin()  # what the guide asks of a reader before it rests
    assert busy.wait(7, timeout_s=30.0) == 7
    assert busy.adopt_into(busy_module) == 7 and value_of(busy_module) == 7.0
    for version in range(8, 12):  # one that rests is no obstacle
        store.publish(constant(version))
        assert busy.adopt_into(busy_module) == version
    assert store.stats().num_deferred == 5
    assert value_of(second_module) == 1.0
