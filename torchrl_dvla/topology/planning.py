# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""From a cluster to a placement."""

from __future__ import annotations

from dataclasses import replace

from torchrl_dvla.collectors import InferenceConfig, NodePlacement, Placement, WorkerConfig
from torchrl_dvla.topology.cluster import ClusterSpec

__all__ = ["plan_placement"]


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
