# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a collector counts, and what it knows of the weights' way to the readers."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, ClassVar

from torchrl_dvla.saved_state import COUNT, Number
from torchrl_dvla.swimlane import Timeline
from torchrl_dvla.weight_update import AsyncWeightUpdater

__all__ = ["CollectionCounters", "WeightTelemetry"]


class CollectionCounters:
    """Totals of a run, and moving averages over its last training episodes.

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

    #: Form of its state, see :mod:`torchrl_dvla.saved_state`.
    STATE_FORM: ClassVar[dict[str, Any]] = {
        "totals": {str: Number(0)},
        "episodes": [(bool, COUNT)],
    }

    def __init__(self, *, window: int = 64) -> None:
        self.totals: Counter[str] = Counter()
        self._episodes: deque[tuple[bool, int]] = deque(maxlen=window)

    def add(self, name: str, amount: int = 1) -> None:
        """Count ``amount`` more of ``name``."""
        self.totals[name] += amount

    def add_episode(self, *, success: bool, num_env_steps: int) -> None:
        """Count one finished training episode."""
        self.totals["collector/episodes"] += 1
        self._episodes.append((success, num_env_steps))

    def stats(self) -> dict[str, float]:
        """Totals and moving averages."""
        out: dict[str, float] = dict(self.totals)
        # Copied in one go: the loop's thread may end another episode at any moment.
        episodes = list(self._episodes)
        if episodes:
            count = len(episodes)
            out["collector/success_rate"] = sum(entry[0] for entry in episodes) / count
            out["collector/episode_env_steps"] = sum(entry[1] for entry in episodes) / count
        return out

    def since(self, earlier: CollectionCounters) -> CollectionCounters:
        """What was counted after ``earlier``, an older copy of this; any thread may ask."""
        new, episodes = CollectionCounters(), list(self._episodes)
        new.totals = Counter(dict(self.totals))
        new.totals.subtract(earlier.totals)
        num_new = new.totals["collector/episodes"]
        new._episodes.extend(episodes[-num_new:] if num_new else ())
        return new

    def merge(self, new: CollectionCounters) -> None:
        """Add what another node has counted."""
        self.totals.update(new.totals)
        self._episodes.extend(new._episodes)

    def state_dict(self) -> dict[str, Any]:
        """Totals and window."""
        return {"totals": dict(self.totals), "episodes": list(self._episodes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from ``state_dict``, which is of :data:`STATE_FORM`."""
        self.totals = Counter(state_dict["totals"])
        self._episodes.clear()
        self._episodes.extend(tuple(entry) for entry in state_dict["episodes"])


class WeightTelemetry:
    """Scalars and spans of what the weight updater and its readers have recorded.

    Args:
        updater (AsyncWeightUpdater): the learner's end.
        timeline (Timeline): takes the readers' adoptions, a track of the distribution lane each.
    """

    def __init__(self, updater: AsyncWeightUpdater, timeline: Timeline) -> None:
        self._updater = updater
        self._timeline = timeline

    def record(self) -> None:
        """Put what readers adopted since the last call on the timeline."""
        for name, adoptions in self._updater.store.take_adoptions().items():
            track = self._timeline.track("distribution", f"reader {name}")
            for adoption in adoptions:
                track.add(adoption.start_s, adoption.end_s, f"adopt {adoption.version}")
                track.waiting("no_version", adoption.end_s)

    def scalars(self, data_bytes: float) -> dict[str, float]:
        """``weights/...`` and the bytes of both planes.

        Args:
            data_bytes (float): bytes of the training-data plane until now.
        """
        weights = self._updater.stats()
        planes = {
            "planes/weight_bytes": weights.pop("published_bytes"),
            "planes/data_bytes": data_bytes,
        }
        return planes | {f"weights/{key}": value for key, value in weights.items()}
