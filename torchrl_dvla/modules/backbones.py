# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Backbones of policies: adapters of transformers image-text models, by model type."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from torchrl_dvla.modules.action_head import ActionQueryHead
from torchrl_dvla.validation import Range, check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["PixelStyle", "PromptStyle", "VLABackbone", "backbone_class", "register_backbone"]


@dataclass(frozen=True)
class PromptStyle:
    """Prompt template of a family: the strings around images and instruction.

    A prompt reads ``start``, then for every camera ``image_start``, the image features and
    ``image_end``, then the proprioception token, then ``instruction`` with the task filled in.

    Args:
        start (str): what precedes the first image.
        image_start (str): what precedes the features of every image.
        image_end (str): what follows the features of every image.
        instruction (str): template of the text part; must contain ``"{instruction}"``.
        lowercase (bool): whether the task is filled in in small letters.

    Raises:
        ValueError: if the template has no place for the instruction.

    Examples:
        >>> from torchrl_dvla.modules.backbones import PromptStyle
        >>> PromptStyle(instruction="do: {instruction}").instruction.format(instruction="lift")
        'do: lift'
    """

    start: str = ""
    image_start: str = ""
    image_end: str = ""
    instruction: str = "{instruction}"
    lowercase: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if "{instruction}" not in self.instruction:
            raise ValueError(
                "instruction must contain '{instruction}', got "
                f"{self.instruction!r}. Say where the task text goes."
            )


@dataclass(frozen=True)
class PixelStyle:
    """Pixel normalisation and resizing that a vision tower was trained with.

    Args:
        mean (tuple of float): per-channel mean of pixels in [0, 1]. Six of them, and of ``std``,
            are of two towers that read the same image.
        std (tuple of float): per-channel standard deviation of pixels in [0, 1].
        interpolation (str): ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``, for cameras of another
            size.
        antialias (bool): whether a larger image is smoothed before it is sampled, as PIL does and
            ``torch.nn.functional.interpolate`` alone does not.
        padding (str): where images of another aspect ratio get black borders instead of being
            distorted: ``"center"`` (half on each side), ``"top_left"``, or ``"none"`` for neither.
        crop (float): share of the area that is kept, from the middle, and enlarged again.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    antialias: bool = True
    padding: Literal["none", "center", "top_left"] = "none"
    crop: Annotated[float, Range(0.01, 1)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.mean) not in (3, 6) or len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise ValueError(
                "mean and std must have three or six entries, be finite and std positive, got "
                f"mean={self.mean}, std={self.std}. Copy them from the preprocessor_config.json "
                "of the checkpoint."
            )


class VLABackbone(nn.Module):
    """Adapter of a transformers image-text model: embed images, embed tokens, decode.

    Families differ in how image features enter the token stream, in position ids and in masks.
    An adapter hides that: :meth:`embed_images`, :meth:`embed_tokens` and :meth:`decode` are all a
    policy needs, and everything else (prompt, padding, queries, heads) is shared.

    A new family is one subclass, decorated with :func:`register_backbone`.

    Args:
        model (PreTrainedModel): the base model, without a language-modelling head.

    Keyword Args:
        image_size (tuple of int): height and width of the images fed to :meth:`embed_images`.
    """

    #: ``config.model_type`` values this adapter understands.
    model_types: ClassVar[tuple[str, ...]] = ()
    #: Whether prompt tokens see later prompt tokens, as the family was pre-trained.
    bidirectional_prompt: ClassVar[bool] = False
    prompt_style: ClassVar[PromptStyle] = PromptStyle()
    pixel_style: ClassVar[PixelStyle] = PixelStyle()
    #: Names of the vision tower and of the decoder in the transformers model.
    vision_name: ClassVar[str] = "vision_tower"
    language_name: ClassVar[str] = "language_model"
    #: What builds the network from its config and ``dtype``, if transformers does not.
    network: ClassVar[Any] = None
    #: Whether the prompt attends to the queries too, as they do to it.
    prompt_sees_queries: ClassVar[bool] = False
    #: Whether a state beyond the range of the statistics is cut off.
    clip_state: ClassVar[bool] = False
    #: Queries beside those of the action tokens.
    num_extra_queries: ClassVar[int] = 0
    #: Position of the first token of the stream.
    first_position: ClassVar[int] = 0
    #: Rows of the position ids: 1, or 3 where rotary positions have time, height and width.
    num_position_axes: ClassVar[int] = 1

    def __init__(self, model: PreTrainedModel, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size

    @classmethod
    def image_size_of(
        cls, config: PreTrainedConfig, camera_size: tuple[int, int]
    ) -> tuple[int, int]:
        """Height and width the vision tower wants for cameras of ``camera_size``."""
        size = config.vision_config.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def text_config(self) -> Any:
        """The language model's part of the transformers config."""
        return self.model.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """Width ``D`` of the token stream."""
        return int(self.text_config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token stream."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def max_tokens(self) -> int:
        """Longest stream for which full attention is what the language model computes."""
        config = self.text_config
        windows = [int(config.max_position_embeddings)]
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            windows.append(int(config.sliding_window))
        return min(windows)

    @property
    @abstractmethod
    def num_image_tokens(self) -> int:
        """Number of stream tokens one image becomes."""

    @property
    def vision_model(self) -> PreTrainedModel:
        """The vision tower, which ``freeze_vision`` freezes."""
        return getattr(self.model, self.vision_name)

    @property
    def language_model(self) -> PreTrainedModel:
        """The decoder, which ``freeze_language`` freezes."""
        return getattr(self.model, self.language_name)

    @abstractmethod
    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Stream tokens ``[N, T, D]`` of normalised pixels ``[N, 3, height, width]``."""

    def embed_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Stream tokens ``[B, L, D]`` of text tokens ``[B, L]``.

        A family that scales its embeddings (Gemma) does so inside the table; image features are not
        scaled.
        """
        return self.language_model.embed_tokens(token_ids)

    def decode(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        attention_bias: torch.Tensor,
        num_queries: int,
    ) -> torch.Tensor:
        """Forward pass of the language model over a whole sequence.

        The layers are called one by one, without cache, recording or mask creation:
        ``LanguageModel.forward`` spends more time on these than a small model on arithmetic.

        Args:
            embeddings (torch.Tensor): the stream, ``[B, S, D]``.
            position_ids (torch.Tensor): int64 ``[axes, B or 1, S]``.
            attention_bias (torch.Tensor): ``[B or 1, 1, S, S]``, added to attention scores:
                0 where row may see column, -inf where not.
            num_queries (int): how many positions at the end are wanted.

        Returns:
            The last ``num_queries`` hidden states after the final norm, ``[B, num_queries, D]``.
        """
        text = self.language_model
        positions = position_ids if self.num_position_axes > 1 else position_ids[0]
        rotary = text.rotary_emb(embeddings, positions)
        hidden = embeddings
        for layer in text.layers:
            hidden = layer(
                hidden, attention_mask=attention_bias, position_embeddings=rotary, use_cache=False
            )
        return text.norm(hidden[:, -num_queries:])

    def make_head(
        self, *, chunk_size: int, action_dim: int, vocab_size: int, tokens_per_step: int
    ) -> nn.Module:
        """The action head, see :class:`~torchrl_dvla.modules.action_head.ActionQueryHead`."""
        return ActionQueryHead(
            self.hidden_size,
            chunk_size=chunk_size,
            action_dim=action_dim,
            vocab_size=vocab_size,
            tokens_per_step=tokens_per_step,
        )

    def queries(self, head: nn.Module, num_queries: int) -> torch.Tensor:
        """Queries ``[num_queries + num_extra_queries, D]`` at the end of the stream."""
        return head.queries  # type: ignore[return-value]

    def image_positions(self, start: int) -> tuple[torch.Tensor, int]:
        """Positions ``[axes, T]`` of one image from ``start`` on, and the next free one."""
        stop = start + self.num_image_tokens
        return torch.arange(start, stop).expand(self.num_position_axes, -1), stop

    def freeze(self, *, vision: bool = False, language: bool = False) -> None:
        """Exclude parts from training.

        Keyword Args:
            vision (bool): freeze :attr:`vision_model`.
            language (bool): freeze :attr:`language_model`.
        """
        if vision:
            self.vision_model.requires_grad_(False)
        if language:
            self.language_model.requires_grad_(False)


_BACKBONES: dict[str, type[VLABackbone]] = {}


def register_backbone(backbone: type[VLABackbone]) -> type[VLABackbone]:
    """Class decorator that registers an adapter under its ``model_types``.

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


def backbone_class(model_type: str) -> type[VLABackbone]:
    """Adapter class of a transformers model type.

    Args:
        model_type (str): ``config.model_type`` of the backbone.

    Returns:
        The adapter class.

    Raises:
        ValueError: if no adapter is registered for it.

    Examples:
        >>> from torchrl_dvla.modules.backbones import backbone_class
        >>> backbone_class("idefics3").__name__
        'SmolVLMBackbone'
    """
    if model_type not in _BACKBONES:
        raise ValueError(
            f"model_type must be one of {sorted(_BACKBONES)}, got {model_type!r}. Write a "
            "VLABackbone subclass for this family and pass it to register_backbone."
        )
    return _BACKBONES[model_type]


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
