# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The four lanes of the pipeline and their timeline."""

from torchrl_dvla.swimlane.inference import InferenceEngine, InferenceProcess, InferenceThread
from torchrl_dvla.swimlane.sampling import SamplingLane
from torchrl_dvla.swimlane.timeline import LANES, Span, Timeline

__all__ = [
    "LANES",
    "InferenceEngine",
    "InferenceProcess",
    "InferenceThread",
    "SamplingLane",
    "Span",
    "Timeline",
]
