# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA-OFT with the head that regresses actions, to be evaluated."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.data.vla import VocabTailActionTokenizer

from torchrl_dvla.modules.openvla import L1ActionHead
from torchrl_dvla.modules.transformers_vla import TransformersVLA

__all__ = ["RegressionVLA"]


class RegressionVLA(TransformersVLA):
    """Vision-language-action policy whose head regresses a chunk, for greedy evaluation.

    It has no distribution: nothing can be explored, and no importance ratio be formed. It writes
    ``("vla_action", "chunk")`` ``[*B, chunk, A]`` and, for the rows of a collector,
    ``("vla_action", "log_probs")`` ``[*B, chunk]``, which are zero: the action is certain.

    Args:
        config (TransformersVLAConfig): the architecture; ``"l1_head_size"`` of its backbone is the
            width of the head, and its action tokenizer knows the statistics of the actions.

    Keyword Args:
        **kwargs: see :class:`TransformersVLA`; what is about tokens has no effect.
    """

    #: There is none: who asks for it is refused with the reason.
    get_dist: Any = None

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.action_head, self.output_mode = "continuous", "chunk"
        self._update_keys()

    def _update_keys(self) -> None:
        super()._update_keys()
        self.out_keys = [self._tensor_keys.action_chunk, self._tensor_keys.log_probs]

    def _make_head(self) -> nn.Module:
        config = self.config
        return L1ActionHead(
            self.backbone.hidden_size,
            chunk_size=config.chunk_size,
            action_dim=config.action_dim,
            mlp_size=config.backbone["l1_head_size"],
        )

    def _predict_chunk(self, tensordict: TensorDictBase) -> torch.Tensor:
        hidden, batch_shape = self._read(tensordict)
        actions = self.query_head(hidden)
        return _denormalize(actions, self.action_tokenizer).reshape(
            *batch_shape, *actions.shape[1:]
        )

    def forward(self, tensordict: TensorDictBase, **kwargs: Any) -> TensorDictBase:
        out = super().forward(tensordict, **kwargs)
        chunk = out.get(self.tensor_keys.action_chunk)
        return out.set(self.tensor_keys.log_probs, torch.zeros_like(chunk[..., 0]))


def _denormalize(actions: torch.Tensor, rule: Any) -> torch.Tensor:
    """Actions of [-1, 1] in the robot's units, by what a tokenizer does once it has decoded."""
    assert isinstance(rule, VocabTailActionTokenizer)
    low, high = rule.norm_low.to(actions.device), rule.norm_high.to(actions.device)
    restored = 0.5 * (actions.double() + 1.0) * (high - low + 1e-8) + low
    gripper = torch.where(actions > rule.gripper_binarize_threshold, -1.0, 1.0)
    return torch.where(rule.norm_mask.to(actions.device), restored, gripper).to(actions.dtype)
