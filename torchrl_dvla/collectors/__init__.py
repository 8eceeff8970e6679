# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Collectors: from lanes to groups in the replay buffer."""

from torchrl_dvla.collectors.configs import InferenceConfig, WorkerConfig
from torchrl_dvla.collectors.dvla import DVLACollector
from torchrl_dvla.collectors.evaluation import Evaluation, EvaluationResult
from torchrl_dvla.collectors.policy_protocol import PolicyReport, check_policy_protocol
from torchrl_dvla.data.group import EpisodeSpec, GroupConfig, InitStateSchedule

__all__ = [
    "DVLACollector",
    "EpisodeSpec",
    "Evaluation",
    "EvaluationResult",
    "GroupConfig",
    "InferenceConfig",
    "InitStateSchedule",
    "PolicyReport",
    "WorkerConfig",
    "check_policy_protocol",
]
