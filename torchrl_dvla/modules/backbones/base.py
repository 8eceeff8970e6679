# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Vision-language backbones of policies: base class, styles and registry by model type."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "PixelStyle",
    "PromptStyle",
    "VLABackbone",
    "backbone_class",
    "known_model_types",
    "register_backbone",
]


@dataclass(frozen=True)
class PromptStyle:
    """The strings a family puts around images and instruction.

    A prompt reads ``start``, then for every camera ``image_start``, the image features and
    ``image_end``, then the proprioception token, then ``instruction`` with the task filled in.

    Args:
        start (str): what precedes the first image.
        image_start (str): what precedes the features of every image.
        image_end (str): what follows the features of every image.
        instruction (str): template of the text part; must contain ``"{instruction}"``.

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

    def __post_init__(self) -> None:
        if "{instruction}" not in self.instruction:
            raise ValueError(
                "instruction must contain '{instruction}', got "
                f"{self.instruction!r}. Say where the task text goes."
            )


@dataclass(frozen=True)
class PixelStyle:
    """How uint8 pixels become what a vision tower was trained on.

    Args:
        mean (tuple of float): per-channel mean of pixels in [0, 1].
        std (tuple of float): per-channel standard deviation of pixels in [0, 1].
        interpolation (str): ``"bilinear"`` or ``"bicubic"``, for cameras of another size.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                "mean and std must have three entries and std must be positive, got "
                f"mean={self.mean}, std={self.std}. Copy them from the preprocessor_config.json "
                "of the checkpoint."
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                "interpolation must be 'bilinear' or 'bicubic', got "
                f"{self.interpolation!r}. Bicubic is what most vision towers were trained with."
            )


class VLABackbone(nn.Module):
    """A transformers image-text model, seen as three functions.

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
        """Return the height and width the vision tower wants for cameras of ``camera_size``."""
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
    def vision_model(self) -> nn.Module:
        """The vision tower, which ``freeze_vision`` freezes."""
        return getattr(self.model, self.vision_name)

    @property
    def language_model(self) -> nn.Module:
        """The decoder, which ``freeze_language`` freezes."""
        return getattr(self.model, self.language_name)

    @abstractmethod
    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn normalised pixels ``[N, 3, height, width]`` into stream tokens ``[N, T, D]``."""

    def embed_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up text tokens ``[B, L]`` as stream tokens ``[B, L, D]``.

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
        """Run the language model over a whole sequence at once.

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

    def image_positions(self, start: int) -> tuple[torch.Tensor, int]:
        """Return positions ``[axes, T]`` of one image from ``start`` on, and the next free one."""
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
