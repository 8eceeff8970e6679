# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What every lane did, and when."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

__all__ = ["LANES", "Span", "Timeline"]

#: The four lanes of the pipeline, in the order in which a decision meets them.
LANES = ("sampling", "inference", "gradient", "distribution")


class Span(NamedTuple):
    """A stretch of work of one track of one lane, in seconds of ``time.monotonic``."""

    lane: str
    track: str
    name: str
    start_s: float
    end_s: float


class _LaneTotals:
    __slots__ = ("busy_s", "idle_s", "tracks")

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.idle_s: dict[str, float] = {}
        self.tracks: set[str] = set()


class Timeline:
    """Spans of every lane, process and worker, and the busy share of each lane.

    Children of the run report the start and end of their work in the messages that they send
    anyway, so recording costs the coordinator one append a span and the children nothing. All
    times are ``time.monotonic`` seconds, which on Linux is one clock for all processes of a
    machine.

    A lane may run on several *tracks* (environment workers, say). Its busy share is the mean over
    its tracks, so that 1.0 always means that no track of the lane ever rested.

    Keyword Args:
        capacity (int): spans kept for :meth:`export_chrome_trace`; older ones are forgotten. The
            totals behind :meth:`shares` forget nothing. Defaults to ``100_000``.

    Examples:
        >>> timeline = Timeline()
        >>> timeline.start(now=10.0)
        >>> timeline.add("sampling", 10.0, 14.0, track="worker 0")
        >>> timeline.add("sampling", 10.0, 12.0, track="worker 1")
        >>> timeline.add("gradient", 12.0, 14.0)
        >>> shares = timeline.shares(now=14.0)
        >>> shares["sampling"], shares["gradient"], shares["inference"]
        (0.75, 0.5, 0.0)
        >>> timeline.critical_lane(now=14.0)
        'sampling'
        >>> timeline.overlap()
        0.5
    """

    def __init__(self, *, capacity: int = 100_000) -> None:
        self._spans: deque[Span] = deque(maxlen=capacity)
        self._totals = {lane: _LaneTotals() for lane in LANES}
        self._lock = threading.Lock()
        self._started_s = time.monotonic()

    def start(self, now: float | None = None) -> None:
        """Begin a new measurement: forget all spans and totals."""
        with self._lock:
            self._spans.clear()
            self._totals = {lane: _LaneTotals() for lane in LANES}
            self._started_s = time.monotonic() if now is None else now

    def add(
        self, lane: str, start_s: float, end_s: float, *, track: str = "main", name: str = ""
    ) -> None:
        """Record that ``track`` of ``lane`` worked from ``start_s`` to ``end_s``.

        Raises:
            KeyError: if ``lane`` is not one of :data:`LANES`.
        """
        with self._lock:
            totals = self._totals[lane]
            totals.busy_s += end_s - start_s
            totals.tracks.add(track)
            self._spans.append(Span(lane, track, name or lane, start_s, end_s))

    def add_idle(self, lane: str, reason: str, duration_s: float) -> None:
        """Record that ``lane`` rested for ``duration_s`` because of ``reason``."""
        with self._lock:
            idle = self._totals[lane].idle_s
            idle[reason] = idle.get(reason, 0.0) + duration_s

    @contextmanager
    def span(self, lane: str, name: str = "", *, track: str = "main") -> Iterator[None]:
        """Record the duration of a ``with`` block as work of ``lane``."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self.add(lane, start_s, time.monotonic(), track=track, name=name)

    def shares(self, now: float | None = None) -> dict[str, float]:
        """Busy share of each lane since :meth:`start`, each in ``[0, 1]`` up to clipping."""
        wall_s = self._wall_s(now)
        with self._lock:
            return {
                lane: totals.busy_s / (wall_s * max(1, len(totals.tracks)))
                for lane, totals in self._totals.items()
            }

    def idle_shares(self, now: float | None = None) -> dict[tuple[str, str], float]:
        """Share of the time that each ``(lane, reason)`` rested."""
        wall_s = self._wall_s(now)
        with self._lock:
            return {
                (lane, reason): duration_s / (wall_s * max(1, len(totals.tracks)))
                for lane, totals in self._totals.items()
                for reason, duration_s in totals.idle_s.items()
            }

    def critical_lane(self, now: float | None = None) -> str:
        """The lane with the largest busy share: what a faster run has to speed up."""
        shares = self.shares(now)
        return max(shares, key=shares.__getitem__)

    def overlap(self) -> float:
        """Share of the working time in which at least two lanes worked at once.

        Computed from the spans kept, over the time in which any lane worked; 0 for a sequential
        loop.
        """
        edges: list[tuple[float, int, str]] = []
        for span in self.spans():
            edges.append((span.start_s, 1, span.lane))
            edges.append((span.end_s, -1, span.lane))
        edges.sort(key=lambda edge: edge[:2])
        active = dict.fromkeys(LANES, 0)
        working_s = overlapped_s = previous_s = 0.0
        for time_s, change, lane in edges:
            num_lanes = sum(count > 0 for count in active.values())
            working_s += (time_s - previous_s) * (num_lanes >= 1)
            overlapped_s += (time_s - previous_s) * (num_lanes >= 2)
            active[lane] += change
            previous_s = time_s
        return overlapped_s / working_s if working_s else 0.0

    def spans(self) -> list[Span]:
        """The spans kept, oldest first."""
        with self._lock:
            return list(self._spans)

    def export_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the spans as Chrome-trace JSON, which Perfetto and ``chrome://tracing`` open.

        One process a lane, one thread a track.
        """
        events: list[dict[str, object]] = []
        tracks: dict[tuple[str, str], int] = {}
        for pid, lane in enumerate(LANES):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": lane}})
        for span in self.spans():
            pid = LANES.index(span.lane)
            tid = tracks.setdefault((span.lane, span.track), len(tracks))
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "pid": pid,
                    "tid": tid,
                    "ts": (span.start_s - self._started_s) * 1e6,
                    "dur": (span.end_s - span.start_s) * 1e6,
                }
            )
        for (lane, track), tid in tracks.items():
            events.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": LANES.index(lane),
                    "tid": tid,
                    "args": {"name": track},
                }
            )
        Path(path).write_text(json.dumps({"traceEvents": events}))

    def _wall_s(self, now: float | None) -> float:
        now = time.monotonic() if now is None else now
        return max(now - self._started_s, 1e-9)
