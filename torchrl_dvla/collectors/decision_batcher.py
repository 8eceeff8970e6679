# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Decisions: rows that wait for the policy, taken to the inference lane in batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from torchrl_dvla.collectors.configs import InferenceConfig, WorkerConfig
from torchrl_dvla.collectors.env_slots import EnvSlot, EnvSlots, RowRef, readable
from torchrl_dvla.collectors.failures import FailureLog
from torchrl_dvla.collectors.metrics import CollectionCounters
from torchrl_dvla.data import InstructionTable, Rollout
from torchrl_dvla.data.schema import (
    DECISION_INDEX_KEY,
    GROUP_ID_KEY,
    INSTRUCTION_ID_KEY,
    ROLLOUT_ID_KEY,
)
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import InferenceProcess, Timeline, batch_seed
from torchrl_dvla.swimlane.messages import Failed, Infer, Inferred, Snapshot, UsePool

__all__ = ["DecisionBatcher", "EvaluationWeights", "SnapshotLostError"]

_log = logging.getLogger("torchrl_dvla")


class SnapshotLostError(Exception):
    """The inference process that held the weights of an evaluation has ended."""


class _ProcessLostError(Exception):
    """The inference process has ended, or hangs."""


@dataclass(frozen=True)
class EvaluationWeights:
    """The copy of the weights that an evaluation decides with.

    Args:
        started_s (float): start of the inference process that holds it.
        greedy (bool): take the most likely tokens instead of sampling.
    """

    started_s: float
    greedy: bool


@dataclass(eq=False)
class _Request:
    """A row that waits for its decision."""

    slot: EnvSlot
    rollout: Rollout
    row: int
    instruction: str
    weights: EvaluationWeights | None
    version: asyncio.Future[int]
    since_s: float = field(default_factory=time.monotonic)


class DecisionBatcher:
    """The policy, asked for one decision and called for a batch of them.

    - *consumes* rows with a new observation;
    - *produces* decisions in the same rows, and the version of the weights that took them;
    - *waits for* enough rows, then for the inference process, up to its deadline;
    - *unblocked by* a further row, by the end of a rollout, or by ``max_wait_s``.

    While a batch is under way the next one gathers, so the batch size follows the load by itself. A
    policy call costs little more for a few more rows, so a batch that could begin waits a moment
    for what is being simulated: until it is full, until nothing more can come, or until
    ``max_wait_s`` is over. The moment begins when the policy is free: rows that have waited for the
    call before are often joined right afterwards by the environments that are in step with it.
    A batched environment is stepped once all its rollouts are decided for, so there a batch begins
    with the rows of a whole one, and takes none of another.

    In lockstep, the first batch begins once every rollout under way waits for its decision, and
    takes rows in the order of the environments.

    An inference process that ends or hangs is replaced, with the newest weights, and its batch
    repeated.

    Args:
        start_process (Callable): starts the inference process.
        pool (EnvironmentPool): the rows.
        instructions (InstructionTable): strings by id.
        envs (EnvSlots): says how many rollouts are under way.

    Keyword Args:
        config (InferenceConfig): limits.
        workers (WorkerConfig): how many environments there are, and ``max_failures``.
        seed (int): of the tokens that are sampled; each batch has a seed of its own, see
            :func:`~torchrl_dvla.swimlane.batch_seed`.
        lockstep (bool): see above.
        is_settled (Callable): whether no rollout is about to begin or to end by itself.
        timeline (Timeline): takes the spans.
        counters (CollectionCounters): takes the counts.
        failures (FailureLog): decides what a crash costs.
    """

    def __init__(
        self,
        start_process: Callable[[], InferenceProcess],
        pool: EnvironmentPool,
        instructions: InstructionTable,
        envs: EnvSlots,
        *,
        config: InferenceConfig,
        workers: WorkerConfig,
        seed: int,
        lockstep: bool,
        is_settled: Callable[[], bool],
        timeline: Timeline,
        counters: CollectionCounters,
        failures: FailureLog,
    ) -> None:
        self._start_process = start_process
        self._pool = pool
        self._instructions = instructions
        self._envs = envs
        self._config = config
        self._max_failures = workers.max_failures
        #: Of the tokens that are sampled; each batch has one of its own.
        self.seed = seed
        self._lockstep = lockstep
        self._is_settled = is_settled
        self._track = timeline.track("inference")
        self._counters = counters
        self._failures = failures
        num_envs = workers.num_workers * workers.envs_per_worker
        num_envs = num_envs if lockstep else -(-num_envs // 2)
        #: Most rows of one batch.
        self.max_batch_size = config.max_batch_size or num_envs * envs.rollouts_per_env
        self._ids = {
            key: pool.rows.get(key).numpy()
            for key in (INSTRUCTION_ID_KEY, GROUP_ID_KEY, ROLLOUT_ID_KEY, DECISION_INDEX_KEY)
        }
        #: Policy calls so far, of training and of evaluations; their seeds follow from it.
        self.num_batches = [0, 0]
        self._waiting: deque[_Request] = deque()
        self._batch: list[_Request] = []
        self._round_is_open = False
        self._free_since_s = 0.0
        self._changed = asyncio.Event()
        self._answered = asyncio.Event()
        #: What the inference process knows and has done, see :meth:`_connect`.
        self._num_instructions_sent = 0
        self._has_answered = False
        self._process = start_process()
        self._connect()

    async def decide(
        self,
        slot: EnvSlot,
        row: RowRef,
        instruction: str,
        weights: EvaluationWeights | None = None,
    ) -> int:
        """Have the policy decide for the observation in ``row``.

        Returns:
            int: the version of the weights; tokens, chunk and log-probs are in the row.

        Raises:
            SnapshotLostError: if ``weights`` are gone with their inference process.
        """
        rollout = slot.rollout
        assert rollout is not None
        if weights is not None and weights.started_s != self._process.started_s:
            raise SnapshotLostError
        version = asyncio.get_running_loop().create_future()
        request = _Request(slot, rollout, row.row, instruction, weights, version)
        self._waiting.append(request)
        self.notify()
        try:
            return await version
        except asyncio.CancelledError:
            if request in self._waiting:
                self._waiting.remove(request)
            while request in self._batch:  # until the call ends the policy writes the row
                await self._answered.wait()
            raise

    def snapshot(self, *, greedy: bool) -> EvaluationWeights:
        """Have the newest weights copied aside for an evaluation."""
        self._send(Snapshot())
        return EvaluationWeights(self._process.started_s, greedy)

    def drop_snapshot(self) -> None:
        """Have the copy of the weights freed: its evaluation is over."""
        self._send(Snapshot(is_over=True))

    def notify(self) -> None:
        """Check again whether a batch may begin: a rollout has begun, waits, or is over."""
        self._changed.set()

    def stop(self) -> None:
        """End the inference process."""
        self._process.stop()

    # -- batches --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Call the policy for one batch after the other until cancelled.

        Raises:
            RuntimeError: if the policy raised (it would raise again: no restart helps), or if the
                process was lost too often.
        """
        try:
            while True:
                await self._gather()
                self._take_batch()
                await self._call()
        finally:
            for request in (*self._waiting, *self._batch):
                request.version.cancel()
            self._forget_batch()

    async def _gather(self) -> None:
        """Wait until the next batch may begin."""
        while True:
            self._changed.clear()
            if self._lockstep:
                if self._waiting and (self._round_is_open or self._may_begin_round()):
                    return
                wait_s = math.inf
            else:
                wait_s = self._time_to_begin()
                if wait_s <= 0.0:
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if wait_s == math.inf else wait_s):
                    await self._changed.wait()

    def _time_to_begin(self) -> float:
        """Seconds until the next batch begins if nothing else happens; infinite without a row."""
        if not self._waiting:
            return math.inf
        if self._envs.rollouts_per_env > 1:
            if self._of_whole_envs():
                return 0.0
        elif len(self._waiting) >= min(self.max_batch_size, self._envs.num_busy):
            return 0.0
        could_begin_s = max(self._waiting[0].since_s, self._free_since_s)
        return could_begin_s + self._config.max_wait_s - time.monotonic()

    def _of_whole_envs(self) -> set[EnvSlot]:
        """Slots that wait for the policy, of the batched environments that are stepped next.

        All rollouts of such an environment wait for it or hold their step, or a batch is full of
        them. One is decided for in a single batch where it fits in: with a few rows in another, it
        would wait twice.
        """
        waiting: dict[tuple[int, int], list[EnvSlot]] = {}
        for request in self._waiting:
            waiting.setdefault(request.slot.environment, []).append(request.slot)
        whole: set[EnvSlot] = set()
        for environment, slots in waiting.items():
            is_whole = len(slots) >= min(self.max_batch_size, self._envs.num_awaited(*environment))
            if is_whole and (not whole or len(whole) + len(slots) <= self.max_batch_size):
                whole.update(slots)
        return whole

    def _may_begin_round(self) -> bool:
        """Whether each rollout under way waits for its decision, and no other is about to begin."""
        all_wait = self._envs.are_waiting and self._envs.num_busy == len(self._waiting)
        return all_wait and self._is_settled()

    def _take_batch(self) -> None:
        if self._lockstep:
            self._waiting = deque(sorted(self._waiting, key=lambda request: request.slot.position))
        is_batched = not self._lockstep and self._envs.rollouts_per_env > 1
        whole = self._of_whole_envs() if is_batched else set()
        # Training rows and those of one evaluation are decided with weights of their own.
        weights = next((r for r in self._waiting if r.slot in whole), self._waiting[0]).weights
        left: deque[_Request] = deque()
        for request in self._waiting:
            is_next = request.weights == weights and (not whole or request.slot in whole)
            if is_next and len(self._batch) < self.max_batch_size:
                request.slot.in_policy = True
                request.rollout.instruction_id = self._instructions.id(request.instruction)
                self._batch.append(request)
            else:
                left.append(request)
        self._waiting, self._round_is_open = left, bool(left)

    async def _call(self) -> None:
        """Have the batch decided, by as many inference processes as it takes."""
        requests, weights = self._batch, self._batch[0].weights
        number = self.num_batches[weights is not None]
        self.num_batches[weights is not None] += 1
        seed = batch_seed(self.seed, number, evaluation=weights is not None)
        self._write_ids(requests)
        self._track.waiting(None)
        while True:
            self._send_request(requests, weights, seed)
            try:
                reply = await self._reply()
                break
            except _ProcessLostError as lost:
                self._restart(str(lost))
                if weights is not None:
                    self._forget_batch()
                    self._fail_evaluations(requests)
                    return
        self._track.add(reply.start_s, reply.end_s, "infer", "no_ready_row")
        self._counters.add("collector/inference_batches")
        self._free_since_s = time.monotonic()
        self._forget_batch()
        if not self._waiting:
            self._track.waiting("no_ready_row")
        for request in requests:
            if not request.version.done():
                request.version.set_result(reply.policy_version)

    def _forget_batch(self) -> None:
        self._batch = []
        self._answered.set()  # wakes those that wait now
        self._answered.clear()

    def _write_ids(self, requests: list[_Request]) -> None:
        rows = np.array([request.row for request in requests])
        rollouts = [request.rollout for request in requests]
        for key, values in (
            (INSTRUCTION_ID_KEY, [rollout.instruction_id for rollout in rollouts]),
            (GROUP_ID_KEY, [rollout.group_id for rollout in rollouts]),
            (ROLLOUT_ID_KEY, [rollout.rollout_id for rollout in rollouts]),
            (DECISION_INDEX_KEY, [rollout.num_rows for rollout in rollouts]),
        ):
            self._ids[key][rows, 0] = values

    def _send_request(
        self, requests: list[_Request], weights: EvaluationWeights | None, seed: int
    ) -> None:
        message = Infer(
            rows=[request.row for request in requests],
            instruction_ids=[request.rollout.instruction_id for request in requests],
            new_instructions=self._instructions.since(self._num_instructions_sent),
            greedy=weights is not None and weights.greedy,
            use_snapshot=weights is not None,
            seed=seed,  # the same when a lost request is repeated
        )
        self._num_instructions_sent = len(self._instructions)
        self._send(message)

    # -- the inference process ------------------------------------------------------------------

    async def _reply(self) -> Inferred:
        """The process's answer.

        Raises:
            _ProcessLostError: if it ends or hangs.
            RuntimeError: if the policy raised.
        """
        limit = "timeout_s" if self._has_answered else "start_timeout_s"
        seconds = float(getattr(self._config, limit))
        connection = self._process.connection
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await readable(connection)
        if not connection.poll():  # else it has answered, though this thread was held up
            raise _ProcessLostError(
                f"a call took more than {limit}={seconds:g} s. Stack:\n{self._process.stack()}"
            )
        try:
            message = connection.recv()
        except (EOFError, OSError):
            raise _ProcessLostError(self._process.describe_end()) from None
        if isinstance(message, Failed):
            raise RuntimeError(f"The policy failed in the inference lane:\n{message.traceback}")
        self._has_answered = True
        reply: Inferred = message
        return reply

    def _restart(self, reason: str) -> None:
        _log.warning("The inference lane is restarted: %s", reason)
        self._counters.add("faults/inference_restarts")
        self._failures.record_crash(self._process.started_s)
        if self._failures.too_many:
            raise RuntimeError(
                f"max_failures ({self._max_failures}) failures in a row came without a finished "
                f"rollout. The last one, of the inference lane: {reason}"
            )
        self._process.stop(0.0)
        self._process = self._start_process()
        self._connect()
        lost = [request for request in self._waiting if request.weights is not None]
        self._waiting = deque(request for request in self._waiting if request.weights is None)
        self._fail_evaluations(lost)

    def _fail_evaluations(self, requests: list[_Request]) -> None:
        for request in requests:
            if not request.version.done():
                request.version.set_exception(SnapshotLostError())

    def _connect(self) -> None:
        """Send a new process the rows; it knows no instruction yet."""
        self._num_instructions_sent = 0
        self._has_answered = False
        self._send(UsePool(self._pool.worker_view()))

    def _send(self, message: Infer | Snapshot | UsePool) -> None:
        with contextlib.suppress(OSError):  # its end shows when the reply is read
            self._process.connection.send(message)
