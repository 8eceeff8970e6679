# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The collection loop: groups of rollouts, each rollout a coroutine.

Read from :meth:`CollectionLoop.run_group` on: a group is a task group of rollouts, a rollout asks
the policy and steps its environment by turns. An ``await`` is the state of a rollout, its
cancellation is how a group is dropped.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from torchrl_dvla.collectors.configs import InferenceConfig, WorkerConfig
from torchrl_dvla.collectors.decision_batcher import (
    DecisionBatcher,
    EvaluationWeights,
    SnapshotLostError,
)
from torchrl_dvla.collectors.env_slots import NO_ROW, EnvSlot, EnvSlots, RowRef, WorkerLostError
from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.collectors.failures import FailureAction, FailureLog
from torchrl_dvla.collectors.loop_thread import LoopThread
from torchrl_dvla.collectors.metrics import CollectionCounters
from torchrl_dvla.collectors.validation import check_same_start
from torchrl_dvla.data import EpisodeSpec, Group, InstructionTable, Rollout
from torchrl_dvla.data.schema import IMAGE_KEY
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import EnvProcesses, InferenceProcess, Timeline
from torchrl_dvla.swimlane.messages import RefusedError

__all__ = ["CollectionLoop", "GroupSource"]

_log = logging.getLogger("torchrl_dvla")

#: What a group is dropped for when its environment keeps failing; a metric is named after it.
_KEPT_FAILING = "the environment kept failing"


class _RolloutFailedError(Exception):
    """A rollout that is given up, and its group or evaluation with it."""

    def __init__(self, rollout: Rollout, reason: str) -> None:
        super().__init__(_describe(rollout, reason))
        self.rollout, self.reason = rollout, reason


class _RolloutRefusedError(_RolloutFailedError):
    """One that is given up for what its environment returned."""


class GroupSource(Protocol):
    """Where a loop gets its groups, and leaves them.

    :class:`~torchrl_dvla.data.GroupQueue` where the learner is, otherwise what it has granted, see
    :class:`~torchrl_dvla.topology.granted_groups.GrantedGroups`.
    """

    pool: EnvironmentPool
    pages_per_rollout: int
    quarantined: set[str]

    @property
    def running(self) -> Sequence[Group]:
        """The groups under way, oldest first."""

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener()`` after every change that may let sampling go on."""

    def admit(self) -> Group | str:
        """The next group, with pages reserved for it, or why there is none."""

    def finish(self, rollout: Rollout) -> None:
        """A rollout has ended."""

    def complete(self, group: Group) -> None:
        """All rollouts of a group have finished."""

    def drop(self, group: Group, reason: str) -> None:
        """A group is given up; nobody writes its rows any more."""

    def quarantine(self, task: str, error: Exception) -> None:
        """Begin no more groups of a task; raises ``error`` if no other is left."""


class CollectionLoop(LoopThread):
    """Rollouts on the environments and the policy of one node, in one thread.

    - *consumes* admitted groups, and evaluations;
    - *produces* complete groups, in its :class:`GroupSource`;
    - *waits for* an idle environment, for admission, for a free page;
    - *unblocked by* the end of a rollout, and by the learner: a publish frees pages and admits.

    The thread owns every page under way and every rollout's state, so nothing here needs a lock;
    workers and policy write only the rows that it names (invariant 2).

    Args:
        processes (EnvProcesses): environment workers that are ready.
        start_inference (Callable): starts the inference process; called again if it ends.
        groups (GroupSource): admits groups, and takes them when they are complete.
        instructions (InstructionTable): strings by id.

    Keyword Args:
        timeline (Timeline): takes the spans.
        counters (CollectionCounters): takes the counts.
        seed (int): of the tokens that are sampled.
        lockstep (bool): environments and policy take turns, so that nothing depends on which of
            them is faster; evaluations are played while no group is.
        workers (WorkerConfig): limits of the sampling lane.
        inference (InferenceConfig): limits of the inference lane.
        on_error (Callable): called with the exception that ends the loop.
    """

    def __init__(
        self,
        processes: EnvProcesses,
        start_inference: Callable[[], InferenceProcess],
        groups: GroupSource,
        instructions: InstructionTable,
        *,
        timeline: Timeline,
        counters: CollectionCounters,
        seed: int,
        lockstep: bool,
        workers: WorkerConfig,
        inference: InferenceConfig,
        on_error: Callable[[BaseException], None],
    ) -> None:
        super().__init__("dvla-collector", on_error=on_error, stop_timeout_s=workers.stop_timeout_s)
        self._processes = processes
        self._groups = groups
        self._pool: EnvironmentPool = groups.pool
        self._counters = counters
        self._workers = workers
        self._lockstep = lockstep
        self._failures = FailureLog(
            workers.max_failures, workers.max_rollout_failures, workers.max_task_failures
        )
        self.envs = EnvSlots(
            processes,
            self._pool,
            workers,
            timeline=timeline,
            counters=counters,
            failures=self._failures,
            lockstep=lockstep,
            failing_tasks=groups.quarantined,
            on_change=self._on_change,
            on_crash=self._on_crash,
        )
        self.batcher = DecisionBatcher(
            start_inference,
            self._pool,
            instructions,
            self.envs,
            config=inference,
            workers=workers,
            seed=seed,
            lockstep=lockstep,
            is_settled=self._is_settled,
            timeline=timeline,
            counters=counters,
            failures=self._failures,
        )
        #: Rollouts that wait for an environment: of groups, oldest first, and of the evaluation.
        self._waiting: list[tuple[int, Rollout, asyncio.Future[EnvSlot]]] = []
        self._requests: dict[Rollout, asyncio.Future[EnvSlot]] = {}
        self._episodes: deque[tuple[Rollout, asyncio.Future[EnvSlot]]] = deque()
        #: Tasks whose first group was seen to start from one observation.
        self._checked_tasks: set[str] = set()
        self._episode_ids = itertools.count(-1, -1)  # beside those of training
        #: Evaluations under way: the last one, and those that were given up and have yet to end.
        self._num_playing = 0
        self._changed = asyncio.Event()
        groups.add_listener(self.notify)

    # -- one rollout, one group -----------------------------------------------------------------

    async def run_group(self, group: Group) -> None:
        """Sample the rollouts of a group and complete it; drop it if one cannot be sampled.

        Raises:
            ValueError: if the rollouts of the first group of a task start from different scenes.
        """
        rollouts = list(group.rollouts)
        try:
            async with asyncio.TaskGroup() as tasks:
                for rollout in rollouts:
                    tasks.create_task(self._sample(rollout))
        except* _RolloutFailedError as failed:
            self._counters.add("faults/groups_dropped")
            self._groups.drop(group, _KEPT_FAILING)
            for error in failed.exceptions:
                if isinstance(error, _RolloutRefusedError):  # once for the group
                    action = self._failures.record_refusal(group.spec.task)
                    self._on_crash(error.rollout, action, error.reason)
                    break
        else:
            if group.spec.task not in self._checked_tasks:
                check_same_start(group, self._pool)
                self._checked_tasks.add(group.spec.task)
            self._groups.complete(group)
        finally:
            for rollout in rollouts:
                self._withdraw(rollout)
            self._on_change()

    async def _sample(self, rollout: Rollout) -> None:
        await self.run_rollout(rollout)
        self._counters.add_episode(success=rollout.success, num_env_steps=rollout.num_env_steps)
        self._groups.finish(rollout)

    async def run_rollout(self, rollout: Rollout, weights: EvaluationWeights | None = None) -> None:
        """Play a rollout to its end, again from the start whenever its worker is lost.

        One that is refused takes its group along. An evaluation tries it again first.
        """
        while True:
            try:
                async with self._environment(rollout, weights) as env:
                    start_s = time.monotonic()
                    await self._play(rollout, env, weights)
                    rollout.duration_s = time.monotonic() - start_s
                break
            except WorkerLostError as lost:
                if lost.action is not FailureAction.RETRY:
                    raise _RolloutFailedError(rollout, str(lost)) from None
            except RefusedError as refused:
                self._counters.add("faults/rollouts_refused")
                rollout.num_failures += 1
                # A second try would select the group for what happens to be accepted.
                if weights is None or rollout.num_failures >= self._workers.max_rollout_failures:
                    raise _RolloutRefusedError(rollout, str(refused)) from None
            rollout.restart()
        self._failures.record_progress(rollout.spec.task)

    async def _play(
        self, rollout: Rollout, env: EnvSlot, weights: EvaluationWeights | None
    ) -> None:
        """One try: reset, then decide and step until the episode ends or is truncated."""
        self._require_healthy(rollout)
        row = self._row(rollout)
        instruction = await env.reset(rollout.spec, row)
        while True:
            version = await self.batcher.decide(env, row, instruction, weights)
            self._require_healthy(rollout)
            is_last = rollout.num_rows + 1 >= self._workers.max_decisions
            next_row = NO_ROW if is_last else self._row(rollout, ahead=1)
            outcome = await env.step(row, next_row)
            rollout.record(
                policy_version=version,
                reward=outcome.reward,
                success=outcome.success,
                num_env_steps=outcome.num_env_steps,
            )
            if outcome.done:
                return
            if outcome.instruction is not None:
                instruction = outcome.instruction
            row = next_row

    def _require_healthy(self, rollout: Rollout) -> None:
        if rollout.spec.task in self._groups.quarantined:
            raise _RolloutFailedError(rollout, "Its task is quarantined.")

    def _row(self, rollout: Rollout, ahead: int = 0) -> RowRef:
        """The row of the decision to come, on a newly leased page where one begins."""
        page, offset = divmod(rollout.num_rows + ahead, self._pool.rows_per_page)
        if page == len(rollout.pages):
            rollout.pages.append(self._pool.lease(owner=rollout.rollout_id))
        lease = rollout.pages[page]
        return RowRef(lease * self._pool.rows_per_page + offset, lease.generation)

    @asynccontextmanager
    async def _environment(
        self, rollout: Rollout, weights: EvaluationWeights | None
    ) -> AsyncIterator[EnvSlot]:
        """An environment for one try of a rollout; a try that fails gives its pages back."""
        slot = self._requests.pop(rollout, None) or self._request(rollout, weights is not None)
        env = None
        try:
            env = await slot
            yield env
        except BaseException:
            if env is None and slot.done() and not slot.cancelled():
                env = slot.result()  # assigned and cancelled at once
            if env is not None:
                await env.finished()  # until then its worker writes the rows
                self._pool.reclaim(rollout.rollout_id, keep_reserved=True)
                if weights is not None:
                    self._pool.unreserve(self._groups.pages_per_rollout)
            raise
        finally:
            if env is not None:
                self.envs.release(env)

    def _request(self, rollout: Rollout, is_evaluation: bool) -> asyncio.Future[EnvSlot]:
        """An environment to come."""
        slot: asyncio.Future[EnvSlot] = asyncio.get_running_loop().create_future()
        if is_evaluation:
            self._episodes.append((rollout, slot))
        else:
            heapq.heappush(self._waiting, (rollout.rollout_id, rollout, slot))
        self._on_change()
        return slot

    # -- evaluations ----------------------------------------------------------------------------

    async def run_evaluation(self, evaluation: Evaluation) -> None:
        """Play all episodes of an evaluation with one copy of the weights."""
        self._num_playing += 1
        while not (evaluation.done() or self._stopping):
            weights = self.batcher.snapshot(greedy=evaluation.greedy)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for number, spec in enumerate(evaluation.episodes):
                        tasks.create_task(self._play_episode(evaluation, number, spec, weights))
            except* SnapshotLostError:
                evaluation.begin_anew()
                # A task group that is aborting swallows a cancellation: see whether it was one.
                await asyncio.sleep(0)
            except* _RolloutFailedError as failed:
                evaluation.fail(RuntimeError(str(failed.exceptions[0])))
        self._num_playing -= 1
        if not self._num_playing:  # the next one may have begun, with the same copy
            self.batcher.drop_snapshot()
        self._on_change()

    async def _play_episode(
        self, evaluation: Evaluation, number: int, spec: EpisodeSpec, weights: EvaluationWeights
    ) -> None:
        if evaluation.done():  # it was given up
            return
        rollout = Rollout(spec, -1, next(self._episode_ids))
        frames = None
        try:
            await self.run_rollout(rollout, weights)
        except _RolloutRefusedError as refused:  # its pages are free again
            rollout.success = False
            _log.error("An episode of an evaluation counts as a failure. %s", refused)
        else:
            if number < evaluation.num_frames_episodes:
                index = self._pool.row_index(rollout.pages, rollout.num_rows)
                frames = self._pool.rows.get(IMAGE_KEY).index_select(0, index)
            self._pool.free(rollout.pages)
            self._pool.unreserve(self._groups.pages_per_rollout - len(rollout.pages))
        evaluation.finish_episode(number, rollout, frames)

    # -- what runs next -------------------------------------------------------------------------

    async def _assign(self, tasks: asyncio.TaskGroup) -> None:
        """Begin groups and evaluations, and give idle environments to the rollouts that wait."""
        try:
            while True:
                self._changed.clear()
                self.envs.set_idle_reason(self._fill(tasks))
                self.batcher.notify()  # in lockstep it waits until nothing more begins
                await self._changed.wait()
        finally:
            self._stopping = True

    def _fill(self, tasks: asyncio.TaskGroup) -> str:
        """Give every idle environment a rollout; returns why the others stay idle.

        Evaluations go before new groups. Groups that have begun hold pages that an evaluation may
        wait for, so they go on. In lockstep, an evaluation has the environments to itself.
        """
        if not self._lockstep and self._begin_evaluation(tasks):
            return "evaluation"  # until its episodes wait for an environment
        while self.envs.idle:
            if self._episodes and self._pool.reserve(self._groups.pages_per_rollout):
                self._hand_over(*self._episodes.popleft())
            elif self._waiting:
                self._hand_over(*heapq.heappop(self._waiting)[1:])
            elif self._episodes:
                return "no_page"
            elif self._lockstep and self._evaluation and not self._evaluation.done():
                return "evaluation"
            else:
                group = self._groups.admit()
                if isinstance(group, Group):
                    self._begin_group(group, tasks)
                elif self._groups.running or not self._begin_evaluation(tasks):
                    return group
                else:
                    return "evaluation"
        return ""

    def _is_settled(self) -> bool:
        """Whether every group is accounted for that has ended, and all that may begin has begun."""
        ended = (all(r.finished for r in group.rollouts) for group in self._groups.running)
        return not self._changed.is_set() and not any(ended)

    def _begin_group(self, group: Group, tasks: asyncio.TaskGroup) -> None:
        for rollout in group.rollouts:
            self._requests[rollout] = self._request(rollout, is_evaluation=False)
        tasks.create_task(self.run_group(group))

    def _withdraw(self, rollout: Rollout) -> None:
        """Take the request of a rollout back that was cancelled before it began."""
        slot = self._requests.pop(rollout, None)
        if slot is not None and not slot.cancel():
            self.envs.release(slot.result())

    def _hand_over(self, rollout: Rollout, slot: asyncio.Future[EnvSlot]) -> None:
        if not slot.done():
            slot.set_result(self.envs.assign(rollout))
        elif rollout.group_id < 0:  # its evaluation was given up
            self._pool.unreserve(self._groups.pages_per_rollout)

    def _begin_evaluation(self, tasks: asyncio.TaskGroup) -> bool:
        """Begin the next evaluation, if there is one and none is under way."""
        if self._evaluation is not None and not self._evaluation.done():
            return False
        with self._lock:
            while self._evaluations and self._evaluations[0].done():
                self._evaluations.popleft()
            self._evaluation = self._evaluations.popleft() if self._evaluations else None
        if self._evaluation is None:
            return False
        tasks.create_task(self.run_evaluation(self._evaluation))
        return True

    # -- failures -------------------------------------------------------------------------------

    def _on_crash(self, rollout: Rollout, action: FailureAction, reason: str) -> None:
        """A rollout has failed too often: its group, or all of its task, is given up.

        Raises:
            RuntimeError: if no other task is left.
        """
        task = rollout.spec.task
        if task in self._groups.quarantined:
            return
        if action is FailureAction.DROP_GROUP:
            if rollout.group_id >= 0:
                text = _describe(rollout, reason)
                _log.error("The group of a rollout is dropped. %s", text)
            return
        text = (
            f"Task {task!r} is quarantined: its groups failed max_task_failures "
            f"({self._workers.max_task_failures}) x max_rollout_failures "
            f"({self._workers.max_rollout_failures}) times in a row."
        )
        error = RuntimeError(f"{text} The last error:\n{reason}")
        self._groups.quarantine(task, error)
        _log.error("%s The run goes on without it. The last error:\n%s", text, reason)
        self._counters.add("faults/tasks_quarantined")
        with self._lock:
            for evaluation in (self._evaluation, *self._evaluations):
                if evaluation and any(spec.task == task for spec in evaluation.episodes):
                    evaluation.fail(error)

    # -- lifecycle ------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """Of the tokens that are sampled."""
        return self.batcher.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.batcher.seed = seed

    @property
    def num_batches(self) -> list[int]:
        """Policy calls so far, of training and of evaluations; a resumed run sets them."""
        return self.batcher.num_batches

    def _on_change(self) -> None:
        self._changed.set()
        self.batcher.notify()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.envs.run())
            tasks.create_task(self.batcher.run())
            await self._assign(tasks)

    def _release(self) -> None:
        self.batcher.stop()
        self._processes.stop(self._stop_grace_s)


def _describe(rollout: Rollout, reason: str) -> str:
    return (
        f"A rollout of {rollout.spec} failed {rollout.num_failures} times. The last error:\n"
        f"{reason}"
    )
