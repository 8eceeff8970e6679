# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Plan of a run: what each node carries, how fast that is, and what bounds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torchrl_dvla.collectors import InferenceConfig, WorkerConfig
from torchrl_dvla.data import GroupConfig
from torchrl_dvla.memory import format_bytes
from torchrl_dvla.topology.cluster import ClusterSpec, NodeSpec
from torchrl_dvla.topology.cost_model import LaneCosts
from torchrl_dvla.weight_update import BUCKET_BYTES

__all__ = [
    "Load",
    "NodePlacement",
    "NodePlan",
    "Placement",
    "RunPlan",
    "plan_placement",
    "plan_run",
]

#: Of the best rate: a plan with fewer workers, or fewer learning GPUs, that is this good is taken.
_GOOD_ENOUGH = 0.99


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
    costs: LaneCosts | None = None,
) -> Placement:
    """One sampling-inference loop on every node, as many workers as its cores and memory carry.

    A worker that simulates keeps one core busy, so a node gets one worker a core; inference and
    learner take the cores that workers leave while they wait for decisions. With *costs*,
    :func:`plan_run` chooses, and a node gets no more workers than make it faster.

    Args:
        cluster (ClusterSpec): the machines; the first one learns.

    Keyword Args:
        env_memory_bytes (int): resident memory of one environment.
        workers (WorkerConfig): everything about workers but their number.
        inference (InferenceConfig): the inference lane of every node.
        memory_share (float): share of a node's memory that environments may take.
        costs (LaneCosts, optional): of the lanes.

    Raises:
        ValueError: if a node cannot hold one environment, or as :func:`plan_run`.

    Examples:
        >>> from torchrl_dvla.topology import ClusterSpec, NodeSpec
        >>> cluster = ClusterSpec((NodeSpec("a", num_cores=8, memory_bytes=16 * 2**30),))
        >>> plan_placement(cluster, env_memory_bytes=2 * 2**30).nodes[0].workers.num_workers
        4
    """
    most = [_most_workers(node, env_memory_bytes, workers, memory_share) for node in cluster.nodes]
    if costs is not None:
        costs = replace(costs, env_bytes=env_memory_bytes)
        plan = plan_run(
            cluster, costs, workers=workers, inference=inference, memory_share=memory_share
        )
        return plan.placement(workers, inference)
    return Placement(
        tuple(
            NodePlacement(
                node.host, replace(workers, num_workers=number), inference, learner=index == 0
            )
            for index, (node, number) in enumerate(zip(cluster.nodes, most, strict=True))
        )
    )


@dataclass(frozen=True)
class Load:
    """What a lane or a device is kept busy with.

    Args:
        what (str): the lane or device.
        where (str): its node; empty for what the run has one of.
        share (float): busy share at the planned rate; 1 bounds it.
    """

    what: str
    where: str
    share: float

    def __str__(self) -> str:
        return f"{self.what} of {self.where}" if self.where else self.what


@dataclass(frozen=True)
class NodePlan:
    """What one node carries.

    Args:
        host (str): its name.
        num_workers (int): environment workers; none where it only learns.
        rollouts (int): rollouts under way at once.
        batch_size (int): rows of one policy call.
        rollout_gpus (int): GPUs with an inference lane.
        learner_gpus (int): GPUs with a rank of the learner.
        decisions_per_s (float): what its loop contributes.
    """

    host: str
    num_workers: int
    rollouts: int
    batch_size: int
    rollout_gpus: int
    learner_gpus: int
    decisions_per_s: float


@dataclass(frozen=True)
class RunPlan:
    """What a run takes and how fast it is, from :func:`plan_run`; print it to read it.

    Args:
        nodes (tuple of NodePlan): in the order of the cluster; the first one learns.
        decisions_per_s (float): decisions that are sampled and learned in the steady state.
        loads (tuple of Load): of every lane and device.
        num_ranks (int): ranks of the learner.
        learner_efficiency (float): share of a rank's time that is not spent on other ranks.
        update_s (float): time between two versions.
        transfer_s (float): from the end of an update until every node has its version.
        max_policy_lag (int): the least that hides transfer, learning and the length of rollouts.
        gains (Mapping): how many times faster the run is with one more node or GPU.
    """

    nodes: tuple[NodePlan, ...]
    decisions_per_s: float
    loads: tuple[Load, ...]
    num_ranks: int
    learner_efficiency: float
    update_s: float
    transfer_s: float
    max_policy_lag: int
    gains: Mapping[str, float] = field(default_factory=dict)

    @property
    def bounded_by(self) -> Load:
        """What is busy all the time."""
        return max(self.loads, key=lambda load: load.share)

    def placement(
        self,
        workers: WorkerConfig = WorkerConfig(),
        inference: InferenceConfig = InferenceConfig(),
    ) -> Placement:
        """The plan as a collector takes it: one loop a node.

        Args:
            workers (WorkerConfig): everything about workers but their number.
            inference (InferenceConfig): everything about inference but its batch size.

        Raises:
            ValueError: if a node has no loop, or one on several GPUs: a collector runs one
                inference process on every node.
        """
        wrong = [node.host for node in self.nodes if not node.num_workers or node.rollout_gpus > 1]
        if wrong:
            raise ValueError(
                f"A collector runs one sampling-inference loop on every node, got a plan with "
                f"none, or one on several GPUs, for {wrong}. Declare a node for each GPU that "
                "samples, with its share of the cores."
            )
        return Placement(
            tuple(
                NodePlacement(
                    node.host,
                    replace(workers, num_workers=node.num_workers),
                    replace(inference, max_batch_size=node.batch_size),
                    learner=index == 0,
                )
                for index, node in enumerate(self.nodes)
            )
        )

    def __str__(self) -> str:
        head = ("node", "workers", "rollouts", "batch", "GPUs sampling", "learning", "decisions/s")
        table: list[tuple[str, ...]] = [head]
        for node in self.nodes:
            counts = [node.num_workers, node.rollouts, node.batch_size]
            counts += [node.rollout_gpus, node.learner_gpus]
            table.append((node.host, *map(str, counts), f"{node.decisions_per_s:.4g}"))
        loads: list[tuple[str, ...]] = [("lane or device", "where", "busy")]
        loads += [(load.what, load.where or "-", f"{load.share:.0%}") for load in self.loads]
        bound = self.bounded_by
        facts: list[tuple[str, ...]] = [
            ("decisions/s", f"{self.decisions_per_s:.4g}"),
            ("bounded by", str(bound)),
            ("learner ranks", f"{self.num_ranks}, efficiency {self.learner_efficiency:.0%}"),
            ("a version", f"every {self.update_s:.3g} s, on its way {self.transfer_s:.3g} s"),
            ("max_policy_lag", f"{self.max_policy_lag} hides that, and the length of rollouts"),
            *((f"one more {name}", f"x {gain:.2f}") for name, gain in self.gains.items()),
        ]
        return "\n\n".join(_aligned(rows) for rows in (facts, table, loads))


def plan_run(
    cluster: ClusterSpec,
    costs: LaneCosts,
    *,
    workers: WorkerConfig = WorkerConfig(),
    inference: InferenceConfig = InferenceConfig(),
    group: GroupConfig = GroupConfig(),
    num_workers: int | None = None,
    num_learner_gpus: int | None = None,
    max_policy_lag: int | None = None,
    memory_share: float = 0.5,
) -> RunPlan:
    r"""The fastest plan on a cluster, by the asymptotic bounds of a closed queueing network.

    A resource that a decision keeps busy for :math:`D` seconds, and of which there are :math:`m`,
    lets at most :math:`m / D` decisions a second through; :math:`N` rollouts, each of which takes
    turns with its policy call, at most :math:`N / \sum D`. A run is as fast as the least of these:
    a step costs the maximum over the lanes. Bounds are optimistic where several are nearly equal.

    - sampling lane: the workers of a node; inference lane: one process, or one a GPU, in batches of
      half of the rollouts, so that the other half is simulated meanwhile;
    - cores: all that runs on the cores of a node, the learner included where it does;
    - gradient lane: the ranks, which gather weights twice and reduce gradients once an optimizer
      step, over the GPUs' links on one node and over the network on several, not overlapped;
    - network: rows to the learner's node, a version from it along the chain of the others;
    - admission: cohorts between their first decision and their publication, of which
      ``max_policy_lag + 1`` may be under way, so that by Little's law each may take that many times
      as long as an update.

    Learners fill the first node, then the next: their traffic is the densest. One GPU alone is
    shared by all lanes.

    Args:
        cluster (ClusterSpec): the machines; the first one learns.
        costs (LaneCosts): of the lanes, on a core and GPU such as those of the cluster.

    Keyword Args:
        workers (WorkerConfig): its ``envs_per_worker`` counts.
        inference (InferenceConfig): its ``max_batch_size`` counts.
        group (GroupConfig): its ``group_size`` and ``groups_per_update`` count.
        num_workers (int, optional): workers of every node. Defaults to the fewest that are as fast
            as any.
        num_learner_gpus (int, optional): GPUs that learn. Defaults to the best split.
        max_policy_lag (int, optional): whose bound counts; 0 takes turns. Defaults to one that
            bounds nothing.
        memory_share (float): share of a node's memory that environments may take.

    Raises:
        ValueError: for a plan for more than there is: workers beyond cores or memory, GPUs that
            learn beyond those that are there, a policy on GPUs without any.

    Reference:
        Denning, Buzen, "The Operational Analysis of Queueing Network Models", ACM Computing Surveys
        10(3), 1978 (utilisation law, asymptotic bounds); Little, "A Proof for the Queuing Formula
        L = λW", Operations Research 9(3), 1961.

    Examples:
        >>> from torchrl_dvla.topology import ClusterSpec, LaneCosts, NodeSpec
        >>> costs = LaneCosts("x", 0.1, 1, 10, call_row_s=0.01, learn_row_s=0.02, row_bytes=1,
        ...     version_bytes=1)
        >>> plan = plan_run(ClusterSpec((NodeSpec("a", 4, 2**34),)), costs, num_workers=2)
        >>> round(plan.decisions_per_s, 3), plan.bounded_by.what  # 2 workers, 110 ms a turn
        (18.182, 'rollouts')
    """
    options = (workers, inference, memory_share)

    def best(cluster: ClusterSpec) -> _Model:
        models = [
            _Model(cluster, costs, group, split, count, *options)
            for split in _splits(cluster, costs, num_learner_gpus)
            for count in _worker_counts(cluster, costs, num_workers, workers, memory_share)
        ]
        rates = [model.rate(max_policy_lag) for model in models]
        good = (model for model, rate in zip(models, rates) if rate >= _GOOD_ENOUGH * max(rates))
        return next(good)

    plan = best(cluster).plan(max_policy_lag)
    last = cluster.nodes[-1]
    more = {"node": ClusterSpec((*cluster.nodes, replace(last, host=f"another {last.host}")))}
    if costs.policy_device == "cuda":
        grown = replace(last, gpus=last.gpus + last.gpus[-1:], num_gpus=last.num_gpus + 1)
        more["GPU"] = ClusterSpec((*cluster.nodes[:-1], grown))
    rates = {name: best(other).rate(max_policy_lag) for name, other in more.items()}
    gains = {name: rate / plan.decisions_per_s for name, rate in rates.items()}
    return replace(plan, gains=gains)


def _splits(cluster: ClusterSpec, costs: LaneCosts, wanted: int | None) -> list[int]:
    """Numbers of GPUs that may learn."""
    splits = [0]
    if costs.policy_device == "cuda":
        if not cluster.num_gpus:
            raise ValueError(
                "cluster must have a GPU for costs with policy_device='cuda', got none. Calibrate "
                "with device=cpu, or declare the GPUs."
            )
        splits = list(range(1, cluster.num_gpus)) or [1]
    if wanted is not None and wanted not in splits:
        raise ValueError(
            f"num_learner_gpus must be one of {splits}, got {wanted}: of the {cluster.num_gpus} "
            "GPUs of the cluster one at least has to sample. Lower it."
        )
    return splits if wanted is None else [wanted]


def _worker_counts(
    cluster: ClusterSpec,
    costs: LaneCosts,
    wanted: int | None,
    workers: WorkerConfig,
    memory_share: float,
) -> list[int]:
    """Numbers of workers that a node may have, as far as it carries them."""
    most = [_most_workers(node, costs.env_bytes, workers, memory_share) for node in cluster.nodes]
    if wanted is None:
        return list(range(1, max(most) + 1))
    for node, number in zip(cluster.nodes, most, strict=True):
        if not 1 <= wanted <= number:
            raise ValueError(
                f"num_workers must be from 1 to {number} on {node.host}, which has "
                f"{node.num_cores} cores and {format_bytes(node.memory_bytes)} of memory, got "
                f"{wanted}. Lower it, or envs_per_worker."
            )
    return [wanted]


class _Loop:
    """The sampling-inference loop of a node with some workers, at its bounds."""

    def __init__(
        self,
        node: NodeSpec,
        costs: LaneCosts,
        num_workers: int,
        num_gpus: int,
        workers: WorkerConfig,
        inference: InferenceConfig,
    ) -> None:
        self.num_workers, self.rollouts = num_workers, num_workers * workers.envs_per_worker
        lanes = max(1, num_gpus)
        self.batch_size = -(-self.rollouts // (2 * lanes))
        if inference.max_batch_size is not None:
            self.batch_size = min(inference.max_batch_size, self.rollouts)
        call_s = costs.call_seconds(self.batch_size)
        on_gpu, simulates_on_gpu = costs.policy_device == "cuda", costs.env_device == "cuda"
        #: Seconds of a turn of one rollout, if it waits for nobody but those of its batch.
        together = self.batch_size if simulates_on_gpu else 1
        self.turn_s = together * costs.sample_s + self.batch_size * call_s + costs.loop_s
        #: Seconds of the cores that a decision takes.
        self.core_s = costs.loop_s
        #: Seconds that a decision takes of each lane or device, and how many of it there are.
        self.demands: dict[str, tuple[float, float]] = {"rollouts": (self.turn_s, self.rollouts)}
        if simulates_on_gpu:
            self.demands["sampling and inference on GPUs"] = (costs.sample_s + call_s, lanes)
        else:
            self.demands["sampling lane"] = (costs.sample_s, num_workers)
            self.demands["inference lane"] = (call_s, lanes)
            self.core_s += costs.sample_s
        self.core_s += 0.0 if on_gpu else call_s
        self.demands["collector's thread"] = (costs.loop_s, 1)
        self.most = min(
            [count / seconds for seconds, count in self.demands.values() if seconds > 0]
            + ([node.num_cores / self.core_s] if self.core_s > 0 else [])
        )


class _Model:
    """The bounds of a cluster with so many GPUs that learn, on the first nodes, and workers a node.

    A node gets fewer workers than that if it carries no more.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        costs: LaneCosts,
        group: GroupConfig,
        num_learner_gpus: int,
        num_workers: int,
        workers: WorkerConfig,
        inference: InferenceConfig,
        memory_share: float,
    ) -> None:
        self.cluster, self.costs = cluster, costs
        self.shares_gpu = num_learner_gpus == cluster.num_gpus > 0
        self.learner_gpus, self.rollout_gpus = split_gpus(cluster, costs, num_learner_gpus)
        self.num_ranks = max(1, num_learner_gpus)
        self.loops: list[_Loop | None] = []
        for node, num_gpus in zip(cluster.nodes, self.rollout_gpus, strict=True):
            if costs.policy_device == "cuda" and not num_gpus:
                self.loops.append(None)
                continue
            most = _most_workers(node, costs.env_bytes, workers, memory_share)
            count = min(num_workers, most)
            self.loops.append(_Loop(node, costs, count, num_gpus, workers, inference))
        learned_s = costs.learned_share * costs.learn_row_s / self.num_ranks
        others_s = (
            costs.learned_share
            * costs.optimizer_steps_per_row
            * reduce_seconds(cluster, costs, self.learner_gpus)
        )
        #: Seconds of the learner behind a decision, and how much of them is work.
        self.learn_s, self.efficiency = learned_s + others_s, learned_s / (learned_s + others_s)
        rows = group.group_size * group.groups_per_update * costs.decisions_per_rollout
        #: Decisions behind an update: those of groups without contrast are learned by none.
        self.update_decisions = rows / costs.learned_share
        networks = [node.network_bytes_per_s for node in cluster.nodes]
        self.network = min([speed for speed in networks if speed], default=math.inf)
        #: Of every link of the chain that a version goes along; each node adds a bucket's delay.
        num_others, version_bytes = len(cluster.nodes) - 1, costs.version_bytes
        self.version_s = version_bytes / self.network if num_others else 0.0
        delay_s = max(0, num_others - 1) * min(BUCKET_BYTES, version_bytes) / self.network
        self.transfer_s = costs.publish_s + self.version_s + delay_s
        self.rollouts = sum(loop.rollouts for loop in self.loops if loop)
        self.free_rates = self._free_rates()
        self.free_rate = sum(self.free_rates)

    def _free_rates(self) -> list[float]:
        """Decisions per second of each node, if the learner is as fast as that.

        A learner on the cores of the first node takes them from the loop there.
        """
        rates = [loop.most if loop else 0.0 for loop in self.loops]
        for index, loop in enumerate(self.loops):
            if loop and self.shares_gpu:
                seconds = self._gpu_seconds(loop) + self.learn_s
                rates[index] = min(rates[index], 1 / seconds)
            if loop and index == 0 and self.costs.policy_device == "cpu":
                left = self.cluster.nodes[0].num_cores - self.learn_s * sum(rates[1:])
                rates[0] = max(0.0, min(rates[0], left / (loop.core_s + self.learn_s)))
        return rates

    def _gpu_seconds(self, loop: _Loop) -> float:
        name = "sampling and inference on GPUs"
        return loop.demands.get(name, loop.demands.get("inference lane", (0.0, 1)))[0]

    def _learner_demands(self) -> dict[str, float]:
        """Seconds behind a decision of all nodes, of what there is one of."""
        costs, rates = self.costs, self.free_rates
        remote = 1 - rates[0] / self.free_rate if self.free_rate else 1.0
        demands = {"gradient lane": self.learn_s}
        if len(rates) > 1 and self.network < math.inf:
            demands["network, rows"] = remote * costs.row_bytes / self.network
            demands["network, versions"] = self.version_s / self.update_decisions
        return demands

    def _admission_s(self, max_policy_lag: int) -> float:
        """Seconds behind a decision, where so few cohorts may be under way."""
        update = self.update_decisions
        turn_s = max(loop.turn_s for loop in self.loops if loop)
        most = sum(loop.most for loop in self.loops if loop)
        sample_s = max(self.costs.decisions_per_rollout * turn_s, update / most)
        cohort_s = sample_s + update * self.learn_s + self.transfer_s
        return cohort_s / ((max_policy_lag + 1) * update)

    def rate(self, max_policy_lag: int | None) -> float:
        """Decisions per second of all nodes."""
        seconds = [1 / self.free_rate, *self._learner_demands().values()]
        if max_policy_lag is not None:
            seconds.append(self._admission_s(max_policy_lag))
        return 1 / max(seconds)

    def plan(self, max_policy_lag: int | None) -> RunPlan:
        """The plan, with the load of everything at its rate."""
        rate, costs = self.rate(max_policy_lag), self.costs
        nodes, loads = [], []
        for index, (node, loop) in enumerate(zip(self.cluster.nodes, self.loops, strict=True)):
            own = self.free_rates[index] * rate / self.free_rate
            gpus = self.rollout_gpus[index], self.learner_gpus[index]
            counts = (loop.num_workers, loop.rollouts, loop.batch_size) if loop else (0, 0, 0)
            nodes.append(NodePlan(node.host, *counts, *gpus, own))
            for name, (seconds, count) in loop.demands.items() if loop else ():
                loads.append(Load(name, node.host, own * seconds / count))
            core_s = own * loop.core_s if loop else 0.0
            if index == 0 and costs.policy_device == "cpu":
                core_s += rate * self.learn_s
            loads.append(Load("cores", node.host, core_s / node.num_cores))
            if self.shares_gpu and loop:
                busy = rate * (self._gpu_seconds(loop) + self.learn_s)
                loads.append(Load("the GPU", node.host, busy))
        for name, seconds in self._learner_demands().items():
            loads.append(Load(name, "", rate * seconds))
        if max_policy_lag is not None:
            loads.append(Load("admission", "", rate * self._admission_s(max_policy_lag)))
        update = self.update_decisions
        # A cohort is sampled at the full rate, or as long as its rollouts take, then learned.
        sampled = max(update, self.rollouts * costs.decisions_per_rollout) / self.free_rate
        cohort_s = sampled + update * self.learn_s + self.transfer_s
        return RunPlan(
            tuple(nodes),
            rate,
            tuple(loads),
            self.num_ranks,
            self.efficiency,
            update / rate,
            self.transfer_s,
            max(1, math.ceil(cohort_s * rate / update - 1e-9) - 1),
        )


def split_gpus(
    cluster: ClusterSpec, costs: LaneCosts, num_learner_gpus: int
) -> tuple[list[int], list[int]]:
    """GPUs of each node that learn, the first nodes first, and those that sample.

    Where all of them learn, all sample as well.
    """
    learning, left = [], num_learner_gpus
    for node in cluster.nodes:
        learning.append(min(left, node.num_gpus))
        left -= learning[-1]
    if costs.policy_device == "cpu":
        return learning, [0] * len(learning)
    is_shared = num_learner_gpus == cluster.num_gpus
    return learning, [
        node.num_gpus - (0 if is_shared else mine) for node, mine in zip(cluster.nodes, learning)
    ]


def reduce_seconds(cluster: ClusterSpec, costs: LaneCosts, learner_gpus: list[int]) -> float:
    """Seconds of an optimizer step in which ranks gather weights twice and reduce gradients."""
    used = [(node, count) for node, count in zip(cluster.nodes, learner_gpus) if count]
    ranks = max(1, sum(learner_gpus))
    speeds = [node.network_bytes_per_s for node, _ in used]
    if len(used) <= 1:
        speeds = [gpu.link_bytes_per_s for node, _ in used for gpu in node.gpus]
    slowest = min([speed for speed in speeds if speed], default=math.inf)
    moved = (2 * costs.version_bytes + (costs.trained_bytes or 0)) * (ranks - 1) / ranks
    return moved / slowest


def _most_workers(
    node: NodeSpec, env_bytes: int, workers: WorkerConfig, memory_share: float
) -> int:
    """Workers that the cores and the memory of a node carry."""
    worker_bytes = env_bytes * workers.envs_per_worker
    room = int(node.memory_bytes * memory_share)
    most = min(node.num_cores, room // worker_bytes) if worker_bytes else node.num_cores
    if most < 1:
        raise ValueError(
            f"env_memory_bytes must fit into {memory_share:.0%} of the memory of {node.host} "
            f"({node.memory_bytes} bytes), got {worker_bytes} bytes for one worker. Lower "
            "envs_per_worker or raise memory_share."
        )
    return most


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
