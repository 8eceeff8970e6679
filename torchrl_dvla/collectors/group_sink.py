# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where finished rollouts go: into groups, and kept groups into the replay buffer."""

from __future__ import annotations

import logging

from torchrl_dvla.collectors.configs import DroughtPolicy
from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.collectors.rollout import Rollout
from torchrl_dvla.collectors.rollout_queue import RolloutQueue
from torchrl_dvla.data import GroupAssembler, GroupRecord, PooledReplayBuffer, RolloutRecord
from torchrl_dvla.memory import EnvironmentPool

__all__ = ["GroupSink"]

_WHAT_FOLLOWS = {
    "warn": "Sampling goes on.",
    "keep": "Groups are kept as they come until there is contrast again.",
    "raise": "The run ends here.",
}

_log = logging.getLogger("torchrl_dvla")


class GroupSink:
    """Seals the pages of finished rollouts, completes their groups, and passes them on.

    Args:
        assembler (GroupAssembler): computes advantages and decides which groups are learned from.

    Keyword Args:
        pool (EnvironmentPool): owner of the pages.
        queue (RolloutQueue): told when a group is complete.
        replay_buffer (PooledReplayBuffer): adopts kept groups.
        counters (CollectionCounters): takes the counts.
        max_drought (int): groups without anything to learn from, in a row, that make a drought.
        on_drought (str): what follows, see :class:`~torchrl_dvla.collectors.GroupConfig`.
    """

    def __init__(
        self,
        assembler: GroupAssembler,
        *,
        pool: EnvironmentPool,
        queue: RolloutQueue,
        replay_buffer: PooledReplayBuffer,
        counters: CollectionCounters,
        max_drought: int,
        on_drought: DroughtPolicy,
    ) -> None:
        self._assembler = assembler
        self._pool = pool
        self._queue = queue
        self._replay_buffer = replay_buffer
        self._counters = counters
        self._max_drought = max_drought
        self._on_drought = on_drought
        self._drought = 0

    def abandon(self, group_id: int, reason: str) -> None:
        """Give a group up and account for it; its finished rollouts go with it.

        Args:
            group_id (int): an unfinished group.
            reason (str): why, in words that do not vary from case to case.
        """
        with self._queue.consistent:
            self._queue.abandon(group_id)
            self._counters.add("faults/groups_abandoned")
            self._replay_buffer.extend(self._assembler.abandon(group_id, reason))

    def add(self, rollout: Rollout) -> None:
        """Take one finished rollout of a training group; the coordinator calls it."""
        pages = self._pool.seal(rollout.pages, rollout.num_decisions)
        group = self._assembler.add(
            RolloutRecord(
                rollout_id=rollout.rollout_id,
                group_id=rollout.group_id,
                pages=pages,
                num_rows=rollout.num_decisions,
                episode_return=rollout.episode_return,
                success=rollout.success,
                num_env_steps=rollout.num_env_steps,
                first_policy_version=rollout.first_policy_version,
                last_policy_version=rollout.last_policy_version,
                task=rollout.spec.task,
                seed=rollout.spec.seed,
                init_state_id=rollout.spec.init_state_id,
            )
        )
        if group is None:
            return
        with self._queue.consistent:
            self._queue.close_group(rollout.group_id)
            # Counted first: the learner may have the group, and read the counters, at once.
            self._counters.add("collector/groups_" + ("kept" if group.kept else "dropped"))
            self._watch_drought(group)
            self._replay_buffer.extend(group)

    def _watch_drought(self, group: GroupRecord) -> None:
        if group.kept and bool(group.advantages.any()):
            self._drought = 0
        else:
            self._drought += 1
        if group.kept and self._drought:
            self._counters.add("collector/groups_kept_in_drought")
        self._counters.totals["collector/drought"] = self._drought
        self._assembler.keep_all = self._on_drought == "keep" and self._drought >= self._max_drought
        if not self._drought or self._drought % self._max_drought:
            return
        text = (
            f"{self._drought} groups in a row had nothing to learn from, the last because of "
            f"{group.drop_reason or 'no contrast'!r}. {_WHAT_FOLLOWS[self._on_drought]} If this "
            "stays so, the tasks are too easy or too hard for the policy: choose others, raise "
            "candidate_group_size, widen return_bounds, or sample at a higher temperature."
        )
        if self._on_drought == "raise":
            raise RuntimeError(text)
        _log.warning("%s", text)
