# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Adapters that turn transformers image-text models into policy backbones."""

from torchrl_dvla.modules.backbones.base import PixelStyle, PromptStyle, VLABackbone
from torchrl_dvla.modules.backbones.paligemma import PaliGemmaBackbone
from torchrl_dvla.modules.backbones.qwen2_5_vl import Qwen25VLBackbone
from torchrl_dvla.modules.backbones.registry import (
    backbone_class,
    known_model_types,
    register_backbone,
)
from torchrl_dvla.modules.backbones.smolvlm import SmolVLMBackbone

__all__ = [
    "PaliGemmaBackbone",
    "PixelStyle",
    "PromptStyle",
    "Qwen25VLBackbone",
    "SmolVLMBackbone",
    "VLABackbone",
    "backbone_class",
    "known_model_types",
    "register_backbone",
]
