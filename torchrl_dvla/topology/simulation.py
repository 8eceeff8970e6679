# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Discrete-event simulation of a run: what the planner bounds, played through event by event.

Read from :meth:`_Node.play` on: the coroutines are those of a run, an env step, a policy call or a
transfer is a span of simulated time on what it keeps busy.
"""

from __future__ import annotations

import importlib
import itertools
import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from torchrl_dvla.collectors import InferenceConfig, WorkerConfig
from torchrl_dvla.data import GroupConfig
from torchrl_dvla.topology.cluster import ClusterSpec, NodeSpec
from torchrl_dvla.topology.cost_model import LaneCosts
from torchrl_dvla.topology.planning import Load, reduce_seconds, split_gpus
from torchrl_dvla.validation import Count, Natural, NonNegative, check
from torchrl_dvla.weight_update import BUCKET_BYTES

__all__ = ["SimulatedRun", "StepLaw", "simulate_run"]

Process = Generator[Any, Any, None]
#: Makes the factors, of mean 1, by which the env steps of one worker are longer than the mean.
StepLaw = Callable[[random.Random], Iterator[float]]

#: A lane or link that is busy for this share bounds a run; else what has to wait for its turn does.
_BOUND = 0.9
#: Parts of an update between which others get the core or GPU that the learner shares with them.
_MAX_PARTS = 64


@dataclass(frozen=True)
class SimulatedRun:
    """What a simulated run did in its steady state; predicted, never measured.

    Args:
        decisions_per_s (float): decisions of all nodes, of groups that were learned or dropped.
        learned_per_s (float): decisions learned.
        update_s (float): time between two versions.
        transfer_s (float): from the end of an update until the last node has its version.
        max_lag (int): largest policy lag of a decision that was learned.
        loads (tuple of Load): busy share of what a run keeps busy, means over the nodes.
    """

    decisions_per_s: float
    learned_per_s: float
    update_s: float
    transfer_s: float
    max_lag: int
    loads: tuple[Load, ...]

    @property
    def bounded_by(self) -> Load:
        """The busiest lane or link; if none is busy all the time, rollouts' turns or admission."""
        lanes = [load for load in self.loads if load.what != "admission"]
        busiest = max(lanes, key=lambda load: load.share)
        admission = self.loads[-1]
        return admission if busiest.share < _BOUND <= admission.share else busiest


def simulate_run(
    cluster: ClusterSpec,
    costs: LaneCosts,
    *,
    workers: WorkerConfig = WorkerConfig(),
    inference: InferenceConfig = InferenceConfig(),
    group: GroupConfig = GroupConfig(),
    num_learner_gpus: int = 0,
    step_law: StepLaw = lambda _: itertools.repeat(1.0),
    hop_s: float = 0.0,
    num_updates: int = 20,
    seed: int = 0,
) -> SimulatedRun:
    """A run on a cluster, simulated with SimPy; the same seed gives the same figures.

    It takes what :func:`~torchrl_dvla.topology.plan_run` takes, and plays it through:

    - a worker executes one command at a time, a reset or a chunk of env steps, on one core; with
      ``env_device="cuda"`` a group is stepped as one batched environment, on the node's GPUs;
    - the inference lane calls the policy for the rows that wait, as the collector does: for
      ``max_batch_size`` of them, for all that are under way, or after ``max_wait_s``; the GPUs of a
      node share each call evenly;
    - admission grants whole groups within ``max_policy_lag``; on several nodes as many as fill a
      node and one ahead, which begin once the version of their admission has arrived;
    - the learner takes ``groups_per_update`` of them; its ranks gather weights and reduce gradients
      before and after each optimizer step;
    - a version goes along the chain of nodes: a node has it after its bytes, and a bucket and
      *hop_s* for each node before it. A complete group goes to the learner's node;
    - links of the learner's node carry one transfer at a time in each direction.

    One node alone is a collector on one machine, without grants and transfers.

    Args:
        cluster (ClusterSpec): the machines; the first one learns.
        costs (LaneCosts): of the lanes.

    Keyword Args:
        workers (WorkerConfig): ``num_workers`` and ``envs_per_worker`` of every node.
        inference (InferenceConfig): limits of a policy call.
        group (GroupConfig): sizes, and the bound on staleness.
        num_learner_gpus (int): GPUs that learn, on the first nodes. Defaults to 0, for a CPU.
        step_law (Callable): from a generator, the factors of one worker's env steps, of mean 1.
            Defaults to steps of one length.
        hop_s (float): seconds of a message between two nodes.
        num_updates (int): updates that count, after those that fill the pipeline.
        seed (int): of everything drawn.

    Raises:
        ImportError: without SimPy.
        ValueError: for a number out of range, or a run in which no group can begin.

    Examples:
        >>> from torchrl_dvla.topology import ClusterSpec, LaneCosts, NodeSpec
        >>> costs = LaneCosts("x", 0.04, 1, 10, call_row_s=0.01, learn_row_s=1e-6, row_bytes=1,
        ...     version_bytes=1)
        >>> one = ClusterSpec((NodeSpec("a", 4, 2**34),))
        >>> found = simulate_run(one, costs, workers=WorkerConfig(num_workers=1))
        >>> round(found.decisions_per_s, 2), found.bounded_by.what  # 50 ms a turn
        (20.0, 'rollouts')
    """
    check("hop_s", hop_s, NonNegative)
    check("num_updates", num_updates, Count)
    check("seed", seed, Natural)
    most = min(cluster.num_gpus, max(1, cluster.num_gpus - 1))
    least, most = (1, most) if costs.policy_device == "cuda" else (0, 0)
    if not least <= num_learner_gpus <= most:
        raise ValueError(
            f"num_learner_gpus must be from {least} to {most} for policy_device="
            f"{costs.policy_device!r} and {cluster.num_gpus} GPUs, got {num_learner_gpus}. On "
            "GPUs, one at least has to learn and one to sample."
        )
    try:
        simpy = importlib.import_module("simpy")
    except ImportError as error:
        raise ImportError(
            "A run can only be simulated with SimPy, which is not installed. "
            "pip install 'torchrl-dvla[simulate]'"
        ) from error
    run = _Run(simpy, cluster, costs, workers, inference, group, num_learner_gpus, hop_s, seed)
    for node in run.nodes:
        node.start(step_law)
    # Rollouts begin in step: until all lanes are in stride, an update is like no other.
    run.play(max(4, 2 * (group.max_policy_lag + 1)))
    run.begin_counting()
    run.play(num_updates)
    return run.result()


@dataclass(eq=False)
class _Group:
    """A group: its rollouts, and from when on it may no longer be learned."""

    node: _Node
    version: int
    lengths: list[int]
    num_left: int
    is_complete: bool = False
    #: Version of its first decision.
    oldest: int | None = None


@dataclass(eq=False)
class _Rollouts:
    """What is played in one environment: a rollout, or all of a group in a batched one."""

    group: _Group
    length: int
    num_rows: int


class _Run:
    """Learner, admission and transfers; and what all nodes have in common."""

    def __init__(
        self,
        simpy: Any,
        cluster: ClusterSpec,
        costs: LaneCosts,
        workers: WorkerConfig,
        inference: InferenceConfig,
        group: GroupConfig,
        num_learner_gpus: int,
        hop_s: float,
        seed: int,
    ) -> None:
        self.simpy, self.clock = simpy, simpy.Environment()
        self.costs, self.workers, self.inference, self.config = costs, workers, inference, group
        self.hop_s, self.random = hop_s, random.Random(seed)
        learning, sampling = split_gpus(cluster, costs, num_learner_gpus)
        self.num_ranks = max(1, num_learner_gpus)
        self.reduce_s = reduce_seconds(cluster, costs, learning)
        self.shares_gpu = num_learner_gpus == cluster.num_gpus > 0
        on_cpu = costs.policy_device == "cpu"
        self.nodes = [
            _Node(self, spec, index, num_gpus)
            for index, (spec, num_gpus) in enumerate(zip(cluster.nodes, sampling))
            if on_cpu or num_gpus
        ]
        self.first = _Node(self, cluster.nodes[0], 0, 0) if self.nodes[0].index else self.nodes[0]
        speeds = [node.network_bytes_per_s for node in cluster.nodes]
        self.network = min([speed for speed in speeds if speed], default=math.inf)
        self.is_cluster = len(cluster.nodes) > 1
        self.spans_nodes = sum(map(bool, learning)) > 1
        #: Groups that may be admitted and not yet learned; those of them that are complete.
        self.limit = (group.max_policy_lag + 1) * group.groups_per_update
        self.num_complete = 0
        #: What arrives at the learner's node, and what leaves it.
        self.inward, self.outward = self.resource(1), self.resource(1)
        self.groups: dict[_Group, None] = {}
        self.version, self.is_publishing = 0, False
        self.changed = self.clock.event()
        #: Seconds.
        self.busy: defaultdict[str, float] = defaultdict(float)
        self.num_dropped = self.num_learned = self.num_updates = self.max_lag = 0
        self.admitted_s, self.admitted_since = 0.0, 0.0
        self.transfers_s: list[float] = []
        self.clock.process(self.learn())
        self.clock.process(self.distribute())

    def resource(self, capacity: int) -> Any:
        return self.simpy.Resource(self.clock, capacity)

    def use(self, name: str, seconds: float, *resources: Any) -> Process:
        """Keep something busy for a while, once it is free."""
        requests = []
        for resource in resources:
            requests.append((resource, resource.request()))
            yield requests[-1][1]
        yield self.clock.timeout(seconds)
        self.busy[name] += seconds
        for resource, request in requests:
            resource.release(request)

    def notify(self) -> None:
        """Wake the learner and the sender: a group is complete, or a version is there."""
        changed, self.changed = self.changed, self.clock.event()
        changed.succeed()

    # -- groups ---------------------------------------------------------------------------------

    def admit(self, node: _Node) -> _Group | None:
        """A further group, if it can be learned within the bound."""
        if self.is_publishing or len(self.groups) >= self.limit:
            return None
        self._count_admitted()
        mean, size = self.costs.decisions_per_rollout, self.config.num_candidates
        whole, part = int(mean), mean - int(mean)
        lengths = [whole + (part > 0 and self.random.random() < part) for _ in range(size)]
        group = _Group(node, self.version, lengths, size)
        self.groups[group] = None
        return group

    def _count_admitted(self) -> None:
        self.admitted_s += len(self.groups) * (self.clock.now - self.admitted_since)
        self.admitted_since = self.clock.now

    def grant(self) -> None:
        """Give groups to the nodes that have the largest share free; begin those that may begin."""
        if self.is_cluster:
            # With many nodes the largest share takes a while to find: only for a group that may be.
            while not self.is_publishing and len(self.groups) < self.limit:
                node = max(self.nodes, key=_Node.free_share)
                if node.free_share() <= 0 or (group := self.admit(node)) is None:
                    break
                node.num_granted += 1
                node.granted.append(group)
                node.fill()
        else:
            self.nodes[0].fill()

    def complete(self, group: _Group) -> Process:
        """A group has come to its end: on another node it has to travel first."""
        if self.is_cluster and group.node.index:
            moved = sum(group.lengths) * self.costs.row_bytes / self.network
            yield self.clock.timeout(self.hop_s)
            yield from self.use("network, rows", moved, self.inward)
        group.node.num_granted -= 1
        if self.random.random() < self.costs.learned_share:
            group.is_complete = True
            self.num_complete += 1
            self.notify()
        else:  # without contrast
            self._count_admitted()
            del self.groups[group]
            self.num_dropped += sum(group.lengths)
        self.grant()

    def select(self) -> list[_Group]:
        """The oldest complete groups, if what stays behind can wait for the next version."""
        size = self.config.groups_per_update
        if self.num_complete < size:
            return []
        cohort = [group for group in self.groups if group.is_complete][:size]
        leaving, staying = set(cohort), 0
        for group in self.groups:
            staying += group not in leaving
            if staying > (group.version + self.config.max_policy_lag - self.version) * size:
                return []
        return cohort

    # -- learner --------------------------------------------------------------------------------

    def learn(self) -> Process:
        """Update after update: wait for a cohort, learn, publish."""
        while True:
            while not (cohort := self.select()):
                yield self.changed
            rows = sum(sum(group.lengths) for group in cohort)
            yield from self._update(rows)
            self.is_publishing = True
            yield self.clock.timeout(self.costs.publish_s)
            self.is_publishing = False
            self._count_admitted()
            for group in cohort:
                self.max_lag = max(self.max_lag, self.version - (group.oldest or 0))
                del self.groups[group]
            self.version += 1
            self.num_complete -= len(cohort)
            self.num_learned += rows
            self.num_updates += 1
            self.first.version = self.version
            self.notify()
            self.grant()

    def _update(self, rows: int) -> Process:
        costs = self.costs
        num_steps = rows * costs.optimizer_steps_per_row if self.reduce_s else 0
        parts = max(1, min(_MAX_PARTS, math.ceil(num_steps or rows)))
        work_s = rows * costs.learn_row_s / self.num_ranks / parts
        reduce_s = num_steps * self.reduce_s / parts
        links = (self.inward, self.outward) if self.spans_nodes else ()
        shared = [self.first.device] if self.shares_gpu else []
        shared += [self.first.cores] if costs.policy_device == "cpu" else []
        for _ in range(parts):
            if reduce_s:
                yield from self.use("FSDP", reduce_s, *links)
            yield from self.use("gradient lane", work_s, *shared)

    def distribute(self) -> Process:
        """Version after version, always the newest, from the learner's node along the chain."""
        sent, others = 0, [node for node in self.nodes if node.index]
        while others:
            while sent == self.version:
                yield self.changed
            sent, start_s = self.version, self.clock.now
            moved_s = self.costs.version_bytes / self.network
            yield from self.use("network, versions", moved_s, self.outward)
            bucket = min(BUCKET_BYTES, self.costs.version_bytes)
            for number, node in enumerate(others):
                if number:
                    yield self.clock.timeout(bucket / self.network)
                yield self.clock.timeout(self.hop_s)
                node.version = sent
                node.fill()
            self.transfers_s.append(self.clock.now - start_s)

    # -- the whole ------------------------------------------------------------------------------

    def play(self, num_updates: int) -> None:
        """Simulate so many updates."""
        until = self.num_updates + num_updates
        self.grant()
        while self.num_updates < until:
            if self.clock.peek() == math.inf:
                raise ValueError(
                    "The run must have rollouts that can begin, got none: no environment fits. "
                    "Raise num_workers or envs_per_worker, or lower group_size."
                )
            self.clock.step()

    def begin_counting(self) -> None:
        """Forget what was counted so far."""
        self._count_admitted()
        self.start_s, self.admitted_s = self.clock.now, 0.0
        self.num_dropped = self.num_learned = self.num_updates = self.max_lag = 0
        self.busy.clear()
        self.transfers_s.clear()

    def result(self) -> SimulatedRun:
        self._count_admitted()
        seconds, costs = self.clock.now - self.start_s, self.costs
        counts: Counter[str] = Counter()
        for node in self.nodes:
            counts["rollouts"] += node.num_slots
            counts["sampling lane"] += len(node.workers) if costs.env_device == "cpu" else 1
            counts["inference lane"] += 1
            counts["collector's thread"] += 1
            counts["cores"] += node.spec.num_cores
            counts["sampling and inference on GPUs"] += 1
        busy = self.busy
        if costs.env_device == "cuda":
            together = busy["sampling lane"] + busy["inference lane"]
            busy["sampling and inference on GPUs"] = together + busy["gradient lane"] * (
                self.shares_gpu
            )
        else:
            busy["cores"] = busy["sampling lane"] + busy["collector's thread"]
            if costs.policy_device == "cpu":
                busy["cores"] += busy["inference lane"] + busy["gradient lane"]
        # What bounds the learner is its traffic where that takes longer than its work.
        work = "gradient lane, work" if busy["FSDP"] < busy["gradient lane"] else "FSDP traffic"
        loads = [
            Load(name, "", busy[name] / counts[name] / seconds) for name in counts if busy[name]
        ]
        learner_s = busy["gradient lane"] + busy["FSDP"]
        loads.append(Load(work if busy["FSDP"] else "gradient lane", "", learner_s / seconds))
        loads += [
            Load(name, "", busy[name] / seconds)
            for name in ("network, rows", "network, versions")
            if busy[name]
        ]
        loads.append(Load("admission", "", self.admitted_s / seconds / self.limit))
        return SimulatedRun(
            (self.num_learned + self.num_dropped) / seconds,
            self.num_learned / seconds,
            seconds / self.num_updates,
            costs.publish_s + sum(self.transfers_s) / max(1, len(self.transfers_s)),
            self.max_lag,
            tuple(loads),
        )


class _Node:
    """The sampling-inference loop of one node."""

    def __init__(self, run: _Run, spec: NodeSpec, index: int, num_gpus: int) -> None:
        self.run, self.spec, self.index = run, spec, index
        self.lanes = max(1, num_gpus)
        self.cores, self.device = run.resource(spec.num_cores), run.resource(1)
        self.thread = run.resource(1)
        num_envs = run.workers.num_workers * run.workers.envs_per_worker
        self.is_batched = run.costs.env_device == "cuda"
        size = run.config.num_candidates
        self.num_slots = num_envs // size if self.is_batched else num_envs
        count = 1 if self.is_batched else run.workers.num_workers
        self.workers = [run.resource(1) for _ in range(count)]
        #: Idle environments, by their workers; the one that is idle longest first.
        self.idle = deque(index * count // self.num_slots for index in range(self.num_slots))
        self.is_lockstep = run.inference.is_deterministic(run.config.max_policy_lag)
        default = num_envs if self.is_lockstep else -(-num_envs // 2)
        self.max_batch_size = run.inference.max_batch_size or default
        self.capacity = -(-num_envs // size) + 1
        self.num_granted, self.version = 0, 0
        self.granted: deque[_Group] = deque()
        self.pending: deque[_Rollouts] = deque()
        self.waiting: deque[tuple[float, int, Any]] = deque()
        self.num_busy = self.num_waiting = 0
        self.free_since = 0.0
        self.changed = run.clock.event()
        self.factors: list[Iterator[float]] = []

    def start(self, step_law: StepLaw) -> None:
        run = self.run
        self.factors = [step_law(random.Random(run.random.random())) for _ in self.workers]
        run.clock.process(self.infer())

    def free_share(self) -> float:
        """Share of the groups that it may hold that it does not hold."""
        return 1 - self.num_granted / self.capacity

    def notify(self) -> None:
        if self.waiting:  # else no batch waits for news
            changed, self.changed = self.changed, self.run.clock.event()
            changed.succeed()

    def fill(self) -> None:
        """Give idle environments what waits for them, and begin groups."""
        while self.idle:
            if not self.pending:
                group = self._next_group()
                if group is None:
                    break
                self.pending.extend(
                    [_Rollouts(group, max(group.lengths), len(group.lengths))]
                    if self.is_batched
                    else [_Rollouts(group, length, 1) for length in group.lengths]
                )
            rollouts = self.pending.popleft()
            self.num_busy += rollouts.num_rows
            self.run.clock.process(self.play(rollouts, self.idle.popleft()))

    def _next_group(self) -> _Group | None:
        if not self.run.is_cluster:
            return self.run.admit(self)
        if self.granted and self.granted[0].version <= self.version:
            return self.granted.popleft()
        return None

    def play(self, rollouts: _Rollouts, worker: int) -> Process:
        """Reset, then decide and step until the end."""
        run, costs, group = self.run, self.run.costs, rollouts.group
        rows = rollouts.num_rows
        each_s = rows / self.lanes if self.is_batched else 1.0
        step_s = each_s * costs.env_step_s * costs.env_steps_per_decision
        on = (self.device,) if self.is_batched else (self.workers[worker], self.cores)
        if costs.reset_s:
            yield from run.use("sampling lane", each_s * costs.reset_s, *on)
        for _ in range(rollouts.length):
            decided = run.clock.event()
            self.waiting.append((run.clock.now, rows, decided))
            self.num_waiting += rows
            self.notify()
            call_s = yield decided
            group.oldest = self.version if group.oldest is None else group.oldest
            seconds = step_s * next(self.factors[worker])
            yield from run.use("sampling lane", seconds, *on)
            run.busy["rollouts"] += call_s + seconds + rows * costs.loop_s
            if costs.loop_s:
                yield from run.use(
                    "collector's thread", rows * costs.loop_s, self.thread, self.cores
                )
        self.idle.append(worker)
        self.num_busy -= rows
        group.num_left -= rows
        if not group.num_left:
            run.clock.process(run.complete(group))
        self.fill()
        if not run.is_cluster:
            run.grant()
        self.notify()

    def infer(self) -> Process:
        """Call the policy for one batch after the other."""
        run, costs = self.run, self.run.costs
        while True:
            yield from self._gather()
            batch, rows = [], 0
            while self.waiting and rows + self.waiting[0][1] <= max(
                self.max_batch_size, self.waiting[0][1]
            ):
                _, size, decided = self.waiting.popleft()
                rows += size
                batch.append(decided)
            self.num_waiting -= rows
            call_s = costs.call_s + costs.call_row_s * rows / self.lanes
            is_on_gpu = costs.policy_device == "cuda" and (self.is_batched or run.shares_gpu)
            on = [self.device] if is_on_gpu else []
            on += [self.cores] if costs.policy_device == "cpu" else []
            yield from run.use("inference lane", call_s, *on)
            self.free_since = run.clock.now
            for decided in batch:
                decided.succeed(call_s)

    def _gather(self) -> Process:
        """Wait until the next batch may begin."""
        run = self.run
        while True:
            wait_s = math.inf
            if self.waiting:
                enough = self.num_busy if self.is_lockstep else self.max_batch_size
                if self.num_waiting >= min(enough, self.num_busy):
                    return
                if not self.is_lockstep:
                    since = max(self.waiting[0][0], self.free_since)
                    wait_s = since + run.inference.max_wait_s - run.clock.now
                    if wait_s <= 1e-12:
                        return
            if wait_s == math.inf:
                yield self.changed
            else:
                yield self.changed | run.clock.timeout(wait_s)
