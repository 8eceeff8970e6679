# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A cluster whose nodes answer by script, in the test's own process and event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import torch

from torchrl_dvla.collectors import InitStateSchedule, WorkerConfig
from torchrl_dvla.collectors.evaluation import Evaluation, EvaluationResult
from torchrl_dvla.collectors.metrics import CollectionCounters
from torchrl_dvla.data import GroupConfig, GroupQueue, InstructionTable, Rollout, decision_layout
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import Timeline
from torchrl_dvla.swimlane.chrome_trace import Span
from torchrl_dvla.swimlane.messages import EnvSpecs
from torchrl_dvla.topology.cluster_loop import ClusterLoop
from torchrl_dvla.topology.node_messages import (
    EvaluationDone,
    Grant,
    GroupDone,
    NodeFacts,
    NodeReport,
    RunPlan,
)
from torchrl_dvla.topology.nodes import (
    Machine,
    Node,
    NodeLostError,
    NodeState,
    in_thread,
    start_node,
)
from torchrl_dvla.weight_update import AsyncWeightUpdater, ChainReceiver, WeightReplica

LAYOUT = decision_layout(
    {("observation", "state"): ((2,), torch.float32)}, chunk_size=2, action_dim=1
)
SPECS = EnvSpecs((), 2, 1)
VERSIONS = {"python": "3.11", "torch": "2.13"}
NUM_ROWS = 3


def make_group(grant: Grant, version: int, **changes: Any) -> GroupDone:
    """What a node makes of a grant: two rollouts of three rows, of which one returns more."""
    rollouts = []
    for number in range(grant.first_rollout_id, grant.first_rollout_id + 2):
        rollout = Rollout(grant.spec, grant.group_id, number, instruction_id=0)
        for _ in range(NUM_ROWS):
            rollout.record(
                policy_version=version, reward=number % 2, success=False, num_env_steps=2
            )
        rollouts.append(rollout)
    num_rows = 2 * NUM_ROWS
    rows = np.zeros(LAYOUT.nbytes(num_rows), np.uint8)
    columns = LAYOUT.columns(rows, num_rows)
    columns["group_id"][:] = grant.group_id
    columns["policy_version"][:] = version
    columns["observation", "state"][:] = np.arange(2 * num_rows).reshape(num_rows, 2)
    done = GroupDone(grant.group_id, rollouts, rows, {0: f"task of {grant.group_id % 2}"})
    return done._replace(**changes)


class FakeNode:
    """One start of a node; it completes what it is granted at once, or when the test says so."""

    def __init__(self, cluster: FakeRuntime, machine_id: str) -> None:
        self.cluster, self.machine_id = cluster, machine_id
        self.grants: list[Grant] = []
        self.failing: list[str] = []
        self.seed: int | None = None
        self.version, self.versions = -1, []
        self.evaluations: list[tuple[Any, ...]] = []
        self.is_lost = self.hangs = self.is_killed = False
        self.holds_weights = False
        self.receiver, self.weights = ChainReceiver(), None
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    async def call(self, method: str, *args: Any, timeout_s: float | None) -> Any:
        await asyncio.sleep(0)
        if self.hangs:
            raise NodeLostError(f"{method} took more than {timeout_s} s.")
        if self.is_lost:
            raise NodeLostError("it is gone")
        return await getattr(self, method)(*args)

    async def facts(self) -> NodeFacts:
        return NodeFacts(self.cluster.specs, self.cluster.versions, 1, 0.0, self.receiver.address)

    async def begin(self, plan: RunPlan, policy: bytes) -> None:
        assert policy == b"policy"
        self.plan, self.weights = plan, WeightReplica(plan.weight_layout)

    async def receive(
        self, version: int | None, digest: str, key: bytes, following: Any, timeout_s: float
    ) -> None:
        def take() -> None:
            # Not the heartbeat of the test: this machine may be busy.
            with self.receiver.receive(key, following, 20.0) as fill:
                if version is None:
                    self.weights.write_frozen(fill, digest)
                else:
                    self.weights.write(version, fill, digest)

        while self.holds_weights:
            await asyncio.sleep(1e-3)
        try:
            await in_thread(take)
        except (OSError, ValueError) as error:
            raise NodeLostError(str(error)) from error
        if version is None:
            return
        self.version = version
        self.versions.append(version)
        if self.cluster.completes:
            self.complete()

    async def grant(self, grants: list[Grant], failing: list[str], seed: int) -> None:
        self.grants += grants
        self.failing += failing
        self.seed = seed
        if self.cluster.completes:
            self.complete()

    def complete(self, count: int = 99) -> None:
        """Complete the oldest grants, as far as their version is there."""
        for grant in self.grants[:count]:
            if grant.min_version <= self.version:
                self.grants.remove(grant)
                self.send(make_group(grant, self.version))

    async def evaluate(self, number: int, episodes: Any, greedy: bool, num_frames: int) -> None:
        self.evaluations.append((number, episodes, num_frames))
        if self.cluster.completes:
            self.finish_evaluation()

    def finish_evaluation(self) -> None:
        number, episodes, num_frames = self.evaluations.pop()
        scores = [float(spec.seed) for spec in episodes]
        count = len(scores)
        frames = {k: torch.full((1,), scores[k]) for k in range(num_frames)}
        result = EvaluationResult([True] * count, scores, [4] * count, self.version, frames)
        self.send(EvaluationDone(number, result))

    def send(self, event: Any) -> None:
        self._events.put_nowait(event)

    async def report(self, timeout_s: float) -> NodeReport:
        for _ in range(int(timeout_s * 1000) + 1):
            if not self._events.empty() or self.is_lost or self.hangs:
                break
            await asyncio.sleep(1e-3)
        if self.is_lost or self.hangs:
            raise NodeLostError("it is gone")
        events = []
        while not self._events.empty():
            events.append(self._events.get_nowait())
        counters = CollectionCounters()
        counters.add("collector/decisions", len(events))
        return NodeReport(events, [], counters, [Span("sampling", "worker 0", "step", 1.0, 2.0)])

    async def stop(self, grace_s: float) -> None:
        pass

    def kill(self) -> None:
        self.is_killed = True
        self.receiver.close()
        if self.weights is not None:
            self.weights.close()


class FakeRuntime:
    """Members that the test adds and removes."""

    def __init__(self, num_machines: int, completes: bool) -> None:
        self.members = {f"m{k}": Machine("here", 4.0) for k in range(num_machines)}
        self.completes = completes
        self.specs, self.versions = SPECS, dict(VERSIONS)
        self.started: list[FakeNode] = []
        self.num_puts, self.is_closed = 0, False

    def machines(self) -> dict[str, Machine]:
        return dict(self.members)

    async def start(self, machine_id: str, workers: WorkerConfig) -> FakeNode:
        if machine_id not in self.members:
            raise NodeLostError("no such machine")
        self.started.append(FakeNode(self, machine_id))
        return self.started[-1]

    def put(self, value: bytes) -> bytes:
        self.num_puts += 1
        return value

    def close(self) -> None:
        self.is_closed = True


class FakeCluster:
    """The learner's end on such nodes: the loop, run by the test's own event loop."""

    def __init__(
        self, num_nodes: int = 2, *, completes: bool = True, paused: bool = False, **group: Any
    ) -> None:
        self.paused = paused
        settings = {"group_size": 2, "groups_per_update": 2, "max_policy_lag": 1, **group}
        self.runtime = FakeRuntime(num_nodes, completes)
        self.pool = EnvironmentPool(LAYOUT, 64, rows_per_page=2)
        self.groups = GroupQueue(
            GroupConfig(**settings),
            self.pool,
            InitStateSchedule(("a", "b")),
            pages_per_rollout=2,
        )
        self.instructions, self.counters = InstructionTable(["mine"]), CollectionCounters()
        self.model = torch.nn.Linear(3, 1)
        self.model.bias.requires_grad_(False)
        self.updater = AsyncWeightUpdater(trainable_only=True)
        self.updater.init_on_sender(model=self.model, num_workers=0)
        self.timeline = Timeline()
        workers = WorkerConfig(num_workers=2, max_failures=3)
        self.nodes = [Node(f"node {k}", "here", workers) for k in range(num_nodes)]
        self.workers = workers

    async def __aenter__(self) -> FakeCluster:
        for node, machine_id in zip(self.nodes, self.runtime.members):
            node.machine_id = machine_id
            await start_node(node, self.runtime)
        store = self.updater.store
        plan = RunPlan(LAYOUT, store.layout, 2, 2, self.groups.config.num_candidates, 0)
        self.loop = ClusterLoop(
            self.nodes,
            self.runtime,
            self.groups,
            self.instructions,
            self.updater,
            plan,
            b"policy",
            timeline=self.timeline,
            counters=self.counters,
            seed=5,
            workers=self.workers,
            heartbeat_timeout_s=1.0,
            on_error=lambda error: None,
        )
        self.nodes = self.loop.nodes
        self._main = asyncio.create_task(self.loop._main())
        await self.until(lambda: all(n.state is NodeState.HEALTHY for n in self.nodes))
        self.groups.set_paused(self.paused)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._main.cancel()
        await asyncio.gather(self._main, return_exceptions=True)
        self.loop._close()
        self.updater.shutdown()
        self.pool.close()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(20.0):
            while not condition():
                if self._main.done():
                    self._main.result()
                await asyncio.sleep(1e-3)

    async def quiet(self) -> None:
        """Let the loop go on until it waits for the nodes."""
        for _ in range(300):
            await asyncio.sleep(0)

    async def error(self) -> BaseException:
        """What the loop ends with."""
        async with asyncio.timeout(20.0):
            await asyncio.wait([self._main])
        error = self._main.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        assert error is not None
        return error

    def node(self, index: int) -> FakeNode:
        """The present start of a node."""
        handle = self.nodes[index].handle
        assert isinstance(handle, FakeNode)
        return handle

    def learn(self) -> list[int]:
        """Learn a cohort and publish; returns its groups."""
        cohort = [group.group_id for group in self.groups.wait_cohort(0.0)]
        with self.groups.publishing() as publication:
            publication.version = self.updater.publish()
        return cohort

    def evaluate(self, *specs: Any, num_frames: int = 0) -> Evaluation:
        evaluation = Evaluation(specs, greedy=True, num_frames_episodes=num_frames)
        self.loop.add_evaluation(evaluation)
        return evaluation
