# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The scheduler's hands: it measures the running lanes in windows and moves their settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from torchrl_dvla.collectors.configs import SchedulerConfig
from torchrl_dvla.collectors.coordinator import Coordinator
from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.data import PooledReplayBuffer
from torchrl_dvla.swimlane import Knob, Measurement, Scheduler, Timeline

__all__ = ["Tuner", "attach_tuner", "check_movable"]

#: Decisions of every rollout under way that a window holds at least: they come in bursts as large
#: as a batch, and a window of few bursts says little.
_MIN_ROUNDS = 4


def check_movable(config: SchedulerConfig | None, deterministic: bool) -> None:
    """Refuse a scheduler where a run is to be a function of its seeds."""
    if config is not None and deterministic:
        raise ValueError(
            "scheduler must be None where a run works in rounds, got a SchedulerConfig. What it "
            "moves depends on the clock: set deterministic=False."
        )


def attach_tuner(
    config: SchedulerConfig | None, *, coordinator: Coordinator, **measured: Any
) -> Tuner | None:
    """Have the coordinator's loop ask a :class:`Tuner`, if there is one to be."""
    if config is None:
        return None
    tuner = Tuner(config, coordinator=coordinator, **measured)
    coordinator.on_pass = tuner.tick
    return tuner


class Tuner:
    """Asks a :class:`~torchrl_dvla.swimlane.Scheduler` after each window.

    Args:
        config (SchedulerConfig): bounds and pace.

    Keyword Args:
        coordinator (Coordinator): the lanes; its thread calls :meth:`tick`.
        replay_buffer (PooledReplayBuffer): the learner reads its ``num_epochs`` at each update.
        timeline (Timeline): says what the lanes did.
        counters (CollectionCounters): count the decisions.
        clock (Callable): seconds, monotonic.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        coordinator: Coordinator,
        replay_buffer: PooledReplayBuffer,
        timeline: Timeline,
        counters: CollectionCounters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._coordinator = coordinator
        self._replay_buffer = replay_buffer
        self._timeline = timeline
        self._counters = counters
        self._clock = clock
        self.scheduler = Scheduler(self._knobs(), min_gain=config.min_gain)
        self._begin_window(clock())

    def _knobs(self) -> list[Knob]:
        config, batcher = self._config, self._coordinator.batcher
        num_slots = self._coordinator.num_slots
        knobs = [
            Knob("max_in_flight", self._coordinator.max_in_flight, 1, num_slots, "all"),
            Knob(
                "max_batch_size",
                min(batcher.max_batch_size, num_slots),
                1,
                num_slots,
                "inference",
                follows="max_in_flight",
            ),
        ]
        if config.max_wait_s > 0:
            wait_s = min(batcher.max_wait_s, config.max_wait_s)
            knobs.append(Knob("max_wait_s", wait_s, 0.0, config.max_wait_s, "inference", 0.001))
        if config.num_epochs is not None:
            epochs = self._replay_buffer.num_epochs
            knobs.append(Knob("num_epochs", epochs, *config.num_epochs, "gradient"))
        if config.num_cores is not None:
            threads, most = self._coordinator.inference_threads, config.num_cores - 1
            knobs.append(
                Knob("inference_threads", threads, 1, most, "inference", takes_from="gradient")
            )
        return knobs

    def tick(self) -> None:
        """Called once a pass of the coordinator's loop; does nothing until a window is over."""
        now, coordinator = self._clock(), self._coordinator
        decisions = self._num_decisions() - self._decisions
        if coordinator.is_evaluating or not coordinator.is_admitting:
            self._begin_window(now)  # another load: nothing to compare with
        elif coordinator.num_at_work > coordinator.max_in_flight:
            self._begin_window(now)  # the move has not taken effect: rollouts have to end first
        elif now >= self._end_s and decisions >= _MIN_ROUNDS * coordinator.num_at_work:
            reading = self._timeline.reading(now)
            rate = decisions / (now - self._start_s)
            for move in self.scheduler.observe(Measurement(rate, reading.since(self._reading))):
                self._apply(move.knob, move.new)
            self._begin_window(now)

    def share_cores(self) -> None:
        """Give the calling thread, the learner's, the cores that the inference lane has not."""
        threads = self.scheduler.settings.get("inference_threads")
        if threads is not None and self._config.num_cores is not None:
            num_threads = self._config.num_cores - int(threads)
            if torch.get_num_threads() != num_threads:
                torch.set_num_threads(num_threads)

    def stats(self) -> dict[str, float]:
        """Settings by TensorBoard name, and how often they were moved."""
        out = {f"scheduler/{name}": value for name, value in self.scheduler.settings.items()}
        return {**out, "scheduler/moves": self.scheduler.num_moves}

    def _apply(self, knob: str, value: float) -> None:
        if knob == "max_in_flight":
            self._coordinator.max_in_flight = int(value)
        elif knob == "max_batch_size":
            self._coordinator.batcher.max_batch_size = int(value)
        elif knob == "max_wait_s":
            self._coordinator.batcher.max_wait_s = value
        elif knob == "num_epochs":
            self._replay_buffer.num_epochs = int(value)
        else:
            self._coordinator.batcher.use_threads(int(value))

    def _begin_window(self, now: float) -> None:
        self._start_s, self._end_s = now, now + self._config.window_s
        self._reading = self._timeline.reading(now)
        self._decisions = self._num_decisions()

    def _num_decisions(self) -> int:
        return self._counters.totals["collector/decisions"]
