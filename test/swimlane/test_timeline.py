# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_dvla.swimlane import LANES, Timeline


@pytest.fixture
def timeline() -> Timeline:
    timeline = Timeline(capacity=100)
    timeline.start(now=0.0)
    return timeline


def test_idle_time_goes_to_the_reason_that_ended_it(timeline):
    timeline.add("sampling", 3.0, 4.0, track="worker 0", blocked_on="no_page")
    timeline.add("sampling", 5.0, 6.0, track="worker 0", blocked_on="no_decision")
    timeline.add("sampling", 0.0, 8.0, track="worker 1", blocked_on="no_page")
    timeline.add("sampling", 9.0, 10.0, track="worker 1")  # nobody knows what it was blocked on
    usage = timeline.usage(now=10.0)
    assert usage.idle_shares() == {
        ("sampling", "no_page"): 3 / 20,
        ("sampling", "no_decision"): 1 / 20,
    }
    assert usage.shares()["sampling"] == 11 / 20


def test_idle_time_goes_to_the_reason_in_force(timeline):
    track = timeline.track("gradient")
    track.waiting("elsewhere", now=0.0)
    track.waiting("no_batch", now=1.0)
    assert timeline.usage(now=3.0).idle_s == {
        ("gradient", "elsewhere"): 1.0,
        ("gradient", "no_batch"): 2.0,
    }
    track.add(4.0, 9.0, "learn")
    track.waiting("elsewhere", now=9.0)
    usage = timeline.usage(now=10.0)
    assert usage.idle_s == {("gradient", "elsewhere"): 2.0, ("gradient", "no_batch"): 3.0}
    assert usage.busy_s["gradient"] == 5.0


def test_idle_time_under_way_is_counted_once_over_two_windows(timeline):
    track = timeline.track("gradient")
    track.waiting("no_batch", now=0.0)
    first = timeline.usage(now=4.0)
    track.add(6.0, 8.0, "learn")
    second = timeline.usage(now=8.0)
    assert first.idle_shares() == {("gradient", "no_batch"): 1.0}
    window = second.since(first)
    assert window.idle_shares() == {("gradient", "no_batch"): 0.5}
    assert window.shares()["gradient"] == 0.5


def test_a_new_start_ends_the_window_before(timeline):
    timeline.add("gradient", 0.0, 5.0)
    before = timeline.usage(now=5.0)
    timeline.start(now=6.0)
    timeline.add("gradient", 6.0, 9.0)
    after = timeline.usage(now=12.0)
    assert after.since(before).shares()["gradient"] == 0.5


def test_overlap_counts_lanes_and_not_tracks(timeline):
    timeline.add("sampling", 0.0, 4.0, track="worker 0")
    timeline.add("sampling", 0.0, 4.0, track="worker 1")
    timeline.add("gradient", 0.0, 0.0)
    assert timeline.usage(now=4.0).overlap == 0.0
    timeline.add("gradient", 3.0, 8.0)
    timeline.add("sampling", 8.0, 9.0, track="worker 0")
    timeline.add("sampling", 8.0, 9.0, track="worker 1")
    # Up to the second 8, all is known: they worked for 8 seconds, in one of them both.
    assert timeline.usage(now=9.0).overlap == pytest.approx(1 / 8)


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_overlap_is_exact_however_often_it_is_read(seed, num_readings):
    draw = random.Random(seed)
    timeline, spans = Timeline(), []
    timeline.start(now=0.0)
    tracks = [("sampling", "a"), ("sampling", "b"), ("inference", "c"), ("gradient", "d")]
    for lane, track in tracks:
        timeline.add(lane, 0.0, 0.0, track=track)
        now = 0.0
        while now < 50.0:
            start_s = now + draw.random() * 3
            now = start_s + draw.random() * 5
            spans.append((now, lane, track, start_s))
        spans.append((100.0, lane, track, 99.0))  # everybody reaches the same end
    spans.sort()  # recorded at the end of the work
    for index, (end_s, lane, track, start_s) in enumerate(spans):
        timeline.add(lane, start_s, end_s, track=track)
        if index % (len(spans) // num_readings + 1) == 0:
            timeline.usage(now=end_s)
    usage = timeline.usage(now=100.0)
    edges = sorted({time for end_s, _, _, start_s in spans for time in (start_s, end_s)})
    working_s = overlapped_s = 0.0
    for left, right in itertools.pairwise(edges):
        lanes = {lane for end_s, lane, _, start_s in spans if start_s <= left and right <= end_s}
        working_s += (right - left) * (len(lanes) >= 1)
        overlapped_s += (right - left) * (len(lanes) >= 2)
    assert usage.working_s == pytest.approx(working_s)
    assert usage.overlapped_s == pytest.approx(overlapped_s)


def test_idle_time_ends_when_work_begins_not_when_it_is_recorded(timeline):
    track = timeline.track("gradient")
    timeline.add("sampling", 0.0, 4.0)
    track.waiting("no_batch", now=0.0)
    track.waiting(None, now=1.0)
    timeline.add("sampling", 4.0, 5.0)
    usage = timeline.usage(now=5.0)  # what the learner does since the second 1 is not known yet
    assert (usage.working_s, usage.idle_s) == (1.0, {("gradient", "no_batch"): 1.0})
    track.add(1.0, 5.0, "learn")
    usage = timeline.usage(now=5.0)
    assert (usage.working_s, usage.overlap) == (5.0, 4 / 5)
    assert usage.shares()["gradient"] == 4 / 5


def test_a_silent_track_does_not_hold_up_the_overlap_for_ever():
    timeline = Timeline(capacity=8)
    timeline.start(now=0.0)
    timeline.add("distribution", 0.0, 0.5)
    for k in range(1, 4):
        timeline.add("sampling", k, k + 1.0)
        timeline.add("inference", k, k + 1.0)
    assert timeline.usage(now=10.0).overlap > 0.5


def test_capacity_bounds_spans_and_not_totals():
    timeline = Timeline(capacity=4)
    timeline.start(now=0.0)
    for k in range(10):
        timeline.add("gradient", k, k + 0.5)
    assert len(timeline.spans()) == 4
    for k in range(10, 100):
        timeline.add("gradient", k, k + 0.5)
        timeline.usage(now=k + 0.5)
    assert len(timeline.spans()) == 4
    assert len(timeline._unswept) <= 4
    assert timeline.usage(now=100.0).shares()["gradient"] == 0.5


def test_an_unknown_lane_is_refused(timeline):
    with pytest.raises(KeyError, match="learner"):
        timeline.add("learner", 0.0, 1.0)


def test_threads_may_record_while_others_read():
    timeline, go = Timeline(), threading.Event()

    def record(name: str) -> None:
        track = timeline.track("sampling", name)
        go.wait()
        for k in range(5_000):
            track.add(k, k + 1.0, "step")

    with ThreadPoolExecutor(3) as threads:
        recordings = [threads.submit(record, str(k)) for k in range(3)]
        go.set()
        while not all(recording.done() for recording in recordings):
            timeline.usage()
    assert timeline.usage().busy_s["sampling"] == 15_000.0
    assert len(timeline.spans()) == 15_000


def test_every_lane_has_its_scalars(timeline):
    timeline.add("inference", 0.0, 3.0, blocked_on="no_ready_row")
    timeline.add("gradient", 1.0, 2.0, blocked_on="no_batch")
    scalars = timeline.usage(now=4.0).scalars()
    assert scalars == {
        "lane/sampling_busy": 0.0,
        "lane/inference_busy": 0.75,
        "lane/gradient_busy": 0.25,
        "lane/distribution_busy": 0.0,
        "lane/gradient_idle_no_batch": 0.25,
        "lane/overlap": 0.5,
        "lane/critical": 1.0,
    }
    assert LANES[int(scalars["lane/critical"])] == "inference"
