# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The environments of all workers: assigned, commanded, watched, replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Set
from multiprocessing.connection import Connection
from typing import NamedTuple

from torchrl_dvla.collectors.configs import WorkerConfig
from torchrl_dvla.collectors.failures import FailureAction, FailureLog
from torchrl_dvla.collectors.metrics import CollectionCounters
from torchrl_dvla.data import EpisodeSpec, Rollout
from torchrl_dvla.memory import EnvironmentPool, format_bytes, parse_bytes
from torchrl_dvla.swimlane import EnvProcesses, Timeline
from torchrl_dvla.swimlane.messages import (
    EnvSpecs,
    Refused,
    RefusedError,
    Reset,
    ResetDone,
    Step,
    StepDone,
    UsePool,
    WorkerCommands,
    WorkerEvents,
)

__all__ = ["NO_ROW", "EnvSlot", "EnvSlots", "RowRef", "WorkerLostError", "readable"]

_log = logging.getLogger("torchrl_dvla")

#: Seconds between two readings of the workers' memory.
_MEMORY_INTERVAL_S = 1.0
#: What an environment does while its worker executes a command, in errors.
_ACTIVITIES = {"reset_timeout_s": "resetting", "step_timeout_s": "stepping"}


class RowRef(NamedTuple):
    """A row of the environment pool, and the generation of its page under this lease."""

    row: int
    generation: int


#: No row: the rollout takes no further decision.
NO_ROW = RowRef(-1, -1)


class WorkerLostError(Exception):
    """The worker of an environment died, raised or hung before the rollout was over.

    Args:
        reason (str): how it ended.
        action (FailureAction): what becomes of the rollout.
    """

    def __init__(self, reason: str, action: FailureAction = FailureAction.RETRY) -> None:
        super().__init__(reason)
        self.action = action


async def readable(connection: Connection) -> None:
    """Wait until ``connection`` has a message, or its other end is gone."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    descriptor = connection.fileno()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


class EnvSlot:
    """One environment of one worker, from the start of the worker to its end.

    Of a batched environment of ``[N]`` it is one of ``N``, each for a rollout. A slot executes
    one command at a time. A command that was sent is always waited for, even by a rollout that was
    cancelled: until the worker has answered, it may write the rollout's rows.

    Args:
        slots (EnvSlots): the owner.
        worker (int): index of the worker.
        env_index (int): index in the worker, over the rollouts of all its environments.
    """

    def __init__(self, slots: EnvSlots, worker: int, env_index: int) -> None:
        self._slots = slots
        self.worker = worker
        self.env_index = env_index
        #: The rollout that it plays.
        self.rollout: Rollout | None = None
        #: The limit of the command under way, and since when the worker has it.
        self.limit: str | None = None
        self.since_s = 0.0
        #: The command as long as the worker has it not.
        self.unsent: Reset | Step | None = None
        #: Whether the policy is deciding for its rollout.
        self.in_policy = False
        self._answer: asyncio.Future[ResetDone | StepDone] | None = None
        self.lost: WorkerLostError | None = None

    @property
    def position(self) -> tuple[int, int]:
        """Place in the order of all environments."""
        return self.worker, self.env_index

    @property
    def environment(self) -> tuple[int, int]:
        """The worker, and which of its environments this is, or is an entry of."""
        return self.worker, self.env_index // self._slots.rollouts_per_env

    @property
    def is_awaited(self) -> bool:
        """Whether its rollout has no step that could be sent yet."""
        return self.rollout is not None and not isinstance(self.unsent, Step)

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody needs the answer to the command under way any more."""
        return self._answer is not None and self._answer.cancelled()

    async def reset(self, spec: EpisodeSpec, row: RowRef) -> str:
        """Start a rollout, its first observation in ``row``; returns the instruction.

        Raises:
            WorkerLostError: if the worker ends first.
            RefusedError: if the observation is refused.
        """
        command = Reset(self.env_index, spec.task, spec.seed, spec.init_state_id, *row)
        answer = await self._command(command, "reset_timeout_s")
        assert isinstance(answer, ResetDone)
        if self.rollout is not None:
            self.rollout.init_state_hash = answer.init_state_hash
        if not answer.has_success:
            self._slots.warn_without_success(spec.task)
        return answer.instruction

    async def step(self, row: RowRef, next_row: RowRef) -> StepDone:
        """Execute the chunk in ``row``, the next observation in ``next_row``.

        Raises:
            WorkerLostError: if the worker ends first, or has ended since the command before.
            RefusedError: if what the environment returned is refused.
        """
        answer = await self._command(Step(self.env_index, *row, *next_row), "step_timeout_s")
        assert isinstance(answer, StepDone)
        return answer

    async def _command(self, command: Reset | Step, limit: str) -> ResetDone | StepDone:
        self.in_policy = False
        if self.lost is not None:
            raise self.lost
        self._answer = asyncio.get_running_loop().create_future()
        self.limit, self.unsent = limit, command
        self._slots.send_soon(self.worker)
        try:
            return await self._answer
        finally:
            if self.unsent is not None:  # cancelled before it was sent
                self.limit = self.unsent = None

    async def finished(self) -> None:
        """Wait until the worker has answered the last command, or has ended."""
        while self.limit is not None and self.lost is None:
            self._slots.answered.clear()
            await self._slots.answered.wait()

    def answer(self, event: ResetDone | StepDone | Refused) -> None:
        """Pass the worker's answer on."""
        if self._answer is not None and not self._answer.done():
            if isinstance(event, Refused):
                self._answer.set_exception(RefusedError(f"Worker {self.worker}: {event.reason}"))
            else:
                self._answer.set_result(event)

    def mark_lost(self, error: WorkerLostError) -> None:
        """End the slot with its worker."""
        self.lost, self.limit, self.unsent = error, None, None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


class EnvSlots:
    """The environments of all workers of a node.

    - *consumes* commands of rollouts, and the events of the workers;
    - *produces* answers, and idle environments;
    - *waits for* the workers' pipes, each up to the deadline of what the worker does;
    - *unblocked by* a worker's events, its end, or its deadline.

    A worker that dies, raises or hangs is replaced; its rollouts get a :class:`WorkerLostError`.
    The failure counts for the one whose command it had longest, of a batched environment for the
    first in it. All of it runs in the loop's thread.

    One step of a batched environment serves all its rollouts. So a step is sent once each of them
    has one: those that the policy has yet to decide for, or that are being reset, are waited for;
    entries without a rollout are not.

    In lockstep, answers are held back until every busy environment has given one, and then passed
    on in the order of the environments, as a sequential loop over them would. Which rollout ends
    first, and so which runs where, does not depend on the workers' speed then.

    Args:
        processes (EnvProcesses): the workers; they have built their environments.
        pool (EnvironmentPool): the rows that workers are shown.
        config (WorkerConfig): limits.

    Keyword Args:
        timeline (Timeline): takes the spans.
        counters (CollectionCounters): takes the counts.
        failures (FailureLog): decides what a crash costs.
        lockstep (bool): see above.
        failing_tasks (set of str): tasks that new workers must not build first.
        on_change (Callable): called when an environment became idle, was lost or answered.
        on_crash (Callable): called with a rollout, what becomes of it and the reason, if that is
            more than another try; an exception of it ends the run.
    """

    def __init__(
        self,
        processes: EnvProcesses,
        pool: EnvironmentPool,
        config: WorkerConfig,
        *,
        timeline: Timeline,
        counters: CollectionCounters,
        failures: FailureLog,
        lockstep: bool,
        failing_tasks: Set[str],
        on_change: Callable[[], None],
        on_crash: Callable[[Rollout, FailureAction, str], None],
    ) -> None:
        self._processes = processes
        self._pool = pool
        self._config = config
        self._counters = counters
        self._failures = failures
        self._lockstep = lockstep
        self._failing_tasks = failing_tasks
        self._on_change = on_change
        self._on_crash = on_crash
        self._tracks = [
            timeline.track("sampling", f"worker {index}") for index in range(config.num_workers)
        ]
        #: Slots of one environment.
        self.rollouts_per_env = processes.specs.num_rollouts
        self.slots = [self._new_slots(index) for index in range(config.num_workers)]
        #: Environments without a rollout, the one that is idle longest first.
        self.idle: deque[EnvSlot] = deque()
        self.num_busy = 0
        self.answered = asyncio.Event()
        self._held: dict[EnvSlot, ResetDone | StepDone | Refused] = {}
        #: Unsent commands by worker in the pass before, if they are about to be sent.
        self._num_unsent: list[int | None] = [None] * config.num_workers
        self._reported_s = [0.0] * config.num_workers
        self._deadlines: list[asyncio.Timeout | None] = [None] * config.num_workers
        self._recycled: set[int] = set()
        self._without_success: set[str] = set()

    def _new_slots(self, worker: int) -> list[EnvSlot]:
        num_slots = self._config.envs_per_worker * self.rollouts_per_env
        return [EnvSlot(self, worker, index) for index in range(num_slots)]

    # -- for rollouts ---------------------------------------------------------------------------

    def assign(self, rollout: Rollout) -> EnvSlot:
        """Have ``rollout`` play in an idle environment."""
        if self._lockstep:
            self.idle = deque(sorted(self.idle, key=lambda slot: slot.position))
        slot = self.idle.popleft()
        slot.rollout = rollout
        self.num_busy += 1
        self._tracks[slot.worker].waiting(None)
        return slot

    def release(self, slot: EnvSlot) -> None:
        """Take an environment back whose rollout is over; see :meth:`EnvSlot.finished`."""
        # What is held back for it was for a rollout that was cancelled.
        self._held.pop(slot, None)
        slot.rollout, slot.in_policy = None, False
        self.num_busy -= 1
        self._check_batch(slot)
        if slot.lost is None:
            self.idle.append(slot)
            if slot.worker in self._recycled:
                self._recycle_if_idle(slot.worker)
        self._end_round()
        self._on_change()

    def warn_without_success(self, task: str) -> None:
        """Say, once for each task, that nothing tells success from failure."""
        if task not in self._without_success:
            self._without_success.add(task)
            _log.warning(
                "The specs of task %r have no 'success': a rollout counts as solved when it "
                "terminates. If it may also terminate on failure, return 'success', or say by "
                "torchrl_dvla.envs.ChunkEnv(success=...) where it is found.",
                task,
            )

    def set_idle_reason(self, reason: str) -> None:
        """Say on the timeline why workers without any rollout are idle."""
        for worker in {slot.worker for slot in self.idle}:
            if not any(slot.rollout for slot in self.slots[worker]):
                self._tracks[worker].waiting(reason)

    @property
    def are_waiting(self) -> bool:
        """Whether no environment executes a command, holds an answer or is decided for."""
        return not self._held and not self._any_busy()

    def num_awaited(self, worker: int, index: int) -> int:
        """Rollouts of one environment that its next step waits for."""
        size = self.rollouts_per_env
        slots = self.slots[worker][index * size : (index + 1) * size]
        return sum(slot.is_awaited for slot in slots)

    def send_soon(self, worker: int) -> None:
        """Send the commands for a worker, together with those that come in the passes to follow.

        A batched environment is then reset once for all rollouts that begin.
        """
        if self._num_unsent[worker] is None:
            self._num_unsent[worker] = 0
            asyncio.get_running_loop().call_soon(self._send, worker)

    def _send(self, worker: int) -> None:
        unsent = [slot for slot in self.slots[worker] if slot.unsent is not None]
        if len(unsent) != self._num_unsent[worker]:  # more may come in the next pass
            self._num_unsent[worker] = len(unsent)
            asyncio.get_running_loop().call_soon(self._send, worker)
            return
        self._num_unsent[worker] = None
        due = unsent if self.rollouts_per_env == 1 else self._without_held_steps(worker, unsent)
        commands = [slot.unsent for slot in due]
        steps = [command for command in commands if isinstance(command, Step)]
        resets = [command for command in commands if isinstance(command, Reset)]
        now_s = time.monotonic()
        for slot in due:
            slot.unsent, slot.since_s = None, now_s
        if commands:
            self._processes.send(worker, WorkerCommands(steps, resets))
            deadline = self._deadlines[worker]
            if deadline is not None and not deadline.expired():
                deadline.reschedule(self._deadline(worker))

    def _without_held_steps(self, worker: int, unsent: list[EnvSlot]) -> list[EnvSlot]:
        """Slots whose command may be sent: resets, and steps that all of a batch have."""
        awaited = {
            slot.environment
            for slot in self.slots[worker]
            # One whose answer is held back gets no decision before the others have answered.
            if slot.is_awaited and slot not in self._held
        }
        self._on_change()  # the policy need not wait for those that hold their step
        return [
            slot
            for slot in unsent
            if isinstance(slot.unsent, Reset) or slot.environment not in awaited
        ]

    def _check_batch(self, slot: EnvSlot) -> None:
        """Send the steps that were held for this slot alone."""
        if self.rollouts_per_env > 1:
            self.send_soon(slot.worker)

    # -- the workers ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the workers until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for index in range(self._config.num_workers):
                    tasks.create_task(self._run_worker(index))
                if self._config.max_rss_bytes is not None:
                    tasks.create_task(self._watch_memory(parse_bytes(self._config.max_rss_bytes)))
        finally:
            for slots in self.slots:
                self._mark_lost(slots, WorkerLostError("The collector has ended."))

    async def _run_worker(self, index: int) -> None:
        """One worker after the other, each until it has to be replaced."""
        reason = await self._serve(index)
        while True:
            self._replace(index, reason)
            reason = await self._wait_built(index) or await self._serve(index)

    async def _serve(self, index: int) -> str:
        """Pass a worker's events on; returns why it has to be replaced, "" if to be recycled."""
        view = self._pool.worker_view()
        self._processes.send(index, UsePool(view, self.rollouts_per_env))
        self.idle.extend(self.slots[index])
        self._on_change()
        while True:
            connection = self._processes.workers[index].connection
            try:
                # Without a deadline an idle worker is waited for, that owes nothing.
                async with asyncio.timeout_at(self._deadline(index)) as self._deadlines[index]:
                    await readable(connection)
            except TimeoutError:
                slot = self._suspect(index)
                if slot is None or slot.limit is None:
                    return ""  # idle: it is to be recycled
                if not connection.poll():  # else it has answered while this thread was held up
                    return self._describe_hang(index, _ACTIVITIES[slot.limit], slot.limit)
            finally:
                self._deadlines[index] = None
            message = self._processes.receive(index)
            if not isinstance(message, WorkerEvents):
                return str(message)
            self._receive(index, message)

    async def _wait_built(self, index: int) -> str:
        """Wait for the environment of a new worker; returns why the worker failed, if it did."""
        connection = self._processes.workers[index].connection
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.start_timeout_s):
                await readable(connection)
        if not connection.poll():
            reason = self._describe_hang(index, "starting", "start_timeout_s")
        else:
            message = self._processes.receive(index)
            if isinstance(message, EnvSpecs):  # of any task; a reset compares it with the rows
                return ""
            reason = str(message)
        # If it is the environment's fault, it will show in a rollout, and count for its task.
        self._choose_first_task(after=self._processes.first_task)
        return reason

    def _receive(self, index: int, message: WorkerEvents) -> None:
        # A worker executes its commands one after the other: the next one's time begins now.
        self._reported_s[index] = time.monotonic()
        for name, start_s, end_s in message.spans:
            self._tracks[index].add(start_s, end_s, name, "no_decision")
        for event in message.events:
            slot = self.slots[index][event.env_index]
            slot.limit = None
            if isinstance(event, StepDone):
                self._counters.add("collector/decisions")
                self._counters.add("collector/env_steps", event.num_env_steps)
                if event.num_clipped:
                    self._counters.add("collector/env_steps_clipped", event.num_clipped)
            if self._lockstep:
                self._held[slot] = event
                self._check_batch(slot)
            else:
                slot.answer(event)
        self._end_round()
        self.answered.set()
        self._on_change()

    def _end_round(self) -> None:
        """Pass the answers on that were held back, once every busy environment has answered."""
        if not self._held or self._any_busy():
            return
        held, self._held = self._held, {}
        for slot, event in sorted(held.items(), key=lambda item: item[0].position):
            if slot.lost is None:
                slot.answer(event)

    def _any_busy(self) -> bool:
        return any(slot.limit or slot.in_policy for slots in self.slots for slot in slots)

    def _deadline(self, index: int) -> float | None:
        """When the command that the worker executes has taken too long."""
        slot = self._suspect(index)
        if slot is None or slot.limit is None:
            return None
        # Those of the others begin when they do: a step may wait for the reset before it.
        seconds = float(getattr(self._config, slot.limit))
        return max(slot.since_s, self._reported_s[index]) + seconds

    def _suspect(self, index: int) -> EnvSlot | None:
        """The environment that a worker was busy with: it executes one command at a time."""
        busy = [slot for slot in self.slots[index] if slot.limit and slot.unsent is None]
        return min(busy, key=lambda slot: slot.since_s, default=None)

    def _describe_hang(self, index: int, activity: str, limit: str) -> str:
        seconds = getattr(self._config, limit)
        stack = self._processes.workers[index].stack()
        return f"{activity} took more than {limit}={seconds:g} s. Stack:\n{stack}"

    def _replace(self, index: int, reason: str) -> None:
        """Start another worker; rollouts of the one before learn that it is gone.

        Raises:
            RuntimeError: if too many failures came without a finished rollout between them, or no
                task is left.
        """
        lost = WorkerLostError(reason)
        slots = self.slots[index]
        if reason:
            lost.action = self._record_crash(index, reason)
        else:
            self._counters.add("faults/workers_recycled")
        suspect = self._suspect(index)
        # replace() returns when the kernel has ended the process: from then on it writes no row.
        self._processes.replace(index)
        self._recycled.discard(index)
        self.slots[index] = self._new_slots(index)
        self.idle = deque(slot for slot in self.idle if slot.worker != index)
        self._tracks[index].waiting("worker_lost")
        self._mark_lost([slot for slot in slots if slot is suspect], lost)
        self._mark_lost([slot for slot in slots if slot is not suspect], WorkerLostError(reason))

    def _record_crash(self, index: int, reason: str) -> FailureAction:
        worker = self._processes.workers[index]
        _log.warning("%s is replaced: %s", worker.name, reason)
        self._counters.add("faults/workers_replaced")
        suspect = self._suspect(index)
        if suspect is not None and suspect.is_cancelled:
            return FailureAction.RETRY  # its group is dropped already
        rollout = None if suspect is None else suspect.rollout
        action = self._failures.record_crash(worker.started_s, rollout)
        if self._failures.too_many:
            raise RuntimeError(
                f"max_failures ({self._config.max_failures}) environment workers in a row ended "
                f"without finishing a rollout. The last one said:\n{reason}"
            )
        if rollout is not None and action is not FailureAction.RETRY:
            self._on_crash(rollout, action, reason)
            if action is FailureAction.QUARANTINE_TASK:
                self._choose_first_task(after=rollout.spec.task)
        return action

    def _mark_lost(self, slots: list[EnvSlot], error: WorkerLostError) -> None:
        for slot in slots:
            slot.mark_lost(error)
        self._end_round()
        self.answered.set()
        self._on_change()

    def _choose_first_task(self, *, after: str) -> None:
        """Let new workers build the environment of the task after ``after`` that is healthy."""
        tasks = self._processes.tasks
        start = tasks.index(after) + 1
        for task in (*tasks[start:], *tasks[:start]):
            if task not in self._failing_tasks:
                self._processes.first_task = task
                return

    # -- memory ---------------------------------------------------------------------------------

    async def _watch_memory(self, max_bytes: int) -> None:
        """Replace workers whose memory has outgrown its bound, once their rollouts are over."""
        while True:
            for index, worker in enumerate(self._processes.workers):
                used = worker.private_bytes()
                if index not in self._recycled and used > max_bytes:
                    _log.info(
                        "%s holds %s, more than max_rss_bytes=%s: it is replaced after its "
                        "rollouts.",
                        worker.name,
                        format_bytes(used),
                        format_bytes(max_bytes),
                    )
                    self._recycled.add(index)
                    self._recycle_if_idle(index)
            await asyncio.sleep(_MEMORY_INTERVAL_S)

    def _recycle_if_idle(self, index: int) -> None:
        self.idle = deque(slot for slot in self.idle if slot.worker != index)
        deadline = self._deadlines[index]
        is_idle = not any(slot.rollout for slot in self.slots[index])
        if deadline is not None and not deadline.expired() and is_idle:
            deadline.reschedule(asyncio.get_running_loop().time())
