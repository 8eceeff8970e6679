# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The four lanes of the pipeline: their processes and their timeline."""

from torchrl_dvla.swimlane.chrome_trace import LANES, Span, read_chrome_trace
from torchrl_dvla.swimlane.env_processes import EnvProcesses
from torchrl_dvla.swimlane.inference import InferenceEngine, InferenceProcess, batch_seed
from torchrl_dvla.swimlane.managed_process import ManagedProcess
from torchrl_dvla.swimlane.timeline import LaneUsage, Timeline, Track
from torchrl_dvla.swimlane.timeline_svg import draw_timeline

__all__ = [
    "LANES",
    "EnvProcesses",
    "InferenceEngine",
    "InferenceProcess",
    "LaneUsage",
    "ManagedProcess",
    "Span",
    "Timeline",
    "Track",
    "batch_seed",
    "draw_timeline",
    "read_chrome_trace",
]
