# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Settings that move while real lanes run."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest

from torchrl_dvla.collectors import GroupConfig, InferenceConfig, SchedulerConfig
from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.collectors.tuning import Tuner
from torchrl_dvla.swimlane import Timeline

from .simulated_lanes import Latencies, SimulatedLanes


class FakeLanes:
    """What the tuner sees of a coordinator, a buffer and a clock."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.now = 0.0
        self.max_in_flight, self.num_slots, self.inference_threads = 1, 8, 1
        self.is_evaluating, self.is_admitting, self.num_at_work = False, True, 1
        self.batcher = SimpleNamespace(max_batch_size=8, max_wait_s=0.0)
        self.num_epochs = 1
        self.counters, self.timeline = CollectionCounters(), Timeline()
        self.timeline.start(now=0.0)
        self.tuner = Tuner(
            config,
            coordinator=self,
            replay_buffer=self,
            timeline=self.timeline,
            counters=self.counters,
            clock=lambda: self.now,
        )

    def run(self, seconds: float) -> None:
        """Lanes whose rate grows with the rollouts under way, up to four."""
        for _ in range(int(seconds * 10)):
            self.now += 0.1
            self.counters.add("collector/decisions", 10 * min(4, self.max_in_flight))
            share = min(4, self.max_in_flight) / 4
            self.timeline.add("sampling", self.now - 0.1 * share, self.now)
            self.tuner.tick()


def test_it_moves_what_the_scheduler_says():
    lanes = FakeLanes(SchedulerConfig(window_s=1.0))
    lanes.run(5.0)  # the first comparison
    assert lanes.max_in_flight > 1
    lanes.run(120.0)
    assert lanes.max_in_flight == 4
    assert lanes.tuner.scheduler.at_rest
    stats = lanes.tuner.stats()
    assert stats["scheduler/max_in_flight"] == 4
    assert stats["scheduler/moves"] >= 2


LATENCIES = {
    "equal": Latencies(),
    "sampling": Latencies(step_s=0.1, infer_s=0.02),
    "inference": Latencies(step_s=0.01, infer_s=0.05),
    "jitter": Latencies(jitter=0.5),
}
#: Rollouts under way, rows of a batch, seconds of waiting.
STARTS = [(1, 1, 0.01), (24, 1, 0.0), (1, 24, 0.032), (2, 2, 0.032)]
GRID = [(n, b, 0.01) for n in (8, 16, 24) for b in (4, 8, 12, 16, 24) if b <= n]


def steady_rate(latencies: Latencies, settings: tuple[int, int, float]) -> float:
    lanes = SimulatedLanes(latencies, *settings)
    lanes.run(4.0)
    return lanes.run(10.0)


@pytest.fixture(scope="module")
def best() -> dict[str, float]:
    return {
        name: max(steady_rate(latencies, settings) for settings in GRID)
        for name, latencies in LATENCIES.items()
    }


def test_simulated_lanes_cost_what_they_state():
    """One rollout alternates: 40 ms step, 41 ms call, 2 messages; and a reset of 5 ms in all."""
    rate = steady_rate(Latencies(), (1, 1, 0.0))
    assert rate == pytest.approx(4 / (4 * 0.083 + 0.004), rel=0.01)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", list(LATENCIES))
def test_it_converges_within_a_minute_while_the_lanes_run(best, name, start):
    lanes = SimulatedLanes(LATENCIES[name], *start)
    tuner = Tuner(
        SchedulerConfig(window_s=0.5),
        coordinator=lanes,
        replay_buffer=lanes,
        timeline=lanes.timeline,
        counters=lanes.counters,
        clock=lambda: lanes.now,
    )
    lanes.on_pass = tuner.tick
    lanes.run(60.0)
    found = tuner.scheduler.settings
    settings = int(found["max_in_flight"]), int(found["max_batch_size"]), found["max_wait_s"]
    assert steady_rate(LATENCIES[name], settings) >= 0.95 * best[name], (settings, best[name])


def test_no_window_begins_before_a_smaller_number_is_under_way():
    lanes = FakeLanes(SchedulerConfig(window_s=1.0))
    lanes.num_at_work = 4  # three rollouts have to end first
    lanes.run(20.0)
    assert lanes.max_in_flight == 1
    lanes.num_at_work = 1
    lanes.run(20.0)
    assert lanes.max_in_flight > 1


def test_an_evaluation_or_a_pause_is_no_window():
    lanes = FakeLanes(SchedulerConfig(window_s=1.0))
    lanes.is_evaluating = True
    lanes.run(20.0)
    lanes.is_evaluating, lanes.is_admitting = False, False
    lanes.run(20.0)
    assert lanes.max_in_flight == 1 and lanes.tuner.scheduler.num_moves == 0


def test_real_lanes_follow(make_collector, caplog):
    moved = threading.Event()
    collector = make_collector(
        workers={"num_workers": 2, "envs_per_worker": 2, "max_in_flight": 1},
        scheduler=SchedulerConfig(window_s=0.1, num_epochs=(1, 3)),
        inference=InferenceConfig(where="process", max_batch_size=1),
    )
    assert collector.stats()["scheduler/max_in_flight"] == 1
    with caplog.at_level(logging.INFO, logger="torchrl_dvla"):
        collector.start()
        for _ in range(200):
            for _batch in collector.replay_buffer:
                pass
            collector.update_policy_weights_()
            stats = collector.stats()
            if stats["scheduler/moves"] >= 4:
                moved.set()
                break
    assert moved.is_set()
    coordinator = collector._coordinator
    assert stats["scheduler/max_batch_size"] == coordinator.batcher.max_batch_size
    assert any("because" in record.getMessage() for record in caplog.records)


def test_threads_of_the_policy_may_change_while_it_runs(make_collector):
    collector = make_collector(inference=InferenceConfig(where="process"))
    collector._coordinator.batcher.use_threads(2)
    collector.start()
    for _ in range(2):
        for _batch in collector.replay_buffer:
            pass
        collector.update_policy_weights_()


def test_rollouts_under_way_are_bounded(make_collector):
    collector = make_collector(workers={"envs_per_worker": 4, "max_in_flight": 2})
    collector.start()
    for _batch in collector.replay_buffer:
        assert collector._coordinator._fleet.num_at_work <= 2


def test_a_run_in_rounds_is_not_moved(make_collector):
    group = GroupConfig(group_size=3, groups_per_update=1, max_policy_lag=0)
    with pytest.raises(ValueError, match="scheduler must be None where a run works in rounds"):
        make_collector(group=group, scheduler=SchedulerConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_s": 0}, "window_s must be positive"),
        ({"max_wait_s": -1.0}, "max_wait_s must not be negative"),
        ({"num_epochs": (3, 2)}, "num_epochs must be"),
        ({"num_cores": 1}, "num_cores must be at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**settings)
