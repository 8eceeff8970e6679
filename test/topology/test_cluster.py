# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a cluster consists of: declared, found on this machine, and asked of real Ray nodes."""

from __future__ import annotations

import os
import sys
import types

import pytest

from torchrl_dvla.topology import ClusterSpec, GPUSpec, NodeSpec
from torchrl_dvla.topology.cluster import _find_gpus

TWO_NODES = """
nodes:
- host: a
  num_cores: 16
  memory_bytes: 64GB
  network_bytes_per_s: 12.5e9
  gpus:
  - {name: H100, memory_bytes: 80GB, link_bytes_per_s: 450e9}
  - {name: H100}
- {host: b, num_cores: 8, memory_bytes: 17179869184, num_gpus: 1, num_numa_nodes: 2}
"""


@pytest.fixture
def declare(tmp_path):
    def declare(text):
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return ClusterSpec.from_yaml(path)

    return declare


def test_a_declared_cluster(declare):
    a, b = declare(TWO_NODES).nodes
    assert (a.host, a.num_cores, a.memory_bytes, a.num_gpus) == ("a", 16, 64 * 2**30, 2)
    assert a.gpus == (GPUSpec("H100", 80 * 2**30, 450e9), GPUSpec("H100"))
    assert a.network_bytes_per_s == 12.5e9 and b.network_bytes_per_s is None
    assert (b.num_gpus, b.gpus, b.num_numa_nodes) == (1, (), 2)
    assert declare(TWO_NODES).num_gpus == 3


def test_what_is_printed_is_read_again(declare):
    cluster = declare(TWO_NODES)
    assert declare(cluster.to_yaml()) == cluster
    local = ClusterSpec.local()
    assert declare(local.to_yaml()) == local
    assert local.nodes[0].num_cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: []", "must hold `nodes`, a list of at least one"),
        ("machines: [1]", r"must hold `nodes`.*\['machines'\]"),
        ("", "must hold `nodes`"),
        ("nodes: [", "must be YAML"),
        ("nodes: [5]", r"nodes\[0\] must be a mapping"),
        ("nodes: [{host: a, memory_bytes: 1GB}]", r"nodes\[0\].num_cores must be given"),
        (
            "nodes: [{host: a, num_cores: 1, memory_bytes: 1, cpus: 3}]",
            r"nodes\[0\].cpus must be a setting.*Did you mean nodes\[0\].gpus",
        ),
        ("nodes: [{host: a, num_cores: 0, memory_bytes: 1}]", "num_cores must be at least 1"),
        ("nodes: [{host: a, num_cores: 1, memory_bytes: 1XB}]", r"nodes\[0\].memory_bytes must be"),
        (
            "nodes: [{host: a, num_cores: 1, memory_bytes: 1, gpus: [{nam: x}]}]",
            r"nodes\[0\].gpus\[0\].nam must.*Did you mean nodes\[0\].gpus\[0\].name",
        ),
        ("nodes: [{host: a, num_cores: 1, memory_bytes: 1, gpus: 2}]", "gpus must be a list"),
        (
            "nodes: [{host: a, num_cores: 1, memory_bytes: 1, num_gpus: 2, gpus: [{}]}]",
            "num_gpus must be the number of gpus of a, 1, got 2",
        ),
        ("nodes: [&a {host: a, num_cores: 1, memory_bytes: 1}, *a]", "hosts of different names"),
    ],
)
def test_a_wrong_declaration(declare, text, message):
    with pytest.raises(ValueError, match=message):
        declare(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="torchrl-dvla topology"):
        ClusterSpec.from_yaml(tmp_path / "no.yaml")


class FakeDriver(types.SimpleNamespace):
    """What is used of NVML: device 0 has two NVLinks of version 4, device 1 none, on PCIe 4 x16."""

    NVML_NVLINK_MAX_LINKS = 18

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        self.is_open = True

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, device):
        return b"H100" if device == 0 else "L4"

    def nvmlDeviceGetMemoryInfo(self, device):
        return types.SimpleNamespace(total=1000 + device)

    def nvmlDeviceGetNvLinkState(self, device, link):
        if device == 1 or link > 1:
            raise self.NVMLError
        return 1

    def nvmlDeviceGetNvLinkVersion(self, device, link):
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, device):
        return 16

    def nvmlDeviceGetMaxPcieLinkGeneration(self, device):
        return 4


def test_gpus_by_nvml(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    # two links of 25 GB/s; 16 lanes of 1.97 GB/s
    assert _find_gpus() == (GPUSpec("H100", 1000, 50e9), GPUSpec("L4", 1001, 31.52e9))
    assert not driver.is_open
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert _find_gpus() == ()


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'torchrl-dvla\[ray\]'"):
        ClusterSpec.from_ray()


@pytest.mark.ray
def test_no_ray_cluster_at_an_address():
    pytest.importorskip("ray")
    with pytest.raises(ConnectionError, match="must answer at '127.0.0.1:1'"):
        ClusterSpec.from_ray("127.0.0.1:1")


@pytest.mark.ray
@pytest.mark.slow
def test_the_nodes_of_a_ray_cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    options = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **options}
    )
    try:
        cluster.add_node(num_cpus=2, num_gpus=2, **options)
        cluster.wait_for_nodes()
        with pytest.raises(TimeoutError, match="within 0.1 s, got nothing from"):
            ClusterSpec.from_ray(cluster.address, timeout_s=0.1)  # a worker takes longer to start
        first, second = ClusterSpec.from_ray(cluster.address, timeout_s=180.0).nodes
    finally:
        cluster.shutdown()
    local = NodeSpec.local()
    assert sorted((n.num_cores, n.num_gpus) for n in (first, second)) == [
        (1, 0),
        (min(2, local.num_cores), 2),  # what Ray may use there
    ]
    assert first.memory_bytes == second.memory_bytes == local.memory_bytes
    assert first.node_id != second.node_id and first.host != second.host
    assert first.host.startswith(local.host)
