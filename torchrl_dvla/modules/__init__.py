# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Policies on transformers backbones."""

from torchrl_dvla.modules.adapters import LoraConfig
from torchrl_dvla.modules.config import FlowVLAConfig, TransformersVLAConfig
from torchrl_dvla.modules.flow_vla import FlowVLA
from torchrl_dvla.modules.load_policy import load_policy
from torchrl_dvla.modules.prompt import word_tokenizer
from torchrl_dvla.modules.regression_vla import RegressionVLA
from torchrl_dvla.modules.tiny import TinyBackboneConfig, TinyFlowConfig, tiny_token_policy
from torchrl_dvla.modules.transformers_vla import TransformersVLA

__all__ = [
    "FlowVLA",
    "FlowVLAConfig",
    "LoraConfig",
    "RegressionVLA",
    "TinyBackboneConfig",
    "TinyFlowConfig",
    "TransformersVLA",
    "TransformersVLAConfig",
    "load_policy",
    "tiny_token_policy",
    "word_tokenizer",
]
