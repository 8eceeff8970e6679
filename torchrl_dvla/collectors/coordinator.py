# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The loop that keeps environments and policy busy and decides nothing twice."""

from __future__ import annotations

import logging
import selectors
import threading
from collections.abc import Callable

from torchrl_dvla.collectors.alarm import Alarm
from torchrl_dvla.collectors.batcher import DecisionBatcher, LaneLostError
from torchrl_dvla.collectors.configs import InferenceConfig, WorkerConfig
from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.collectors.fleet import Fleet
from torchrl_dvla.collectors.lockstep import Lockstep
from torchrl_dvla.collectors.rollout import NO_PLACE, Rollout, Slot, SlotState
from torchrl_dvla.collectors.rollout_queue import RolloutQueue
from torchrl_dvla.collectors.supervision import Supervisor
from torchrl_dvla.data import InstructionTable
from torchrl_dvla.data.schema import IMAGE_KEY
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import InferenceProcess, InferenceThread, SamplingLane, Timeline
from torchrl_dvla.swimlane.messages import (
    EnvSpecs,
    Ready,
    Report,
    Reset,
    Step,
    Stepped,
    unpack,
)

__all__ = ["Coordinator"]

_log = logging.getLogger("torchrl_dvla")


class Coordinator:
    """Runs rollouts on the sampling and inference lanes of one node, in one thread.

    It is the single owner of page ownership and of every rollout's state, so nothing here needs a
    lock; workers and policy write only the rows that it tells them (invariant 2). One pass of the
    loop fills idle environments, sends the rows that wait to the policy and its orders to every
    worker, and then sleeps until a message, a deadline or :meth:`wake` ends the sleep. What a pass
    costs depends on what there is to do, not on the number of environments.

    Args:
        sampling (SamplingLane): environment workers that are ready.
        start_inference (Callable): starts the inference lane; called again if it dies.
        pool (EnvironmentPool): rows.
        queue (RolloutQueue): what to run next.
        instructions (InstructionTable): strings by id.
        on_rollout (Callable): takes the finished rollouts of training groups and owns their pages
            from then on.
        abandon_group (Callable): gives up the unfinished group of an id for a reason.
        timeline (Timeline): takes the spans.
        counters (CollectionCounters): takes the counts.
        seed (int): of the tokens that are sampled.
        lockstep (bool): whether environments and policy work in rounds, see :class:`Lockstep`.
        workers (WorkerConfig): limits of the sampling lane.
        inference (InferenceConfig): limits of the inference lane.
    """

    def __init__(
        self,
        *,
        sampling: SamplingLane,
        start_inference: Callable[[], InferenceProcess | InferenceThread],
        pool: EnvironmentPool,
        queue: RolloutQueue,
        instructions: InstructionTable,
        on_rollout: Callable[[Rollout], None],
        abandon_group: Callable[[int, str], None],
        timeline: Timeline,
        counters: CollectionCounters,
        seed: int,
        lockstep: bool,
        workers: WorkerConfig,
        inference: InferenceConfig,
    ) -> None:
        self._sampling = sampling
        self._pool = pool
        self._queue = queue
        self._instructions = instructions
        self._on_rollout = on_rollout
        self._tracks = [
            timeline.track("sampling", f"worker {index}") for index in range(workers.num_workers)
        ]
        self._counters = counters
        self._workers = workers
        self._fleet = Fleet(workers.num_workers, workers.envs_per_worker)
        #: Rollouts that may be under way at once; it may be changed while the lanes run.
        self.max_in_flight = workers.max_in_flight or len(self._fleet.slots)
        self._lockstep = Lockstep(self._fleet.slots) if lockstep else None
        self.batcher = DecisionBatcher(
            start_inference,
            pool,
            instructions,
            fleet=self._fleet,
            max_batch_size=inference.max_batch_size or self._fleet.share(1 if lockstep else 2),
            max_wait_s=inference.max_wait_s,
            # A thread shares its generator with the learner: only rounds may reseed it.
            seed=seed if lockstep or inference.where == "process" else None,
            timeline=timeline,
            counters=counters,
        )
        self._selector = selectors.DefaultSelector()
        self._alarm = Alarm()
        self._selector.register(self._alarm, selectors.EVENT_READ, None)
        self._supervisor = Supervisor(
            sampling=sampling,
            batcher=self.batcher,
            fleet=self._fleet,
            queue=queue,
            abandon_group=abandon_group,
            pool=pool,
            selector=self._selector,
            counters=counters,
            workers=workers,
            inference=inference,
        )
        #: Policy calls so far, of training and of evaluations; their seeds follow from it.
        self.num_batches = self.batcher.num_batches
        self.inference_threads = inference.num_threads
        #: Called once a pass of the loop.
        self.on_pass: Callable[[], None] = lambda: None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dvla-coordinator", daemon=True)
        self.error: BaseException | None = None
        self.on_error: Callable[[BaseException], None] = lambda error: None

    def start(self) -> None:
        """Begin: from here on the lanes belong to the coordinator's thread."""
        self._supervisor.start()
        self._thread.start()

    @property
    def num_slots(self) -> int:
        """Environments of all workers."""
        return len(self._fleet.slots)

    @property
    def num_at_work(self) -> int:
        """Rollouts under way."""
        return self._fleet.num_at_work

    @property
    def is_evaluating(self) -> bool:
        """Whether an evaluation is under way."""
        return self._queue.evaluating

    @property
    def is_admitting(self) -> bool:
        """Whether new groups may begin."""
        return self._queue.admitting.is_set()

    def wake(self) -> None:
        """End the loop's sleep: something has changed. Any thread may call it."""
        if threading.current_thread() is not self._thread:
            self._alarm.ring()  # the loop itself looks at everything again before it sleeps

    def stop(self) -> None:
        """End the loop and both lanes; safe to call twice."""
        if not self._stopping:
            self._stopping = True
            self.wake()
        if self._thread.is_alive():
            self._thread.join()

    # -- the loop -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._begin_evaluation()
                self._end_round()
                self._supervisor.retire_workers()
                self._fill_idle_slots()
                self._dispatch()
                self._sampling.flush()
                for key, _ in self._selector.select(self._time_to_act()):
                    self._receive(key)
                self._supervisor.replace_hung()
                self.on_pass()
        except BaseException as error:
            self.error = error
            _log.debug("The coordinator ends.", exc_info=True)
            self.on_error(error)
        finally:
            self._close()

    def _close(self) -> None:
        self._stopping = True
        ended = RuntimeError("The collector ended before the evaluation did.")
        ended.__cause__ = self.error
        self._queue.fail_evaluations(ended)
        self.batcher.stop()
        self._sampling.stop(self._workers.stop_timeout_s)
        self._selector.close()
        self._alarm.close()

    def _receive(self, key: selectors.SelectorKey) -> None:
        if key.data is None:
            self._alarm.silence()
        elif key.data == "inference":
            self._receive_decisions()
        else:
            self._receive_worker(key.data)

    # -- rounds ---------------------------------------------------------------------------------

    def _end_round(self) -> None:
        if self._lockstep is not None:
            for slot, message in self._lockstep.release():
                slot.enter(SlotState.ANSWERED)
                self._on_answer(slot, message)
            self._fleet.sort_idle()

    def _dispatch(self) -> None:
        if self._lockstep is None:
            self.batcher.dispatch()
        elif self.batcher.round_is_open or self._lockstep.settled:
            self.batcher.dispatch(in_order=True)

    # -- starting rollouts ----------------------------------------------------------------------

    def _begin_evaluation(self) -> None:
        if self._queue.next_evaluation() is not None:
            self.batcher.snapshot()

    def _fill_idle_slots(self) -> None:
        while self._fleet.idle:
            reason = "in_flight"
            if self._fleet.num_at_work < self.max_in_flight:
                rollout = self._queue.next()
                if isinstance(rollout, Rollout):
                    self._begin(rollout)
                    continue
                reason = rollout
            # What holds for one idle environment holds for all of them.
            self._tell_rest(reason)
            return

    def _begin(self, rollout: Rollout) -> None:
        slot = self._fleet.begin(rollout)
        self._tracks[slot.worker].waiting(None)
        rollout.place = self._place_of(rollout, 0)
        spec = rollout.spec
        start = (spec.task, spec.seed, spec.init_state_id)
        self._sampling.order(slot.worker, Reset(slot.env_index, *start, *rollout.place))

    def _tell_rest(self, reason: str) -> None:
        """A worker without any rollout rests because of ``reason`` from now on."""
        for slot in self._fleet.idle:
            if slot.idle_reason != reason:
                slot.idle_reason = reason
                if not self._fleet.num_at_work_on[slot.worker]:
                    self._tracks[slot.worker].waiting(reason)

    def _place_of(self, rollout: Rollout, decision: int) -> tuple[int, int]:
        """The row of one decision of ``rollout``, on a newly leased page where one begins.

        Beside it the generation of its page, by which a worker knows that the lease still stands.
        """
        page, offset = divmod(decision, self._pool.rows_per_page)
        if page == len(rollout.pages):
            rollout.pages.append(self._pool.lease(owner=rollout.rollout_id))
        lease = rollout.pages[page]
        return lease * self._pool.rows_per_page + offset, lease.generation

    # -- the sampling lane ----------------------------------------------------------------------

    def _receive_worker(self, index: int) -> None:
        message = self._sampling.receive(index)
        if isinstance(message, Report):
            self._receive_report(index, message)
        elif isinstance(message, EnvSpecs):
            self._supervisor.receive_specs(index, message)
        else:
            self._supervisor.replace_worker(index, str(message))

    def _receive_report(self, index: int, report: Report) -> None:
        self._supervisor.note_report(index)
        for name, start_s, end_s in report.spans:
            self._tracks[index].add(start_s, end_s, name, "no_decision")
        answer = self._on_answer if self._lockstep is None else self._lockstep.hold
        steps = list(unpack(Stepped, report.stepped))
        self._counters.add("collector/decisions", len(steps))
        self._counters.add("collector/env_steps", sum(step.num_env_steps for step in steps))
        for stepped in steps:
            answer(self._fleet.slot(index, stepped.env_index), stepped)
        for ready in unpack(Ready, report.ready):
            answer(self._fleet.slot(index, ready.env_index), ready)

    def _on_answer(self, slot: Slot, message: Ready | Stepped) -> None:
        if isinstance(message, Ready):
            slot.occupant.instruction_id = self._instructions.id(message.instruction)
            self.batcher.add(slot)
        else:
            self._on_stepped(slot, message)

    def _on_stepped(self, slot: Slot, message: Stepped) -> None:
        rollout = slot.occupant
        rollout.num_decisions += 1
        rollout.num_env_steps += message.num_env_steps
        rollout.episode_return += message.reward
        rollout.success |= message.success
        if message.done:
            self._fleet.end(slot)
            self._finish(rollout)
        else:
            rollout.place = rollout.next_place
            self.batcher.add(slot)

    def _finish(self, rollout: Rollout) -> None:
        self._supervisor.note_progress(rollout.spec.task)
        self._queue.finish(rollout)
        if rollout.cancelled:
            self._pool.free(rollout.pages)
            return
        if rollout.evaluation is None:
            self._counters.add_episode(success=rollout.success, num_env_steps=rollout.num_env_steps)
            self._on_rollout(rollout)
            return
        frames = None
        if rollout.episode < rollout.evaluation.num_frames_episodes:
            index = self._pool.row_index(rollout.pages, rollout.num_decisions)
            frames = self._pool.rows.get(IMAGE_KEY).index_select(0, index)
        self._pool.free(rollout.pages)
        rollout.evaluation.finish_episode(
            rollout.episode,
            success=rollout.success,
            episode_return=rollout.episode_return,
            num_env_steps=rollout.num_env_steps,
            policy_version=rollout.last_policy_version,
            frames=frames,
        )

    # -- the inference lane ---------------------------------------------------------------------

    def _receive_decisions(self) -> None:
        try:
            batch = self.batcher.receive()
        except LaneLostError as error:
            self._supervisor.restart_inference(str(error))
            return
        for slot, rollout in batch:
            if rollout.abandoned:
                self._queue.retry(rollout)
                continue
            slot.enter(SlotState.STEPPING)
            rollout.next_place = NO_PLACE
            if rollout.num_decisions + 1 < self._workers.max_decisions:
                rollout.next_place = self._place_of(rollout, rollout.num_decisions + 1)
            step = Step(slot.env_index, *rollout.place, *rollout.next_place)
            self._sampling.order(slot.worker, step)

    # -- helpers --------------------------------------------------------------------------------

    def _time_to_act(self) -> float:
        """Seconds that the loop may sleep if no message comes."""
        if self._lockstep is not None:  # only an answer begins the next batch
            return self._supervisor.time_to_check()
        return min(self._supervisor.time_to_check(), self.batcher.time_to_dispatch())
