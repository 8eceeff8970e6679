# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The layout of one decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey

from torchrl_dvla.data import schema
from torchrl_dvla.memory import RowLayout

__all__ = ["decision_layout"]


def decision_layout(
    observation: Mapping[NestedKey, tuple[Sequence[int], torch.dtype]],
    *,
    chunk_size: int,
    action_dim: int,
) -> RowLayout:
    """The row of one decision, as :mod:`torchrl_dvla.data.schema` describes it.

    Args:
        observation (Mapping): shape and dtype of every observation tensor, by full key.

    Keyword Args:
        chunk_size (int): env steps of a chunk.
        action_dim (int): dimension ``A`` of an action.

    Returns:
        RowLayout: the layout; observations come first.

    Raises:
        ValueError: if a size is not positive or an observation has no static shape.

    Examples:
        >>> image = {("observation", "image"): ((3, 8, 8), torch.uint8)}
        >>> layout = decision_layout(image, chunk_size=2, action_dim=3)
        >>> layout["vla_action", "tokens"]
        (torch.Size([2, 3]), torch.int64)
    """
    if chunk_size < 1 or action_dim < 1:
        raise ValueError(
            f"chunk_size and action_dim must be at least 1, got {chunk_size} and {action_dim}. "
            "Take them from the policy."
        )
    chunk, one = (chunk_size, action_dim), (1,)
    fields: dict[NestedKey, tuple[Sequence[int], torch.dtype]] = dict(observation)
    fields |= {
        schema.INSTRUCTION_ID_KEY: (one, torch.int64),
        schema.ACTION_TOKENS_KEY: (chunk, torch.int64),
        schema.ACTION_CHUNK_KEY: (chunk, torch.float32),
        schema.SAMPLE_LOG_PROB_KEY: (chunk, torch.float32),
        schema.ACTION_IS_PAD_KEY: ((chunk_size,), torch.bool),
        schema.POLICY_VERSION_KEY: (one, torch.int64),
        schema.GROUP_ID_KEY: (one, torch.int64),
        schema.ROLLOUT_ID_KEY: (one, torch.int64),
        schema.DECISION_INDEX_KEY: (one, torch.int64),
        schema.ADVANTAGE_KEY: (one, torch.float32),
        schema.REWARD_KEY: (one, torch.float32),
    }
    flags = (schema.DONE_KEY, schema.TERMINATED_KEY, schema.TRUNCATED_KEY, schema.SUCCESS_KEY)
    return RowLayout(fields | dict.fromkeys(flags, (one, torch.bool)))
