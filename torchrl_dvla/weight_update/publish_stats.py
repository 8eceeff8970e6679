# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the writing side of a store counts."""

from __future__ import annotations

import dataclasses
import threading
import time

__all__ = ["PublishCounter", "PublishStats"]


@dataclasses.dataclass(frozen=True)
class PublishStats:
    """Counters of the writing side.

    Args:
        num_publishes (int): versions taken; from a device, those that arrived or were replaced.
        num_deferred (int): versions that found no free slot at once.
        num_coalesced (int): versions that a newer one replaced before any reader could see them.
        num_refused (int): publishes refused since weights were not finite.
        bytes_total (int): bytes of weights copied by all publishes.
        stall_last_s, stall_max_s, stall_total_s (float): time the learner spent in ``publish``.
    """

    num_publishes: int = 0
    num_deferred: int = 0
    num_coalesced: int = 0
    num_refused: int = 0
    bytes_total: int = 0
    stall_last_s: float = 0.0
    stall_max_s: float = 0.0
    stall_total_s: float = 0.0


class PublishCounter:
    """Counts for the learner's thread and for those that end what it began.

    Examples:
        >>> counter = PublishCounter()
        >>> counter.add(num_publishes=1, bytes_total=40)
        >>> counter.stats.num_publishes, counter.stats.bytes_total
        (1, 40)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: The counts so far; a new object at each change.
        self.stats = PublishStats()

    def add(self, **increments: float) -> None:
        """Add to the counts of these names."""
        with self._lock:
            values = {name: getattr(self.stats, name) + step for name, step in increments.items()}
            self.stats = dataclasses.replace(self.stats, **values)

    def note_stall(self, start_s: float) -> None:
        """Record that the learner was held up since ``start_s``, of ``time.perf_counter``."""
        stall_s = time.perf_counter() - start_s
        with self._lock:
            stats = self.stats
            self.stats = dataclasses.replace(
                stats,
                stall_last_s=stall_s,
                stall_max_s=max(stats.stall_max_s, stall_s),
                stall_total_s=stats.stall_total_s + stall_s,
            )
