# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

"""Real process groups between processes of this machine, some of which are killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import wait as wait_for
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_dvla.testing import Remote
from torchrl_dvla.weight_update import WeightBroadcast, WeightReader, WeightRelay, WeightStore
from torchrl_dvla.weight_update.broadcast.channel import Channel, ChannelError, parse_address
from torchrl_dvla.weight_update.broadcast.peers import Peers

WHOLE = {-7.0}
#: What learner and node do in a round.
ROUND = [("learner", "send"), ("a", "receive")]


class Beside:
    """A process of the learner's node that broadcasts for it."""

    def begin(self, reader: WeightReader) -> str:
        self.broadcast = WeightBroadcast(reader, timeout_s=300.0)
        return self.broadcast.address

    def end(self) -> None:
        self.broadcast.close()


def assert_reads(node: Any, version: int) -> None:
    """The node's readers get exactly this version, whole."""
    assert node.call("read") == (version, {float(version)}, WHOLE)


@pytest.mark.parametrize(("shape", "checksum"), [("chain", True), ("binomial", False)])
def test_every_node_gets_every_version_whole(cluster: Any, shape: str, checksum: bool) -> None:
    learner = cluster.learner(shapes=[shape], checksum=checksum)
    nodes = [cluster.relay(f"n{index}") for index in range(5)]
    for node in nodes:
        assert node.call("wait", 0) == 0
        assert_reads(node, 0)
    for version in range(1, 6):
        assert learner.call("publish") == version
        learner.call("wait", version, 5)
        for node in nodes:
            assert node.call("wait", version) == version
            assert_reads(node, version)
    stats, edge_bytes, (used, num_buckets) = learner.call("tell")
    assert used == shape
    live, frozen = learner.call("payload_bytes")
    assert num_buckets > 1
    # What the learner sent does not depend on the number of nodes: to one of them six versions and
    # the frozen weights once, and perhaps a sum per bucket.
    (sent,) = [n for edge, n in edge_bytes.items() if edge.startswith("learner > ")]
    sums = 8 * 7 * num_buckets if checksum else 0
    assert 0 <= sent - 6 * live - frozen <= sums
    assert stats["broadcast/learner_sent_bytes"] == sent
    assert stats["broadcast/sent_bytes"] >= 5 * (live * 6 + frozen)
    assert stats["broadcast/nodes"] == stats["broadcast/nodes_joined"] == 5
    assert stats["broadcast/nodes_left"] == stats["broadcast/versions_coalesced"] == 0
    assert 0 < stats["broadcast/publish_to_node_p50_s"] <= stats["broadcast/publish_to_node_p99_s"]
    # The way down: no thread outlives a close.
    assert [node.call("close") for node in nodes] == [[]] * 5
    assert learner.call("close") == []


def test_a_relay_killed_during_a_transfer_is_cut_out(cluster: Any, make_gate: Any) -> None:
    gate = make_gate("live 2")
    gate.open.set()
    learner = cluster.learner(shapes=["chain"])
    first = cluster.relay("first")
    learner.call("wait", 0, 1)
    middle = cluster.relay("middle", gate)
    learner.call("wait", 0, 2)
    last = cluster.relay("last")
    learner.call("wait", 0, 3)
    for node in (first, middle, last):
        node.call("wait", 0)
    gate.open.clear()
    learner.call("publish")
    assert gate.reached.wait(60.0)  # it has three buckets and has passed on two
    middle.kill(signal.SIGKILL)
    assert learner.call("wait_for_loss", 1).keys() == {"first", "last"}
    assert learner.call("wait", 1, 2) == {"first": 1, "last": 1}
    for node in (first, last):
        assert node.call("wait", 1) == 1
        assert_reads(node, 1)
    stats, edge_bytes, _ = learner.call("tell")
    assert (stats["broadcast/nodes_left"], stats["broadcast/rounds_failed"]) == (1, 1)
    assert "first > last" in edge_bytes  # the orphan has a new parent
    # It comes back, as a new process, and gets the newest at once.
    back = cluster.relay("middle")
    assert back.call("wait", 1) == 1
    assert_reads(back, 1)
    learner.call("publish")
    assert learner.call("wait", 2, 3) == {"first": 2, "last": 2, "middle": 2}
    assert_reads(back, 2)

    told = [(t.node, t.what) for t in learner.call("transfers") if t.version == 1]
    assert sorted(told) == [
        ("first", "receive"),
        ("first", "send"),
        ("last", "lose"),
        ("last", "receive"),
        ("last", "send"),  # to the one that came back
        ("learner", "send"),
        ("middle", "lose"),
        ("middle", "receive"),
    ]


def test_the_first_relay_may_die_too(cluster: Any, make_gate: Any) -> None:
    gate = make_gate("live 1")
    gate.open.set()
    learner = cluster.learner(shapes=["binomial"])
    head = cluster.relay("head", gate)
    learner.call("wait", 0, 1)
    others = [cluster.relay(f"n{index}") for index in range(3)]
    learner.call("wait", 0, 4)
    gate.open.clear()
    learner.call("publish")
    assert gate.reached.wait(60.0)
    head.kill(signal.SIGKILL)
    learner.call("wait_for_loss", 1)
    learner.call("wait", 1, 3)
    for node in others:
        assert_reads(node, node.call("wait", 1))


def test_a_stopped_relay_is_cut_out_and_comes_back(cluster: Any, make_gate: Any) -> None:
    learner = cluster.learner(shapes=["chain"], timeout_s=1.0)
    first = cluster.relay("first")
    learner.call("wait", 0, 1)
    middle = cluster.relay("middle")
    learner.call("wait", 0, 2)
    last = cluster.relay("last")
    learner.call("wait", 0, 3)
    middle.kill(signal.SIGSTOP)
    learner.call("publish")
    assert learner.call("wait_for_loss", 1).keys() == {"first", "last"}
    learner.call("wait", 1, 2)
    assert_reads(first, first.call("wait", 1))
    assert_reads(last, last.call("wait", 1))
    middle.kill(signal.SIGCONT)
    assert middle.call("wait", 1) == 1  # the same process, the same store, the newest version
    assert_reads(middle, 1)
    assert learner.call("wait", 1, 3).keys() == {"first", "middle", "last"}


def test_a_slow_node_makes_versions_coalesce_and_the_learner_does_not_wait(
    cluster: Any, make_gate: Any
) -> None:
    gate = make_gate("live 1")
    gate.open.set()
    learner = cluster.learner(shapes=["chain"])
    first = cluster.relay("first")
    learner.call("wait", 0, 1)
    slow = cluster.relay("slow", gate)
    learner.call("wait", 0, 2)
    gate.open.clear()
    learner.call("publish")
    assert gate.reached.wait(60.0)
    assert [learner.call("publish") for _ in range(6)] == [2, 3, 4, 5, 6, 7]  # all return
    assert first.call("read")[0] in (0, 1)
    gate.open.set()
    learner.call("wait", 7, 2)
    assert_reads(first, 7)
    assert_reads(slow, 7)
    stats, _, _ = learner.call("tell")
    assert stats["broadcast/versions_coalesced"] == 5  # 2, 3, 4, 5 and 6 never travelled
    assert stats["broadcast/rounds_failed"] == 0


@pytest.mark.parametrize("when", ["idle", "during a transfer"])
def test_the_leader_vanishes(cluster: Any, make_gate: Any, when: str) -> None:
    gate = make_gate("live 2")
    gate.open.set()
    learner = cluster.learner(gate if when == "during a transfer" else None, shapes=["chain"])
    nodes = [cluster.relay("a"), cluster.relay("b")]
    learner.call("wait", 0, 2)
    learner.call("publish")
    learner.call("wait", 1, 2)
    for node in nodes:
        assert_reads(node, 1)
    if when == "during a transfer":
        gate.open.clear()
        learner.call("publish")
        assert gate.reached.wait(60.0)
    learner.kill(signal.SIGKILL)
    for node in nodes:
        node.call("wait_for_loss")
        with pytest.raises(
            TimeoutError, match=r"got 1, which stays readable; the learner's node at .* is lost"
        ):
            node.call("wait", 2, 0.2)
        assert_reads(node, 1)  # nothing of version 2
        assert not node.call("is_connected")
        assert node.call("close") == []


def test_another_learner_at_the_same_address(cluster: Any) -> None:
    learner = cluster.learner()
    node = cluster.relay("a")
    node.call("wait", 0)
    learner.call("publish")
    node.call("wait", 1)
    learner.kill(signal.SIGKILL)
    port = int(cluster.address.rpartition(":")[2])
    cluster.learner(port=port)
    with pytest.raises(RuntimeError, match="has ended at version 1, which stays readable") as error:
        node.call("wait", 2)
    assert "Another learner answers" in "".join(getattr(error.value, "__notes__", []))
    assert_reads(node, 1)


class TestInOneProcess:
    """What needs no process to be killed."""

    def test_other_weights_are_refused_with_the_difference(self) -> None:
        with WeightStore(nn.Linear(3, 2)) as store:
            broadcast = WeightBroadcast(store.reader("broadcast"))
            with pytest.raises(
                ValueError, match=r"(?s)2 differences:.*bias: missing.*shape \(2, 4\)"
            ):
                WeightRelay(broadcast.address, nn.Linear(4, 2, bias=False))
            deadline = time.monotonic() + 30.0
            while not broadcast.stats()["broadcast/nodes_refused"]:
                assert time.monotonic() < deadline
            assert broadcast.nodes() == {}
            broadcast.close()

    def test_nobody_is_there(self) -> None:
        with pytest.raises(TimeoutError, match=r"127.0.0.1:9 did not answer within 0.3 s"):
            WeightRelay("127.0.0.1:9", nn.Linear(1, 1), timeout_s=0.3)
        with pytest.raises(ValueError, match="address must be 'host:port', got 'learner'"):
            WeightRelay("learner", nn.Linear(1, 1))

    def test_a_narrow_transport_stays_narrow(self) -> None:
        learner, served = nn.Linear(3, 2), nn.Linear(3, 2)
        with WeightStore(learner, transport_dtype=torch.bfloat16) as store:
            broadcast = WeightBroadcast(store.reader("broadcast"))
            relay = WeightRelay(broadcast.address, served, name="n")
            assert relay.wait(0) == 0
            assert relay.store.layout.slot_bytes == store.layout.slot_bytes
            reader = relay.store.reader("worker")
            reader.adopt_into(served)
            assert served.weight.dtype == torch.float32
            assert served.weight.equal(learner.weight.bfloat16().float())
            broadcast.wait(0, num_nodes=1)
            with pytest.raises(TimeoutError, match=r"older ones: \{'n': 0\}"):
                broadcast.wait(1, timeout_s=0.1)
            with pytest.raises(TimeoutError, match=r"of 1 nodes \(wanted: 2\)"):
                broadcast.wait(0, timeout_s=0.1, num_nodes=2)
            reader.close(), relay.close(), broadcast.close()
            with pytest.raises(RuntimeError, match="The broadcast has ended"):
                broadcast.wait(5)

    def test_the_version_of_a_relay_is_what_readers_can_adopt(self) -> None:
        learner, served = nn.Linear(2, 1), nn.Linear(2, 1)
        with WeightStore(learner) as store:
            broadcast = WeightBroadcast(store.reader("broadcast"))
            relay = WeightRelay(broadcast.address, served)
            relay.wait(0)
            ledger, seen = relay.store._writer._ledger, list[int]()
            set_latest = ledger.set_latest

            def note(**latest: int) -> None:
                seen.append(relay.version)
                set_latest(**latest)

            ledger.set_latest = note  # type: ignore[method-assign, assignment]
            store.publish()
            assert relay.wait(1) == relay.version == 1
            assert seen == [0]  # it has come whole, but it is not visible yet
            relay.close(), broadcast.close()

    def test_two_nodes_of_one_name_are_two_nodes(self) -> None:
        with WeightStore(nn.Linear(2, 1)) as store:
            broadcast = WeightBroadcast(store.reader("broadcast"))
            relays = [WeightRelay(broadcast.address, nn.Linear(2, 1), name="a") for _ in range(2)]
            broadcast.wait(0, 30.0, num_nodes=2)
            assert broadcast.nodes() == {"a": 0, "a #2": 0}
            for relay in relays:
                relay.close()
            broadcast.close()

    @pytest.mark.parametrize(
        "message", [{"kind": "join"}, {"kind": "report", "round": 0, "report": {}}, {"kind": "hi"}]
    )
    def test_one_that_talks_nonsense_is_dropped_alone(self, message: dict[str, Any]) -> None:
        with WeightStore(nn.Linear(2, 1)) as store:
            broadcast = WeightBroadcast(store.reader("broadcast"))
            relay = WeightRelay(broadcast.address, nn.Linear(2, 1), name="a")
            stranger = Channel.connect(*parse_address(broadcast.address), timeout_s=10.0)
            if message["kind"] == "report":
                stranger.send("join", name="stranger", version=0, has_frozen=True)
            stranger.send(**message)
            with pytest.raises(ChannelError):
                while True:
                    wait_for([stranger.socket], 10.0)
                    stranger.receive()
            stranger.close()
            store.publish()
            broadcast.wait(1, 30.0, num_nodes=1)
            assert broadcast.nodes() == {"a": 1}
            relay.close(), broadcast.close()

    def test_publish_wakes_the_broadcast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[float] = []
        receive = Peers.receive

        def watched(peers: Peers, timeout_s: float) -> Iterator[Any]:
            waits.append(timeout_s)
            return receive(peers, timeout_s)

        monkeypatch.setattr(Peers, "receive", watched)
        with WeightStore(nn.Linear(2, 1)) as store:
            broadcast = WeightBroadcast(store.reader("broadcast"), timeout_s=300.0)
            relay = WeightRelay(broadcast.address, nn.Linear(2, 1), name="a")
            for _ in range(3):
                # Signs of life are a minute apart: nothing but the publish can begin a round.
                assert relay.wait(store.publish(), timeout_s=30.0) == store.version
            relay.close(), broadcast.close()
        assert set(waits) == {300.0}

    def test_a_broadcast_in_another_process_than_the_store_asks_it(self) -> None:
        with Remote(Beside) as other, WeightStore(nn.Linear(2, 1)) as store:
            address = other.call("begin", store.reader("broadcast"))
            relay = WeightRelay(address, nn.Linear(2, 1), name="a")
            for _ in range(3):
                # Signs of life are a minute apart, and nothing tells of the publish.
                assert relay.wait(store.publish(), timeout_s=30.0) == store.version
            relay.close(), other.call("end")

    def test_nobody_waits_for_a_broadcast_without_nodes(self) -> None:
        with WeightStore(nn.Linear(2, 1)) as store:
            broadcast = WeightBroadcast(store.reader("broadcast"))
            store.publish()
            store.wait(1, timeout_s=30.0)
            broadcast.close()

    def test_transfers_are_told_once(self) -> None:
        with WeightStore(nn.Linear(2, 1)) as store:
            broadcast = WeightBroadcast(store.reader("broadcast"), shapes=["chain"])
            before_s = time.monotonic()
            relay = WeightRelay(broadcast.address, nn.Linear(2, 1), name="a")
            broadcast.wait(0, 30.0, num_nodes=1)
            store.publish()
            broadcast.wait(1, 30.0)
            with broadcast._changed:  # the learner's own reports may be the last ones
                assert broadcast._changed.wait_for(lambda: broadcast._slot is None, 30.0)
            transfers = broadcast.take_transfers()
            told = {(t.node, t.what, t.version) for t in transfers}
            assert told == {(n, w, v) for n, w in ROUND for v in (0, 1)}
            assert len(transfers) == 4
            for t in transfers:
                assert before_s < t.start_s < t.end_s < time.monotonic()
            assert broadcast.take_transfers() == []
            relay.close(), broadcast.close()

    def test_impossible_settings(self) -> None:
        with WeightStore(nn.Linear(1, 1)) as store:
            reader = store.reader("broadcast")
            with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
                WeightBroadcast(reader, timeout_s=0)
            with pytest.raises(ValueError, match="shapes must be some of"):
                WeightBroadcast(reader, shapes=["ring"])
            reader.close()
