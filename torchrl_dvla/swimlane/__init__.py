# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The four lanes of the pipeline and their timeline."""

from torchrl_dvla.swimlane.device_wait import note_device_wait, take_device_wait
from torchrl_dvla.swimlane.inference import InferenceEngine, InferenceProcess, InferenceThread
from torchrl_dvla.swimlane.picture import draw_timeline
from torchrl_dvla.swimlane.reading import LANES, Reading
from torchrl_dvla.swimlane.row_transport import RowClient, RowFuture, RowTransport
from torchrl_dvla.swimlane.sampling import SamplingLane
from torchrl_dvla.swimlane.scheduler import Knob, Measurement, Move, Scheduler
from torchrl_dvla.swimlane.seeding import batch_seed
from torchrl_dvla.swimlane.timeline import Timeline, Track
from torchrl_dvla.swimlane.trace import Span, read_chrome_trace

__all__ = [
    "LANES",
    "InferenceEngine",
    "InferenceProcess",
    "InferenceThread",
    "Knob",
    "Measurement",
    "Move",
    "Reading",
    "RowClient",
    "RowFuture",
    "RowTransport",
    "SamplingLane",
    "Scheduler",
    "Span",
    "Timeline",
    "Track",
    "batch_seed",
    "draw_timeline",
    "note_device_wait",
    "read_chrome_trace",
    "take_device_wait",
]
