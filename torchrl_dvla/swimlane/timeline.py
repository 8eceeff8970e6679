# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The timeline of a run: what every lane did and when, how busy it was, what it was blocked on."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torchrl_dvla.swimlane.chrome_trace import LANES, Span, chrome_trace

__all__ = ["LaneUsage", "Timeline", "Track"]

#: A span as it is kept: track, name, start, end, reason of the idle time before.
_Kept = tuple["Track", str, float, float, str | None]


@dataclass(frozen=True)
class LaneUsage:
    """Busy and idle seconds of every lane over a stretch of time.

    Two usages of one timeline differ by what happened between them: ``later.since(earlier)``.
    Work counts when it is recorded, at its end: work that reaches over the border of two
    stretches counts in the second.

    Args:
        wall_s (float): length of the stretch.
        busy_s (Mapping): busy seconds by lane, summed over its tracks.
        idle_s (Mapping): idle seconds by ``(lane, reason)``, summed over its tracks.
        num_tracks (Mapping): tracks by lane.
        working_s (float): time in which any lane was busy.
        overlapped_s (float): time in which at least two lanes were busy at once.
        started_s (float): when the timeline was started.

    Examples:
        >>> first = LaneUsage(10.0, {"sampling": 4.0}, {}, {"sampling": 1}, 4.0, 0.0)
        >>> second = LaneUsage(14.0, {"sampling": 7.0}, {}, {"sampling": 1}, 7.0, 1.5)
        >>> window = second.since(first)
        >>> window.shares()["sampling"], window.overlap
        (0.75, 0.5)
    """

    wall_s: float
    busy_s: Mapping[str, float]
    idle_s: Mapping[tuple[str, str], float]
    num_tracks: Mapping[str, int]
    working_s: float = 0.0
    overlapped_s: float = 0.0
    started_s: float = 0.0

    def since(self, earlier: LaneUsage) -> LaneUsage:
        """What happened after *earlier*; all of it if the timeline was started anew meanwhile."""
        if earlier.started_s != self.started_s:
            return self
        return LaneUsage(
            wall_s=self.wall_s - earlier.wall_s,
            busy_s={
                lane: busy_s - earlier.busy_s.get(lane, 0.0) for lane, busy_s in self.busy_s.items()
            },
            idle_s={
                key: idle_s - earlier.idle_s.get(key, 0.0) for key, idle_s in self.idle_s.items()
            },
            num_tracks=self.num_tracks,
            working_s=self.working_s - earlier.working_s,
            overlapped_s=self.overlapped_s - earlier.overlapped_s,
            started_s=self.started_s,
        )

    def shares(self) -> dict[str, float]:
        """Busy share of each lane: the mean over its tracks, 1.0 if none of them was ever idle."""
        return {lane: self._share(lane, self.busy_s.get(lane, 0.0)) for lane in LANES}

    def idle_shares(self) -> dict[tuple[str, str], float]:
        """Idle share of each ``(lane, reason)``."""
        return {key: self._share(key[0], idle_s) for key, idle_s in self.idle_s.items()}

    @property
    def critical_lane(self) -> str:
        """The lane with the largest busy share: what a faster run has to speed up."""
        shares = self.shares()
        return max(shares, key=shares.__getitem__)

    @property
    def overlap(self) -> float:
        """Share of the busy time in which at least two lanes were; 0 in a sequential loop."""
        return min(1.0, self.overlapped_s / self.working_s) if self.working_s > 0 else 0.0

    def scalars(self) -> dict[str, float]:
        """The figures by TensorBoard name; see the guide's page on metrics."""
        out = {f"lane/{lane}_busy": share for lane, share in self.shares().items()}
        for (lane, reason), share in self.idle_shares().items():
            out[f"lane/{lane}_idle_{reason}"] = share
        out["lane/overlap"] = self.overlap
        out["lane/critical"] = float(LANES.index(self.critical_lane))
        return out

    def _share(self, lane: str, duration_s: float) -> float:
        total_s = self.wall_s * max(1, self.num_tracks.get(lane, 0))
        # Work that began before the stretch may make it look longer than it is.
        return min(1.0, max(0.0, duration_s / total_s)) if total_s > 0 else 0.0


class Track:
    """One row of a lane: a worker, a thread, the learner's loop. :meth:`Timeline.track` makes it.

    One thread at a time records what a track does, in the order of time; so recording needs no lock
    and costs less than a microsecond. Work that was done elsewhere is recorded afterwards
    (:meth:`add`), the caller's own is wrapped (:meth:`span`). Idle time is what lies between, and
    goes to the reason that was given: by :meth:`waiting` when it began, or by ``blocked_on`` when
    it ended.
    """

    __slots__ = ("_append", "_reason", "busy_s", "has_begun", "idle_s", "lane", "name", "until_s")

    def __init__(
        self, lane: str, name: str, append: Callable[[_Kept], None], until_s: float
    ) -> None:
        self.lane = lane
        self.name = name
        self._append = append
        self.reset(until_s)

    def reset(self, now_s: float) -> None:
        """Forget everything before *now_s*."""
        self.busy_s = 0.0
        self.idle_s: dict[str, float] = {}
        #: Everything before this time is accounted for.
        self.until_s = now_s
        self._reason: str | None = None
        #: Whether anything was recorded yet.
        self.has_begun = False

    def add(self, start_s: float, end_s: float, name: str, blocked_on: str | None = None) -> None:
        """Record work from *start_s* to *end_s*.

        Args:
            start_s (float): ``time.monotonic`` seconds.
            end_s (float): the same.
            name (str): of the work.
            blocked_on (str, optional): why the track was idle before. Defaults to the reason of
                :meth:`waiting`; idle time without a reason is not accounted for.
        """
        reason = self._reason if blocked_on is None else blocked_on
        gap_s = start_s - self.until_s
        if reason is not None and gap_s > 0.0:
            self.idle_s[reason] = self.idle_s.get(reason, 0.0) + gap_s
        self.busy_s += end_s - start_s
        self.until_s = end_s
        self._reason, self.has_begun = None, True
        self._append((self, name, start_s, end_s, reason))

    def waiting(self, reason: str | None, now: float | None = None) -> None:
        """The track is idle from now on, blocked on *reason*, until its next work.

        ``None`` says that it is busy again, which :meth:`add` records at the end.
        """
        if reason == self._reason:
            return
        if self._reason is not None:
            now = time.monotonic() if now is None else now
            self.idle_s[self._reason] = self.idle_s.get(self._reason, 0.0) + now - self.until_s
            self.until_s = now
        self._reason, self.has_begun = reason, True

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the duration of a ``with`` block as work."""
        start_s = time.monotonic()
        self.waiting(None, start_s)
        try:
            yield
        finally:
            self.add(start_s, time.monotonic(), name)

    def known_until(self, now: float) -> float:
        """Up to when it is known what the track did: nothing before it can still be recorded."""
        return self.until_s if self._reason is None else max(now, self.until_s)

    def idle_until(self, now: float) -> dict[str, float]:
        """Idle seconds by reason, with the idle time under way."""
        idle_s = dict(self.idle_s)
        if self._reason is not None and now > self.until_s:
            idle_s[self._reason] = idle_s.get(self._reason, 0.0) + now - self.until_s
        return idle_s


class Timeline:
    """Spans of every lane, process and worker; busy and idle share of each lane, with reasons.

    Workers and inference put the start and end of their work into the messages that they send
    anyway, so recording costs the collector one append a span and them nothing. All times are
    ``time.monotonic`` seconds, which on Linux is one clock for all processes of a machine.

    A lane may run on several *tracks* (environment workers, say). Its busy share is the mean over
    its tracks, so that 1.0 always means that no track of the lane was ever idle.

    Keyword Args:
        capacity (int): spans kept for :meth:`export_chrome_trace`; older ones are forgotten. The
            totals behind :meth:`usage` forget nothing. Defaults to ``100_000``.

    Examples:
        >>> timeline = Timeline()
        >>> timeline.start(now=10.0)
        >>> timeline.add("sampling", 10.0, 14.0, track="worker 0")
        >>> timeline.add("sampling", 10.0, 12.0, track="worker 1")
        >>> timeline.track("sampling", "worker 1").waiting("no_page", now=12.0)
        >>> timeline.add("gradient", 12.0, 14.0, blocked_on="no_batch")
        >>> usage = timeline.usage(now=14.0)
        >>> shares = usage.shares()
        >>> shares["sampling"], shares["gradient"], shares["inference"]
        (0.75, 0.5, 0.0)
        >>> usage.idle_shares()
        {('sampling', 'no_page'): 0.25, ('gradient', 'no_batch'): 0.5}
        >>> usage.critical_lane, usage.overlap
        ('sampling', 0.5)
    """

    def __init__(self, *, capacity: int = 100_000) -> None:
        self._capacity = capacity
        self._tracks: dict[tuple[str, str], Track] = {}
        self._lock = threading.Lock()  # of the readers; recording needs none
        #: Spans in the order of their recording: those that no reader has seen, and the others.
        self._new: deque[_Kept] = deque(maxlen=capacity)
        self._seen: deque[_Kept] = deque(maxlen=capacity)
        self._unswept: list[_Kept] = []
        self.start()

    def start(self, now: float | None = None) -> None:
        """Begin a new measurement: forget all spans and totals."""
        with self._lock:
            self._started_s = self._swept_s = time.monotonic() if now is None else now
            self._new.clear()
            self._seen.clear()
            self._unswept.clear()
            self._working_s = self._overlapped_s = 0.0
            for track in self._tracks.values():
                track.reset(self._started_s)

    # -- recording ------------------------------------------------------------------------------

    def track(self, lane: str, name: str = "main") -> Track:
        """The track *name* of *lane*; whoever records often keeps it.

        Raises:
            KeyError: if *lane* is not one of :data:`LANES`.
        """
        track = self._tracks.get((lane, name))
        if track is not None:
            return track
        if lane not in LANES:
            raise KeyError(f"lane must be one of {LANES}, got {lane!r}. Give its track a name.")
        with self._lock:
            made = Track(lane, name, self._new.append, self._started_s)
            return self._tracks.setdefault((lane, name), made)

    def add(
        self,
        lane: str,
        start_s: float,
        end_s: float,
        *,
        track: str = "main",
        name: str = "",
        blocked_on: str | None = None,
    ) -> None:
        """Record work of *track* of *lane* from *start_s* to *end_s*; see :meth:`Track.add`.

        Raises:
            KeyError: if *lane* is not one of :data:`LANES`.
        """
        self.track(lane, track).add(start_s, end_s, name or lane, blocked_on)

    @contextmanager
    def span(self, lane: str, name: str = "", *, track: str = "main") -> Iterator[None]:
        """Record the duration of a ``with`` block as work of *lane*."""
        with self.track(lane, track).span(name or lane):
            yield

    # -- reading --------------------------------------------------------------------------------

    def usage(self, now: float | None = None) -> LaneUsage:
        """Totals since :meth:`start`; subtract an earlier usage to see a stretch of time."""
        now = time.monotonic() if now is None else now
        busy_s = dict.fromkeys(LANES, 0.0)
        num_tracks = dict.fromkeys(LANES, 0)
        idle_s: dict[tuple[str, str], float] = {}
        with self._lock:
            self._sweep(now)
            for track in self._tracks.values():
                busy_s[track.lane] += track.busy_s
                num_tracks[track.lane] += 1
                for reason, duration_s in track.idle_until(now).items():
                    key = (track.lane, reason)
                    idle_s[key] = idle_s.get(key, 0.0) + duration_s
            return LaneUsage(
                wall_s=max(now - self._started_s, 1e-9),
                busy_s=busy_s,
                idle_s=idle_s,
                num_tracks=num_tracks,
                working_s=self._working_s,
                overlapped_s=self._overlapped_s,
                started_s=self._started_s,
            )

    def spans(self) -> list[Span]:
        """The spans kept, in the order of their recording."""
        with self._lock:
            self._take_new()
            return [
                Span(track.lane, track.name, name, start_s, end_s, reason)
                for track, name, start_s, end_s, reason in self._seen
            ]

    def take(self) -> list[Span]:
        """The spans recorded since the last call, for whoever keeps them; here they are forgotten.

        Of a timeline that is read so, :meth:`usage` knows no overlap.
        """
        spans = []
        with self._lock:
            while self._new:
                track, name, start_s, end_s, reason = self._new.popleft()
                spans.append(Span(track.lane, track.name, name, start_s, end_s, reason))
        return spans

    def export_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the spans kept as a Chrome trace, which Perfetto and ``chrome://tracing`` open.

        The spans are in this process: they can be written after a collector's shutdown, too.
        """
        trace = chrome_trace(self.spans(), origin_s=self._started_s)
        Path(path).write_text(json.dumps(trace))

    # -- overlap --------------------------------------------------------------------------------

    def _take_new(self) -> None:
        while self._new:
            span = self._new.popleft()
            self._seen.append(span)
            self._unswept.append(span)

    def _sweep(self, now: float) -> None:
        """Account for the overlap of lanes up to where nothing new can be recorded.

        A track records its work in the order of time, so a span that is still to come starts after
        the track's last. Up to the earliest such end all spans are known: there the sweep
        stops, and goes on next time. So each span is sorted once or twice, never all of them again.
        (Of a track that has recorded nothing yet, what began before the last call is left out.)
        """
        self._take_new()
        tracks = [track for track in self._tracks.values() if track.has_begun]
        horizon_s = min((track.known_until(now) for track in tracks), default=now)
        if len(self._unswept) > self._capacity // 2:
            # A track has been silent for very long: do not wait for it.
            horizon_s = max(end_s for _, _, _, end_s, _ in self._unswept)
        if horizon_s <= self._swept_s:
            return
        edges: list[tuple[float, int, str]] = []
        for track, _, start_s, end_s, _ in self._unswept:
            start_s, end_s = max(start_s, self._swept_s), min(end_s, horizon_s)
            if start_s < end_s:
                edges += [(start_s, 1, track.lane), (end_s, -1, track.lane)]
        edges.sort(key=lambda edge: edge[0])
        active = dict.fromkeys(LANES, 0)
        num_lanes, previous_s = 0, self._swept_s
        for time_s, change, lane in edges:
            self._working_s += (time_s - previous_s) * (num_lanes >= 1)
            self._overlapped_s += (time_s - previous_s) * (num_lanes >= 2)
            active[lane] += change
            num_lanes = sum(count > 0 for count in active.values())
            previous_s = time_s
        self._unswept = [span for span in self._unswept if span[3] > horizon_s]
        self._swept_s = horizon_s
