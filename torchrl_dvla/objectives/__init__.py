# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Losses: they wire keys and call :mod:`torchrl_dvla.functional`."""

from torchrl_dvla.objectives.bc import ActionTokenBCLoss, FlowMatchingLoss
from torchrl_dvla.objectives.grpo import GRPOLoss

__all__ = ["ActionTokenBCLoss", "FlowMatchingLoss", "GRPOLoss"]
