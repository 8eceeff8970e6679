# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""From ``config.model_type`` to the adapter that understands it."""

from __future__ import annotations

from torchrl_dvla.modules.backbones.base import VLABackbone
from torchrl_dvla.modules.backbones.paligemma import PaliGemmaBackbone
from torchrl_dvla.modules.backbones.qwen2_5_vl import Qwen25VLBackbone
from torchrl_dvla.modules.backbones.smolvlm import SmolVLMBackbone

__all__ = ["backbone_class", "known_model_types", "register_backbone"]

_BACKBONES: dict[str, type[VLABackbone]] = {}


def register_backbone(backbone: type[VLABackbone]) -> type[VLABackbone]:
    """Enter an adapter under its ``model_types``; usable as a class decorator.

    Args:
        backbone (type): a :class:`VLABackbone` subclass.

    Returns:
        The class, unchanged.

    Raises:
        ValueError: if it names no model type.
    """
    if not backbone.model_types:
        raise ValueError(
            f"model_types must name at least one transformers model type, got () on "
            f"{backbone.__name__}. Set the class attribute."
        )
    for model_type in backbone.model_types:
        _BACKBONES[model_type] = backbone
    return backbone


def known_model_types() -> list[str]:
    """Return the transformers model types that have an adapter, sorted.

    Examples:
        >>> from torchrl_dvla.modules.backbones import known_model_types
        >>> known_model_types()
        ['idefics3', 'paligemma', 'qwen2_5_vl', 'smolvlm']
    """
    return sorted(_BACKBONES)


def backbone_class(model_type: str) -> type[VLABackbone]:
    """Return the adapter of a transformers model type.

    Args:
        model_type (str): ``config.model_type`` of the backbone.

    Returns:
        The adapter class.

    Raises:
        ValueError: if no adapter is registered for it.
    """
    if model_type not in _BACKBONES:
        raise ValueError(
            f"model_type must be one of {known_model_types()}, got {model_type!r}. Write a "
            "VLABackbone subclass for this family and pass it to register_backbone."
        )
    return _BACKBONES[model_type]


for _backbone in (SmolVLMBackbone, PaliGemmaBackbone, Qwen25VLBackbone):
    register_backbone(_backbone)
