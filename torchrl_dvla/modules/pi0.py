# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""pi0 as a velocity: a prefix that is computed once a decision, and an expert that reads it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from torchrl_dvla.modules.backbones import PixelStyle

if TYPE_CHECKING:
    from transformers import DynamicCache, PI0ForConditionalGeneration

__all__ = ["Pi0", "Prefix"]


class Prefix(NamedTuple):
    """What every pass of the expert reads: keys and values of images and instruction, and state."""

    cache: DynamicCache
    #: ``[B, L]``, 1 = a token, 0 = padding.
    mask: torch.Tensor
    #: Standardised, padded states ``[B, max_state_dim]``.
    state: torch.Tensor

    def fresh_cache(self) -> DynamicCache:
        """The cache for one pass, to whose layers the expert appends its own keys and values."""
        # To crop them off again would leave views behind that hold the graph of the pass.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache


class Pi0(nn.Module):
    """Adapter of transformers' pi0: PaliGemma reads the prefix, an action expert gives velocities.

    The expert sees the prefix, the state token sees no action token, action tokens see each other.

    Args:
        model (PI0ForConditionalGeneration): the model.

    Reference:
        Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control", 2024,
        https://arxiv.org/abs/2410.24164.
    """

    #: Prompt after the images, and after a ``<bos>`` where the tokenizer knows one.
    template: ClassVar[str] = "{instruction}\n"
    pixel_style: ClassVar[PixelStyle] = PixelStyle(interpolation="bilinear", pad=True)

    def __init__(self, model: PI0ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        # Its input is projected actions, never token ids: 263 million parameters of the real one.
        model.model.dit.embed_tokens = None
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
    def from_dict(cls, data: dict[str, Any], *, dtype: torch.dtype) -> Pi0:
        """Adapter of a model with random weights.

        Args:
            data (dict): ``to_dict()`` of a ``PI0Config``.

        Keyword Args:
            dtype (torch.dtype): of both transformers; projections of state, actions and velocities
                are float32.
        """
        from transformers import PI0Config, PI0ForConditionalGeneration

        config = PI0Config.from_dict({**data, "model_type": PI0Config.model_type})
        model = PI0ForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
        model.embed_action_time.float()
        model.action_out_proj.float()
        return cls(model)

    # -- sizes -------------------------------------------------------------
    @property
    def config(self) -> Any:
        """The transformers config: ``chunk_size``, ``max_action_dim``, ``max_state_dim`` etc."""
        return self.model.config

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the vision tower takes."""
        size = int(self.config.vlm_config.vision_config.image_size)
        return size, size

    @property
    def hidden_size(self) -> int:
        """Width ``W`` of the expert."""
        return int(self.config.dit_config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of both transformers."""
        return self.model.get_input_embeddings().weight.dtype

    def freeze_prefix(self) -> None:
        """Exclude what reads images and instruction from training."""
        self.model.model.vlm.requires_grad_(False)

    # -- the two passes ----------------------------------------------------
    def prefix(
        self, pixels: torch.Tensor, text_ids: list[torch.Tensor], state: torch.Tensor
    ) -> Prefix:
        """One pass of PaliGemma over images and instruction.

        Args:
            pixels (torch.Tensor): normalised images ``[B, cameras, 3, height, width]``.
            text_ids (list of torch.Tensor): token ids of each row's prompt after the images.
            state (torch.Tensor): standardised, padded states ``[B, max_state_dim]``.

        Returns:
            The :class:`Prefix` of the batch.
        """
        pi0, vlm = self.model.model, self.model.model.vlm
        num_rows, num_cameras = pixels.shape[:2]
        patch_size = int(vlm.config.vision_config.patch_size)
        num_image_tokens = num_cameras * (pixels.shape[-1] // patch_size) ** 2
        image_ids = torch.full((num_rows, num_image_tokens), vlm.config.image_token_id)
        text, text_mask = (
            nn.utils.rnn.pad_sequence(rows, batch_first=True)
            for rows in (text_ids, [torch.ones_like(ids) for ids in text_ids])
        )
        ids = torch.cat([image_ids, text], 1).to(pixels.device)
        mask = torch.cat([torch.ones_like(image_ids), text_mask], 1).to(pixels.device)
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
        """One pass of the action expert.

        Args:
            prefix (Prefix): of the batch; it is the same afterwards.
            x (torch.Tensor): noisy action chunks ``[B, H, max_action_dim]``.
            time (torch.Tensor): of each row ``[B]``, 1 = noise.

        Returns:
            Velocities ``[B, H, max_action_dim]`` and the expert's last hidden states ``[B, H, W]``,
            float32.
        """
        tokens = self.model.embed_action_time(prefix.state, x, time)
        hidden = self.model.model(
            action_embeds=tokens.to(self.dtype),
            attention_mask=prefix.mask,
            past_key_values=prefix.fresh_cache(),
        ).last_hidden_state
        head = self.model.action_out_proj
        hidden = hidden[:, -x.shape[1] :].to(head.weight.dtype)
        return head(hidden), hidden
