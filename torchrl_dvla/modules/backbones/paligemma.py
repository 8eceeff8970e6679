# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PaliGemma and PaliGemma 2: SigLIP tower, linear projector, Gemma decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from torchrl_dvla.modules.backbones.base import (
    PixelStyle,
    PromptStyle,
    VLABackbone,
    run_decoder_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PaliGemmaBackbone"]


class PaliGemmaBackbone(VLABackbone):
    """Adapter of PaliGemma, whose prompt is a prefix that sees itself in both directions.

    Args:
        model (PreTrainedModel): a ``PaliGemmaModel``.

    Keyword Args:
        image_size (tuple of int): height and width of the images.

    Reference:
        Beyer et al., "PaliGemma: A versatile 3B VLM for transfer", 2024.
        https://arxiv.org/abs/2407.07726
    """

    model_types = ("paligemma",)
    bidirectional_prompt = True
    prompt_style = PromptStyle(instruction="<bos>{instruction}\n")
    pixel_style = PixelStyle(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    # The family counts positions from one.
    first_position = 1

    def __init__(self, model: PreTrainedModel, *, image_size: tuple[int, int]) -> None:
        super().__init__(model, image_size=image_size)
        expected = self.image_size_of(model.config, image_size)
        if image_size != expected:
            raise ValueError(
                f"image_size must be {expected}, the size of the tower's position table, got "
                f"{image_size}. Leave resizing to the policy."
            )

    @property
    def num_image_tokens(self) -> int:
        patch_size = int(self.model.config.vision_config.patch_size)
        return (self.image_size[0] // patch_size) * (self.image_size[1] // patch_size)

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.model.vision_tower]

    @property
    def language_modules(self) -> list[nn.Module]:
        return [self.model.language_model]

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixels).pooler_output

    def embed_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        # Gemma's table multiplies by sqrt(D) itself; image features are not scaled.
        return self.model.language_model.embed_tokens(token_ids)

    def decode(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        attention_bias: torch.Tensor,
        num_queries: int,
    ) -> torch.Tensor:
        text = self.model.language_model
        rotary = text.rotary_emb(embeddings, position_ids[0])
        hidden = run_decoder_layers(text.layers, embeddings, attention_bias, rotary)
        return text.norm(hidden[:, -num_queries:])
