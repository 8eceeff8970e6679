# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What ends the construction of a collector over several nodes before Ray is started."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace

import pytest

from torchrl_dvla import GroupConfig, TopologyAwareCollector
from torchrl_dvla.collectors import InferenceConfig, WorkerConfig
from torchrl_dvla.topology import NodePlacement, Placement
from torchrl_dvla.topology.node_messages import NodeFacts
from torchrl_dvla.topology.nodes import Machine, Node, difference
from torchrl_dvla.topology.topology_aware import assign_machines

from .counting_nodes import make_env, make_policy

WORKERS = WorkerConfig(num_workers=2, max_decisions=4)
SECOND = NodePlacement("localhost", WORKERS, InferenceConfig())


def build(*others: NodePlacement, first: InferenceConfig = InferenceConfig(), **kwargs):
    node = NodePlacement("localhost", WORKERS, first, learner=True)
    return TopologyAwareCollector(
        make_env, make_policy(), placement=Placement((node, *others)), **kwargs
    )


def test_without_ray_the_error_has_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "torchrl-dvla\[ray\]"'):
        build(SECOND)


@pytest.mark.parametrize(
    "other",
    [
        replace(SECOND, inference=InferenceConfig(max_batch_size=3)),
        replace(SECOND, workers=replace(WORKERS, max_decisions=5)),
    ],
)
def test_nodes_differ_in_their_workers_only(other):
    with pytest.raises(ValueError, match="one inference and one max_decisions"):
        build(other)


def test_several_nodes_are_not_deterministic():
    exact = InferenceConfig(deterministic=True)
    with pytest.raises(ValueError, match="deterministic must be None or False on several nodes"):
        build(replace(SECOND, inference=exact), first=exact, group=GroupConfig(max_policy_lag=0))


def test_other_machines_need_an_address():
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"without an address, got \['elsewhere'\]"):
        build(replace(SECOND, host="elsewhere"))


@pytest.mark.parametrize("address", ["nowhere", "host:port"])
def test_an_address_that_is_none_is_refused(address):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match="address must be"):
        build(SECOND, address=address)


def test_an_address_that_does_not_answer_ends_with_the_reason():
    pytest.importorskip("ray")
    with socket.socket() as taken:  # bound, and nobody answers there
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(TimeoutError, match="does not answer.*refused.*ray start --head"):
            build(SECOND, address=f"127.0.0.1:{taken.getsockname()[1]}")


def test_lag_0_and_idle_environments_are_warned_about(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ray", None)
    group = GroupConfig(group_size=2, groups_per_update=1, max_policy_lag=0)
    with pytest.raises(ImportError):
        build(SECOND, group=group)
    assert "max_policy_lag=0 on 2 nodes" in caplog.text
    assert "4 environments on 2 nodes, of which admission keeps 2 busy" in caplog.text


def test_machines_are_taken_by_name_and_size():
    nodes = [Node("node 0", "a", WORKERS), Node("node 1", "localhost", WORKERS)]
    machines = {"1": Machine("b", 1.0), "2": Machine("b", 2.0), "3": Machine("a", 8.0)}
    assign_machines(nodes, machines)
    assert [node.machine_id for node in nodes] == ["3", "2"]
    with pytest.raises(ValueError, match=r"got 2 workers for 'c'.*b with 1 cores"):
        assign_machines([Node("node 2", "c", WORKERS)], machines)


def test_a_node_of_other_packages_or_specs_is_named():
    facts = NodeFacts("specs", {"torch": "2.13", "mujoco": "3.8"}, 1, 0.0, ("here", 1))
    first = Node("node 0", "a", WORKERS, facts=facts)
    other = Node("node 1", "b", WORKERS, facts=facts)
    assert difference(other, first) == ""
    other.facts = facts._replace(versions={"torch": "2.13", "mujoco": "none"})
    assert "got mujoco 3.8 and none on node 0 and node 1" in difference(other, first)
    other.facts = facts._replace(specs="others")
    assert "got specs on node 0 and others on node 1" in difference(other, first)
