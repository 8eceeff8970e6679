# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

"""Several hosts: namespaces with limited bandwidth and a delay between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from torchrl_dvla.testing import EmulatedNetwork
from torchrl_dvla.weight_update import LinkModel
from torchrl_dvla.weight_update.broadcast.cost import choose_plan

NUM_NODES = 4
# 160 Mbit/s and 10 ms there and back: slow enough for the network, and not the two cores that all
# hosts share, to set the pace.
LINK = LinkModel(latency_s=0.005, bytes_per_s=20e6, overhead_s=200e-6)


@pytest.fixture
def network() -> Iterator[EmulatedNetwork]:
    obstacle = EmulatedNetwork.obstacle()
    if obstacle:
        pytest.skip(f"no hosts can be emulated: {obstacle}")
    hosts = EmulatedNetwork(1 + NUM_NODES, bytes_per_s=LINK.bytes_per_s, delay_s=LINK.latency_s)
    with hosts:
        yield hosts


def seconds_to_all(cluster: Any, shape: str) -> tuple[float, float, float]:
    """Fastest of three rounds, what the model says, and the bytes of a version."""
    learner = cluster.learner(shapes=[shape], link=LINK)
    nodes = [cluster.relay(f"n{host}", host=host) for host in range(1, 1 + NUM_NODES)]
    learner.call("wait", 0, NUM_NODES)
    rounds = []
    for version in range(1, 4):
        learner.call("publish")
        learner.call("wait", version, NUM_NODES)
        for node in nodes:
            assert node.call("read") == (version, {float(version)}, {-7.0})
        learner.call("wait_until_idle")
        rounds.append(learner.call("tell")[0]["broadcast/round_s"])
    stats, _, _ = learner.call("tell")
    live, _ = learner.call("payload_bytes")
    for node in (*nodes, learner):
        node.close()
    return min(rounds), stats["broadcast/round_predicted_s"], live


def test_times_are_those_of_the_model(cluster: Any, network: EmulatedNetwork) -> None:
    cluster.network = network
    cluster.num_kib = 1024  # 4 MiB: 0.21 s for one transfer
    chain_s, chain_model_s, live = seconds_to_all(cluster, "chain")
    star_s, star_model_s, _ = seconds_to_all(cluster, "star")
    assert choose_plan(NUM_NODES, int(live), LINK).shape == "chain"
    assert star_model_s > 3 * chain_model_s  # so there is something to find
    # An order and a report add a delay each. The factor is room for a machine that does other
    # things as well; nothing can be faster than the bandwidth but for what the bucket lets through.
    for measured_s, model_s in ((chain_s, chain_model_s), (star_s, star_model_s)):
        assert 0.8 * model_s < measured_s < 1.6 * (model_s + 2 * LINK.latency_s)
    assert star_s > 2 * chain_s


def test_a_host_that_loses_its_network_is_cut_out_and_comes_back(
    cluster: Any, network: EmulatedNetwork, make_gate: Any
) -> None:
    cluster.network = network
    gate = make_gate("live 1")
    gate.open.set()
    learner = cluster.learner(shapes=["chain"], link=LINK, timeout_s=1.0)
    nodes = {}
    for host, name in enumerate(("first", "middle", "last"), start=1):
        nodes[name] = cluster.relay(name, gate if name == "middle" else None, host=host)
        learner.call("wait", 0, host)
    gate.open.clear()
    learner.call("publish")
    assert gate.reached.wait(60.0)
    network.cut(2)  # nobody is told: no connection is closed, nothing comes any more
    gate.open.set()
    assert learner.call("wait_for_loss", 1).keys() == {"first", "last"}
    learner.call("wait", 1, 2)
    for name in ("first", "last"):
        assert nodes[name].call("wait", 1) == 1
        assert nodes[name].call("read") == (1, {1.0}, {-7.0})
    nodes["middle"].call("wait_for_loss")
    # It may have had version 1 before the network was cut; it never has a part of it.
    version, values, _ = nodes["middle"].call("read")
    assert values == {float(version)}
    learner.call("publish")
    learner.call("wait", 2, 2)
    network.cut(2, False)
    assert nodes["middle"].call("wait", 2) == 2
    assert nodes["middle"].call("read") == (2, {2.0}, {-7.0})
    assert learner.call("wait", 2, 3).keys() == {"first", "middle", "last"}
