# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What happens when a part of the run dies, raises or hangs."""

from __future__ import annotations

import logging
import math
import selectors
import time
from collections.abc import Callable

from torchrl_dvla.collectors.batcher import DecisionBatcher
from torchrl_dvla.collectors.configs import InferenceConfig, WorkerConfig
from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.collectors.failures import FailureLog, Remedy
from torchrl_dvla.collectors.fleet import Fleet
from torchrl_dvla.collectors.rollout import Rollout, Slot, SlotState
from torchrl_dvla.collectors.rollout_queue import RolloutQueue
from torchrl_dvla.memory import EnvironmentPool, format_bytes, parse_bytes
from torchrl_dvla.swimlane import SamplingLane
from torchrl_dvla.swimlane.messages import EnvSpecs, UsePool

__all__ = ["Supervisor"]

_log = logging.getLogger("torchrl_dvla")

#: States that end by a deadline, and the limit of :class:`WorkerConfig` that sets it.
_DEADLINES = {
    SlotState.STARTING: "start_timeout_s",
    SlotState.RESETTING: "reset_timeout_s",
    SlotState.STEPPING: "step_timeout_s",
}


#: What a group is dropped for when its environment keeps failing; a metric is named after it.
_KEPT_FAILING = "the environment kept failing"
#: Pause between two looks at the memory of the workers.
_MEMORY_INTERVAL_S = 1.0


class Supervisor:
    """Replaces what is lost, so that the run goes on; gives up when nothing gets done any more.

    A worker that dies, raises or hangs is replaced and its rollouts are sampled again. A task whose
    rollouts keep failing is taken out of the run, a single rollout takes its group along. An
    inference process that dies or hangs is started again on the newest weights, and its request is
    repeated. The coordinator's thread is the only one that calls it.

    Keyword Args:
        sampling (SamplingLane): environment workers.
        batcher (DecisionBatcher): owner of the inference lane.
        fleet (Fleet): all environments.
        queue (RolloutQueue): takes interrupted rollouts back.
        abandon_group (Callable): gives up the group of an id for a reason.
        pool (EnvironmentPool): the rows that new workers are shown.
        selector (BaseSelector): where the connections of new processes are registered: workers
            under their number, the inference lane under ``"inference"``.
        counters (CollectionCounters): takes the counts.
        workers (WorkerConfig): deadlines and limits of the sampling lane.
        inference (InferenceConfig): deadlines of the inference lane.
    """

    def __init__(
        self,
        *,
        sampling: SamplingLane,
        batcher: DecisionBatcher,
        fleet: Fleet,
        queue: RolloutQueue,
        abandon_group: Callable[[int, str], None],
        pool: EnvironmentPool,
        selector: selectors.BaseSelector,
        counters: CollectionCounters,
        workers: WorkerConfig,
        inference: InferenceConfig,
    ) -> None:
        self._sampling = sampling
        self._batcher = batcher
        self._fleet = fleet
        self._queue = queue
        self._abandon_group = abandon_group
        self._pool = pool
        self._selector = selector
        self._counters = counters
        self._workers = workers
        self._inference = inference
        self._failures = FailureLog(
            workers.max_failures, workers.max_rollout_failures, workers.max_task_failures
        )
        self._max_bytes = parse_bytes(workers.max_rss_bytes) if workers.max_rss_bytes else None
        self._next_look_s = time.monotonic()
        #: Workers that are replaced as soon as their rollouts are finished.
        self._retiring: set[int] = set()
        self._inference_descriptor = -1
        #: When each worker reported last, and when the deadlines are looked at next.
        self._reported_s = [0.0] * workers.num_workers
        self._check_at_s = 0.0

    def start(self) -> None:
        """Connect the lanes; all workers have built their environments."""
        self._listen_to_inference(self._batcher.connect())
        for index in range(self._workers.num_workers):
            self._connect_worker(index)
            self._admit_worker(index)

    def note_progress(self, task: str) -> None:
        """A rollout was finished: the failures before it were not in vain."""
        self._failures.progress(task)

    # -- the sampling lane ----------------------------------------------------------------------

    def receive_specs(self, index: int, specs: EnvSpecs) -> None:
        """Worker ``index``, which replaces another, has built its environment: let it work."""
        if specs == self._sampling.specs:
            self._admit_worker(index)
        else:
            self.replace_worker(
                index,
                f"It has built an environment with the specs {specs}, the others have "
                f"{self._sampling.specs}. Make create_env_fn deterministic.",
            )

    def replace_worker(self, index: int, reason: str) -> None:
        """Worker ``index`` is lost: sample its rollouts again, start another worker.

        Raises:
            RuntimeError: if too many failures came without a finished rollout between them, or no
                task is left.
        """
        worker = self._sampling.workers[index]
        _log.warning("%s is replaced: %s", worker.name, reason)
        self._counters.add("faults/workers_replaced")
        culprit = self._culprit(index)
        rollout = None if culprit is None else culprit.rollout
        remedy = self._failures.lost(worker.started_s, rollout)
        if self._failures.too_many:
            raise RuntimeError(
                f"max_failures ({self._workers.max_failures}) environment workers in a row ended "
                f"without finishing a rollout. The last one said:\n{reason}"
            )
        if rollout is not None and remedy is Remedy.QUARANTINE_TASK:
            self._quarantine(rollout.spec.task, reason)
        elif rollout is not None and remedy is Remedy.ABANDON_GROUP:
            self._abandon(rollout, reason)
        if culprit is not None and culprit.state is SlotState.STARTING:
            # If it is the environment's fault, it will show in a rollout, and count for its task.
            self._choose_first_task(after=self._sampling.first_task)
        self._respawn(index)

    def replace_hung(self) -> None:
        """Replace every worker, and the inference lane, that has let a deadline pass.

        Deadlines only move away: a report puts off those of its worker, and what is asked for from
        now on has its whole time before it. So they are looked at when the earliest may have
        passed, not in every pass of the loop.
        """
        now_s = time.monotonic()
        if now_s < self._check_at_s:
            return
        for slot in self._fleet.slots:
            if slot.state in _DEADLINES and self._deadline(slot) < now_s:
                limit = _DEADLINES[slot.state]
                seconds = getattr(self._workers, limit)
                stack = self._sampling.workers[slot.worker].stack()
                self.replace_worker(
                    slot.worker,
                    f"{slot.state.value} took more than {limit}={seconds:g} s. Stack:\n{stack}",
                )
        limit, deadline_s = self._inference_deadline()
        if deadline_s < now_s:
            lane = self._batcher.lane
            seconds = getattr(self._inference, limit)
            reason = f"a call took more than {limit}={seconds:g} s. Stack:\n{lane.stack()}"
            if not lane.can_be_killed:
                raise RuntimeError(
                    f"The inference thread hangs, and a thread cannot be ended: {reason}\nRaise "
                    f"{limit}, or take where='process'."
                )
            self.restart_inference(reason)
        limits = [getattr(self._workers, name) for name in _DEADLINES.values()]
        limits += [self._inference.timeout_s, self._inference.start_timeout_s]
        deadlines = [self._deadline(slot) for slot in self._fleet.slots if slot.state in _DEADLINES]
        self._check_at_s = min(now_s + min(limits), deadline_s, *deadlines)

    def retire_workers(self) -> None:
        """Replace workers whose memory has outgrown its bound, once they have finished."""
        if self._max_bytes is None:
            return
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _MEMORY_INTERVAL_S
            self._look_at_memory(self._max_bytes)
        for index in list(self._retiring):
            if self._fleet.retire(index):
                self._counters.add("faults/workers_recycled")
                self._respawn(index)

    def note_report(self, index: int) -> None:
        """Worker ``index`` has reported: the time of what it does next counts from now."""
        self._reported_s[index] = time.monotonic()

    def time_to_check(self) -> float:
        """Seconds until the deadlines, or the memory of the workers, have to be looked at."""
        check_at_s = self._check_at_s
        if self._max_bytes is not None:
            check_at_s = min(check_at_s, self._next_look_s)
        return max(0.0, check_at_s - time.monotonic())

    def _admit_worker(self, index: int) -> None:
        self._sampling.send(index, UsePool(self._pool.worker_view()))
        self._fleet.admit(index)

    def _respawn(self, index: int) -> None:
        self._retiring.discard(index)
        self._selector.unregister(self._sampling.workers[index].connection)
        # replace() returns when the kernel has ended the process: from then on it writes no row.
        self._sampling.replace(index)
        self._connect_worker(index)
        for slot in self._fleet.of(index):
            state = slot.state
            if state is SlotState.READY:
                self._batcher.withdraw(slot)
            rollout = self._fleet.lose(slot)
            if rollout is not None and state is SlotState.INFERRING:
                rollout.abandoned = True  # the policy still writes its row
            elif rollout is not None:
                self._queue.retry(rollout)

    def _culprit(self, index: int) -> Slot | None:
        """The environment that worker ``index`` was busy with: it takes one order at a time."""
        busy = [slot for slot in self._fleet.of(index) if slot.state in _DEADLINES]
        return min(busy, key=lambda slot: slot.since_s, default=None)

    def _quarantine(self, task: str, reason: str) -> None:
        text = (
            f"Task {task!r} is quarantined: max_task_failures ({self._workers.max_task_failures}) "
            f"of its groups failed in a row, each max_rollout_failures "
            f"({self._workers.max_rollout_failures}) times."
        )
        error = RuntimeError(f"{text} The last error:\n{reason}")
        groups = self._queue.quarantine(task, error)
        _log.error("%s The run goes on without it. The last error:\n%s", text, reason)
        self._counters.add("faults/tasks_quarantined")
        for group_id in groups:
            self._abandon_group(group_id, _KEPT_FAILING)
        self._choose_first_task(after=task)

    def _choose_first_task(self, *, after: str) -> None:
        """Let new workers build the environment of the task after ``after`` that is healthy."""
        tasks = self._sampling.tasks
        start = tasks.index(after) + 1
        for task in (*tasks[start:], *tasks[:start]):
            if task not in self._queue.quarantined:
                self._sampling.first_task = task
                return

    def _abandon(self, rollout: Rollout, reason: str) -> None:
        text = f"A rollout of {rollout.spec} failed {rollout.num_failures} times."
        if rollout.evaluation is not None:
            error = RuntimeError(f"{text} The last error:\n{reason}")
            self._queue.abandon_evaluation(rollout.evaluation, error)
            return
        _log.error("%s Its group is given up. The last error:\n%s", text, reason)
        self._abandon_group(rollout.group_id, _KEPT_FAILING)

    def _look_at_memory(self, max_bytes: int) -> None:
        for index, worker in enumerate(self._sampling.workers):
            if index in self._retiring:
                continue
            used = worker.private_bytes()
            if used > max_bytes:
                _log.info(
                    "%s holds %s, more than max_rss_bytes=%s: it is replaced after its rollouts.",
                    worker.name,
                    format_bytes(used),
                    format_bytes(max_bytes),
                )
                self._retiring.add(index)

    # -- the inference lane ---------------------------------------------------------------------

    def restart_inference(self, reason: str) -> None:
        """The inference lane is lost: start another with the newest weights, repeat the request.

        An evaluation that is under way has lost its weights, and is played from the start again.

        Raises:
            RuntimeError: if too many failures came without a finished rollout between them.
        """
        _log.warning("The inference lane is restarted: %s", reason)
        self._counters.add("faults/inference_restarts")
        self._failures.lost(self._batcher.lane.started_s)
        if self._failures.too_many:
            raise RuntimeError(
                f"max_failures ({self._workers.max_failures}) failures in a row came without a "
                f"finished rollout. The last one, of the inference lane: {reason}"
            )
        self._selector.unregister(self._inference_descriptor)
        self._listen_to_inference(self._batcher.restart(snapshot=self._queue.replay_evaluation()))

    def _inference_deadline(self) -> tuple[str, float]:
        """The limit that holds for the call under way, and when it passes."""
        limit = "timeout_s" if self._batcher.lane_has_answered else "start_timeout_s"
        if self._batcher.requested_s is None:
            return limit, math.inf
        return limit, self._batcher.requested_s + float(getattr(self._inference, limit))

    # -- helpers --------------------------------------------------------------------------------

    def _connect_worker(self, index: int) -> None:
        self._selector.register(
            self._sampling.workers[index].connection, selectors.EVENT_READ, index
        )

    def _listen_to_inference(self, descriptor: int) -> None:
        self._inference_descriptor = descriptor
        self._selector.register(descriptor, selectors.EVENT_READ, "inference")

    def _deadline(self, slot: Slot) -> float:
        # A worker carries its orders out one after the other, and reports in between.
        since_s = max(slot.since_s, self._reported_s[slot.worker])
        return since_s + float(getattr(self._workers, _DEADLINES[slot.state]))
