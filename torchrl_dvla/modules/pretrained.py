# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Backbones from a transformers config, a local folder or the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from torchrl_dvla.modules.backbones import PixelStyle, PromptStyle, backbone_class
from torchrl_dvla.modules.words import word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BackboneParts", "backbone_from_dict", "backbone_to_dict", "resolve_backbone"]

#: Fields of a transformers config that say where it came from, not what it is.
_PROVENANCE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")

_BICUBIC = 3  # PIL's number


def backbone_to_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a transformers config as plain JSON types, without provenance.

    Args:
        config (PreTrainedConfig): the config.

    Returns:
        A dict for :func:`backbone_from_dict`, equal for equal architectures.

    Raises:
        ValueError: if there is no adapter for its model type.
    """
    backbone_class(config.model_type)

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(item) for name, item in value.items() if name not in _PROVENANCE}
        return value

    return json.loads(json.dumps(clean(config.to_dict())))


def backbone_from_dict(data: dict[str, Any], *, dtype: torch.dtype) -> PreTrainedModel:
    """Build a backbone with random weights.

    Args:
        data (dict): see :func:`backbone_to_dict`.

    Keyword Args:
        dtype (torch.dtype): dtype of the parameters.

    Returns:
        The base model, without a language-modelling head.

    Raises:
        ValueError: if there is no adapter for its model type.
    """
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    backbone_class(data["model_type"])
    config = CONFIG_MAPPING[data["model_type"]].from_dict(dict(data))
    return AutoModel.from_config(config, dtype=dtype, attn_implementation=_attention(config))


class BackboneParts(NamedTuple):
    """What a source of backbones settles."""

    config: PreTrainedConfig
    #: None where the weights are still to be drawn.
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    prompt_style: PromptStyle
    pixel_style: PixelStyle
    bidirectional_prompt: bool


def resolve_backbone(
    source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    instructions: Iterable[str] | None,
    dtype: torch.dtype,
    hub_kwargs: dict[str, Any],
) -> BackboneParts:
    """Find config, weights, tokenizer and habits of a backbone.

    Args:
        source (str, path, PreTrainedConfig or PreTrainedModel): a hub id or local folder for
            pre-trained weights, a config for random ones, or a base model.
        tokenizer (PreTrainedTokenizerBase, optional): used instead of the checkpoint's own.
        instructions (iterable of str, optional): make a word-level tokenizer of these instead; it
            knows none of the family's prompt strings, so there are none.
        dtype (torch.dtype): dtype of pre-trained parameters.
        hub_kwargs (dict): passed on to transformers, e.g. ``revision``.

    Returns:
        The parts.

    Raises:
        ValueError: if there is no adapter for the model type, or no tokenizer.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

    model: PreTrainedModel | None = None
    if isinstance(source, PreTrainedConfig):
        config = source
        pixel_style = backbone_class(config.model_type).pixel_style
    elif isinstance(source, PreTrainedModel):
        model, config = source, source.config
        pixel_style = backbone_class(config.model_type).pixel_style
    else:
        config = AutoConfig.from_pretrained(source, **hub_kwargs)
        pixel_style = _pixel_style(
            source, backbone_class(config.model_type).pixel_style, **hub_kwargs
        )
        if tokenizer is None and instructions is None:
            tokenizer = AutoTokenizer.from_pretrained(source, **hub_kwargs)
        model = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=_attention(config),
            **hub_kwargs,
        )
    family = backbone_class(config.model_type)
    prompt_style = family.prompt_style
    if instructions is not None:
        tokenizer, prompt_style = word_tokenizer(instructions), PromptStyle()
    if tokenizer is None:
        raise ValueError(
            "tokenizer must be given where source is a config or a model, got None. Pass "
            "tokenizer=AutoTokenizer.from_pretrained(...) or instructions=[...]."
        )
    return BackboneParts(
        config, model, tokenizer, prompt_style, pixel_style, family.bidirectional_prompt
    )


def _attention(config: PreTrainedConfig) -> str:
    # Fused attention has no soft cap (Gemma 2).
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if softcap is None else "eager"


def _pixel_style(source: str | os.PathLike[str], default: PixelStyle, **kwargs: Any) -> PixelStyle:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        data, _ = ImageProcessingMixin.get_image_processor_dict(source, **kwargs)
    except OSError:
        return default
    return PixelStyle(
        mean=tuple(data.get("image_mean") or default.mean),
        std=tuple(data.get("image_std") or default.std),
        interpolation="bilinear" if data.get("resample", _BICUBIC) == 2 else "bicubic",
    )
