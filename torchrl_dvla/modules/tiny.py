# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small policies: TorchRL's TinyVLA with action tokens, and sizes of what a CPU can train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.data.vla import UniformActionTokenizer
from torchrl.modules.vla import TinyVLA

from torchrl_dvla.validation import Count, Positive, check_fields

if TYPE_CHECKING:
    from transformers import PI0Config, SmolVLMConfig

__all__ = ["TinyBackboneConfig", "TinyFlowConfig", "initialize_tiny_", "tiny_token_policy"]


class _TinyStateVLA(TinyVLA):
    """TinyVLA of the state and the words, without a camera."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        del self.image_encoder  # its lazy layers would never be made

    def _update_keys(self) -> None:
        super()._update_keys()
        self.in_keys.remove(self._tensor_keys.image)

    def _features(self, tensordict: TensorDictBase) -> torch.Tensor:
        state = self._get_state(tensordict).float()
        batch_shape = state.shape[:-1]
        words = self._instruction_strings(tensordict, batch_shape.numel())
        text = self.text_embedding(self._hash_text(words, state.device)).view(*batch_shape, -1)
        features: torch.Tensor = self.trunk(torch.cat([self.state_encoder(state), text], -1))
        return features


def tiny_token_policy(
    action_dim: int,
    chunk_size: int,
    *,
    vocab_size: int = 16,
    use_image: bool = True,
    **kwargs: Any,
) -> TinyVLA:
    """TorchRL's :class:`~torchrl.modules.vla.TinyVLA` as an action-token policy for GRPO.

    It samples one of ``vocab_size`` tokens for each action dimension, uniform bins over [-1, 1],
    and writes tokens, their log-probabilities and the action chunk ``[*B, chunk_size, action_dim]``
    below ``"vla_action"``. Its lazy layers are made by the first call.

    Args:
        action_dim (int): action dimension ``A``.
        chunk_size (int): env steps per decision.

    Keyword Args:
        vocab_size (int): action tokens per dimension. Defaults to ``16``.
        use_image (bool): read ``("observation", "image")``, by a small CNN. Defaults to ``True``.
        **kwargs: further arguments of ``TinyVLA``, e.g. ``hidden_dim``; ``use_state=False`` for an
            environment without a state.

    Returns:
        The policy.

    Raises:
        ValueError: if it would read neither image nor state.

    Examples:
        >>> from tensordict import NonTensorStack, TensorDict
        >>> from torchrl_dvla.modules import tiny_token_policy
        >>> policy = tiny_token_policy(2, 4)
        >>> td = TensorDict(
        ...     {
        ...         "observation": {
        ...             "image": torch.zeros(3, 3, 16, 16, dtype=torch.uint8),
        ...             "state": torch.zeros(3, 5),
        ...         },
        ...         "language_instruction": NonTensorStack("push", "pull", "push"),
        ...     },
        ...     batch_size=[3],
        ... )
        >>> action = policy(td)["vla_action"]
        >>> action["tokens"].shape, action["log_probs"].shape, action["chunk"].shape
        (torch.Size([3, 4, 2]), torch.Size([3, 4, 2]), torch.Size([3, 4, 2]))
    """
    if not use_image and not kwargs.get("use_state", True):
        raise ValueError(
            "use_image or use_state must be True, got neither. A policy has to observe something."
        )
    settings: dict[str, Any] = {
        "action_head": "tokens",
        "action_tokenizer": UniformActionTokenizer(vocab_size, low=-1.0, high=1.0),
        "output_mode": "both",
        "log_probs_mode": "token",
        "return_vla_action_container": False,
    }
    return (TinyVLA if use_image else _TinyStateVLA)(
        action_dim=action_dim, chunk_size=chunk_size, vocab_size=vocab_size, **settings | kwargs
    )


@dataclass(frozen=True)
class TinyBackboneConfig:
    """Sizes of a SmolVLM-type backbone that trains on two CPU cores.

    It is the real architecture (SigLIP tower with learned positions, pixel shuffle, Llama decoder)
    with small numbers. The pixel shuffle moves ``scale_factor**2`` neighbouring patches into the
    channels of one token, so that the decoder reads a quarter of the tokens and loses no location.

    Args:
        image_size (int): side of the square images.
        patch_size (int): side of a patch.
        vision_size (int): width of the vision tower.
        vision_layers (int): depth of the vision tower.
        text_size (int): width of the decoder.
        text_layers (int): depth of the decoder.
        head_size (int): width of an attention head, in both.
        mlp_ratio (float): width of the MLPs over that of the stream; Llama's gated MLPs get two
            thirds of it, which costs the same.
        scale_factor (int): side of the patch squares that become one token.

    Examples:
        >>> from torchrl_dvla.modules import TinyBackboneConfig
        >>> config = TinyBackboneConfig().to_transformers(num_words=100)
        >>> config.model_type, config.vision_config.image_size
        ('smolvlm', 128)
    """

    image_size: Count = 128
    patch_size: Count = 16
    vision_size: Count = 128
    vision_layers: Count = 3
    text_size: Count = 128
    text_layers: Count = 2
    head_size: Count = 32
    mlp_ratio: Positive = 3.0
    scale_factor: Count = 2

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("vision_size", "text_size"):
            if getattr(self, name) % self.head_size:
                raise ValueError(
                    f"{name} must be a multiple of head_size={self.head_size}, got "
                    f"{getattr(self, name)}."
                )
        if self.image_size % (self.patch_size * self.scale_factor):
            raise ValueError(
                "image_size must be a multiple of patch_size * scale_factor="
                f"{self.patch_size * self.scale_factor}, got {self.image_size}. Change patch_size "
                "or the camera's resolution."
            )

    def to_transformers(self, num_words: int) -> SmolVLMConfig:
        """Transformers config of these sizes.

        Args:
            num_words (int): size of the instruction vocabulary.

        Returns:
            A ``SmolVLMConfig``.
        """
        from transformers import SmolVLMConfig

        return SmolVLMConfig(
            vision_config={
                "hidden_size": self.vision_size,
                "intermediate_size": int(self.vision_size * self.mlp_ratio),
                "num_hidden_layers": self.vision_layers,
                "num_attention_heads": self.vision_size // self.head_size,
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                # A third of the time of the tanh approximation on a CPU, and no worse.
                "hidden_act": "gelu",
            },
            text_config={
                "model_type": "llama",
                "vocab_size": num_words,
                "hidden_size": self.text_size,
                "intermediate_size": int(self.text_size * self.mlp_ratio * 2 / 3),
                "num_hidden_layers": self.text_layers,
                "num_attention_heads": self.text_size // self.head_size,
                "num_key_value_heads": self.text_size // self.head_size,
                "max_position_embeddings": 1024,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": None,
                "rms_norm_eps": 1e-5,
            },
            scale_factor=self.scale_factor,
            image_token_id=0,
            pad_token_id=0,
        )


@dataclass(frozen=True)
class TinyFlowConfig:
    """Sizes of a pi0, pi0.5 or SmolVLA that trains on two CPU cores.

    It is the real architecture with small numbers: a vision-language model, and a language model as
    action expert that attends to it layer by layer.

    Args:
        image_size (int): side of the square images.
        patch_size (int): side of a patch; each becomes a token, in SmolVLA four become one.
        vision_size (int): width of the vision tower.
        vision_layers (int): depth of the vision tower.
        text_size (int): width of the language model.
        expert_size (int): width of the action expert.
        layers (int): depth of language model and expert.
        head_size (int): width of an attention head, in all three.
        mlp_ratio (float): width of the MLPs over that of the stream; gated MLPs get two thirds of
            it, which costs the same.
        model_type (str): ``"pi0"``, ``"pi05"`` or ``"smolvla"``.

    Examples:
        >>> from torchrl_dvla.modules.tiny import TinyFlowConfig
        >>> config = TinyFlowConfig().to_transformers(100, chunk_size=8, max_action_dim=7)
        >>> config.model_type, config.dit_config.num_hidden_layers
        ('pi0', 2)
    """

    image_size: Count = 64
    patch_size: Count = 16
    vision_size: Count = 128
    vision_layers: Count = 3
    text_size: Count = 128
    expert_size: Count = 128
    layers: Count = 2
    head_size: Count = 32
    mlp_ratio: Positive = 3.0
    model_type: Literal["pi0", "pi05", "smolvla"] = "pi0"

    def __post_init__(self) -> None:
        check_fields(self)
        for name, divisor in (
            ("vision_size", "head_size"),
            ("text_size", "head_size"),
            ("image_size", "patch_size"),
        ):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"{name} must be a multiple of {divisor}={getattr(self, divisor)}, got "
                    f"{getattr(self, name)}."
                )

    def to_transformers(self, num_words: int, **kwargs: Any) -> PI0Config:
        """Transformers config of these sizes.

        Args:
            num_words (int): size of the instruction vocabulary.

        Keyword Args:
            **kwargs: further fields of ``PI0Config``: ``chunk_size``, ``max_action_dim`` etc.

        Returns:
            A ``PI0Config``, for all families: transformers has no others.
        """
        from transformers import PI0Config

        if self.model_type == "smolvla":
            return self._smolvla(num_words, **kwargs)
        gemma = {
            "model_type": "gemma",
            "vocab_size": num_words,
            "num_hidden_layers": self.layers,
            # Attention is joint: expert and language model have the same heads.
            "num_attention_heads": self.text_size // self.head_size,
            "num_key_value_heads": 1,
            "head_dim": self.head_size,
        }
        text, expert = (
            {**gemma, "hidden_size": size, "intermediate_size": int(size * self.mlp_ratio * 2 / 3)}
            for size in (self.text_size, self.expert_size)
        )
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": self.vision_size,
            "intermediate_size": int(self.vision_size * self.mlp_ratio),
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_size // self.head_size,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_act": "gelu",
            "vision_use_head": False,
        }
        return PI0Config(
            vlm_config={
                "model_type": "paligemma",
                "text_config": text,
                "vision_config": vision,
                "projection_dim": self.text_size,
                "image_token_id": num_words,  # no word's
            },
            dit_config=expert,
            **kwargs,
        )

    def _smolvla(self, num_words: int, **kwargs: Any) -> PI0Config:
        from transformers import PI0Config

        names = ("image_size", "patch_size", "vision_size", "vision_layers", "text_size")
        sizes = {name: getattr(self, name) for name in (*names, "head_size", "mlp_ratio")}
        vlm = TinyBackboneConfig(text_layers=self.layers, **sizes).to_transformers(num_words)
        expert = {
            **vlm.text_config.to_dict(),
            "hidden_size": self.expert_size,
            "intermediate_size": int(self.expert_size * self.mlp_ratio * 2 / 3),
            "head_dim": self.head_size,
        }
        return PI0Config(vlm_config=vlm.to_dict(), dit_config=expert, **kwargs)


@torch.no_grad()
def initialize_tiny_(model: nn.Module, words: nn.Embedding) -> None:
    """Initialisation of a tiny transformer for training from scratch.

    The family's own initialisation (normal, 0.02 everywhere) suits models that are a hundred times
    wider: here it would drown position and word identity in the first residual sums. So: linear
    layers keep the variance of their input, those that write to the residual stream are scaled down
    by the depth, embeddings have unit scale, and the tower's positions start as a sine table, from
    which "where" can be read linearly.

    Args:
        model (nn.Module): the model, changed in place.
        words (nn.Embedding): its embeddings of words.

    Reference:
        He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021 (sine positions of a
        tower). https://arxiv.org/abs/2111.06377
    """
    for name, module in model.named_modules():
        is_modulation = name.endswith(".dense")  # of an adaptive norm, which starts without effect
        if isinstance(module, nn.Linear | nn.Conv2d) and not is_modulation:
            std = module.weight[0].numel() ** -0.5
            stack, in_stack, _ = name.rpartition(".layers.")
            if in_stack and name.endswith(("out_proj", "o_proj", "fc2", "down_proj")):
                layers: Any = model.get_submodule(f"{stack}.layers")
                std *= (2 * len(layers)) ** -0.5
            if name.endswith("action_out_proj"):
                # Velocities of unit size would carry actions out of reach of the exploration.
                std *= 0.1
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(words.weight, std=1 / getattr(words, "scalar_embed_scale", 1.0))
    for name, module in model.named_modules():
        if name.endswith("position_embedding"):
            table = module.weight
            table.copy_(_sine_table(math.isqrt(table.shape[0]), table.shape[1]))


def _sine_table(side: int, width: int) -> torch.Tensor:
    """Sine and cosine of row and column at ``width / 4`` frequencies each, ``[side**2, width]``."""
    num_frequencies = width // 4
    frequencies = 100.0 ** -(torch.arange(num_frequencies) / num_frequencies)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    table = torch.zeros(side * side, width)
    table[:, : 4 * num_frequencies] = torch.cat([rows, columns], -1).flatten(0, 1)
    return table
