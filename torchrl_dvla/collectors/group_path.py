# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The way of a group: admitted, begun, finished, and stored for the learner."""

from __future__ import annotations

from collections.abc import Callable

from torchrl_dvla.collectors.checks import check_buffer
from torchrl_dvla.collectors.configs import GroupConfig
from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.collectors.group_sink import GroupSink
from torchrl_dvla.collectors.rollout_queue import RolloutQueue
from torchrl_dvla.collectors.schedule import InitStateSchedule
from torchrl_dvla.data import Admission, GroupAssembler, InstructionTable, PooledReplayBuffer
from torchrl_dvla.memory import EnvironmentPool

__all__ = ["GroupPath"]


class GroupPath:
    """The stations of a group, from the initial state to the learner.

    :attr:`queue` begins its rollouts once :attr:`admission` and the pool let it; :attr:`sink` takes
    them when they have ended, and gives the whole group to :attr:`replay_buffer`, which tells
    :attr:`admission` when it was learned from. What runs the rollouts is none of its business.

    Args:
        group (GroupConfig): groups and staleness.
        pool (EnvironmentPool): the pages.

    Keyword Args:
        pages_per_rollout (int): pages that a rollout of the greatest length needs.
        schedule (InitStateSchedule): initial states.
        replay_buffer (Callable): builds the replay buffer from ``pool``, ``admission`` and
            ``instructions``.
        counters (CollectionCounters): takes the counts.
        evaluations_alone (bool): see :class:`RolloutQueue`.

    Raises:
        ValueError: if the replay buffer is on another pool or under another admission.
    """

    def __init__(
        self,
        group: GroupConfig,
        pool: EnvironmentPool,
        *,
        pages_per_rollout: int,
        schedule: InitStateSchedule,
        replay_buffer: Callable[..., PooledReplayBuffer],
        counters: CollectionCounters,
        evaluations_alone: bool,
    ) -> None:
        self.instructions = InstructionTable()
        self.admission = Admission(group.groups_per_update, group.max_policy_lag)
        self.replay_buffer = replay_buffer(
            pool=pool, admission=self.admission, instructions=self.instructions
        )
        check_buffer(self.replay_buffer, pool, self.admission)
        self.queue = RolloutQueue(
            schedule,
            self.admission,
            num_candidates=group.num_candidates,
            pages_per_rollout=pages_per_rollout,
            pool=pool,
            evaluations_alone=evaluations_alone,
        )
        assembler = GroupAssembler(
            pool,
            group.group_size,
            group.candidate_group_size,
            return_bounds=group.return_bounds,
            normalise_std=group.normalise_std,
        )
        self.sink = GroupSink(
            assembler,
            pool=pool,
            queue=self.queue,
            replay_buffer=self.replay_buffer,
            counters=counters,
            max_drought=group.max_drought,
            on_drought=group.on_drought,
        )
