# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Chrome traces of spans: the files that Perfetto opens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["LANES", "Span", "chrome_trace", "read_chrome_trace"]

#: The four lanes of the pipeline, in the order in which a decision meets them.
LANES = ("sampling", "inference", "gradient", "distribution")


class Span(NamedTuple):
    """A stretch of work of one track of one lane, in seconds of ``time.monotonic``."""

    lane: str
    track: str
    name: str
    start_s: float
    end_s: float
    #: What the track was blocked on before, if it was idle and the reason is known.
    blocked_on: str | None = None


def chrome_trace(spans: Iterable[Span], *, origin_s: float = 0.0) -> dict[str, Any]:
    """Spans in Chrome's trace-event format: one process a lane, one thread a track.

    Args:
        spans (iterable of Span): the work.

    Keyword Args:
        origin_s (float): the second that becomes time zero.

    Returns:
        What ``json.dump`` has to write.

    Examples:
        >>> trace = chrome_trace([Span("gradient", "main", "learn", 1.0, 1.5)], origin_s=1.0)
        >>> [event["dur"] for event in trace["traceEvents"] if event["ph"] == "X"]
        [500000.0]

    Reference:
        The "Trace Event Format", complete events (``"ph": "X"``) and metadata events.
    """
    events: list[dict[str, Any]] = []
    # Both viewers want a thread's number to be unique in the file, and nonzero.
    tids: dict[tuple[str, str], int] = {}
    ends_s: dict[int, float] = {}
    for span in spans:
        pid = LANES.index(span.lane) + 1
        tid = tids.setdefault((span.lane, span.track), len(tids) + 1)
        event: dict[str, Any] = {
            "ph": "X",
            "cat": span.lane,
            "name": span.name,
            "pid": pid,
            "tid": tid,
            "ts": round((span.start_s - origin_s) * 1e6, 3),
            "dur": round(max(0.0, span.end_s - span.start_s) * 1e6, 3),
        }
        if span.blocked_on is not None:
            idle_s = max(0.0, span.start_s - ends_s.get(tid, span.start_s))
            event["args"] = {"blocked_on": span.blocked_on, "idle_ms": round(idle_s * 1e3, 3)}
        ends_s[tid] = span.end_s
        events.append(event)
    names = [
        {"ph": "M", "name": key, "pid": pid, "args": args}
        for pid, lane in enumerate(LANES, 1)
        for key, args in (
            ("process_name", {"name": lane}),
            ("process_sort_index", {"sort_index": pid}),
        )
    ]
    names += [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": LANES.index(lane) + 1,
            "tid": tid,
            "args": {"name": track},
        }
        for (lane, track), tid in tids.items()
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}


def read_chrome_trace(path: str | os.PathLike[str]) -> list[Span]:
    """The spans of a file that :meth:`Timeline.export_chrome_trace` wrote, from time zero on.

    Raises:
        ValueError: if the file holds no such trace.
    """
    try:
        events = json.loads(Path(path).read_text())["traceEvents"]
        tracks = {
            event["tid"]: event["args"]["name"]
            for event in events
            if event["name"] == "thread_name"
        }
        return [
            Span(
                LANES[event["pid"] - 1],
                tracks[event["tid"]],
                event["name"],
                event["ts"] / 1e6,
                (event["ts"] + event["dur"]) / 1e6,
                event.get("args", {}).get("blocked_on"),
            )
            for event in events
            if event["ph"] == "X"
        ]
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"path must name a trace of Timeline.export_chrome_trace(), got {os.fspath(path)!r} "
            f"({type(error).__name__}: {error}). Export one first."
        ) from error
