# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Adapters that turn transformers image-text models into policy backbones."""

from torchrl_dvla.modules.backbones.base import (
    PixelStyle,
    PromptStyle,
    VLABackbone,
    backbone_class,
    known_model_types,
    register_backbone,
)
from torchrl_dvla.modules.backbones.families import (
    PaliGemmaBackbone,
    Qwen25VLBackbone,
    SmolVLMBackbone,
)

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
