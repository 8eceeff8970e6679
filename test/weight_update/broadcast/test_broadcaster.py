# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

"""A broadcast and its relays in one process: what needs no process to be killed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_dvla.testing import Remote
from torchrl_dvla.weight_update import WeightBroadcast, WeightReader, WeightRelay, WeightStore
from torchrl_dvla.weight_update.broadcast.channel import Channel, ChannelError, Peers, parse_address


@pytest.fixture
def store() -> Iterator[WeightStore]:
    with WeightStore(nn.Linear(2, 1)) as made:
        yield made


@pytest.fixture
def broadcast(store: WeightStore) -> Iterator[WeightBroadcast]:
    with contextlib.closing(WeightBroadcast(store.reader("broadcast"), timeout_s=300.0)) as made:
        yield made


@pytest.fixture
def start_relay(broadcast: WeightBroadcast) -> Iterator[Callable[..., WeightRelay]]:
    with contextlib.ExitStack() as stack:
        yield lambda name="a": stack.enter_context(
            contextlib.closing(WeightRelay(broadcast.address, nn.Linear(2, 1), name=name))
        )


def test_other_weights_are_refused_with_the_difference(broadcast: WeightBroadcast) -> None:
    with pytest.raises(ValueError, match=r"(?s)2 differences:.*bias: missing.*shape \(1, 4\)"):
        WeightRelay(broadcast.address, nn.Linear(4, 1, bias=False))
    deadline = time.monotonic() + 30.0
    while not broadcast.stats()["broadcast/nodes_refused"]:
        assert time.monotonic() < deadline
    assert broadcast.nodes() == {}


def test_nobody_answers() -> None:
    with pytest.raises(TimeoutError, match=r"127.0.0.1:9 did not answer within 0.3 s"):
        WeightRelay("127.0.0.1:9", nn.Linear(1, 1), timeout_s=0.3)
    with pytest.raises(ValueError, match="address must be 'host:port', got 'learner'"):
        WeightRelay("learner", nn.Linear(1, 1))


def test_a_narrow_transport_stays_narrow() -> None:
    learner, served = nn.Linear(3, 2), nn.Linear(3, 2)
    with (
        WeightStore(learner, transport_dtype=torch.bfloat16) as store,
        contextlib.closing(WeightBroadcast(store.reader("broadcast"))) as broadcast,
        contextlib.closing(WeightRelay(broadcast.address, served, name="n")) as relay,
    ):
        assert relay.wait(0) == 0
        assert relay.store.layout.slot_bytes == store.layout.slot_bytes
        reader = relay.store.reader("worker")
        reader.adopt_into(served)
        assert served.weight.dtype == torch.float32
        assert served.weight.equal(learner.weight.bfloat16().float())
        reader.close()


def test_waiting_for_nodes(broadcast: WeightBroadcast, start_relay: Any) -> None:
    start_relay("n")
    broadcast.wait(0, num_nodes=1)
    with pytest.raises(TimeoutError, match=r"older ones: \{'n': 0\}"):
        broadcast.wait(1, timeout_s=0.1)
    with pytest.raises(TimeoutError, match=r"of 1 nodes \(wanted: 2\)"):
        broadcast.wait(0, timeout_s=0.1, num_nodes=2)
    broadcast.close()
    with pytest.raises(RuntimeError, match="The broadcast has ended"):
        broadcast.wait(5)


def test_the_version_of_a_relay_is_what_readers_can_adopt(
    store: WeightStore, start_relay: Any
) -> None:
    relay = start_relay()
    relay.wait(0)
    seen: list[int] = []
    receive = relay.store.receive

    def watched(fill: Callable[[torch.Tensor], None], *, version: int) -> None:
        def fill_and_look(memory: torch.Tensor) -> None:
            fill(memory)
            seen.append(relay.version)

        receive(fill_and_look, version=version)

    relay.store.receive = watched
    store.publish()
    assert relay.wait(1) == relay.version == 1
    assert seen == [0]  # it had come whole, but it was not visible yet


def test_two_nodes_of_one_name_are_two_nodes(broadcast: WeightBroadcast, start_relay: Any) -> None:
    start_relay("a"), start_relay("a")
    broadcast.wait(0, 30.0, num_nodes=2)
    assert broadcast.nodes() == {"a": 0, "a #2": 0}


@pytest.mark.parametrize(
    "message", [{"kind": "join"}, {"kind": "result", "round": 0, "result": {}}, {"kind": "hi"}]
)
def test_one_that_sends_nonsense_is_dropped_alone(
    store: WeightStore, broadcast: WeightBroadcast, start_relay: Any, message: dict[str, Any]
) -> None:
    start_relay("a")
    stranger = Channel.connect(*parse_address(broadcast.address), timeout_s=30.0)
    if message["kind"] == "result":
        stranger.send("join", name="stranger", version=0, has_frozen=True)
    stranger.send(**message)
    with pytest.raises(ChannelError, match="closed|broke"):
        stranger.wait_for("never", time.monotonic() + 30.0)
    stranger.close()
    store.publish()
    broadcast.wait(1, 30.0, num_nodes=1)
    assert broadcast.nodes() == {"a": 1}


def test_publish_wakes_the_broadcast(
    store: WeightStore, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    receive = Peers.receive

    def watched(peers: Peers, timeout_s: float) -> Iterator[Any]:
        waits.append(timeout_s)
        return receive(peers, timeout_s)

    monkeypatch.setattr(Peers, "receive", watched)
    relay = request.getfixturevalue("start_relay")()
    for _ in range(3):
        # Heartbeats are a minute apart: nothing but the publish can begin a round.
        assert relay.wait(store.publish(), timeout_s=30.0) == store.version
    assert set(waits) == {300.0}


class BroadcastProcess:
    """A process of the learner's node that broadcasts for it."""

    def begin(self, reader: WeightReader) -> str:
        self.broadcast = WeightBroadcast(reader, timeout_s=300.0)
        return self.broadcast.address

    def end(self) -> None:
        self.broadcast.close()


def test_a_broadcast_in_another_process_than_the_store_polls_it() -> None:
    with Remote(BroadcastProcess) as other, WeightStore(nn.Linear(2, 1)) as store:
        address = other.call("begin", store.reader("broadcast"))
        with contextlib.closing(WeightRelay(address, nn.Linear(2, 1), name="a")) as relay:
            for _ in range(3):
                # Heartbeats are a minute apart, and nothing notifies of the publish.
                assert relay.wait(store.publish(), timeout_s=30.0) == store.version
        other.call("end")


def test_a_broadcast_without_nodes_holds_nobody_up(
    store: WeightStore, broadcast: WeightBroadcast
) -> None:
    store.publish()
    store.wait(1, timeout_s=30.0)


def test_transfers_are_returned_once(
    store: WeightStore, broadcast: WeightBroadcast, start_relay: Any
) -> None:
    before_s = time.monotonic()
    start_relay("a")
    broadcast.wait(0, 30.0, num_nodes=1)
    store.publish()
    broadcast.wait(1, 30.0)
    with broadcast._changed:  # the learner's own results may be the last ones
        assert broadcast._changed.wait_for(lambda: broadcast._slot is None, 30.0)
    transfers = broadcast.take_transfers()
    parts = [("learner", "send"), ("a", "receive")]
    assert {(t.node, t.what, t.version) for t in transfers} == {
        (node, what, version) for node, what in parts for version in (0, 1)
    }
    assert len(transfers) == 4
    assert all(before_s < t.start_s < t.end_s < time.monotonic() for t in transfers)
    assert broadcast.take_transfers() == []


def test_impossible_settings(store: WeightStore) -> None:
    reader = store.reader("broadcast")
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        WeightBroadcast(reader, timeout_s=0)
    with pytest.raises(ValueError, match="shapes must be some of"):
        WeightBroadcast(reader, shapes=["ring"])
    reader.close()
