# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""pi0.5 as a velocity: pi0 with an expert that the time modulates, and the state in the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from torchrl_dvla.modules.flow_network import Prefix
from torchrl_dvla.modules.gradient_checkpointing import call_layer
from torchrl_dvla.modules.pi0 import Pi0

if TYPE_CHECKING:
    from transformers import PI0ForConditionalGeneration

__all__ = ["AdaptiveRMSNorm", "Pi05", "state_words"]


class Pi05(Pi0):
    """Adapter of pi0.5, built of the parts of transformers' pi0.

    It differs from pi0 in three things: the expert's norms are :class:`AdaptiveRMSNorm`, through
    which it is told the time; the expert reads action tokens alone; the state stands in the prompt
    (:func:`state_words`).

    Args:
        model (PI0ForConditionalGeneration): a pi0 of its sizes, whose expert is changed in place;
            its norms and the time's layers start anew.

    Reference:
        Physical Intelligence, "pi0.5: a Vision-Language-Action Model with Open-World
        Generalization", 2025, https://arxiv.org/abs/2504.16054.
    """

    template: ClassVar[str] = "Task: {instruction}, State: {state};\nAction: "
    scaling: ClassVar[Literal["standard", "range"]] = "range"

    def __init__(self, model: PI0ForConditionalGeneration) -> None:
        super().__init__(model)
        expert, width = model.model.dit, self.hidden_size
        eps = float(self.config.dit_config.rms_norm_eps)
        for layer in expert.layers:
            layer.input_layernorm = AdaptiveRMSNorm(width, eps)
            layer.post_attention_layernorm = AdaptiveRMSNorm(width, eps)
        expert.norm = AdaptiveRMSNorm(width, eps)
        model.embed_action_time = _ActionTimeEmbedding(model.embed_action_time, width)

    def velocity(
        self, prefix: Prefix, x: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, condition = self.model.embed_action_time(x, time)
        hidden = tokens.to(self.dtype)
        expert = self.model.model.dit
        num_tokens = x.shape[1]
        positions = prefix.mask.sum(-1, keepdim=True) + torch.arange(num_tokens, device=x.device)
        rotary = expert.rotary_emb(hidden, positions)
        # Every action token sees the prefix, its padding apart, and all action tokens.
        seen = F.pad(prefix.mask, (0, num_tokens), value=1).bool()[:, None, None]
        seen = seen.expand(-1, -1, num_tokens, -1)
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=x.device)
        bias = bias.masked_fill_(~seen, torch.finfo(self.dtype).min)
        for layer in expert.layers:

            def block(
                hidden: torch.Tensor, condition: torch.Tensor, layer: Any = layer
            ) -> torch.Tensor:
                normed, gate = layer.input_layernorm(hidden, condition)
                attended, _ = layer.self_attn(
                    normed,
                    position_embeddings=rotary,
                    attention_mask=bias,
                    past_key_values=prefix.fresh_cache(),
                )
                hidden = hidden + gate * attended
                normed, gate = layer.post_attention_layernorm(hidden, condition)
                return hidden + gate * layer.mlp(normed)

            hidden = call_layer(layer, block, hidden, condition)
        hidden, _ = expert.norm(hidden, condition)
        head = self.model.action_out_proj
        hidden = hidden.to(head.weight.dtype)
        return head(hidden), hidden


class AdaptiveRMSNorm(nn.Module):
    """RMS norm with a scale, a shift and the gate of the residual that it leads to, of a condition.

    It starts as an ordinary norm with an open gate. Like all norms of pi0.5 it is float32.

    Args:
        size (int): size ``W`` of vectors and condition.
        eps (float): added to the mean square.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.pi05 import AdaptiveRMSNorm
        >>> norm = AdaptiveRMSNorm(2, eps=0.0)
        >>> normed, gate = norm(torch.tensor([[[3.0, 3.0]]]), torch.zeros(1, 2))
        >>> normed.tolist(), gate.tolist()
        ([[[1.0, 1.0]]], [[[1.0, 1.0]]])
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(size, 3 * size, dtype=torch.float32)
        with torch.no_grad():
            self.dense.weight.zero_()
            self.dense.bias.copy_(torch.tensor([0.0, 0.0, 1.0]).repeat_interleave(size))

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed vectors ``[B, H, W]`` and gates ``[B, 1, W]``, given conditions ``[B, W]``."""
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, -1)
        full = x.float()
        normed = full * (full.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normed * (1 + scale) + shift).to(x.dtype), gate.to(x.dtype)


class _ActionTimeEmbedding(nn.Module):
    """Tokens of noisy actions, and the condition that tells the expert the time."""

    def __init__(self, pi0: nn.Module, width: int) -> None:
        super().__init__()
        self.sinusoid_embeds: nn.Module = pi0.get_submodule("sinusoid_embeds")
        self.action_in_proj: nn.Module = pi0.get_submodule("action_in_proj")
        self.time_mlp_in = nn.Linear(width, width, dtype=torch.float32)
        self.time_mlp_out = nn.Linear(width, width, dtype=torch.float32)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        waves = self.sinusoid_embeds(time).to(self.time_mlp_in.weight.dtype)
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(waves))))
        return self.action_in_proj(x), condition


def state_words(state: torch.Tensor) -> list[str]:
    """States as words: of each number the one of 256 bins of [-1, 1] that it falls in.

    Args:
        state (torch.Tensor): standardised states ``[B, S]``; below -1 is bin -1.

    Returns:
        One string a row.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.modules.pi05 import state_words
        >>> state_words(torch.tensor([[-1.0, 0.0, 0.999], [-1.1, -0.9922, 3.0]]))
        ['0 128 255', '-1 0 255']
    """
    if state.is_meta:  # sizes without numbers
        return [" ".join(["128"] * state.shape[-1])] * len(state)
    edges = torch.linspace(-1, 1, 257, dtype=torch.float64, device=state.device)[:-1]
    bins = torch.bucketize(state.double(), edges, right=True) - 1
    return [" ".join(map(str, row)) for row in bins.tolist()]
