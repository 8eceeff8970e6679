# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The collector of a cluster: the learner's here, a whole sampling-inference loop on every node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torch.nn.parameter import is_lazy

from torchrl_dvla.collectors import DVLACollector
from torchrl_dvla.collectors.dvla import EnvFactory, Loop, SamplingLanes
from torchrl_dvla.swimlane.managed_process import pickled
from torchrl_dvla.swimlane.messages import EnvSpecs
from torchrl_dvla.topology.cluster_loop import ClusterLoop
from torchrl_dvla.topology.node_loop import installed_versions, policy_payload
from torchrl_dvla.topology.node_messages import RunPlan
from torchrl_dvla.topology.nodes import (
    Machine,
    Node,
    NodeLostError,
    NodeRuntime,
    apart,
    difference,
    start_node,
    stop_nodes,
)
from torchrl_dvla.topology.planning import Placement
from torchrl_dvla.topology.ray_runtime import RayRuntime
from torchrl_dvla.validation import Seconds, check

__all__ = ["TopologyAwareCollector"]

_log = logging.getLogger("torchrl_dvla")

#: Of a node's object store that is started here, at least: groups on their way.
_MIN_STORE_BYTES = 128 << 20


class ClusterNodes:
    """Nodes that were started and compared: the environments of the whole cluster.

    Args:
        nodes (list of Node): at least one.
        runtime (NodeRuntime): has started them.
    """

    def __init__(self, nodes: list[Node], runtime: NodeRuntime) -> None:
        self.nodes, self.runtime = nodes, runtime
        self.specs: EnvSpecs
        self.first_task = ""

    def stop(self, grace_s: float) -> None:
        """End the nodes and leave the cluster."""
        stop_nodes(self.nodes, grace_s)
        self.runtime.close()


class TopologyAwareCollector(DVLACollector):
    """:class:`~torchrl_dvla.collectors.DVLACollector` over the nodes of a cluster.

    On every node of the placement runs a whole sampling-inference loop: environment workers, pages,
    inference process and weight store of its own. Per-step data never leaves a node. Complete
    groups come to the learner, which is this process, as bytes, and versions of the weights go to
    each node once. Admission is the learner's, so the bound on ``policy_lag`` holds over the whole
    cluster. Any node may die, hang, join or leave: its groups are sampled again on others.

    With one node, and without *address*, it is ``DVLACollector``.

    Args:
        create_env_fn (Callable or str or Mapping): as for ``DVLACollector``.
        policy (TensorDictModuleBase): as for ``DVLACollector``.

    Keyword Args:
        placement (Placement): what runs where, as
            :func:`torchrl_dvla.topology.plan_placement` makes it. Several nodes may have the name
            of this machine; Ray then has as many nodes here.
        address (str, optional): ``"host:port"`` of a running Ray cluster, or ``"auto"`` for that of
            this machine. By default the one that this process has joined already is used, or else
            one is started on this machine, which nobody outside can reach.
        heartbeat_timeout_s (float): seconds without an answer after which a node counts as lost.
        **kwargs: the further arguments of ``DVLACollector``, except ``workers`` and
            ``inference``, which the placement holds.

    Raises:
        ImportError: if there are several nodes and Ray is not installed.
        ValueError: if the placement asks for more than there is; or as ``DVLACollector``.
        RuntimeError: naming the node, if its environments or its policy cannot be built, or differ
            from those of the others.
        TimeoutError: if the address does not answer.

    Examples:
        >>> from torchrl_dvla.topology import ClusterSpec, plan_placement
        >>> placement = plan_placement(ClusterSpec.local(), env_memory_bytes=2 * 2**30)
        >>> collector = TopologyAwareCollector(  # doctest: +SKIP
        ...     make_env, policy, placement=placement, replay_buffer=buffer
        ... )
    """

    def __init__(
        self,
        create_env_fn: EnvFactory | Mapping[str, EnvFactory],
        policy: TensorDictModuleBase | None = None,
        *,
        placement: Placement,
        address: str | None = None,
        heartbeat_timeout_s: float = 10.0,
        **kwargs: Any,
    ) -> None:
        self.placement = placement
        #: The nodes, their states over time and what they did; ``None`` on one machine.
        self.cluster: ClusterLoop | None = None
        self._address = check("address", address, str | None)
        self._heartbeat_s = check("heartbeat_timeout_s", heartbeat_timeout_s, Seconds)
        node = placement.learner
        workers, inference = node.workers, node.inference
        self._is_cluster = len(placement.nodes) > 1 or address is not None
        if self._is_cluster:
            different = [n.host for n in placement.nodes if n.inference != inference]
            different += [
                n.host for n in placement.nodes if n.workers.max_decisions != workers.max_decisions
            ]
            if different:
                raise ValueError(
                    f"placement must have one inference and one max_decisions, got others on "
                    f"{different}. Let nodes differ in num_workers and envs_per_worker."
                )
            if inference.deterministic:
                raise ValueError(
                    "deterministic must be None or False on several nodes, got True: which of them "
                    "is faster decides what is sampled. Use one node."
                )
            every = [n.workers for n in placement.nodes]
            num_envs = sum(w.num_workers * w.envs_per_worker for w in every)
            workers = replace(workers, num_workers=num_envs, envs_per_worker=1)
        super().__init__(create_env_fn, policy, workers=workers, inference=inference, **kwargs)

    def _start_lanes(self, undo: contextlib.ExitStack) -> SamplingLanes:
        if not self._is_cluster:
            return super()._start_lanes(undo)
        self._warn_of_limits()
        runtime = self._make_runtime()
        names = [f"node {index}" for index in range(len(self.placement.nodes))]
        nodes = [Node(n, p.host, p.workers) for n, p in zip(names, self.placement.nodes)]
        lanes = ClusterNodes(nodes, runtime)
        undo.callback(lanes.stop, self._workers.stop_timeout_s)
        assign_machines(nodes, runtime.machines())

        async def start_all() -> None:
            await asyncio.gather(*[start_node(node, runtime) for node in nodes])

        try:
            apart(asyncio.run, start_all()).result()
        except NodeLostError as error:
            raise RuntimeError(f"A node could not be started: {error}") from error
        here, first = installed_versions(), nodes[0]
        assert first.facts is not None
        versions = first.facts.versions
        ours = {name: here[name] for name in versions if here[name] != versions[name] != "none"}
        if {"torchrl-dvla", "torch", "python"} & ours.keys():
            raise RuntimeError(
                f"The learner must have the packages of the nodes, got {ours} here and "
                f"{versions} on {first.name}. Install the same versions."
            )
        for node in nodes[1:]:
            if problem := difference(node, first):
                raise RuntimeError(problem)
        lanes.specs, lanes.first_task = first.facts.specs, next(iter(self._factories))
        return lanes

    def _make_runtime(self) -> NodeRuntime:
        nodes = self.placement.nodes
        # The policy by value, and as much for groups.
        weights = [p for p in self.policy.parameters() if not is_lazy(p)]
        policy_bytes = sum(p.numel() * p.element_size() for p in weights)
        runtime = RayRuntime(
            [node.host for node in nodes],
            [node.workers.num_workers for node in nodes],
            address=self._address,
            object_store_bytes=max(_MIN_STORE_BYTES, 2 * policy_bytes),
        )
        runtime.use(
            pickled(self._factories, "create_env_fn"),
            nodes[0].inference,
            # A policy by value is sent later, when lazy parameters have their shapes.
            self._policy_factory and policy_payload(self.policy, self._policy_factory),
        )
        return runtime

    def _warn_of_limits(self) -> None:
        """Log what works, but not as well as more nodes are meant to."""
        group, nodes = self.group, self.placement.nodes
        if group.max_policy_lag == 0 and len(nodes) > 1:
            _log.warning(
                "max_policy_lag=0 on %d nodes: all of them are idle from the end of their last "
                "group until the update is published and has reached them. Set max_policy_lag=1.",
                len(nodes),
            )
        limit = (group.max_policy_lag + 1) * group.groups_per_update
        num_envs = self._workers.num_workers
        if limit * group.num_candidates < num_envs:
            _log.warning(
                "%d environments on %d nodes, of which admission keeps %d busy at most: "
                "(max_policy_lag + 1) x groups_per_update x rollouts of a group. Raise one.",
                num_envs,
                len(nodes),
                limit * group.num_candidates,
            )

    def _make_loop(self, lanes: Any) -> Loop:
        if not self._is_cluster:
            return super()._make_loop(lanes)
        plan = RunPlan(
            layout=self.plan.layout,
            weight_layout=self._updater.store.layout,
            rows_per_page=self.plan.rows_per_page,
            pages_per_rollout=self._groups.pages_per_rollout,
            num_candidates=self.group.num_candidates,
            num_groups=0,  # of each node its own
        )
        self.cluster = ClusterLoop(
            lanes.nodes,
            lanes.runtime,
            self._groups,
            self._instructions,
            self._updater,
            plan,
            policy_payload(
                self.policy, self._policy_factory, self._updater.store.provides(self.policy)
            ),
            timeline=self.timeline,
            counters=self._counters,
            seed=self._seed,
            workers=self._workers,
            heartbeat_timeout_s=self._heartbeat_s,
            on_error=self._on_error,
        )
        return self.cluster

    def stats(self) -> dict[str, Any]:
        """As those of ``DVLACollector``, and ``cluster/...`` of the nodes."""
        return super().stats() | (self.cluster.stats() if self.cluster else {})

    def __repr__(self) -> str:
        hosts = [
            f"{n.host} {n.workers.num_workers}x{n.workers.envs_per_worker}"
            for n in self.placement.nodes
        ]
        return f"{type(self).__name__}(tasks={list(self._factories)}, group={self.group}, {hosts})"


def assign_machines(nodes: list[Node], machines: Mapping[str, Machine]) -> None:
    """Give every node the machine of its name.

    Raises:
        ValueError: if there is none left for one, with what there is.
    """
    free = dict(machines)
    for node in nodes:
        for machine_id, machine in free.items():
            is_here = node.host in (machine.host, "localhost", "127.0.0.1")
            if is_here and machine.num_cores >= node.workers.num_workers:
                node.machine_id = machine_id
                del free[machine_id]
                break
        else:
            there = [f"{m.host} with {m.num_cores:g} cores" for m in free.values()]
            raise ValueError(
                f"placement must fit the cluster, got {node.workers.num_workers} workers for "
                f"{node.host!r} ({node.name}), and what is left of it is {there}. Plan for what "
                "`ray status` shows."
            )
