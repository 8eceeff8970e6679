# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The learner's end of a cluster: one coroutine a node, from its start to its loss, over again.

Read from :meth:`ClusterLoop.run_node` on. Admission is where it is on one machine, in the learner's
:class:`~torchrl_dvla.data.GroupQueue`: a group is admitted here, granted to a node, and comes back
complete, or, if the node is lost, is granted to another one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

import numpy as np

from torchrl_dvla.collectors import WorkerConfig
from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.collectors.loop_thread import LoopThread
from torchrl_dvla.collectors.metrics import CollectionCounters
from torchrl_dvla.data import Group, GroupQueue, InstructionTable, Rollout
from torchrl_dvla.swimlane import Timeline, batch_seed
from torchrl_dvla.topology.node_messages import (
    EvaluationDone,
    Grant,
    GroupDone,
    GroupDropped,
    LoopEnded,
    NodeReport,
    RunPlan,
    TaskQuarantined,
    unpack_rows,
)
from torchrl_dvla.topology.nodes import (
    Machine,
    Node,
    NodeHandle,
    NodeLostError,
    NodeRuntime,
    NodeState,
    apart,
    difference,
    in_thread,
    start_node,
    stop_nodes,
)
from torchrl_dvla.weight_update import (
    AsyncWeightUpdater,
    new_key,
    send_along_chain,
    weight_digest,
)

__all__ = ["ClusterLoop"]

_log = logging.getLogger("torchrl_dvla")

#: A report comes at least so often, with or without news.
_REPORT_S = 1.0
#: Seconds between two looks at who belongs to the cluster.
_MEMBERS_S = 1.0
#: Pause before a lost node is started again; doubled with each loss in a row, up to the second.
_PAUSE_S = (0.2, 30.0)


class ClusterLoop(LoopThread):
    """Sampling on the nodes of a cluster, seen from the learner.

    - *consumes* admitted groups, published versions, and evaluations;
    - *produces* complete groups in the learner's :class:`~torchrl_dvla.data.GroupQueue`;
    - *waits for* reports of the nodes, each up to its heartbeat;
    - *unblocked by* a report, by the loss of a node, and by the learner: a publish admits.

    A group has one keeper at any time, the node that holds its grant. Once a node counts as lost
    nothing is read of it any more, its grants are given to others, and another start of it has
    another handle: a late result cannot arrive, so nothing is learned twice.

    The newest version goes along a chain of the nodes, in threads of their own: the learner waits
    for none of it, and sends each byte once. One chain ends before the next one begins, with what
    is newest then. If it breaks, the first node that did not get the version counts as lost, and
    those behind it are in the next chain.

    Args:
        nodes (sequence of Node): started and compared with each other.
        runtime (NodeRuntime): starts and watches them.
        groups (GroupQueue): admits groups, and takes them when they are complete.
        instructions (InstructionTable): strings by id.
        updater (AsyncWeightUpdater): the learner's store.
        plan (RunPlan): what nodes need before they sample.
        policy (bytes): what builds the policy on a node, from ``policy_payload``.

    Keyword Args:
        timeline (Timeline): takes the spans of all nodes, on tracks named after them.
        counters (CollectionCounters): takes the counts.
        seed (int): of the tokens that are sampled.
        workers (WorkerConfig): limits.
        heartbeat_timeout_s (float): seconds without a report after which a node counts as lost.
        on_error (Callable): called with the exception that ends the loop.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        runtime: NodeRuntime,
        groups: GroupQueue,
        instructions: InstructionTable,
        updater: AsyncWeightUpdater,
        plan: RunPlan,
        policy: bytes,
        *,
        timeline: Timeline,
        counters: CollectionCounters,
        seed: int,
        workers: WorkerConfig,
        heartbeat_timeout_s: float,
        on_error: Callable[[BaseException], None],
    ) -> None:
        super().__init__("dvla-cluster", on_error=on_error, stop_timeout_s=workers.stop_timeout_s)
        self.nodes = list(nodes)
        #: What later starts are compared with; a copy, for it may itself be started anew.
        self._first = replace(self.nodes[0])
        self._known: set[str] = set()
        self._machines: Mapping[str, Machine] = {}
        self.runtime, self._groups, self._instructions = runtime, groups, instructions
        self._store, self._plan, self._policy = updater.store, plan, policy
        self._reader = self._store.reader("nodes")
        self._timeline, self._counters = timeline, counters
        self._distribution = timeline.track("distribution", "sender")
        self.seed, self._workers = seed, workers
        self._heartbeat_s = heartbeat_timeout_s
        #: Starts of nodes whose tokens were seeded; the other count is one of a single machine.
        self.num_batches = [0, 0]
        self._returned: deque[tuple[Group, int]] = deque()
        #: The learner's part of the transfer under way.
        self._sending: Future[None] | None = None
        self._results: dict[int, EvaluationDone] = {}
        self._evaluation_ids = itertools.count()
        #: Every change of state: seconds of ``time.monotonic``, node, state.
        self.history: list[tuple[float, str, NodeState]] = []
        self.totals: Counter[str] = Counter()
        self._num_losses = 0
        self._waiters: list[asyncio.Future[None]] = []
        groups.add_listener(self.notify)

    # -- one node -------------------------------------------------------------------------------

    async def run_node(self, node: Node) -> None:
        """Start, serve and lose a node, or let it leave, again and again."""
        while True:
            reason = ""
            try:
                if node.handle is None:
                    await self._start(node)
                await self._serve(node)
            except* NodeLostError as lost:
                reason = str(lost.exceptions[0])
            if reason:
                await self._lose(node, reason)

    async def _start(self, node: Node) -> None:
        """Start the node where there is a machine for it, and see that it is like the others."""
        await self._until(lambda: self._find_machine(node))
        self._set_state(node, NodeState.RESTARTING)
        _log.info("Node %s is started on machine %s.", node.name, node.machine_id)
        await start_node(node, self.runtime)
        if problem := difference(node, self._first):
            raise NodeLostError(problem)

    def _find_machine(self, node: Node) -> bool:
        """Whether a machine is there that carries the node, its own if possible; takes it."""
        taken = {other.machine_id for other in self.nodes if other is not node}
        for machine_id, machine in sorted(
            self._machines.items(), key=lambda item: item[1].host != node.host
        ):
            fits = machine.num_cores >= node.workers.num_workers
            if fits and machine_id not in taken and not machine.is_leaving:
                node.machine_id = machine_id
                return True
        return False

    async def _serve(self, node: Node) -> None:
        """Work with a node that is started, until it is lost or has left with nothing to do."""
        assert node.handle is not None
        self._set_state(node, NodeState.STALE)
        plan = self._plan._replace(num_groups=node.capacity(self._plan.num_candidates))
        limit_s = self._workers.start_timeout_s
        await node.handle.call("begin", plan, self._sent_policy, timeout_s=limit_s)
        node.has_begun = True
        self._on_change()
        async with asyncio.TaskGroup() as tasks:
            granting = tasks.create_task(self._send_grants(node))
            while not (node.is_leaving and not node.granted):
                wait_s = min(_REPORT_S, self._heartbeat_s / 2)
                report = await node.handle.call("report", wait_s, timeout_s=self._heartbeat_s)
                self._take(node, report)
            granting.cancel()
        await self._end(node)
        self._set_state(node, NodeState.DEAD)

    async def _send_grants(self, node: Node) -> None:
        assert node.handle is not None
        while True:
            await self._until(lambda: node.unsent or node.failing or node.problem)
            if node.problem:
                raise NodeLostError(node.problem)
            grants, node.unsent = node.unsent, []
            failing, node.failing = node.failing, []
            args = grants, failing, node.seed
            await node.handle.call("grant", *args, timeout_s=self._heartbeat_s)

    async def _lose(self, node: Node, reason: str) -> None:
        """Take the grants of a lost node back, end what is left of it, and wait a moment.

        Raises:
            RuntimeError: if nodes were lost too often without a complete group between.
        """
        self.totals["nodes_lost"] += node.state is not NodeState.RESTARTING  # else it was none yet
        self.totals["groups_resampled"] += len(node.granted)
        self._set_state(node, NodeState.DEAD)
        _log.warning(
            "Node %s is lost, and its %d groups are sampled again: %s",
            node.name,
            len(node.granted),
            reason,
        )
        self._returned.extend(node.granted.values())
        for lane, name in node.tracks:
            self._timeline.track(lane, name).waiting("node_lost")
        await self._end(node)
        self._machines = await in_thread(self.runtime.machines)
        self._on_change()
        node.num_losses += 1
        self._num_losses += 1
        if self._num_losses > self._workers.max_failures * len(self.nodes):
            raise RuntimeError(
                f"max_failures ({self._workers.max_failures}) x {len(self.nodes)} nodes were lost "
                f"in a row without a complete group. The last one: {reason}"
            )
        first_s, most_s = _PAUSE_S
        await asyncio.sleep(min(most_s, first_s * 2 ** min(node.num_losses - 1, 10)))

    async def _end(self, node: Node) -> None:
        handle, node.handle, node.machine_id = node.handle, None, None
        node.granted, node.unsent, node.version, node.seed = {}, [], -1, None
        node.is_leaving = node.has_begun = node.has_frozen = False
        node.problem = ""
        node.failing = sorted(self._groups.quarantined)
        if handle is not None:
            await in_thread(handle.kill)

    def _set_state(self, node: Node, state: NodeState) -> None:
        node.state = state
        self.history.append((time.monotonic(), node.name, state))
        self._on_change()

    # -- groups ---------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Grant groups to the least loaded nodes, those of lost nodes first."""
        while True:
            free_share = {
                node: 1 - len(node.granted) / node.capacity(self._plan.num_candidates)
                for node in self.nodes
                if node.state is NodeState.HEALTHY and not node.is_leaving
            }
            node = max(free_share, key=free_share.__getitem__, default=None)
            if node is None or free_share[node] <= 0:
                return
            if self._returned:
                group, min_version = self._returned.popleft()
            else:
                admitted = self._groups.admit()
                if isinstance(admitted, str):
                    return
                group, min_version = admitted, self._groups.version
            if group.spec.task in self._groups.quarantined:
                self._groups.drop(group, "the environment kept failing")
                continue
            if node.seed is None:
                node.seed = batch_seed(self.seed, self.num_batches[0])
                self.num_batches[0] += 1
            node.granted[group.group_id] = group, min_version
            first = group.rollouts[0].rollout_id
            node.unsent.append(
                Grant(group.group_id, group.spec, first, group.deadline, min_version)
            )

    def _take(self, node: Node, report: NodeReport) -> None:
        for level, text in report.logs:
            _log.log(level, "%s: %s", node.name, text)
        self._counters.merge(report.counters)
        for lane, track, name, start_s, end_s, blocked_on in report.spans:
            key = lane, f"{node.name} {track}"
            node.tracks.add(key)
            start_s, end_s = start_s + node.clock_s, end_s + node.clock_s
            self._timeline.track(*key).add(start_s, end_s, name, blocked_on)
        for event in report.events:
            if isinstance(event, GroupDone):
                self._complete(node, event)
            elif isinstance(event, GroupDropped):
                if granted := node.granted.pop(event.group_id, None):
                    self._groups.drop(granted[0], event.reason)
            elif isinstance(event, TaskQuarantined):
                self._quarantine(event)
            elif isinstance(event, EvaluationDone):
                self._results[event.evaluation_id] = event
            elif isinstance(event, LoopEnded):
                if event.is_final:
                    raise ValueError(event.reason)
                raise NodeLostError(f"its loop ended: {event.reason}")
        if report.events:
            self._on_change()

    def _complete(self, node: Node, done: GroupDone) -> None:
        """Copy a group's rows into the learner's pages, and hand it over.

        Raises:
            NodeLostError: if it is not what was granted.
        """
        granted = node.granted.pop(done.group_id, None)
        if granted is None:
            raise NodeLostError(f"it sent group {done.group_id}, which it was not granted.")
        group, min_version = granted
        ids = {number: self._instructions.id(text) for number, text in done.instructions.items()}
        pool = self._groups.pool
        try:
            _require_granted(group, min_version, done.rollouts, self._plan)
            for rollout, sampled in zip(group.rollouts, done.rollouts, strict=True):
                rollout.__dict__.update(
                    vars(sampled),
                    spec=rollout.spec,
                    instruction_id=ids[sampled.instruction_id],
                    pages=[
                        pool.lease(rollout.rollout_id)
                        for _ in range(-(-sampled.num_rows // pool.rows_per_page))
                    ],
                    finished=False,
                )
            unpack_rows(pool, group.row_index(pool), done.rows, ids)
        except (ValueError, KeyError) as error:
            for rollout in group.rollouts:
                pool.reclaim(rollout.rollout_id, keep_reserved=True)
                rollout.restart()
            node.granted[group.group_id] = granted  # to be sampled again
            raise NodeLostError(f"it sent a group that is not what was granted: {error}") from None
        self.totals["bytes_received"] += done.rows.nbytes
        self.totals["groups_received"] += 1
        self._num_losses = node.num_losses = 0
        for rollout in group.rollouts:
            self._groups.finish(rollout)
        self._groups.complete(group)

    def _quarantine(self, event: TaskQuarantined) -> None:
        if event.task in self._groups.quarantined:
            return
        self._groups.quarantine(event.task, RuntimeError(event.reason))
        self._counters.add("faults/tasks_quarantined")
        for node in self.nodes:
            if node.state is NodeState.HEALTHY:
                node.failing.append(event.task)

    # -- weights --------------------------------------------------------------------------------

    def _behind(self, version: int) -> list[Node]:
        """Nodes that have an older version, new ones last."""
        behind = [node for node in self.nodes if node.has_begun and node.version < version]
        return sorted(behind, key=lambda node: node.state is NodeState.STALE)

    async def _distribute(self) -> None:
        """Send the newest version to all nodes that have an older one, again and again."""
        frozen_digest = ""
        while True:
            await self._until(lambda: self._behind(self._store.visible_version))
            number, live, frozen = self._reader.pin_bytes()
            frozen_digest = frozen_digest or await in_thread(weight_digest, frozen)
            digest = await in_thread(weight_digest, live)
            with self._distribution.span(f"send {number}"):
                new = [node for node in self._behind(number) if not node.has_frozen]
                for node in await self._send_along(new, None, frozen, frozen_digest):
                    node.has_frozen = True
                nodes = [node for node in self._behind(number) if node.has_frozen]
                for node in await self._send_along(nodes, number, live, digest):
                    node.version = number
                    if node.state is NodeState.STALE:
                        self._set_state(node, NodeState.HEALTHY)
            self._reader.unpin()
            self._distribution.waiting("no_version")
            self._on_change()

    async def _send_along(
        self, nodes: Sequence[Node], version: int | None, parts: list[np.ndarray], digest: str
    ) -> list[Node]:
        """Send bytes along a chain of nodes; returns those that have them.

        The first that has not counts as lost. What is behind it may only have waited for it.
        """
        if not nodes or not any(len(part) for part in parts):
            return list(nodes)
        handles = [node.handle for node in nodes if node.handle is not None]
        addresses = [node.facts.address for node in nodes if node.facts is not None]
        key, limit_s = new_key(), self._heartbeat_s
        self._sending = apart(send_along_chain, parts, addresses[0], key, limit_s)
        calls = [
            asyncio.ensure_future(
                handle.call("receive", version, digest, key, following, limit_s, timeout_s=None)
            )
            for handle, following in zip(handles, [*addresses[1:], None], strict=True)
        ]
        try:
            await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            is_broken = False
            for call, address in zip(calls, addresses, strict=True):
                if is_broken and not call.done():
                    # Nobody else will connect to it. It breaks off to those behind it.
                    apart(send_along_chain, [], address, key, limit_s)
                    break
                is_broken |= call.done() and call.exception() is not None
            found = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            for call in calls:
                call.cancel()
        reached, is_broken = [], False
        for node, handle, error in zip(nodes, handles, found, strict=True):
            if error is None:
                self.totals["bytes_sent"] += sum(len(part) for part in parts)
                if node.handle is handle:
                    reached.append(node)
            elif not isinstance(error, NodeLostError):
                raise error
            elif not is_broken:
                is_broken = True
                if node.handle is handle:
                    node.problem = f"the weights did not reach it: {error}"
        return reached

    # -- evaluations ----------------------------------------------------------------------------

    async def _evaluate(self) -> None:
        while True:
            await self._until(lambda: self._evaluations)
            with self._lock:
                self._evaluation = evaluation = self._evaluations.popleft()
            # While weights stand still all nodes have the same; else one node plays alone.
            num_nodes = len(self.nodes) if self._groups.paused else 1
            while not evaluation.done():
                try:
                    await self._play(evaluation, num_nodes)
                except NodeLostError as error:
                    _log.warning("An evaluation begins anew: %s", error)
                    evaluation.begin_anew()
                    num_nodes = 1

    async def _play(self, evaluation: Evaluation, num_nodes: int) -> None:
        """Deal the episodes to nodes that have the newest version, and gather what they did."""

        def ready() -> list[Node]:
            newest = self._store.visible_version
            return [
                node
                for node in self.nodes
                if node.state is NodeState.HEALTHY and node.version == newest
            ]

        await self._until(ready)
        chosen = sorted(ready(), key=lambda node: len(node.granted))[:num_nodes]
        shares: dict[int, tuple[Node, NodeHandle, list[int]]] = {}
        for index, node in enumerate(chosen):
            numbers = list(range(len(evaluation.episodes)))[index :: len(chosen)]
            if numbers and node.handle is not None:
                shares[next(self._evaluation_ids)] = node, node.handle, numbers
        for number, (_, handle, numbers) in shares.items():
            specs = [evaluation.episodes[k] for k in numbers]
            num_frames = sum(k < evaluation.num_frames_episodes for k in numbers)
            args = number, specs, evaluation.greedy, num_frames
            await handle.call("evaluate", *args, timeout_s=self._heartbeat_s)

        def is_over() -> bool:
            lost = any(node.handle is not handle for node, handle, _ in shares.values())
            return evaluation.done() or lost or shares.keys() <= self._results.keys()

        await self._until(is_over)
        results = {number: self._results.pop(number, None) for number in shares}
        if evaluation.done():
            return
        for number, (node, _, _) in shares.items():
            done = results[number]
            if done is None:
                raise NodeLostError(f"node {node.name} was lost.")
            if done.result is None:
                evaluation.fail(RuntimeError(done.error))
                return
        found = {number: done.result for number, done in results.items() if done and done.result}
        if len({result.policy_version for result in found.values()} - {-1}) > 1:
            raise NodeLostError("its nodes had different versions.")
        for number, result in found.items():
            for index, k in enumerate(shares[number][2]):
                rollout = Rollout(
                    evaluation.episodes[k],
                    -1,
                    -1 - k,
                    episode_return=result.episode_returns[index],
                    success=result.successes[index],
                    num_env_steps=result.num_env_steps[index],
                    last_policy_version=result.policy_version,
                )
                evaluation.finish_episode(k, rollout, result.frames.get(index))

    # -- members --------------------------------------------------------------------------------

    async def _watch(self, tasks: asyncio.TaskGroup) -> None:
        """See who joins and who is about to leave."""
        while True:
            self._machines = await in_thread(self.runtime.machines)
            for node in self.nodes:
                machine = self._machines.get(node.machine_id or "")
                node.is_leaving = machine is not None and machine.is_leaving
            taken = {node.machine_id for node in self.nodes}
            num_waiting = sum(node.handle is None and not node.machine_id for node in self.nodes)
            for machine_id, machine in self._machines.items():
                model = self.nodes[-1]
                fits = machine.num_cores >= model.workers.num_workers and not machine.is_leaving
                if machine_id in taken | self._known or not fits:
                    continue  # what was there at the start and is not in the plan is not ours
                if num_waiting:
                    num_waiting -= 1  # a lost node takes it
                    continue
                node = Node(f"node {len(self.nodes)}", machine.host, model.workers)
                self.nodes.append(node)
                node.machine_id = machine_id
                tasks.create_task(self.run_node(node))
            self._on_change()
            await asyncio.sleep(_MEMBERS_S)

    # -- lifecycle ------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Scalars of the cluster."""
        states = Counter(node.state for node in self.nodes)
        newest = self._store.version
        lags = [newest - node.version for node in self.nodes if node.state is NodeState.HEALTHY]
        names = [
            "nodes_lost",
            "groups_resampled",
            "groups_received",
            "bytes_received",
            "bytes_sent",
        ]
        return {
            **{f"cluster/{name}": self.totals[name] for name in names},
            **{f"cluster/nodes_{state.value}": states[state] for state in NodeState},
            "cluster/version_lag": max(lags, default=0),
        }

    def _on_change(self) -> None:
        self._fill()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _until(self, condition: Callable[[], Any]) -> None:
        """Wait until a change makes ``condition()`` true."""
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    async def _work(self) -> None:
        self._machines = await in_thread(self.runtime.machines)
        self._known = set(self._machines)
        self._sent_policy = await in_thread(self.runtime.put, self._policy)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._distribute())
            tasks.create_task(self._evaluate())
            tasks.create_task(self._watch(tasks))
            for node in self.nodes:
                tasks.create_task(self.run_node(node))

    def _release(self) -> None:
        stop_nodes(self.nodes, self._stop_grace_s)
        if self._sending is not None:
            wait([self._sending])  # it reads a slot; nobody listens any more
        self.runtime.close()
        self._reader.close()


def _require_granted(
    group: Group, min_version: int, rollouts: Sequence[Rollout], plan: RunPlan
) -> None:
    """Require that a node has sampled what it was granted.

    Raises:
        ValueError: if it has not.
    """
    expected = [rollout.rollout_id for rollout in group.rollouts]
    found = [rollout.rollout_id for rollout in rollouts]
    max_rows = plan.pages_per_rollout * plan.rows_per_page
    if found != expected or not all(1 <= rollout.num_rows <= max_rows for rollout in rollouts):
        raise ValueError(f"rollouts must be {expected}, of 1 to {max_rows} rows, got {rollouts}.")
    oldest = min(rollout.first_policy_version for rollout in rollouts)
    if oldest < min_version:
        raise ValueError(f"decisions must be of version {min_version} at least, got {oldest}.")
