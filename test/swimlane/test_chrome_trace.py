# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The trace that Perfetto opens."""

from __future__ import annotations

import json

import pytest

from torchrl_dvla.swimlane import LANES, Timeline, read_chrome_trace


@pytest.fixture
def trace(tmp_path):
    timeline = Timeline()
    timeline.start(now=1.0)
    timeline.add("sampling", 2.0, 3.0, track="worker 0", name="step")
    timeline.add("sampling", 2.0, 4.0, track="worker 1", name="reset")
    timeline.add("sampling", 3.5, 4.0, track="worker 0", name="step", blocked_on="no_decision")
    timeline.add("gradient", 2.0, 2.25, name="learn")
    path = tmp_path / "trace.json"
    timeline.export_chrome_trace(path)
    return path, timeline


def test_it_has_the_structure_that_viewers_ask_for(trace):
    content = json.loads(trace[0].read_text())
    assert content["displayTimeUnit"] in ("ms", "ns")
    named: dict[str, set] = {"process_name": set(), "thread_name": set()}
    for event in content["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["name"], str) and isinstance(event["pid"], int)
        if event["ph"] == "M":
            assert isinstance(event["args"], dict)
            named.setdefault(event["name"], set()).add((event["pid"], event.get("tid")))
            continue
        # Complete events: microseconds, on a thread and a process that have names.
        assert event["ts"] >= 0 and event["dur"] >= 0
        assert (event["pid"], event["tid"]) in named["thread_name"] or event["tid"] > 0
    used = {(e["pid"], e["tid"]) for e in content["traceEvents"] if e["ph"] == "X"}
    assert used == named["thread_name"]
    assert {pid for pid, _ in used} <= {pid for pid, _ in named["process_name"]}
    assert len({tid for _, tid in used}) == len(used)


def test_one_process_a_lane_and_one_thread_a_track(trace):
    events = json.loads(trace[0].read_text())["traceEvents"]
    work = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in work] == [
        ("step", 1e6, 1e6),
        ("reset", 1e6, 2e6),
        ("step", 2.5e6, 0.5e6),
        ("learn", 1e6, 0.25e6),
    ]
    assert work[0]["tid"] == work[2]["tid"] != work[1]["tid"]
    assert work[0]["pid"] == work[1]["pid"] != work[3]["pid"]
    assert work[2]["args"] == {"blocked_on": "no_decision", "idle_ms": 500.0}
    names = [e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]]
    assert names == [*LANES, "worker 0", "worker 1", "main"]


def test_it_reads_back(trace):
    path, timeline = trace
    for read, span in zip(read_chrome_trace(path), timeline.spans(), strict=True):
        assert read[:3] == span[:3] and read.blocked_on == span.blocked_on
        assert (read.start_s, read.end_s) == pytest.approx((span.start_s - 1.0, span.end_s - 1.0))


@pytest.mark.parametrize("text", ["", "[]", '{"traceEvents": [{"ph": "X"}]}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="path must name a trace"):
        read_chrome_trace(tmp_path / "other.json")
