# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Lanes in simulated time, event by event: a setting that is moved takes effect as it does."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.swimlane import Timeline

#: An environment: worker and number.
Slot = tuple[int, int]


@dataclass(frozen=True)
class Latencies:
    """Seconds of each lane, of a message, and the sizes of what is worked on."""

    step_s: float = 0.04
    infer_s: float = 0.04
    infer_row_s: float = 0.001
    learn_row_s: float = 0.001
    reset_s: float = 0.002
    message_s: float = 0.001
    #: Share of a step that is exponentially distributed.
    jitter: float = 0.0
    num_workers: int = 8
    envs_per_worker: int = 3
    decisions_per_rollout: int = 4
    rows_per_update: int = 96
    #: Rows that may be admitted ahead of the learner.
    store: int = 288


class SimulatedLanes:
    """What a :class:`~torchrl_dvla.collectors.tuning.Tuner` sees of a coordinator and a buffer.

    Rollouts under way run to their end when ``max_in_flight`` falls; a row waits for others while
    the policy is free, as in the batcher; a worker works through its orders one by one.
    """

    def __init__(
        self, latencies: Latencies, max_in_flight: int, max_batch_size: int, max_wait_s: float
    ) -> None:
        self._latencies = latencies
        self.max_in_flight, self.inference_threads, self.num_epochs = max_in_flight, 1, 1
        self.num_slots = latencies.num_workers * latencies.envs_per_worker
        self.is_evaluating, self.is_admitting = False, True
        self.batcher = SimpleNamespace(max_batch_size=max_batch_size, max_wait_s=max_wait_s)
        self.counters, self.timeline = CollectionCounters(), Timeline()
        self.timeline.start(now=0.0)
        self.on_pass: Callable[[], None] = lambda: None
        self.now = 0.0
        self.num_collected = 0
        self._random = random.Random(0)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_events = 0
        workers = range(latencies.num_workers)
        self._idle = deque((w, e) for e in range(latencies.envs_per_worker) for w in workers)
        #: Decisions that each rollout under way has left.
        self._left: dict[Slot, int] = {}
        self._orders: list[deque[tuple[Slot, bool]]] = [deque() for _ in workers]
        self._working = [False for _ in workers]
        self._ready: deque[tuple[float, Slot]] = deque()
        self._calling = self._learning = False
        self._free_since_s, self._due_s = 0.0, -1.0
        self._num_admitted = self._num_learned = 0
        self._workers = [self.timeline.track("sampling", f"worker {w}") for w in workers]
        self._policy = self.timeline.track("inference")
        self._learner = self.timeline.track("gradient")

    @property
    def num_at_work(self) -> int:
        """Rollouts under way."""
        return len(self._left)

    def run(self, duration_s: float) -> float:
        """Decisions a second meanwhile."""
        until_s, before = self.now + duration_s, self.num_collected
        self._act()
        while self._events[0][0] <= until_s:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)
            self._act()
            self.on_pass()
        self.now = until_s
        return (self.num_collected - before) / duration_s

    def _after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        self._num_events += 1  # of two events at once, the first that was planned comes first
        heapq.heappush(self._events, (self.now + delay_s, self._num_events, action, args))

    def _act(self) -> None:
        of = self._latencies
        while (
            self._idle
            and len(self._left) < self.max_in_flight
            and self._num_admitted - self._num_learned < of.store
        ):
            slot = self._idle.popleft()
            self._left[slot] = of.decisions_per_rollout
            self._num_admitted += of.decisions_per_rollout
            self._after(of.message_s, self._order, slot, True)
        if self._ready and not self._calling:
            due_s = max(self._ready[0][0], self._free_since_s) + self.batcher.max_wait_s
            is_full = len(self._ready) >= min(self.batcher.max_batch_size, len(self._left))
            if is_full or self.now >= due_s - 1e-9:
                self._call()
            elif self._due_s != due_s:
                self._due_s = due_s
                self._after(due_s - self.now, lambda: None)
        if not self._learning and self.num_collected - self._num_learned >= of.rows_per_update:
            self._learning = True
            learn_s = of.rows_per_update * self.num_epochs * of.learn_row_s
            self._after(learn_s, self._on_learned, self.now)

    # -- the lanes ------------------------------------------------------------------------------

    def _call(self) -> None:
        of, self._calling = self._latencies, True
        num_rows = min(len(self._ready), self.batcher.max_batch_size)
        slots = [self._ready.popleft()[1] for _ in range(num_rows)]
        self._after(of.infer_s + of.infer_row_s * num_rows, self._on_decided, slots, self.now)

    def _on_decided(self, slots: list[Slot], start_s: float) -> None:
        self._policy.add(start_s, self.now, "infer", "no_ready_row")
        self._calling, self._free_since_s = False, self.now
        for slot in slots:
            self._after(self._latencies.message_s, self._order, slot, False)

    def _order(self, slot: Slot, is_reset: bool) -> None:
        self._orders[slot[0]].append((slot, is_reset))
        self._work(slot[0])

    def _work(self, worker: int) -> None:
        if self._orders[worker] and not self._working[worker]:
            of, self._working[worker] = self._latencies, True
            slot, is_reset = self._orders[worker].popleft()
            factor = 1.0 - of.jitter + of.jitter * self._random.expovariate(1.0)
            duration_s = of.reset_s if is_reset else of.step_s * factor
            self._after(duration_s, self._on_worked, slot, is_reset, self.now)

    def _on_worked(self, slot: Slot, is_reset: bool, start_s: float) -> None:
        worker = slot[0]
        self._workers[worker].add(start_s, self.now, "work", "no_decision")
        self._working[worker] = False
        self._after(self._latencies.message_s, self._on_report, slot, is_reset)
        self._work(worker)

    def _on_report(self, slot: Slot, is_reset: bool) -> None:
        if not is_reset:
            self.num_collected += 1
            self.counters.add("collector/decisions")
            self._left[slot] -= 1
            if not self._left[slot]:
                del self._left[slot]
                self._idle.append(slot)
                return
        self._ready.append((self.now, slot))

    def _on_learned(self, start_s: float) -> None:
        self._learner.add(start_s, self.now, "learn", "no_batch")
        self._learning = False
        self._num_learned += self._latencies.rows_per_update
