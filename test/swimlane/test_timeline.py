# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the timeline says about known spans."""

from __future__ import annotations

import json

import pytest

from torchrl_dvla.swimlane import LANES, Timeline


@pytest.fixture
def timeline() -> Timeline:
    timeline = Timeline(capacity=4)
    timeline.start(now=0.0)
    return timeline


def test_idle_shares_carry_their_reason(timeline):
    timeline.add("sampling", 0.0, 2.0, track="worker 0")
    timeline.add("sampling", 0.0, 2.0, track="worker 1")
    timeline.add_idle("sampling", "no_page", 4.0)
    timeline.add_idle("sampling", "no_page", 2.0)
    timeline.add_idle("sampling", "no_decision", 1.0)
    idle = timeline.idle_shares(now=10.0)
    assert idle == {("sampling", "no_page"): 0.3, ("sampling", "no_decision"): 0.05}


def test_overlap_counts_lanes_and_not_tracks(timeline):
    timeline.add("sampling", 0.0, 4.0, track="worker 0")
    timeline.add("sampling", 0.0, 4.0, track="worker 1")
    assert timeline.overlap() == 0.0
    timeline.add("gradient", 3.0, 8.0)
    assert timeline.overlap() == pytest.approx(1 / 8)


def test_capacity_bounds_spans_and_not_totals(timeline):
    for k in range(10):
        timeline.add("gradient", k, k + 0.5)
    assert len(timeline.spans()) == 4
    assert timeline.shares(now=10.0)["gradient"] == 0.5


def test_an_unknown_lane_is_refused(timeline):
    with pytest.raises(KeyError, match="learner"):
        timeline.add("learner", 0.0, 1.0)


def test_chrome_trace_has_one_process_a_lane_and_one_thread_a_track(timeline, tmp_path):
    timeline.add("sampling", 1.0, 2.0, track="worker 0", name="step")
    timeline.add("sampling", 1.0, 3.0, track="worker 1", name="reset")
    timeline.export_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    work = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in work] == [
        ("step", 1e6, 1e6),
        ("reset", 1e6, 2e6),
    ]
    assert work[0]["tid"] != work[1]["tid"] and work[0]["pid"] == work[1]["pid"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert set(LANES) | {"worker 0", "worker 1"} == set(names)
