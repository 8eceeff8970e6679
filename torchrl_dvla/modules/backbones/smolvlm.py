# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""SmolVLM and Idefics3: SigLIP tower, pixel shuffle, Llama decoder."""

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

__all__ = ["SmolVLMBackbone"]


class SmolVLMBackbone(VLABackbone):
    """Adapter of SmolVLM and Idefics3, which share one architecture.

    An image is one crop: the family's tiling of large photographs is of no use for camera frames.

    Args:
        model (PreTrainedModel): a ``SmolVLMModel`` or ``Idefics3Model``.

    Keyword Args:
        image_size (tuple of int): height and width of the images.

    Reference:
        Marafioti et al., "SmolVLM: Redefining small and efficient multimodal models", 2025.
        https://arxiv.org/abs/2504.05299
    """

    model_types = ("smolvlm", "idefics3")
    prompt_style = PromptStyle(
        start="<|im_start|>User:",
        image_start="<fake_token_around_image><global-img>",
        image_end="<fake_token_around_image>",
        instruction="{instruction}<end_of_utterance>\nAssistant:",
    )
    pixel_style = PixelStyle(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def __init__(self, model: PreTrainedModel, *, image_size: tuple[int, int]) -> None:
        super().__init__(model, image_size=image_size)
        embeddings = model.vision_model.embeddings
        self._patch_size = int(embeddings.patch_size)
        grid = (image_size[0] // self._patch_size, image_size[1] // self._patch_size)
        if min(grid) == 0 or grid[0] != grid[1] or grid[0] % int(model.config.scale_factor):
            raise ValueError(
                "image_size must give a square grid of patches that scale_factor divides, got "
                f"image_size={image_size}, patch_size={self._patch_size}, "
                f"scale_factor={model.config.scale_factor}. Use the image_size of vision_config."
            )
        self._num_patches = grid[0] * grid[1]
        # Non-persistent buffer: follows the module to a device, is no part of a checkpoint.
        self.register_buffer(
            "_patch_positions",
            _patch_positions(grid[0], int(embeddings.num_patches_per_side)),
            persistent=False,
        )

    @property
    def num_image_tokens(self) -> int:
        return self._num_patches // int(self.model.config.scale_factor) ** 2

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.model.vision_model]

    @property
    def language_modules(self) -> list[nn.Module]:
        return [self.model.text_model]

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        vision = self.model.vision_model
        embeddings = vision.embeddings
        hidden = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding(self._patch_positions)
        for layer in vision.encoder.layers:
            hidden = layer(hidden, None)
        return self.model.connector(vision.post_layernorm(hidden))

    def embed_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.text_model.embed_tokens(token_ids)

    def decode(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        attention_bias: torch.Tensor,
        num_queries: int,
    ) -> torch.Tensor:
        text = self.model.text_model
        rotary = text.rotary_emb(embeddings, position_ids[0])
        hidden = run_decoder_layers(text.layers, embeddings, attention_bias, rotary)
        return text.norm(hidden[:, -num_queries:])


def _patch_positions(side: int, table_side: int) -> torch.Tensor:
    """Rows of the position table for a ``side`` x ``side`` grid, in the family's own arithmetic.

    The tower stretches a small grid over the table by bucketing fractional coordinates. Rounding is
    part of what it was trained with, so the formula is kept to the letter.
    """
    boundaries = torch.arange(1 / table_side, 1.0, 1 / table_side)
    fraction = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    bucket = torch.bucketize(fraction.clamp(max=1.0 - 1e-6), boundaries, right=True)
    return (bucket[:, None] * table_side + bucket[None, :]).flatten()
