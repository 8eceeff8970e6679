# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Records of a run: checkpoints, TensorBoard files, the final report, its lock, an orderly stop."""

from torchrl_dvla.recording.checkpoint import RunCheckpoints, find_latest_checkpoint
from torchrl_dvla.recording.learning_curve import draw_learning_curve, read_scalars
from torchrl_dvla.recording.recorder import (
    LogBackend,
    RunRecorder,
    check_backend,
    check_writable,
    encode_gif,
)
from torchrl_dvla.recording.report import RunReport, SuccessRate, wilson_interval
from torchrl_dvla.recording.run_lock import RunLock
from torchrl_dvla.recording.signals import GracefulStop, StopRequested
from torchrl_dvla.recording.suite_record import (
    EpisodeKey,
    EpisodeRecord,
    SuiteRecord,
    SuiteReport,
)
from torchrl_dvla.recording.tensorboard import DASHBOARD, TensorBoardRecorder
from torchrl_dvla.recording.training_scenes import SceneOverlap, TrainingScenes

__all__ = [
    "DASHBOARD",
    "EpisodeKey",
    "EpisodeRecord",
    "GracefulStop",
    "LogBackend",
    "RunCheckpoints",
    "RunLock",
    "RunRecorder",
    "RunReport",
    "SceneOverlap",
    "StopRequested",
    "SuccessRate",
    "SuiteRecord",
    "SuiteReport",
    "TensorBoardRecorder",
    "TrainingScenes",
    "check_backend",
    "check_writable",
    "draw_learning_curve",
    "encode_gif",
    "find_latest_checkpoint",
    "read_scalars",
    "wilson_interval",
]
