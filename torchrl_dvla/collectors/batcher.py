# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One policy call for all decisions that wait."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.collectors.fleet import Fleet
from torchrl_dvla.collectors.rollout import Rollout, Slot, SlotState
from torchrl_dvla.data import InstructionTable
from torchrl_dvla.data.schema import (
    DECISION_INDEX_KEY,
    GROUP_ID_KEY,
    INSTRUCTION_ID_KEY,
    ROLLOUT_ID_KEY,
)
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import InferenceProcess, InferenceThread, Timeline, batch_seed
from torchrl_dvla.swimlane.messages import Failed, Infer, Snapshot, UsePool, UseThreads

__all__ = ["DecisionBatcher", "LaneLostError"]


class LaneLostError(RuntimeError):
    """The inference lane has ended without being asked to."""


class DecisionBatcher:
    """Sends all rows that wait for a decision to the inference lane, one batch at a time.

    While a batch is under way the next one gathers, so the batch size follows the load by itself. A
    policy call costs little more for a few more rows, so a batch that could begin waits a moment
    for what is being simulated: until it is full, until nothing more can come, or until
    ``max_wait_s`` is over. The moment begins when the policy is free: rows that have waited for the
    call before are often joined right afterwards by the environments that are in step with it.

    Args:
        start_inference (Callable): starts the inference lane.
        pool (EnvironmentPool): the rows.
        instructions (InstructionTable): strings by id.

    Keyword Args:
        fleet (Fleet): says how many rollouts are under way.
        max_batch_size (int): rows of one batch.
        max_wait_s (float): seconds that a row waits for others while the policy is free.
        seed (int, optional): of the tokens that are sampled; each batch has a seed of its own, see
            :func:`~torchrl_dvla.swimlane.batch_seed`. ``None`` leaves the lane's generator alone.
        timeline (Timeline): takes the spans.
        counters (CollectionCounters): takes the counts.
    """

    def __init__(
        self,
        start_inference: Callable[[], InferenceProcess | InferenceThread],
        pool: EnvironmentPool,
        instructions: InstructionTable,
        *,
        fleet: Fleet,
        max_batch_size: int,
        max_wait_s: float,
        seed: int | None,
        timeline: Timeline,
        counters: CollectionCounters,
    ) -> None:
        self._start_inference = start_inference
        self._pool = pool
        self._instructions = instructions
        self._fleet = fleet
        #: These two may be changed while the lane runs.
        self.max_batch_size = max_batch_size
        self.max_wait_s = max_wait_s
        self._seed = seed
        #: Batches so far, of training and of evaluations.
        self.num_batches = [0, 0]
        self._track = timeline.track("inference")
        self._ids = {
            key: pool.rows.get(key).numpy()
            for key in (INSTRUCTION_ID_KEY, GROUP_ID_KEY, ROLLOUT_ID_KEY, DECISION_INDEX_KEY)
        }
        self._counters = counters
        self._waiting: deque[Slot] = deque()
        self._free_since_s = 0.0
        #: Whether rows were left when the last batch was begun.
        self.round_is_open = False
        #: The decisions that are being taken; a slot may change hands meanwhile, a rollout does
        #: not.
        self._batch: list[tuple[Slot, Rollout]] = []
        self._batch_seed: int | None = None
        self._num_instructions_sent = 0
        self._num_threads: int | None = None
        #: The inference lane, and whether it has taken a decision yet.
        self.lane = start_inference()
        self.lane_has_answered = False
        #: When the call under way was asked for, in seconds of ``time.monotonic``.
        self.requested_s: float | None = None

    def connect(self) -> int:
        """Tell a new lane where the rows are; returns the descriptor to wait on."""
        self._num_instructions_sent = 0
        self._send(UsePool(self._pool.worker_view()))
        if self._num_threads is not None:
            self._send(UseThreads(self._num_threads))
        return self.lane.connection.fileno()

    def restart(self, *, snapshot: bool) -> int:
        """Start another lane, with the newest weights, and repeat the request that was lost.

        Keyword Args:
            snapshot (bool): whether an evaluation needs its copy of the weights again.
        """
        self.lane.stop(0.0)
        self.lane = self._start_inference()
        self.lane_has_answered = False
        descriptor = self.connect()
        if snapshot:
            self.snapshot()
        if self._batch:
            self._request()
        return descriptor

    def stop(self) -> None:
        """End the lane."""
        self.lane.stop()

    def use_threads(self, num_threads: int) -> None:
        """Have the policy run on that many threads, from the next batch on."""
        self._num_threads = num_threads
        self._send(UseThreads(num_threads))

    def snapshot(self) -> None:
        """Have the newest weights copied aside for an evaluation."""
        self._send(Snapshot())

    def add(self, slot: Slot) -> None:
        """The row of the slot's rollout waits for a decision."""
        slot.enter(SlotState.READY)
        self._waiting.append(slot)

    def withdraw(self, slot: Slot) -> None:
        """The slot's rollout is lost before its decision was begun."""
        self._waiting.remove(slot)

    def dispatch(self, *, in_order: bool = False) -> None:
        """Begin the next batch, if none is under way and it is time.

        Keyword Args:
            in_order (bool): take the rows in the order of their slots, not of their arrival, and
                at once.
        """
        wait_s = self.time_to_dispatch()
        if wait_s == math.inf or (wait_s > 0.0 and not in_order):
            return
        waiting, self._waiting = self._waiting, deque()
        if in_order:
            waiting = deque(sorted(waiting, key=lambda slot: (slot.worker, slot.env_index)))
        evaluation = waiting[0].occupant.evaluation
        for slot in waiting:
            rollout = slot.occupant
            if rollout.evaluation is evaluation and len(self._batch) < self.max_batch_size:
                slot.state = SlotState.INFERRING  # since_s stays: it still waits for its decision
                self._batch.append((slot, rollout))
            else:
                self._waiting.append(slot)
        self.round_is_open = bool(self._waiting)
        self._batch_seed = self._next_seed(evaluation is not None)
        self._request()

    def time_to_dispatch(self) -> float:
        """Seconds until the next batch begins if nothing else happens; infinite if it cannot."""
        if self._batch or not self._waiting:
            return math.inf
        if len(self._waiting) >= min(self.max_batch_size, self._fleet.num_at_work):
            return 0.0
        could_begin_s = max(self._waiting[0].since_s, self._free_since_s)
        return max(0.0, could_begin_s + self.max_wait_s - time.monotonic())

    def receive(self) -> list[tuple[Slot, Rollout]]:
        """The decisions that have been taken; they stand in the rows.

        Raises:
            LaneLostError: if the lane has ended.
            RuntimeError: if the policy raised. It would raise again: no restart helps.
        """
        try:
            message = self.lane.connection.recv()
        except (EOFError, OSError):
            raise LaneLostError(self.lane.describe_end()) from None
        if isinstance(message, Failed):
            raise RuntimeError(f"The policy failed in the inference lane:\n{message.traceback}")
        self._track.add(
            message.start_s, message.end_s, "infer", "no_ready_row", message.device_wait_s
        )
        self._counters.add("collector/inference_batches")
        self.lane_has_answered, self.requested_s = True, None
        self._free_since_s = time.monotonic()
        batch, self._batch = self._batch, []
        if not self._waiting:
            self._track.waiting("no_ready_row")
        for _, rollout in batch:
            rollout.stamp(message.policy_version)
        return batch

    def _request(self) -> None:
        rollouts = [rollout for _, rollout in self._batch]
        evaluation = rollouts[0].evaluation
        rows = [rollout.place[0] for rollout in rollouts]
        instruction_ids = [rollout.instruction_id for rollout in rollouts]
        index = np.array(rows)
        for key, values in (
            (INSTRUCTION_ID_KEY, instruction_ids),
            (GROUP_ID_KEY, [rollout.group_id for rollout in rollouts]),
            (ROLLOUT_ID_KEY, [rollout.rollout_id for rollout in rollouts]),
            (DECISION_INDEX_KEY, [rollout.num_decisions for rollout in rollouts]),
        ):
            self._ids[key][index, 0] = values
        message = Infer(
            rows=rows,
            instruction_ids=instruction_ids,
            new_instructions=self._instructions.since(self._num_instructions_sent),
            greedy=evaluation is not None and evaluation.greedy,
            use_snapshot=evaluation is not None,
            seed=self._batch_seed,  # the same when a lost request is repeated
        )
        self._num_instructions_sent = len(self._instructions)
        self.requested_s = time.monotonic()
        self._track.waiting(None)
        self._send(message)

    def _next_seed(self, evaluation: bool) -> int | None:
        number = self.num_batches[evaluation]
        self.num_batches[evaluation] += 1
        if self._seed is None:
            return None
        return batch_seed(self._seed, number, evaluation=evaluation)

    def _send(self, message: Infer | Snapshot | UsePool | UseThreads) -> None:
        try:
            self.lane.connection.send(message)
        except OSError:
            pass  # its death shows at the next receive
