# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""pi0 as a velocity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchrl_dvla.modules.flow_network import FlowNetwork, Prefix, TimeWaves, pad_text

if TYPE_CHECKING:
    from typing import Self

    from transformers import PI0ForConditionalGeneration

__all__ = ["Pi0"]


class Pi0(FlowNetwork):
    """Adapter of transformers' pi0: PaliGemma reads the prefix, an action expert gives velocities.

    The expert sees the prefix, the state token sees no action token, action tokens see each other.

    Args:
        model (PI0ForConditionalGeneration): the model.

    Reference:
        Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control", 2024,
        https://arxiv.org/abs/2410.24164.
    """

    def __init__(self, model: PI0ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        # Its input is projected actions, never token ids: 263 million parameters of the real one.
        model.model.dit.embed_tokens = None
        config = model.config
        model.embed_action_time.sinusoid_embeds = TimeWaves(
            config.dit_config.hidden_size, (config.min_period, config.max_period)
        )
        # Of the prefix, keys and values are read: the rest of the last layer gets no gradient.
        language_model = model.model.vlm.language_model
        last = language_model.layers[-1]
        for unread in (
            last.self_attn.q_proj,
            last.self_attn.o_proj,
            last.mlp,
            last.post_attention_layernorm,
            language_model.norm,
        ):
            unread.requires_grad_(False)

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, dtype: torch.dtype) -> Self:
        from transformers import PI0Config, PI0ForConditionalGeneration

        config = PI0Config.from_dict({**data, "model_type": PI0Config.model_type})
        model = PI0ForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
        model.embed_action_time.float()
        model.action_out_proj.float()
        return cls(model)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def words(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def freeze_prefix(self) -> None:
        self.model.model.vlm.requires_grad_(False)

    def prefix(
        self, pixels: torch.Tensor, text_ids: list[torch.Tensor], state: torch.Tensor
    ) -> Prefix:
        pi0, vlm = self.model.model, self.model.model.vlm
        num_rows, num_cameras = pixels.shape[:2]
        patch_size = int(vlm.config.vision_config.patch_size)
        num_image_tokens = num_cameras * (pixels.shape[-1] // patch_size) ** 2
        text, text_mask = pad_text(text_ids, pixels.device)
        image_ids = text.new_full((num_rows, num_image_tokens), vlm.config.image_token_id)
        ids = torch.cat([image_ids, text], 1)
        mask = torch.cat([torch.ones_like(image_ids), text_mask], 1)
        is_camera = torch.ones(num_rows, num_cameras, dtype=torch.bool, device=pixels.device)
        cache = vlm(
            inputs_embeds=pi0.embed_prefix(ids, pixels, is_camera),
            attention_mask=mask,
            position_ids=mask.cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(ids),  # all of it sees all of it
            use_cache=True,
        ).past_key_values
        return Prefix(cache, mask, state)

    def velocity(
        self, prefix: Prefix, x: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.model.embed_action_time(prefix.state, x, time)
        hidden = self.model.model(
            action_embeds=tokens.to(self.dtype),
            attention_mask=prefix.mask,
            past_key_values=prefix.fresh_cache(),
        ).last_hidden_state
        head = self.model.action_out_proj
        hidden = hidden[:, -x.shape[1] :].to(head.weight.dtype)
        return head(hidden), hidden
