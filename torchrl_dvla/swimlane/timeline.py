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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl_dvla.swimlane.device_wait import take_device_wait
from torchrl_dvla.swimlane.reading import LANES, Reading
from torchrl_dvla.swimlane.trace import Span, chrome_trace

__all__ = ["LANES", "Span", "Timeline", "Track"]

#: A span as it is kept: track, name, start, end, reason of the rest before.
_Kept = tuple["Track", str, float, float, str | None]


class Track:
    """One line of a lane: a worker, a thread, the learner's loop. :meth:`Timeline.track` makes it.

    What a track does is told by one thread at a time, in the order of time; so telling needs no
    lock and costs less than a microsecond. Work that was done elsewhere is told afterwards
    (:meth:`add`), the caller's own is wrapped (:meth:`span`). Rest is what lies between, and goes
    to the reason that was given: by :meth:`waiting` when it began, or by ``waited_for`` when it
    ended.
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
        #: The track's last sign of life: everything before it is accounted for.
        self.until_s = now_s
        self._reason: str | None = None
        #: Whether it has told anything yet.
        self.has_begun = False

    def add(
        self,
        start_s: float,
        end_s: float,
        name: str,
        waited_for: str | None = None,
        device_wait_s: float = 0.0,
    ) -> None:
        """Work from *start_s* to *end_s*.

        Args:
            start_s (float): ``time.monotonic`` seconds.
            end_s (float): the same.
            name (str): of the work.
            waited_for (str, optional): why the track rested before. Defaults to what
                :meth:`waiting` said last; rest without a reason is not accounted for.
            device_wait_s (float): part of the time that passed in the queue of a busy device.
        """
        reason = self._reason if waited_for is None else waited_for
        gap_s = start_s - self.until_s
        if reason is not None and gap_s > 0.0:
            self.idle_s[reason] = self.idle_s.get(reason, 0.0) + gap_s
        if device_wait_s:
            self.idle_s["device"] = self.idle_s.get("device", 0.0) + device_wait_s
        self.busy_s += end_s - start_s - device_wait_s
        self.until_s = end_s
        self._reason, self.has_begun = None, True
        self._append((self, name, start_s, end_s, reason))

    def waiting(self, reason: str | None, now: float | None = None) -> None:
        """From now on the track rests because of *reason*, until its next work.

        ``None`` says that it works again, and that :meth:`add` will tell at the end.
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
        take_device_wait()  # what was noted before is not this block's
        start_s = time.monotonic()
        self.waiting(None, start_s)
        try:
            yield
        finally:
            self.add(start_s, time.monotonic(), name, None, take_device_wait())

    def known_until(self, now: float) -> float:
        """Up to when it is known what the track did: no later report changes what was before."""
        return self.until_s if self._reason is None else max(now, self.until_s)

    def rest_s(self, now: float) -> tuple[str, float] | None:
        """The rest under way, if its reason is known."""
        reason, rest_s = self._reason, now - self.until_s
        return None if reason is None or rest_s <= 0.0 else (reason, rest_s)


class Timeline:
    """Spans of every lane, process and worker; busy and idle share of each lane, with reasons.

    Children of the run report the start and end of their work in the messages that they send
    anyway, so recording costs the coordinator one append a span and the children nothing. All
    times are ``time.monotonic`` seconds, which on Linux is one clock for all processes of a
    machine.

    A lane may run on several *tracks* (environment workers, say). Its busy share is the mean over
    its tracks, so that 1.0 always means that no track of the lane ever rested.

    Keyword Args:
        capacity (int): spans kept for :meth:`export_chrome_trace`; older ones are forgotten. The
            totals behind :meth:`reading` forget nothing. Defaults to ``100_000``.

    Examples:
        >>> timeline = Timeline()
        >>> timeline.start(now=10.0)
        >>> timeline.add("sampling", 10.0, 14.0, track="worker 0")
        >>> timeline.add("sampling", 10.0, 12.0, track="worker 1")
        >>> timeline.track("sampling", "worker 1").waiting("no_page", now=12.0)
        >>> timeline.add("gradient", 12.0, 14.0, waited_for="no_batch")
        >>> reading = timeline.reading(now=14.0)
        >>> shares = reading.shares()
        >>> shares["sampling"], shares["gradient"], shares["inference"]
        (0.75, 0.5, 0.0)
        >>> reading.idle_shares()
        {('sampling', 'no_page'): 0.25, ('gradient', 'no_batch'): 0.5}
        >>> reading.critical_lane, reading.overlap
        ('sampling', 0.5)
    """

    def __init__(self, *, capacity: int = 100_000) -> None:
        self._capacity = capacity
        self._tracks: dict[tuple[str, str], Track] = {}
        self._lock = threading.Lock()  # of the readers; who tells needs none
        #: Spans in the order of their reports: those that no reader has seen, and the others.
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

    # -- telling --------------------------------------------------------------------------------

    def track(self, lane: str, name: str = "main") -> Track:
        """The track *name* of *lane*; whoever tells often keeps it.

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
        waited_for: str | None = None,
    ) -> None:
        """Record that *track* of *lane* worked from *start_s* to *end_s*; see :meth:`Track.add`.

        Raises:
            KeyError: if *lane* is not one of :data:`LANES`.
        """
        self.track(lane, track).add(start_s, end_s, name or lane, waited_for)

    @contextmanager
    def span(self, lane: str, name: str = "", *, track: str = "main") -> Iterator[None]:
        """Record the duration of a ``with`` block as work of *lane*."""
        with self.track(lane, track).span(name or lane):
            yield

    # -- reading --------------------------------------------------------------------------------

    def reading(self, now: float | None = None) -> Reading:
        """Totals since :meth:`start`; subtract an earlier reading to see a stretch of time."""
        now = time.monotonic() if now is None else now
        busy_s = dict.fromkeys(LANES, 0.0)
        num_tracks = dict.fromkeys(LANES, 0)
        idle_s: dict[tuple[str, str], float] = {}
        with self._lock:
            self._sweep(now)
            for track in self._tracks.values():
                busy_s[track.lane] += track.busy_s
                num_tracks[track.lane] += 1
                rests = list(track.idle_s.items())
                rest = track.rest_s(now)
                for reason, duration_s in rests if rest is None else [*rests, rest]:
                    key = (track.lane, reason)
                    idle_s[key] = idle_s.get(key, 0.0) + duration_s
            return Reading(
                wall_s=max(now - self._started_s, 1e-9),
                busy_s=busy_s,
                idle_s=idle_s,
                num_tracks=num_tracks,
                working_s=self._working_s,
                overlapped_s=self._overlapped_s,
                started_s=self._started_s,
            )

    def heartbeats(self) -> dict[tuple[str, str], float]:
        """Last sign of life of each ``(lane, track)``, in ``time.monotonic`` seconds."""
        with self._lock:
            return {key: track.until_s for key, track in self._tracks.items()}

    def spans(self) -> list[Span]:
        """The spans kept, in the order of their reports."""
        with self._lock:
            self._take_new()
            return [
                Span(track.lane, track.name, name, start_s, end_s, reason)
                for track, name, start_s, end_s, reason in self._seen
            ]

    def export_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the spans kept as a Chrome trace, which Perfetto and ``chrome://tracing`` open."""
        trace = chrome_trace(self.spans(), origin_s=self._started_s)
        Path(path).write_text(json.dumps(trace))

    # -- overlap --------------------------------------------------------------------------------

    def _take_new(self) -> None:
        while self._new:
            span = self._new.popleft()
            self._seen.append(span)
            self._unswept.append(span)

    def _sweep(self, now: float) -> None:
        """Account for the overlap of lanes up to where nothing new can be reported.

        A track tells its work in the order of time, so a span that is still to come starts after
        what its track told last. Up to the earliest such end all spans are known: there the sweep
        stops, and goes on next time. So each span is sorted once or twice, never all of them again.
        (Of a track that nobody has heard of yet, what began before the last reading is left out.)
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
