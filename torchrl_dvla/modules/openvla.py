# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA-OFT: two fused vision towers before a Llama 2, of which a chunk is read at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchrl_dvla.modules.backbones import PromptStyle, VLABackbone, register_backbone

__all__ = ["L1ActionHead", "OpenVLABackbone", "OpenVLANetwork"]

#: Llama's tokens around the places of the actions: an empty word, and the end of the text.
_BEFORE, _AFTER = 29871, 2


class _Tower(nn.Module):
    """Patches ``[N, P, W]`` after the last but one of a tower's layers, without a norm."""

    def __init__(self, config: Any, layer: type[nn.Module], num_registers: int | None) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (config.image_size // patch) ** 2, width))
        self.prefix_length = 0
        if num_registers is not None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, num_registers, width))
            self.prefix_length = 1 + num_registers
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        if self.prefix_length:
            prefix = torch.cat([self.cls_token, self.reg_token], 1).expand(len(hidden), -1, -1)
            hidden = torch.cat([prefix, hidden], 1)
        for layer in self.layers:
            hidden = layer(hidden, None)
        return hidden[:, self.prefix_length :]


class _Towers(nn.Module):
    """Features of DINOv2 with registers and of SigLIP, patch by patch."""

    def __init__(self, dino: dict[str, Any], siglip: dict[str, Any]) -> None:
        super().__init__()
        from transformers import Dinov2WithRegistersConfig, SiglipVisionConfig
        from transformers.models.dinov2_with_registers import (
            modeling_dinov2_with_registers as dinov2,
        )
        from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

        # timm's activation is the exact one, also in SigLIP, which was trained with another.
        common = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "attn_implementation": "sdpa"}
        dino, num_registers = dict(dino), dino["num_registers"]
        first = Dinov2WithRegistersConfig(**dino, **common)
        self.featurizer = _Tower(first, dinov2.Dinov2WithRegistersLayer, num_registers)
        second = SiglipVisionConfig(**siglip, **common)
        self.fused_featurizer = _Tower(second, SiglipEncoderLayer, None)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        one, other = pixels.split(3, 1)
        return torch.cat([self.featurizer(one), self.fused_featurizer(other)], -1)


class _Projector(nn.Module):
    """Stream tokens of patches, by an MLP of three layers."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_size, 4 * vision_size)
        self.fc2 = nn.Linear(4 * vision_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        gelu = nn.functional.gelu
        return self.fc3(gelu(self.fc2(gelu(self.fc1(patches)))))


class OpenVLANetwork(nn.Module):
    """OpenVLA's towers, projector and language model, of the layers that transformers has.

    What no action depends on is left out: the last layer and norm of both towers, and the head over
    words.

    Args:
        config (dict): ``vision_config``, ``fused_vision_config`` and ``text_config``.

    Keyword Args:
        dtype (torch.dtype): of all parameters.
    """

    def __init__(self, config: dict[str, Any], *, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        self.config = config
        text = LlamaConfig(**config["text_config"])
        self.language_model = LlamaModel._from_config(text, dtype=dtype, attn_implementation="sdpa")
        towers = config["vision_config"], config["fused_vision_config"]
        self.vision_backbone = _Towers(*towers).to(dtype)
        vision_size = sum(tower["hidden_size"] for tower in towers)
        self.projector = _Projector(vision_size, text.hidden_size).to(dtype)

    def get_input_embeddings(self) -> nn.Embedding:
        """Embeddings of words."""
        return self.language_model.embed_tokens


class _TokenHead(nn.Module):
    """Rows of the language model's head that stand for actions."""

    def __init__(self, hidden_size: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self._shape = shape
        self.projection = nn.Linear(hidden_size, shape[-1], bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, chunk, A, V]``: as of words, each is read one place before its own."""
        logits = self.projection(hidden[:, :-2].to(self.projection.weight.dtype))
        return logits.view(len(hidden), *self._shape)


class L1ActionHead(nn.Module):
    """MLP with two residual blocks that regresses the actions of each env step.

    Args:
        hidden_size (int): width ``D`` of the token stream.

    Keyword Args:
        chunk_size (int): env steps per decision.
        action_dim (int): action dimension ``A``, and tokens that an env step has in the stream.
        mlp_size (int): width of the MLP.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.openvla import L1ActionHead
        >>> head = L1ActionHead(16, chunk_size=4, action_dim=3, mlp_size=8)
        >>> head(torch.zeros(2, 1 + 4 * 3 + 1, 16)).shape
        torch.Size([2, 4, 3])
    """

    def __init__(
        self, hidden_size: int, *, chunk_size: int, action_dim: int, mlp_size: int
    ) -> None:
        super().__init__()
        self._chunk_size = chunk_size
        self.layer_norm1 = nn.LayerNorm(action_dim * hidden_size)
        self.fc1 = nn.Linear(action_dim * hidden_size, mlp_size)
        self.mlp_resnet_blocks = nn.ModuleList(_ResidualBlock(mlp_size) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(mlp_size)
        self.fc2 = nn.Linear(mlp_size, action_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalised actions ``[B, chunk, A]`` of hidden states ``[B, chunk * A + 2, D]``."""
        steps = hidden[:, :-2].reshape(len(hidden), self._chunk_size, -1)
        inner = self.fc1(self.layer_norm1(steps.to(self.fc1.weight.dtype))).relu()
        for block in self.mlp_resnet_blocks:
            inner = block(inner)
        return self.fc2(self.layer_norm2(inner))


class _ResidualBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.ReLU())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.ffn(hidden)


@register_backbone
class OpenVLABackbone(VLABackbone):
    """Adapter of OpenVLA as OpenVLA-OFT fine-tunes it: every token sees every other one.

    The stream ends in an empty word, a zero for each action token and ``</s>``. An action token is
    read one place before its own, as the words of a language model are.

    Args:
        model (OpenVLANetwork): the network.

    Keyword Args:
        image_size (tuple of int): height and width of the images.

    Reference:
        Kim et al., "Fine-Tuning Vision-Language-Action Models: Optimizing Speed and Success", 2025.
        https://arxiv.org/abs/2502.19645
    """

    model_types = ("openvla",)
    network = OpenVLANetwork
    bidirectional_prompt = True
    prompt_sees_queries = True
    clip_state = True
    num_extra_queries = 2
    prompt_style = PromptStyle(
        instruction="In: What action should the robot take to {instruction}?\nOut:",
        lowercase=True,
    )
    vision_name = "vision_backbone"

    @classmethod
    def image_size_of(cls, config: Any, camera_size: tuple[int, int]) -> tuple[int, int]:
        size = int(config["vision_config"]["image_size"])
        return size, size

    @property
    def text_config(self) -> Any:
        return self.model.language_model.config

    @property
    def num_image_tokens(self) -> int:
        return int(self.model.vision_backbone.featurizer.pos_embed.shape[1])

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.projector(self.model.vision_backbone(pixels))

    def make_head(
        self, *, chunk_size: int, action_dim: int, vocab_size: int, tokens_per_step: int
    ) -> nn.Module:
        return _TokenHead(self.hidden_size, (chunk_size, action_dim, vocab_size))

    def queries(self, head: nn.Module, num_queries: int) -> torch.Tensor:
        device = self.model.get_input_embeddings().weight.device
        before, after = self.embed_tokens(torch.tensor([[_BEFORE], [_AFTER]], device=device))
        return torch.cat([before, before.new_zeros(num_queries, before.shape[-1]), after])
