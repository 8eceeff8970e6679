# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Policies on transformers backbones."""

from torchrl_dvla.modules.action_tokenizer import (
    action_tokenizer_from_dict,
    action_tokenizer_to_dict,
)
from torchrl_dvla.modules.config import TransformersVLAConfig
from torchrl_dvla.modules.tiny import TinyBackboneConfig
from torchrl_dvla.modules.transformers_vla import TransformersVLA
from torchrl_dvla.modules.words import word_tokenizer

__all__ = [
    "TinyBackboneConfig",
    "TransformersVLA",
    "TransformersVLAConfig",
    "action_tokenizer_from_dict",
    "action_tokenizer_to_dict",
    "word_tokenizer",
]
