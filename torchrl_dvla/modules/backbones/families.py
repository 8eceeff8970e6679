# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Families of vision-language backbones: SmolVLM and Idefics3, PaliGemma, Qwen2.5-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchrl_dvla.modules.backbones.base import (
    PixelStyle,
    PromptStyle,
    VLABackbone,
    register_backbone,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["PaliGemmaBackbone", "Qwen25VLBackbone", "SmolVLMBackbone"]


@register_backbone
class SmolVLMBackbone(VLABackbone):
    """Adapter of SmolVLM and Idefics3: SigLIP tower, pixel shuffle, Llama decoder.

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
    vision_name, language_name = "vision_model", "text_model"

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

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        vision = self.model.vision_model
        embeddings = vision.embeddings
        hidden = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding(self._patch_positions)
        for layer in vision.encoder.layers:
            hidden = layer(hidden, None)
        return self.model.connector(vision.post_layernorm(hidden))


def _patch_positions(side: int, table_side: int) -> torch.Tensor:
    """Rows of the position table for a ``side`` x ``side`` grid, in the family's own arithmetic.

    The tower stretches a small grid over the table by bucketing fractional coordinates. Rounding is
    part of what it was trained with, so the formula is kept to the letter.
    """
    boundaries = torch.arange(1 / table_side, 1.0, 1 / table_side)
    fraction = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    bucket = torch.bucketize(fraction.clamp(max=1.0 - 1e-6), boundaries, right=True)
    return (bucket[:, None] * table_side + bucket[None, :]).flatten()


@register_backbone
class PaliGemmaBackbone(VLABackbone):
    """Adapter of PaliGemma and PaliGemma 2: SigLIP tower, linear projector, Gemma decoder.

    The prompt is a prefix that sees itself in both directions.

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

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixels).pooler_output


@register_backbone
class Qwen25VLBackbone(VLABackbone):
    """Adapter of Qwen2.5-VL: windowed tower, patch merger, Qwen2 decoder with 3-D rotary positions.

    The tower takes images of any size that its merged patches tile.

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
    vision_name = "visual"
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

    def image_positions(self, start: int) -> tuple[torch.Tensor, int]:
        rows, columns = (side // self._merge_size for side in self._grid)
        time = torch.zeros(rows * columns, dtype=torch.int64)
        row = torch.arange(rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(rows)
        return torch.stack([time, row, column]) + start, start + max(rows, columns)
