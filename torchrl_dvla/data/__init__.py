# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The training-data plane: rows, groups, and the replay buffer that hands out whole groups."""

from __future__ import annotations

from torchrl_dvla.data.group import (
    EpisodeSpec,
    Group,
    GroupConfig,
    GroupState,
    InitStateSchedule,
    Rollout,
    max_variance_subset,
)
from torchrl_dvla.data.group_queue import GroupQueue
from torchrl_dvla.data.instructions import InstructionTable, InstructionTransform
from torchrl_dvla.data.replay_buffer import PooledReplayBuffer
from torchrl_dvla.data.schema import decision_layout

__all__ = [
    "EpisodeSpec",
    "Group",
    "GroupConfig",
    "GroupQueue",
    "GroupState",
    "InitStateSchedule",
    "InstructionTable",
    "InstructionTransform",
    "PooledReplayBuffer",
    "Rollout",
    "decision_layout",
    "max_variance_subset",
]
