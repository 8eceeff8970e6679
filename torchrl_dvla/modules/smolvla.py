# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""SmolVLA as a velocity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from torchrl_dvla.modules.backbones import PixelStyle, SmolVLMBackbone
from torchrl_dvla.modules.flow_network import FlowNetwork, Prefix, TimeWaves, pad_text
from torchrl_dvla.modules.gradient_checkpointing import call_layer

if TYPE_CHECKING:
    from typing import Self

    from transformers import PI0Config

__all__ = ["SmolVLA"]

#: Every second layer of the expert, from the first on, attends to itself beside the prefix.
_SELF_ATTENTION_EVERY = 2


class SmolVLA(FlowNetwork):
    """Adapter of SmolVLA, built of transformers' SmolVLM and Llama.

    The first layers of SmolVLM read images, instruction and state (a token after them, which they
    do not see). In even layers of the expert, an action token attends to the prefix and to action
    tokens up to itself; in odd layers to the prefix alone, through projections of its keys and
    values.

    Args:
        config (PI0Config): with a ``SmolVLMConfig`` of as many layers as are used, and a
            ``LlamaConfig`` with the same heads for the expert.

    Keyword Args:
        dtype (torch.dtype): of both transformers.

    Reference:
        Shukor et al., "SmolVLA: A Vision-Language-Action Model for Affordable and Efficient
        Robotics", 2025, https://arxiv.org/abs/2506.01844.
    """

    pixel_style: ClassVar[PixelStyle] = PixelStyle(interpolation="bilinear", padding="top_left")

    def __init__(self, config: PI0Config, *, dtype: torch.dtype) -> None:
        from transformers import AutoModel

        super().__init__()
        self._config = config
        vlm, self.expert = (
            AutoModel.from_config(part, dtype=dtype, attn_implementation="sdpa")
            for part in (config.vlm_config, config.dit_config)
        )
        self.vlm = SmolVLMBackbone(vlm, image_size=self.image_size)
        self.expert.embed_tokens = None  # its input is projected actions
        attention = vlm.text_model.layers[0].self_attn
        size = attention.k_proj.out_features
        for layer in self._cross_layers():
            for name in ("k_proj", "v_proj"):
                setattr(layer.self_attn, name, nn.Linear(size, size, bias=False, dtype=dtype))
        width, action_dim = self.hidden_size, config.max_action_dim
        self.state_proj = nn.Linear(config.max_state_dim, self.vlm.hidden_size)
        self.action_in_proj = nn.Linear(action_dim, width)
        self.action_out_proj = nn.Linear(width, action_dim)
        self.time_waves = TimeWaves(width, (config.min_period, config.max_period))
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        # Of the prefix, keys and values are read: the rest of the last layer gets no gradient.
        last = vlm.text_model.layers[-1]
        for unread in (
            last.self_attn.q_proj,
            last.self_attn.o_proj,
            last.mlp,
            last.post_attention_layernorm,
            vlm.text_model.norm,
        ):
            unread.requires_grad_(False)

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, dtype: torch.dtype) -> Self:
        from transformers import PI0Config

        return cls(PI0Config.from_dict({**data, "model_type": PI0Config.model_type}), dtype=dtype)

    @property
    def config(self) -> Any:
        return self._config

    @property
    def words(self) -> nn.Embedding:
        return self.vlm.model.get_input_embeddings()

    def _cross_layers(self) -> list[nn.Module]:
        layers = enumerate(self.expert.layers)
        return [layer for i, layer in layers if i % _SELF_ATTENTION_EVERY]

    def freeze_prefix(self) -> None:
        self.vlm.requires_grad_(False)
        self.state_proj.requires_grad_(False)  # else its gradient would pass through all of it

    # -- the two passes ----------------------------------------------------
    def prefix(
        self, pixels: torch.Tensor, text_ids: list[torch.Tensor], state: torch.Tensor
    ) -> Prefix:
        from transformers import DynamicCache

        num_rows = len(pixels)
        text, text_mask = pad_text(text_ids, pixels.device)
        images = self.vlm.embed_images(pixels.flatten(0, 1))
        images = images.reshape(num_rows, -1, images.shape[-1])
        # Both at the scale that PaliGemma has, with which SmolVLA was trained.
        seen_by_all = torch.cat([images, self.vlm.embed_tokens(text)], 1) * images.shape[-1] ** 0.5
        state_token = self.state_proj(state)[:, None].to(self.dtype)
        hidden = torch.cat([seen_by_all, state_token], 1)
        mask = torch.cat(
            [text_mask.new_ones(images.shape[:2]), text_mask, text_mask.new_ones(num_rows, 1)], 1
        )
        length = mask.shape[1]
        seen = mask.bool()[:, None, None].repeat(1, 1, length, 1)
        seen[:, :, :-1, -1] = False  # nobody but the state token itself sees it
        bias, cache = self._bias(seen), DynamicCache()
        rotary = self.expert.rotary_emb(hidden, mask.cumsum(-1) - 1)
        for layer in self.vlm.language_model.layers:
            hidden = layer(
                hidden, attention_mask=bias, position_embeddings=rotary, past_key_values=cache
            )
        return Prefix(cache, mask, state)

    def velocity(
        self, prefix: Prefix, x: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        actions = self.action_in_proj(x)
        waves = self.time_waves(time)[:, None].expand_as(actions).to(actions.dtype)
        tokens = F.silu(self.action_time_mlp_in(torch.cat([actions, waves], -1)))
        hidden = self.action_time_mlp_out(tokens).to(self.dtype)

        num_rows, num_tokens = x.shape[:2]
        steps = torch.arange(num_tokens, device=x.device).expand(num_rows, -1)
        positions = prefix.mask.sum(-1, keepdim=True) + steps
        seen = prefix.mask.bool()[:, None, None].expand(-1, -1, num_tokens, -1)
        earlier = (steps[:, :, None] >= steps[:, None])[:, None]
        bias_of_prefix, bias = self._bias(seen), self._bias(torch.cat([seen, earlier], -1))
        rotary = self.expert.rotary_emb(hidden, positions)
        rotary_from_zero = self.expert.rotary_emb(hidden, steps)
        for i, layer in enumerate(self.expert.layers):

            def block(hidden: torch.Tensor, i: int = i, layer: Any = layer) -> torch.Tensor:
                normed = layer.input_layernorm(hidden)
                if i % _SELF_ATTENTION_EVERY:
                    cached = prefix.cache.layers[i]
                    attended = _cross_attention(
                        layer.self_attn, normed, cached.keys, cached.values, rotary_from_zero,
                        bias_of_prefix,
                    )  # fmt: skip
                else:
                    attended, _ = layer.self_attn(
                        normed,
                        position_embeddings=rotary,
                        attention_mask=bias,
                        past_key_values=prefix.fresh_cache(),
                    )
                hidden = hidden + attended
                return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

            hidden = call_layer(layer, block, hidden)
        hidden = self.expert.norm(hidden).to(self.action_out_proj.weight.dtype)
        return self.action_out_proj(hidden), hidden

    def _bias(self, seen: torch.Tensor) -> torch.Tensor:
        """What is added to attention scores, of what ``seen`` ``[B, 1, queries, keys]`` says."""
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return bias.masked_fill_(~seen, torch.finfo(self.dtype).min)


def _cross_attention(
    attention: Any,
    normed: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor,
) -> torch.Tensor:
    """Attention to projections of the prefix's keys and values ``[B, heads, L, head_dim]``."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def heads(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (-1, keys.shape[-1])).transpose(1, 2)

    query = heads(attention.q_proj(normed))
    query, _ = apply_rotary_pos_emb(query, query, *rotary)
    key, value = (
        heads(project(cached.transpose(1, 2).flatten(2)))
        for project, cached in ((attention.k_proj, keys), (attention.v_proj, values))
    )
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
    return attention.o_proj(attended.transpose(1, 2).flatten(2))
