# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

"""Real process groups between processes of this machine, some of which are killed or stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from torchrl_dvla.testing import EmulatedNetwork
from torchrl_dvla.weight_update import LinkModel
from torchrl_dvla.weight_update.broadcast.tree import choose_tree

NUM_HOSTS = 4
# 160 Mbit/s and 10 ms there and back: slow enough for the network, and not the two cores that all
# hosts share, to set the pace.
LINK = LinkModel(latency_s=0.005, bytes_per_s=20e6, overhead_s=200e-6)


@pytest.fixture
def network() -> Iterator[EmulatedNetwork]:
    obstacle = EmulatedNetwork.obstacle()
    if obstacle:
        pytest.skip(f"no hosts can be emulated: {obstacle}")
    hosts = EmulatedNetwork(1 + NUM_HOSTS, bytes_per_s=LINK.bytes_per_s, delay_s=LINK.latency_s)
    with hosts:
        yield hosts


def assert_reads(version: int, *nodes: Any) -> None:
    """The nodes' readers get exactly this version, whole."""
    for node in nodes:
        assert node.call("wait", version) == version
        assert node.call("read") == (version, {float(version)}, {-7.0})


@pytest.mark.parametrize("shape", ["chain", "binomial"])
def test_every_node_gets_every_version_whole(cluster: Any, shape: str) -> None:
    learner = cluster.start_learner(shapes=[shape])
    nodes = cluster.start_relays(*(f"n{index}" for index in range(5)))
    assert_reads(0, *nodes)
    for version in range(1, 6):
        assert learner.call("publish") == version
        learner.call("wait", version, 5)
        assert_reads(version, *nodes)
    learner.call("wait_until_idle")
    stats, (used, num_buckets) = learner.call("stats"), learner.call("plan")
    assert used == shape
    assert num_buckets > 1
    # What the learner sent does not depend on the number of nodes: to one of them six versions and
    # the frozen weights once.
    live, frozen = learner.call("payload_bytes")
    assert stats["broadcast/learner_sent_bytes"] == 6 * live + frozen
    assert stats["broadcast/sent_bytes"] == 5 * (6 * live + frozen)
    assert stats["broadcast/nodes"] == stats["broadcast/nodes_joined"] == 5
    assert stats["broadcast/nodes_left"] == stats["broadcast/versions_coalesced"] == 0
    assert 0 < stats["broadcast/publish_to_node_p50_s"] <= stats["broadcast/publish_to_node_p99_s"]
    # The way down: no thread outlives a close.
    assert [node.call("close") for node in nodes] == [[]] * 5
    assert learner.call("close") == []


def test_a_relay_killed_during_a_transfer_is_dropped(cluster: Any, gate: Any) -> None:
    learner = cluster.start_learner(shapes=["chain"])
    first, middle, last = cluster.start_relays("first", "middle", "last", gates={"middle": gate})
    learner.call("wait", 0, 3)
    gate.close()
    learner.call("publish")
    assert gate.reached.wait(60.0)  # it has two buckets and has passed on one
    middle.kill(signal.SIGKILL)
    assert learner.call("wait_for_departures", 1).keys() == {"first", "last"}
    assert learner.call("wait", 1, 2) == {"first": 1, "last": 1}
    assert_reads(1, first, last)
    stats = learner.call("stats")
    assert (stats["broadcast/nodes_left"], stats["broadcast/rounds_failed"]) == (1, 1)
    # It comes back, as a new process, and gets the newest at once.
    (back,) = cluster.start_relays("middle")
    assert_reads(1, back)
    learner.call("publish")
    assert learner.call("wait", 2, 3) == {"first": 2, "last": 2, "middle": 2}
    assert_reads(2, back)
    transfers = [(t.node, t.what) for t in learner.call("transfers") if t.version == 1]
    assert sorted(transfers) == [
        ("first", "receive"),
        ("first", "send"),  # to the last one, whose new parent it is
        ("last", "lose"),
        ("last", "receive"),
        ("last", "send"),  # to the one that came back
        ("learner", "send"),
        ("middle", "lose"),
        ("middle", "receive"),
    ]


def test_the_first_relay_may_die_too(cluster: Any, gate: Any) -> None:
    learner = cluster.start_learner(shapes=["binomial"])
    head, *others = cluster.start_relays("head", "n0", "n1", "n2", gates={"head": gate})
    learner.call("wait", 0, 4)
    gate.close()
    learner.call("publish")
    assert gate.reached.wait(60.0)
    head.kill(signal.SIGKILL)
    learner.call("wait_for_departures", 1)
    learner.call("wait", 1, 3)
    assert_reads(1, *others)


def test_a_stopped_relay_is_dropped_and_comes_back(cluster: Any) -> None:
    learner = cluster.start_learner(shapes=["chain"], timeout_s=2.0)
    first, middle, last = cluster.start_relays("first", "middle", "last")
    learner.call("wait", 0, 3)
    middle.kill(signal.SIGSTOP)
    learner.call("publish")
    assert learner.call("wait_for_departures", 1).keys() == {"first", "last"}
    learner.call("wait", 1, 2)
    assert_reads(1, first, last)
    middle.kill(signal.SIGCONT)
    assert_reads(1, middle)  # the same process, the same store, the newest version
    assert learner.call("wait", 1, 3).keys() == {"first", "middle", "last"}


def test_a_slow_node_makes_versions_coalesce_and_the_learner_does_not_wait(
    cluster: Any, gate: Any
) -> None:
    learner = cluster.start_learner(shapes=["chain"])
    first, slow = cluster.start_relays("first", "slow", gates={"slow": gate})
    learner.call("wait", 0, 2)
    gate.close()
    learner.call("publish")
    assert gate.reached.wait(60.0)
    assert [learner.call("publish") for _ in range(6)] == [2, 3, 4, 5, 6, 7]  # all return
    assert first.call("read")[0] in (0, 1)
    gate.open()
    learner.call("wait", 7, 2)
    assert_reads(7, first, slow)
    stats = learner.call("stats")
    assert stats["broadcast/versions_coalesced"] == 5  # 2, 3, 4, 5 and 6 never travelled
    assert stats["broadcast/rounds_failed"] == 0


@pytest.mark.parametrize("when", ["idle", "during a transfer"])
def test_the_learner_is_killed(cluster: Any, gate: Any, when: str) -> None:
    learner = cluster.start_learner(gate, shapes=["chain"])
    nodes = cluster.start_relays("a", "b")
    learner.call("wait", 0, 2)
    learner.call("publish")
    learner.call("wait", 1, 2)
    assert_reads(1, *nodes)
    if when == "during a transfer":
        gate.close()
        learner.call("publish")
        assert gate.reached.wait(60.0)
    learner.kill(signal.SIGKILL)
    for node in nodes:
        node.call("wait_for_disconnect")
        with pytest.raises(
            TimeoutError, match=r"got 1, which stays readable; the learner's node at .* is lost"
        ):
            node.call("wait", 2, 0.2)
        assert_reads(1, node)  # nothing of version 2
        assert not node.call("is_connected")
        assert node.call("close") == []


def test_another_learner_at_the_same_address(cluster: Any) -> None:
    learner = cluster.start_learner()
    (node,) = cluster.start_relays("a")
    learner.call("publish")
    assert_reads(1, node)
    learner.kill(signal.SIGKILL)
    cluster.start_learner(port=int(cluster.address.rpartition(":")[2]))
    with pytest.raises(RuntimeError, match="has ended at version 1, which stays readable") as error:
        node.call("wait", 2)
    assert "Another learner answers" in "".join(getattr(error.value, "__notes__", []))
    assert node.call("read") == (1, {1.0}, {-7.0})


def test_no_tree_is_faster_than_the_model(cluster: Any, network: EmulatedNetwork) -> None:
    cluster.network = network
    cluster.num_kib = 1024  # 4 MiB: 0.21 s for one transfer
    predicted_s = {}
    for shape in ("chain", "binomial"):
        learner = cluster.start_learner(shapes=[shape], link=LINK)
        nodes = cluster.start_relays(*(f"n{host}" for host in range(1, 1 + NUM_HOSTS)))
        learner.call("wait", 0, NUM_HOSTS)
        for version in (1, 2):
            learner.call("publish")
            learner.call("wait", version, NUM_HOSTS)
            assert_reads(version, *nodes)
            learner.call("wait_until_idle")
            stats = learner.call("stats")
            # One-sided, as the machine may be busy: nothing can be faster than the bandwidth but
            # for what the token bucket lets through at once.
            predicted_s[shape] = stats["broadcast/round_predicted_s"]
            assert stats["broadcast/round_s"] > 0.8 * predicted_s[shape]
        num_bytes, _ = learner.call("payload_bytes")
        for node in (*nodes, learner):
            node.close()
    assert predicted_s["binomial"] > 1.5 * predicted_s["chain"]  # so there is something to choose
    assert choose_tree(NUM_HOSTS, num_bytes, LINK).shape == "chain"


def test_a_host_that_loses_its_network_is_dropped_and_comes_back(
    cluster: Any, network: EmulatedNetwork, gate: Any
) -> None:
    cluster.network = network
    learner = cluster.start_learner(shapes=["chain"], link=LINK, timeout_s=2.0)
    first, middle, last = cluster.start_relays("first", "middle", "last", gates={"middle": gate})
    learner.call("wait", 0, 3)
    gate.close()
    learner.call("publish")
    assert gate.reached.wait(60.0)
    network.cut(2)  # nothing says so: no connection is closed, nothing comes any more
    gate.open()
    assert learner.call("wait_for_departures", 1).keys() == {"first", "last"}
    learner.call("wait", 1, 2)
    assert_reads(1, first, last)
    middle.call("wait_for_disconnect")
    # It may have had version 1 before the network was cut; it never has a part of it.
    version, values, _ = middle.call("read")
    assert values == {float(version)}
    learner.call("publish")
    learner.call("wait", 2, 2)
    network.cut(2, False)
    assert_reads(2, middle)
    assert learner.call("wait", 2, 3).keys() == {"first", "middle", "last"}
