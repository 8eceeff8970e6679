# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Counters of a run."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

__all__ = ["CollectionCounters"]


class CollectionCounters:
    """What was collected since the start of the run, and how fast.

    Keyword Args:
        window (int): training episodes behind the moving averages. Defaults to ``64``.

    Examples:
        >>> counters = CollectionCounters()
        >>> counters.add_episode(success=True, num_env_steps=40)
        >>> counters.add_episode(success=False, num_env_steps=80)
        >>> stats = counters.stats()
        >>> stats["collector/episodes"], stats["collector/success_rate"]
        (2, 0.5)
        >>> stats["collector/episode_env_steps"]
        60.0
    """

    def __init__(self, *, window: int = 64) -> None:
        self.totals: Counter[str] = Counter()
        self._episodes: deque[tuple[bool, int]] = deque(maxlen=window)
        self._last_stats = (time.monotonic(), 0, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Count ``amount`` more of ``name``."""
        self.totals[name] += amount

    def add_episode(self, *, success: bool, num_env_steps: int) -> None:
        """Count one finished training episode."""
        self.totals["collector/episodes"] += 1
        self._episodes.append((success, num_env_steps))

    def stats(self) -> dict[str, float]:
        """Counters, moving averages, and rates since the call before."""
        now_s = time.monotonic()
        decisions = self.totals["collector/decisions"]
        env_steps = self.totals["collector/env_steps"]
        last_s, last_decisions, last_env_steps = self._last_stats
        elapsed_s = max(now_s - last_s, 1e-9)
        self._last_stats = (now_s, decisions, env_steps)
        out: dict[str, float] = dict(self.totals)
        out["collector/decisions_per_s"] = (decisions - last_decisions) / elapsed_s
        out["collector/env_steps_per_s"] = (env_steps - last_env_steps) / elapsed_s
        # Copied in one go: the coordinator's thread may end another episode at any moment.
        episodes = list(self._episodes)
        if episodes:
            count = len(episodes)
            out["collector/success_rate"] = sum(entry[0] for entry in episodes) / count
            out["collector/episode_env_steps"] = sum(entry[1] for entry in episodes) / count
        return out

    def state_dict(self) -> dict[str, Any]:
        """The counters and the window."""
        return {"totals": dict(self.totals), "episodes": list(self._episodes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from ``state_dict``; rates begin anew."""
        self.totals = Counter(state_dict["totals"])
        self._episodes.clear()
        self._episodes.extend(tuple(entry) for entry in state_dict["episodes"])
        self._last_stats = (
            time.monotonic(),
            self.totals["collector/decisions"],
            self.totals["collector/env_steps"],
        )
