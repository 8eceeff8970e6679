# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a cluster consists of: declared in YAML, found on this machine, or asked of Ray's nodes."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from torchrl_dvla.memory import parse_bytes
from torchrl_dvla.validation import Count, Natural, Positive, check_fields, from_mapping

__all__ = ["ClusterSpec", "GPUSpec", "NodeSpec"]

#: Bytes per second of one NVLink in one direction, by its version; of a PCIe lane, by generation.
_NVLINK = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}
_PCIE_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.97e9, 5: 3.94e9, 6: 7.56e9}


@dataclass(frozen=True)
class GPUSpec:
    """One CUDA device.

    Args:
        name (str): what the driver calls it.
        memory_bytes (int): its memory.
        link_bytes_per_s (float, optional): to the other devices of its node, in one direction:
            NVLink where there is one, else PCI Express. Defaults to unknown, which bounds nothing.
    """

    name: str = "GPU"
    memory_bytes: Count = 80 * 2**30
    link_bytes_per_s: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class NodeSpec:
    """One machine.

    Args:
        host (str): its name.
        num_cores (int): cores that this process may use.
        memory_bytes (int): main memory.
        num_gpus (int): CUDA devices. Defaults to those of *gpus*.
        gpus (tuple of GPUSpec): what is known of them.
        num_numa_nodes (int): parts of the main memory, each near to a part of the cores.
        network_bytes_per_s (float, optional): to the other nodes, in one direction. Defaults to
            unknown, which bounds nothing.
        node_id (str): Ray's name of the node; several of them may run on one host.

    Raises:
        ValueError: for a number out of range, or of another number of *gpus*.

    Examples:
        >>> NodeSpec("a", num_cores=8, memory_bytes=2**34, gpus=(GPUSpec(), GPUSpec())).num_gpus
        2
    """

    host: str
    num_cores: Count
    memory_bytes: Count
    num_gpus: Natural = 0
    gpus: tuple[GPUSpec, ...] = ()
    num_numa_nodes: Count = 1
    network_bytes_per_s: Positive | None = None
    node_id: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.gpus and self.num_gpus not in (0, len(self.gpus)):
            raise ValueError(
                f"num_gpus must be the number of gpus of {self.host}, {len(self.gpus)}, got "
                f"{self.num_gpus}. Leave it out where gpus are listed."
            )
        object.__setattr__(self, "num_gpus", self.num_gpus or len(self.gpus))

    @classmethod
    def local(cls) -> NodeSpec:
        """This machine, as far as this process may use it."""
        try:
            num_cores = len(os.sched_getaffinity(0))
        except AttributeError:  # not on macOS
            num_cores = os.cpu_count() or 1
        return cls(
            socket.gethostname(),
            num_cores,
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            num_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            gpus=_find_gpus(),
            num_numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
            network_bytes_per_s=_find_network(),
        )


@dataclass(frozen=True)
class ClusterSpec:
    """The machines of a run; the first one learns.

    Args:
        nodes (tuple of NodeSpec): at least one.

    Examples:
        >>> cluster = ClusterSpec.local()
        >>> len(cluster.nodes), cluster.nodes[0].num_cores >= 1
        (1, True)
    """

    nodes: tuple[NodeSpec, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError(
                "nodes must hold at least one NodeSpec, got none. Use ClusterSpec.local()."
            )

    @property
    def num_gpus(self) -> int:
        """CUDA devices of all nodes."""
        return sum(node.num_gpus for node in self.nodes)

    @classmethod
    def local(cls) -> ClusterSpec:
        """This machine."""
        return cls((NodeSpec.local(),))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> ClusterSpec:
        """The cluster that a file declares, in the form of :meth:`to_yaml`.

        Sizes may be written as ``64GB``.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it declares no nodes, something unknown, or two nodes of one name.
        """
        given = Path(path).expanduser()
        if not given.is_file():
            raise FileNotFoundError(
                f"The cluster must be declared in a YAML file, got {str(given)!r}, where none is. "
                "`torchrl-dvla topology > cluster.yaml` writes one of this machine."
            )
        try:
            data = yaml.safe_load(given.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{given} must be YAML, got: {error}. Correct it.") from None
        nodes = data.get("nodes") if isinstance(data, Mapping) and set(data) == {"nodes"} else None
        if not isinstance(nodes, list) or not nodes:
            found = sorted(map(str, data)) if isinstance(data, Mapping) else data
            raise ValueError(
                f"{given} must hold `nodes`, a list of at least one, and nothing else, got "
                f"{found!r:.99}. `torchrl-dvla topology` prints one of this machine."
            )
        cluster = cls(tuple(_node(node, f"nodes[{k}]") for k, node in enumerate(nodes)))
        twice = [
            name for name, count in Counter(n.host for n in cluster.nodes).items() if count > 1
        ]
        if twice:
            raise ValueError(
                f"The nodes must have hosts of different names, got {twice} twice. Rename one."
            )
        return cluster

    def to_yaml(self) -> str:
        """The declaration of the cluster, which :meth:`from_yaml` reads; unknowns are left out.

        Examples:
            >>> print(ClusterSpec((NodeSpec("a", 8, 2**34, num_gpus=2),)).to_yaml(), end="")
            nodes:
            - host: a
              num_cores: 8
              memory_bytes: 17179869184
              num_gpus: 2
              num_numa_nodes: 1
        """
        nodes = [_known(asdict(node)) for node in self.nodes]
        for node in nodes:
            if "gpus" in node:
                node["gpus"] = [_known(gpu) for gpu in node["gpus"]]
        return str(yaml.safe_dump({"nodes": nodes}, sort_keys=False))

    @classmethod
    def from_ray(cls, address: str = "auto", *, timeout_s: float = 60.0) -> ClusterSpec:
        """The alive nodes of a Ray cluster, each asked by a task that runs on it.

        The driver's node comes first. A node has the cores and GPUs that Ray may use there.

        Args:
            address (str): of the cluster; ``"auto"`` finds one that runs on this machine. One that
                the process is connected to already is used as it is.

        Keyword Args:
            timeout_s (float): for the nodes to answer.

        Raises:
            ImportError: without Ray.
            ConnectionError: if no cluster answers at *address*.
            TimeoutError: if a node does not answer in time.
        """
        try:
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError as error:
            raise ImportError(
                "A cluster can only be discovered with Ray, which is not installed. "
                "pip install 'torchrl-dvla[ray]', or declare the cluster in a YAML file."
            ) from error
        was_connected = ray.is_initialized()
        if not was_connected:
            try:
                host, _, port = address.rpartition(":")
                if port.isdigit() and "/" not in host:  # Ray itself would try for minutes
                    socket.create_connection((host, int(port)), timeout_s).close()
                ray.init(address=address, log_to_driver=False)
            except (OSError, ValueError, RuntimeError) as error:
                raise ConnectionError(
                    f"A Ray cluster must answer at {address!r}, got: {error}. Start one with `ray "
                    "start --head`, or declare the cluster in a YAML file."
                ) from error
        try:
            here = ray.get_runtime_context().get_node_id()
            alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
            probe = ray.remote(num_cpus=0, max_retries=0)(_probe)
            asked = {
                node_id: probe.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
                ).remote()
                for node_id in sorted(alive, key=lambda node_id: node_id != here)
            }
            try:
                found = dict(zip(asked, ray.get(list(asked.values()), timeout=timeout_s)))
            except ray.exceptions.GetTimeoutError:
                done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=0)
                silent = [node_id for node_id, answer in asked.items() if answer not in done]
                raise TimeoutError(
                    f"Each node must answer within {timeout_s:g} s, got nothing from {silent}. "
                    "Look at `ray status`; torchrl_dvla must be installed on every node."
                ) from None
        finally:
            if not was_connected:
                ray.shutdown()
        hosts = Counter(node.host for node in found.values())
        nodes = []
        for node_id, node in found.items():
            num_gpus = int(alive[node_id].get("GPU", 0))
            num_cores = min(node.num_cores, int(alive[node_id].get("CPU", 0)) or 1)
            host = node.host if hosts[node.host] == 1 else f"{node.host}/{node_id[:8]}"
            gpus = node.gpus[:num_gpus]
            nodes.append(
                replace(
                    node,
                    host=host,
                    num_cores=num_cores,
                    num_gpus=num_gpus,
                    gpus=gpus if len(gpus) == num_gpus else (),
                    node_id=node_id,
                )
            )
        return cls(tuple(nodes))


def _probe() -> NodeSpec:
    """Task that runs on a node of Ray's."""
    return NodeSpec.local()


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is neither empty nor unknown."""
    return {name: value for name, value in values.items() if value}


def _node(data: Any, path: str) -> NodeSpec:
    """A node of a YAML file."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must be a mapping with host, num_cores ..., got {data!r:.99}.")
    values = dict(data)
    gpus = values.get("gpus", [])
    if not isinstance(gpus, list) or not all(isinstance(gpu, Mapping) for gpu in gpus):
        raise ValueError(f"{path}.gpus must be a list of mappings, got {gpus!r:.99}. Correct it.")
    where = [f"{path}.gpus[{k}]" for k in range(len(gpus))]
    values["gpus"] = tuple(
        from_mapping(GPUSpec, _sizes(gpu, name), name) for gpu, name in zip(gpus, where)
    )
    return from_mapping(NodeSpec, _sizes(values, path), path)


def _sizes(data: Mapping[str, Any], path: str) -> dict[str, Any]:
    """``memory_bytes`` as a number."""
    values = dict(data)
    if isinstance(values.get("memory_bytes"), str):
        values["memory_bytes"] = parse_bytes(values["memory_bytes"], f"{path}.memory_bytes")
    return values


def _find_network() -> float | None:
    """Bytes per second of the fastest link that is up, as its driver states it."""
    fastest = 0
    for path in Path("/sys/class/net").glob("*/speed"):
        with contextlib.suppress(OSError, ValueError):  # those that are down, and virtual ones
            fastest = max(fastest, int(path.read_text()))
    return fastest * 1e6 / 8 if fastest > 0 else None


def _find_gpus() -> tuple[GPUSpec, ...]:
    """The devices that NVML sees; none without ``nvidia-ml-py`` or a driver."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(device)
            name = name.decode() if isinstance(name, bytes) else name
            memory_bytes = pynvml.nvmlDeviceGetMemoryInfo(device).total
            found.append(GPUSpec(name, memory_bytes, _find_link(pynvml, device)))
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()


def _find_link(pynvml: Any, device: Any) -> float | None:
    """Bytes per second of a device's NVLinks together, else of its PCI Express lanes."""
    speed = 0.0
    with contextlib.suppress(pynvml.NVMLError):  # it has none, or fewer than there may be
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            if pynvml.nvmlDeviceGetNvLinkState(device, link):
                speed += _NVLINK.get(pynvml.nvmlDeviceGetNvLinkVersion(device, link), 25e9)
    if not speed:
        with contextlib.suppress(pynvml.NVMLError):
            lanes = pynvml.nvmlDeviceGetMaxPcieLinkWidth(device)
            speed = lanes * _PCIE_LANE.get(pynvml.nvmlDeviceGetMaxPcieLinkGeneration(device), 0.0)
    return speed if speed > 0 and math.isfinite(speed) else None
