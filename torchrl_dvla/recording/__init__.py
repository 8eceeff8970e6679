# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a run leaves behind: checkpoints, TensorBoard files, a progress bar, an end table.

Recipes need these, and so may a program that assembles the components by itself.
"""

from torchrl_dvla.recording.checkpoint import Checkpoint, CheckpointDirectory
from torchrl_dvla.recording.plain import from_plain, rng_state, set_rng_state, to_plain
from torchrl_dvla.recording.policy_files import load_policy, save_policy
from torchrl_dvla.recording.progress import ProgressBar
from torchrl_dvla.recording.report import RunReport, SuccessRate, wilson_interval
from torchrl_dvla.recording.signals import GracefulStop, StopRequested
from torchrl_dvla.recording.tensorboard import (
    DASHBOARD,
    TensorBoardRecorder,
    check_writable,
    encode_gif,
)

__all__ = [
    "DASHBOARD",
    "Checkpoint",
    "CheckpointDirectory",
    "GracefulStop",
    "ProgressBar",
    "RunReport",
    "StopRequested",
    "SuccessRate",
    "TensorBoardRecorder",
    "check_writable",
    "encode_gif",
    "from_plain",
    "load_policy",
    "rng_state",
    "save_policy",
    "set_rng_state",
    "to_plain",
    "wilson_interval",
]
