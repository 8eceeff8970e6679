# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the timeline says about a stretch of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LANES", "Reading"]

#: The four lanes of the pipeline, in the order in which a decision meets them.
LANES = ("sampling", "inference", "gradient", "distribution")


@dataclass(frozen=True)
class Reading:
    """Seconds of work and of rest of every lane over a stretch of time.

    Two readings of one timeline differ by what happened between them: ``later.since(earlier)``.
    Work is counted when it is reported, at its end: work that reaches over the border of two
    stretches counts in the second.

    Args:
        wall_s (float): length of the stretch.
        busy_s (Mapping): seconds of work by lane, summed over its tracks.
        idle_s (Mapping): seconds of rest by ``(lane, reason)``, summed over its tracks.
        num_tracks (Mapping): tracks by lane.
        working_s (float): time in which any lane worked.
        overlapped_s (float): time in which at least two lanes worked at once.
        started_s (float): when the timeline was started.

    Examples:
        >>> first = Reading(10.0, {"sampling": 4.0}, {}, {"sampling": 1}, 4.0, 0.0)
        >>> second = Reading(14.0, {"sampling": 7.0}, {}, {"sampling": 1}, 7.0, 1.5)
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

    def since(self, earlier: Reading) -> Reading:
        """What happened after *earlier*; all of it if the timeline was started anew meanwhile."""
        if earlier.started_s != self.started_s:
            return self
        return Reading(
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
        """Busy share of each lane: the mean over its tracks, 1.0 if none of them ever rested."""
        return {lane: self._share(lane, self.busy_s.get(lane, 0.0)) for lane in LANES}

    def idle_shares(self) -> dict[tuple[str, str], float]:
        """Share of the time that each ``(lane, reason)`` rested."""
        return {key: self._share(key[0], idle_s) for key, idle_s in self.idle_s.items()}

    @property
    def critical_lane(self) -> str:
        """The lane with the largest busy share: what a faster run has to speed up."""
        shares = self.shares()
        return max(shares, key=shares.__getitem__)

    @property
    def overlap(self) -> float:
        """Share of the working time in which at least two lanes worked; 0 in a sequential loop."""
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
