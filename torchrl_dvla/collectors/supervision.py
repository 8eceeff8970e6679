# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What happens when a part of the run dies, raises or hangs."""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Sequence

from torchrl_dvla.collectors.batcher import DecisionBatcher
from torchrl_dvla.collectors.configs import WorkerConfig
from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.collectors.rollout import Slot, SlotState
from torchrl_dvla.collectors.rollout_queue import RolloutQueue
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import SamplingLane
from torchrl_dvla.swimlane.messages import UsePool

__all__ = ["Supervisor"]

_log = logging.getLogger("torchrl_dvla")

#: States that end by a deadline, and the limit of :class:`WorkerConfig` that sets it.
_DEADLINES = {
    SlotState.STARTING: "start_timeout_s",
    SlotState.RESETTING: "reset_timeout_s",
    SlotState.STEPPING: "step_timeout_s",
}


class Supervisor:
    """Replaces what is lost, so that the run goes on; gives up when nothing gets done any more.

    The coordinator's thread is the only one that calls it.

    Keyword Args:
        sampling (SamplingLane): environment workers.
        batcher (DecisionBatcher): owner of the inference lane.
        slots (sequence of Slot): all environments, worker after worker.
        queue (RolloutQueue): takes interrupted rollouts back.
        pool (EnvironmentPool): the rows that new workers are shown.
        selector (BaseSelector): where the connections of new processes are registered: workers
            under their number, the inference lane under ``"inference"``.
        counters (CollectionCounters): takes the counts.
        workers (WorkerConfig): deadlines and the limit of failures.
    """

    def __init__(
        self,
        *,
        sampling: SamplingLane,
        batcher: DecisionBatcher,
        slots: Sequence[Slot],
        queue: RolloutQueue,
        pool: EnvironmentPool,
        selector: selectors.BaseSelector,
        counters: CollectionCounters,
        workers: WorkerConfig,
    ) -> None:
        self._sampling = sampling
        self._batcher = batcher
        self._slots = slots
        self._queue = queue
        self._pool = pool
        self._selector = selector
        self._counters = counters
        self._workers = workers
        self._num_failures = 0
        self._inference_descriptor = -1

    def start(self) -> None:
        """Connect the lanes; all workers have built their environments."""
        self._listen_to_inference(self._batcher.connect())
        for index in range(self._workers.num_workers):
            self._connect_worker(index)
            self.admit_worker(index)

    def note_progress(self) -> None:
        """A rollout was finished: the failures before it were not in vain."""
        self._num_failures = 0

    # -- the sampling lane ----------------------------------------------------------------------

    def admit_worker(self, index: int) -> None:
        """Worker ``index`` has built its environment: let it work."""
        self._sampling.send(index, UsePool(self._pool.worker_view()))
        for slot in self._slots_of(index):
            slot.enter(SlotState.IDLE)

    def replace_worker(self, index: int, reason: str) -> None:
        """Worker ``index`` is lost: sample its rollouts again, start another worker.

        Raises:
            RuntimeError: if too many failures came without a finished rollout between them.
        """
        _log.warning("%s is replaced: %s", self._sampling.workers[index].name, reason)
        self._counters.add("faults/workers_replaced")
        self._num_failures += 1
        if self._num_failures > self._workers.max_failures:
            raise RuntimeError(
                f"max_failures ({self._workers.max_failures}) environment workers in a row ended "
                f"without finishing a rollout. The last one said:\n{reason}"
            )
        self._selector.unregister(self._sampling.workers[index].connection)
        # replace() returns when the kernel has ended the process: from then on it writes no row.
        self._sampling.replace(index)
        self._connect_worker(index)
        for slot in self._slots_of(index):
            rollout, slot.rollout = slot.rollout, None
            if rollout is not None and slot.state is SlotState.INFERRING:
                rollout.abandoned = True  # the policy still writes its row
            elif rollout is not None:
                self._queue.retry(rollout)
            if slot.state is SlotState.READY:
                self._batcher.withdraw(slot)
            slot.enter(SlotState.STARTING)
            slot.idle_reason = "worker_lost"

    def time_to_deadline(self) -> float | None:
        """Seconds until the next deadline passes; ``None`` if nothing has one."""
        deadlines = [self._deadline(slot) for slot in self._slots if slot.state in _DEADLINES]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def replace_hung_workers(self) -> None:
        """Replace every worker that has let a deadline pass."""
        now_s = time.monotonic()
        for slot in self._slots:
            if slot.state in _DEADLINES and self._deadline(slot) < now_s:
                limit = _DEADLINES[slot.state]
                seconds = getattr(self._workers, limit)
                self.replace_worker(
                    slot.worker, f"{slot.state.value} took more than {limit}={seconds:g} s."
                )

    # -- the inference lane ---------------------------------------------------------------------

    def restart_inference(self, reason: str) -> None:
        """The inference lane is lost: start another with the newest weights, repeat the request.

        Raises:
            RuntimeError: if too many failures came without a finished rollout between them.
        """
        _log.warning("The inference lane is restarted: %s", reason)
        self._counters.add("faults/inference_restarts")
        self._num_failures += 1
        if self._num_failures > self._workers.max_failures:
            raise RuntimeError(
                f"The inference lane was lost {self._num_failures} times without a finished "
                f"rollout between. The last time: {reason}"
            )
        self._selector.unregister(self._inference_descriptor)
        self._listen_to_inference(self._batcher.restart(snapshot=self._queue.evaluating))

    # -- helpers --------------------------------------------------------------------------------

    def _connect_worker(self, index: int) -> None:
        self._selector.register(
            self._sampling.workers[index].connection, selectors.EVENT_READ, index
        )

    def _listen_to_inference(self, descriptor: int) -> None:
        self._inference_descriptor = descriptor
        self._selector.register(descriptor, selectors.EVENT_READ, "inference")

    def _deadline(self, slot: Slot) -> float:
        return slot.since_s + float(getattr(self._workers, _DEADLINES[slot.state]))

    def _slots_of(self, worker: int) -> Sequence[Slot]:
        size = self._workers.envs_per_worker
        return self._slots[worker * size : (worker + 1) * size]
