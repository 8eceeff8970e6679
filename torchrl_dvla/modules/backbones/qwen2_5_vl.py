# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Qwen2.5-VL: windowed vision tower, patch merger, Qwen2 decoder with 3-D rotary positions."""

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
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Qwen25VLBackbone"]


class Qwen25VLBackbone(VLABackbone):
    """Adapter of Qwen2.5-VL, whose tower takes images of any size that its merged patches tile.

    Args:
        model (PreTrainedModel): a ``Qwen2_5_VLModel``.

    Keyword Args:
        image_size (tuple of int): height and width of the images; multiples of
            ``patch_size * spatial_merge_size``.

    Reference:
        Bai et al., "Qwen2.5-VL Technical Report", 2025. https://arxiv.org/abs/2502.13923
    """

    model_types = ("qwen2_5_vl",)
    prompt_style = PromptStyle(
        start="<|im_start|>user\n",
        image_start="<|vision_start|>",
        image_end="<|vision_end|>",
        instruction="{instruction}<|im_end|>\n<|im_start|>assistant\n",
    )
    pixel_style = PixelStyle(
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
    )
    num_position_axes = 3

    def __init__(self, model: PreTrainedModel, *, image_size: tuple[int, int]) -> None:
        super().__init__(model, image_size=image_size)
        vision = model.config.vision_config
        self._patch_size = int(vision.patch_size)
        self._merge_size = int(vision.spatial_merge_size)
        self._temporal_patch_size = int(vision.temporal_patch_size)
        tile = self._patch_size * self._merge_size
        if image_size[0] % tile or image_size[1] % tile:
            raise ValueError(
                f"image_size must be a multiple of {tile} (patch_size * spatial_merge_size), got "
                f"{image_size}. Leave resizing to the policy."
            )
        self._grid = (image_size[0] // self._patch_size, image_size[1] // self._patch_size)

    @classmethod
    def image_size_of(
        cls, config: PreTrainedConfig, camera_size: tuple[int, int]
    ) -> tuple[int, int]:
        tile = int(config.vision_config.patch_size) * int(config.vision_config.spatial_merge_size)
        height, width = (max(1, round(side / tile)) * tile for side in camera_size)
        return height, width

    @property
    def num_image_tokens(self) -> int:
        return self._grid[0] * self._grid[1] // self._merge_size**2

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.model.visual]

    @property
    def language_modules(self) -> list[nn.Module]:
        return [self.model.language_model]

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        num_images = pixels.shape[0]
        grid = torch.tensor([[1, *self._grid]], device=pixels.device).expand(num_images, -1)
        features = self.model.visual(self._patchify(pixels), grid_thw=grid).pooler_output
        return features.view(num_images, self.num_image_tokens, -1)

    def _patchify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Cut ``[N, 3, H, W]`` into rows ``[N * patches, 3 * time * patch * patch]``.

        Patches that will be merged are neighbours in the row order, and a still image fills the
        temporal patch by repetition.
        """
        patch, merge = self._patch_size, self._merge_size
        rows, columns = self._grid[0] // merge, self._grid[1] // merge
        tiles = pixels.reshape(-1, 3, rows, merge, patch, columns, merge, patch)
        tiles = tiles.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        tiles = tiles.expand(-1, -1, -1, -1, -1, -1, self._temporal_patch_size, -1, -1)
        return tiles.reshape(pixels.shape[0] * self._grid[0] * self._grid[1], -1)

    def embed_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.language_model.embed_tokens(token_ids)

    def image_positions(self, start: int) -> tuple[torch.Tensor, int]:
        rows, columns = (side // self._merge_size for side in self._grid)
        time = torch.zeros(rows * columns, dtype=torch.int64)
        row = torch.arange(rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(rows)
        return torch.stack([time, row, column]) + start, start + max(rows, columns)

    def decode(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        attention_bias: torch.Tensor,
        num_queries: int,
    ) -> torch.Tensor:
        text = self.model.language_model
        rotary = text.rotary_emb(embeddings, position_ids)
        hidden = run_decoder_layers(text.layers, embeddings, attention_bias, rotary)
        return text.norm(hidden[:, -num_queries:])
