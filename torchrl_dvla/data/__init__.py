# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The training-data plane: rows, groups, admission, and the buffer that hands out whole groups."""

from __future__ import annotations

from torchrl_dvla.data.admission import Admission
from torchrl_dvla.data.assembler import GroupAssembler, max_variance_subset
from torchrl_dvla.data.groups import GroupRecord, RolloutRecord
from torchrl_dvla.data.instructions import InstructionTable, InstructionTransform
from torchrl_dvla.data.replay_buffer import PooledReplayBuffer
from torchrl_dvla.data.rows import decision_layout
from torchrl_dvla.data.storage import PooledStorage

__all__ = [
    "Admission",
    "GroupAssembler",
    "GroupRecord",
    "InstructionTable",
    "InstructionTransform",
    "PooledReplayBuffer",
    "PooledStorage",
    "RolloutRecord",
    "decision_layout",
    "max_variance_subset",
]
