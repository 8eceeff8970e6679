# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What became of the nodes and the groups of a run over a cluster, and a node that is killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torchrl_dvla import DVLACollector, TopologyAwareCollector
from torchrl_dvla.data import Group
from torchrl_dvla.recipes.dvla_grpo.bookkeeping import RunState, groups_of, log
from torchrl_dvla.recipes.dvla_grpo.settings import Settings

__all__ = ["ClusterRecord"]

#: Seconds until a killed node comes back.
_RETURN_S = 5.0


class ClusterRecord:
    """Record of a run over several nodes; of a run on one machine it says nothing.

    Args:
        cfg (Settings): settings of the run.
        state (RunState): its progress.
        collector (DVLACollector): its collector.
    """

    def __init__(self, cfg: Settings, state: RunState, collector: DVLACollector) -> None:
        self._cfg, self._state = cfg, state
        self._groups = groups_of(collector)
        is_cluster = isinstance(collector, TopologyAwareCollector)
        self._loop = collector.cluster if is_cluster else None
        self._lost_before = self._num_unaccounted()  # by a run that this one resumes
        self._learned: list[int] = []
        #: When a killed node comes back, and what brings it.
        self._return: tuple[float, Callable[[], None]] | None = None
        self._has_killed = False

    def after_update(self, cohort: Sequence[Group]) -> None:
        """Count an update; half-way, kill a node and have it come back, if that was asked for."""
        self._learned += [group.group_id for group in cohort]
        if self._loop is None or not self._cfg.demo.kill_node:
            return
        if not self._has_killed and self._state.progress(self._cfg) >= 0.35:
            log("demo.kill_node: a node is killed")
            self._has_killed = True
            self._return = time.monotonic() + _RETURN_S, self._loop.runtime.kill_machine()
        elif self._return is not None and time.monotonic() >= self._return[0]:
            log("demo.kill_node: it comes back")
            self._return[1]()
            self._return = None

    def _num_unaccounted(self) -> int:
        """Groups that were admitted and are nowhere."""
        with self._groups.lock:
            stats = self._groups.stats()
        places = ("learned", "dropped", "in_flight", "stored")
        return int(stats["groups_admitted"] - sum(stats[f"groups_{place}"] for place in places))

    def to_text(self) -> str:
        """States over time, and what became of every group; "" on one machine."""
        if self._loop is None:
            return ""
        start_s = self._loop.history[0][0]
        lines = [
            f"{time_s - start_s:7.1f} s  {name}  {state.value}"
            for time_s, name, state in self._loop.history
        ]
        totals = self._loop.totals
        rows = [
            ("groups learned", len(self._learned)),
            ("sampled again", totals["groups_resampled"]),
            ("lost", self._num_unaccounted() - self._lost_before),
            ("learned twice", len(self._learned) - len(set(self._learned))),
            ("nodes lost", totals["nodes_lost"]),
            ("largest policy lag", self._state.policy_lag_max),
            ("MB received, sent", f"{totals['bytes_received'] / 1e6:.1f}, "
             f"{totals['bytes_sent'] / 1e6:.1f}"),
        ]  # fmt: skip
        lines += [f"{label:<20}{value}" for label, value in rows]
        return "\n".join(["nodes over time, and their groups", *lines])
