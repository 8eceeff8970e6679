# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Plan of a run: its machines, and how many workers each of them carries."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace

import torch

from torchrl_dvla.collectors import InferenceConfig, WorkerConfig

__all__ = ["ClusterSpec", "NodePlacement", "NodeSpec", "Placement", "plan_placement"]


@dataclass(frozen=True)
class NodeSpec:
    """One machine.

    Args:
        host (str): its name.
        num_cores (int): cores that this process may use.
        memory_bytes (int): main memory.
        num_gpus (int): CUDA devices.
    """

    host: str
    num_cores: int
    memory_bytes: int
    num_gpus: int = 0


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

    @classmethod
    def local(cls) -> ClusterSpec:
        """This machine."""
        try:
            num_cores = len(os.sched_getaffinity(0))
        except AttributeError:  # not on macOS
            num_cores = os.cpu_count() or 1
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return cls((NodeSpec(socket.gethostname(), num_cores, memory_bytes, num_gpus),))


@dataclass(frozen=True)
class NodePlacement:
    """The closed sampling-inference loop of one node.

    Args:
        host (str): the node.
        workers (WorkerConfig): its sampling lane.
        inference (InferenceConfig): its inference lane.
        learner (bool): whether the learner runs here.
    """

    host: str
    workers: WorkerConfig
    inference: InferenceConfig
    learner: bool = False


@dataclass(frozen=True)
class Placement:
    """One loop a node, and one node with the learner.

    Args:
        nodes (tuple of NodePlacement): the nodes.

    Examples:
        >>> node = NodePlacement("localhost", WorkerConfig(), InferenceConfig(), learner=True)
        >>> Placement((node,)).learner.host
        'localhost'
        >>> Placement(())
        Traceback (most recent call last):
        ...
        ValueError: nodes must hold exactly one node with learner=True, got 0. Mark the node that
        learns.
    """

    nodes: tuple[NodePlacement, ...]

    def __post_init__(self) -> None:
        num_learners = sum(node.learner for node in self.nodes)
        if num_learners != 1:
            raise ValueError(
                f"nodes must hold exactly one node with learner=True, got {num_learners}. Mark the "
                "node that learns."
            )

    @property
    def learner(self) -> NodePlacement:
        """The node with the learner."""
        return next(node for node in self.nodes if node.learner)


def plan_placement(
    cluster: ClusterSpec,
    *,
    env_memory_bytes: int,
    workers: WorkerConfig = WorkerConfig(),
    inference: InferenceConfig = InferenceConfig(),
    memory_share: float = 0.5,
) -> Placement:
    """One sampling-inference loop on every node, as many workers as its cores and memory carry.

    A worker that simulates keeps one core busy, so a node gets one worker a core; inference and
    learner take the cores that workers leave while they wait for decisions.

    Args:
        cluster (ClusterSpec): the machines; the first one learns.

    Keyword Args:
        env_memory_bytes (int): resident memory of one environment.
        workers (WorkerConfig): everything about workers but their number.
        inference (InferenceConfig): the inference lane of every node.
        memory_share (float): share of a node's memory that environments may take.

    Raises:
        ValueError: if a node cannot hold one environment.

    Examples:
        >>> from torchrl_dvla.topology import ClusterSpec, NodeSpec
        >>> cluster = ClusterSpec((NodeSpec("a", num_cores=8, memory_bytes=16 * 2**30),))
        >>> plan_placement(cluster, env_memory_bytes=2 * 2**30).nodes[0].workers.num_workers
        4
    """
    nodes = []
    for index, node in enumerate(cluster.nodes):
        worker_bytes = env_memory_bytes * workers.envs_per_worker
        by_memory = int(node.memory_bytes * memory_share) // worker_bytes
        num_workers = min(node.num_cores, by_memory)
        if num_workers < 1:
            raise ValueError(
                f"env_memory_bytes must fit into {memory_share:.0%} of the memory of {node.host} "
                f"({node.memory_bytes} bytes), got {worker_bytes} bytes for one worker. Lower "
                "envs_per_worker or raise memory_share."
            )
        nodes.append(
            NodePlacement(
                node.host, replace(workers, num_workers=num_workers), inference, learner=index == 0
            )
        )
    return Placement(tuple(nodes))
