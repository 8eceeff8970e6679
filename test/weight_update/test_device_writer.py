# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

"""Publishing from a device that is not there: real order, the CPU's memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from torchrl_dvla.memory import SharedArena
from torchrl_dvla.testing.streams import LazyDevice
from torchrl_dvla.weight_update import WeightStore, device_copy


class Learner(nn.Module):
    """Two weights, changed by kernels on the device's current stream."""

    def __init__(self, device: LazyDevice) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(40))
        self.second = nn.Parameter(torch.zeros(3, 5))
        self._device = device

    def step(self, value: float) -> None:
        """An optimiser step in place, some time from now."""

        def update() -> None:
            with torch.no_grad():
                self.first.fill_(value), self.second.fill_(value)

        self._device.compute(update)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LazyDevice:
    device = LazyDevice()
    monkeypatch.setattr(device_copy, "side_stream", device.of)
    return device


@pytest.fixture
def learner(device: LazyDevice) -> Learner:
    return Learner(device)


@pytest.fixture
def store(device: LazyDevice, learner: Learner) -> Iterator[WeightStore]:
    with WeightStore(learner) as store:
        device.trace.clear()
        yield store
        device.release()


def values_in(store: WeightStore, name: str = "look") -> set[float]:
    """What a reader that comes now would act with."""
    reader = store.reader(name)
    _, weights = reader.pin()
    values = {v for key in ("first", "second") for v in weights[key].reshape(-1).tolist()}
    reader.close()
    return values


def test_a_step_after_publish_cannot_touch_the_version(
    store: WeightStore, learner: Learner, device: LazyDevice
) -> None:
    device.hold()
    learner.step(1.0)
    assert store.publish() == 1  # nothing of it has happened on the device
    learner.step(2.0)
    device.run_current()  # the learner's stream runs ahead of the copy to the host
    assert (store.version, store.offered_version) == (1, 0)
    device.release()
    store.finish()
    assert learner.first[0].item() == 2.0
    assert (store.offered_version, values_in(store)) == (1, {1.0})


def test_the_version_holds_what_was_computed_before_publish(
    store: WeightStore, learner: Learner, device: LazyDevice
) -> None:
    learner.step(1.0)  # still in the stream when the side stream is told to copy
    store.publish()
    store.finish()
    assert values_in(store) == {1.0}


def test_it_is_offered_only_when_the_copy_to_the_slot_has_ended(
    store: WeightStore, learner: Learner, device: LazyDevice
) -> None:
    store.set_gate(device.trace.append)
    device.hold()
    learner.step(1.0)
    store.publish()
    device.step()  # the look at the snapshot has ended
    device.await_host()  # the host waits for the copy into the slot
    copying = ["look", "waited", "claimed", "marked", "start"]
    assert device.trace == copying
    assert (store.offered_version, values_in(store)) == (0, {0.0})
    device.release()
    store.finish()
    assert device.trace == [*copying, "waited", "written", "unlocked", "offered"]
    assert values_in(store, "again") == {1.0}


def test_versions_coalesce_on_the_device_in_two_snapshots(
    store: WeightStore, learner: Learner, device: LazyDevice
) -> None:
    offered: list[int] = []
    device.hold()
    for value in (1.0, 2.0, 3.0, 4.0):
        learner.step(value)
        assert store.publish() == value
        if value == 1.0:
            device.await_host()  # version 1 is being looked at; 2 to 4 wait behind it
    learner.step(5.0)
    store.set_gate(
        lambda step: offered.append(store._writer.version) if step == "offered" else None
    )
    device.release()
    store.finish()
    assert offered == [1, 4]
    assert values_in(store) == {4.0}
    stats = store.stats()
    assert (stats.num_publishes, stats.num_coalesced, stats.num_deferred) == (5, 2, 0)
    assert store._publisher.device_writer is not None
    assert len(store._publisher.device_writer._free) == 2  # no third snapshot was made


def test_one_snapshot_is_enough_while_copies_keep_up(store: WeightStore, learner: Learner) -> None:
    for value in (1.0, 2.0, 3.0):
        learner.step(value)
        store.publish()
        store.finish()
        assert values_in(store, f"look {value}") == {value}
    assert store._publisher.device_writer is not None
    assert len(store._publisher.device_writer._free) == 1


@pytest.mark.parametrize("who", ["finish", "wait", "publish"])
def test_what_is_not_finite_is_refused_by_the_next_call(
    store: WeightStore, learner: Learner, device: LazyDevice, who: str
) -> None:
    learner.step(float("inf"))
    assert store.publish() == 1
    device.run_current()
    releaser = store._writer.releaser
    with releaser._changed:
        assert releaser._changed.wait_for(lambda: releaser._error is not None, timeout=30.0)
    assert (store.version, store.offered_version, values_in(store)) == (0, 0, {0.0})
    with pytest.raises(ValueError, match=r"infinity in first \(40 of 40 .* second .* of version 1"):
        getattr(store, who)()
    assert store.stats().num_refused == 1
    learner.step(2.0)
    assert store.publish() == 1  # the number was never seen by a reader
    store.finish()
    assert values_in(store, "again") == {2.0}


def test_a_refused_version_does_not_hurt_the_one_behind_it(
    store: WeightStore, learner: Learner, device: LazyDevice
) -> None:
    device.hold()
    learner.step(float("nan"))
    store.publish()
    device.await_host()
    learner.step(2.0)
    assert store.publish() == 2
    device.release()
    with pytest.raises(ValueError, match="finite"):
        store.finish()
    assert (store.version, store.offered_version, values_in(store)) == (2, 2, {2.0})


def test_without_the_check_nothing_is_looked_at(device: LazyDevice, learner: Learner) -> None:
    with WeightStore(learner, check_finite=False) as store:
        learner.step(float("nan"))
        store.publish()
        store.finish()
        assert device.trace == ["start", "waited"] * 2
        assert store.offered_version == 1


def test_a_version_from_the_device_is_deferred_as_any_other(
    store: WeightStore, learner: Learner
) -> None:
    readers = [store.reader(index) for index in range(2)]
    for value, reader in enumerate(readers):  # one stays at version 0, one at version 1
        reader.pin()
        learner.step(value + 1.0)
        store.publish()
        store.finish()
    learner.step(3.0)
    assert store.publish() == 3
    store.finish()
    assert (store.version, store.offered_version, store.stats().num_deferred) == (3, 2, 1)
    readers[0].unpin()
    assert readers[0].wait(3, timeout_s=30.0) == 3
    assert values_in(store) == {3.0}
    for reader in readers:
        reader.close()


def test_a_copy_that_fails_is_not_offered(
    store: WeightStore, learner: Learner, device: LazyDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(event: object) -> None:
        raise RuntimeError("CUDA error")

    learner.step(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(device, "wait", fail)
        store.publish()
        with pytest.raises(RuntimeError, match="CUDA error"):
            store.finish()
    assert (store.version, store.offered_version, values_in(store)) == (0, 0, {0.0})


def test_weights_of_the_host_come_after_those_of_the_device(
    store: WeightStore, learner: Learner, device: LazyDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    store.set_gate(lambda step: order.append(store._writer.version) if step == "offered" else None)
    learner.step(1.0)
    store.publish()
    monkeypatch.setattr(device_copy, "side_stream", lambda tensors: None)
    host = {"first": torch.full((40,), 7.0), "second": torch.full((3, 5), 7.0)}
    assert store.publish(host) == 2
    assert order == [1, 2]
    assert values_in(store) == {7.0}
    with pytest.raises(ValueError, match="version must grow, got 2 after 2"):
        store.publish(host, version=2)


def test_a_version_must_grow_past_the_one_on_its_way(
    store: WeightStore, learner: Learner, device: LazyDevice
) -> None:
    device.hold()
    assert store.publish(version=9) == 9
    with pytest.raises(ValueError, match="version must grow, got 9 after 9"):
        store.publish(version=9)
    assert store.publish() == 10
    device.release()
    store.finish()
    assert store.offered_version == 10


def test_a_paused_store_shows_it_later(store: WeightStore, learner: Learner) -> None:
    store.pause()
    learner.step(1.0)
    store.publish()
    store.finish()
    assert (store.version, store.offered_version) == (1, 0)
    store.resume()
    assert (store.offered_version, values_in(store)) == (1, {1.0})


def test_closing_waits_for_what_was_published(
    store: WeightStore, learner: Learner, device: LazyDevice
) -> None:
    reader = store.reader("look")
    reader.pin()
    device.hold()
    learner.step(1.0)
    store.publish()
    device.await_host()
    learner.step(2.0)
    store.publish()
    closing = threading.Thread(target=store.close)
    releaser = store._writer.releaser
    closing.start()
    with releaser._changed:  # closing has begun: it says so before it waits
        assert releaser._changed.wait_for(lambda: releaser._is_closing, timeout=30.0)
    assert closing.is_alive()
    device.release()
    closing.join(timeout=30.0)
    assert not closing.is_alive()
    assert releaser._thread is None
    version, weights = reader.pin()
    assert (version, set(weights["first"].tolist())) == (2, {2.0})
    reader.close()


def test_the_cast_is_made_on_the_device_and_frozen_weights_stay_behind(
    device: LazyDevice, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(SharedArena, "pin", lambda arena: pinned.append(arena.nbytes))
    learner.second.requires_grad_(False)
    with WeightStore(learner, trainable_only=True, transport_dtype=torch.bfloat16) as store:
        learner.step(1.0 + 2.0**-9)
        store.publish()
        store.finish()
        reader = store.reader("reader")
        _, weights = reader.pin()
        assert weights["first"].dtype == torch.bfloat16
        assert set(weights["first"].tolist()) == {1.0}
        assert weights["second"].eq(0.0).all()
        assert store._publisher.device_writer is not None
        (snapshot,) = store._publisher.device_writer._free
        assert snapshot.views.memory.nbytes == store.layout.slot_bytes
        reader.close()
    assert len(pinned) == 1  # the slots are page-locked, once


def test_a_reader_lets_the_slot_go_when_the_copy_up_has_ended(
    store: WeightStore, learner: Learner, device: LazyDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(SharedArena, "pin", lambda arena: pinned.append(arena.nbytes))
    learner.step(1.0)
    store.publish()
    store.finish()
    served, seen = Learner(device), []
    reader = store.reader("reader")
    device.compute(lambda: seen.append(served.first[0].item()))  # a forward pass under way
    device.hold()
    adopting = threading.Thread(target=reader.adopt_into, args=(served,), kwargs={"copy": True})
    adopting.start()
    device.await_host()
    assert seen == [0.0]  # the copy came after it
    intruder = store._segment.locks.open()
    slot = store._ledger.offer % 256
    assert not intruder.try_exclusive(1 + slot)  # not let go before the copy has ended
    device.release()
    adopting.join(timeout=30.0)
    assert served.first.eq(1.0).all()
    assert served.second.eq(1.0).all()
    assert intruder.try_exclusive(1 + slot)
    intruder.close()
    assert len(pinned) == 1
    reader.close()
