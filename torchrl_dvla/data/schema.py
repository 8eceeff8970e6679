# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Keys of one decision.

TorchRL's canonical VLA schema (:mod:`torchrl.data.vla`) names what a policy reads and writes. This
module adds what asynchronous, group-relative training needs to know about a decision besides: who
took it, under which weights, and for which group. A *row* is one decision; ``A`` is the action
dimension, ``chunk`` the chunk size, ``S`` the proprioception size.

=================================  =======  ============  ==========================================
key                                dtype    shape         written by
=================================  =======  ============  ==========================================
``("observation", "image")``       uint8    [3, H, W]     env worker
``("observation", "state")``       float32  [S]           env worker
``"instruction_id"``               int64    [1]           collector (strings live in a side table)
``("vla_action", "tokens")``       int64    [chunk, A]    inference lane
``("vla_action", "chunk")``        float32  [chunk, A]    inference lane
``("vla_action", "log_probs")``    float32  [chunk, A]    inference lane
``"policy_version"``               int64    [1]           inference lane
``"action_is_pad"``                bool     [chunk]       env worker; True = never executed
``"group_id"``, ``"rollout_id"``   int64    [1]           collector
``"decision_index"``               int64    [1]           collector
``"advantage"``                    float32  [1]           collector, when the group is complete
``("next", "reward")``             float32  [1]           env worker
``("next", "done")`` and siblings  bool     [1]           env worker
=================================  =======  ============  ==========================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey
from torchrl.data.vla import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    ACTION_TOKENS_KEY,
    IMAGE_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    STATE_KEY,
    VLA_ACTION_KEY,
)

from torchrl_dvla.memory import RowLayout

__all__ = [
    "ACTION_CHUNK_KEY",
    "ACTION_IS_PAD_KEY",
    "ACTION_MASK",
    "ACTION_TOKENS_KEY",
    "ADVANTAGE_KEY",
    "DECISION_INDEX_KEY",
    "DONE_KEY",
    "GROUP_ID_KEY",
    "IMAGE_KEY",
    "INIT_STATE_ID_KEY",
    "INSTRUCTION_ID_KEY",
    "INSTRUCTION_KEY",
    "OBSERVATION_KEY",
    "POLICY_VERSION_KEY",
    "REWARD_KEY",
    "ROLLOUT_ID_KEY",
    "SAMPLE_LOG_PROB_KEY",
    "STATE_KEY",
    "SUCCESS_KEY",
    "TERMINATED_KEY",
    "TRUNCATED_KEY",
    "VLA_ACTION_KEY",
    "decision_layout",
]

#: Last part of the key of an action mask, TorchRL's name for it.
ACTION_MASK = "action_mask"
#: Log-probabilities of the sampled tokens under the behaviour policy.
SAMPLE_LOG_PROB_KEY: NestedKey = ("vla_action", "log_probs")
#: Version of the weights that took the decision.
POLICY_VERSION_KEY: NestedKey = "policy_version"
#: Group of rollouts that share one initial state.
GROUP_ID_KEY: NestedKey = "group_id"
ROLLOUT_ID_KEY: NestedKey = "rollout_id"
#: Position of the decision in its rollout, from 0.
DECISION_INDEX_KEY: NestedKey = "decision_index"
ADVANTAGE_KEY: NestedKey = "advantage"
#: Index of the instruction in the side table of strings.
INSTRUCTION_ID_KEY: NestedKey = "instruction_id"
#: State entry that environments read at reset: the initial state to start from, -1 or absent lets
#: them sample. Declared in ``state_spec``, for transforms pass nothing else on; a reset returns it.
INIT_STATE_ID_KEY: NestedKey = "init_state_id"
REWARD_KEY: NestedKey = ("next", "reward")
DONE_KEY: NestedKey = ("next", "done")
TERMINATED_KEY: NestedKey = ("next", "terminated")
TRUNCATED_KEY: NestedKey = ("next", "truncated")
SUCCESS_KEY: NestedKey = ("next", "success")


def decision_layout(
    observation: Mapping[NestedKey, tuple[Sequence[int], torch.dtype]],
    *,
    chunk_size: int,
    action_dim: int,
) -> RowLayout:
    """The row of one decision, as the table above describes it.

    Args:
        observation (Mapping): shape and dtype of every observation tensor, by full key.

    Keyword Args:
        chunk_size (int): env steps of a chunk.
        action_dim (int): dimension ``A`` of an action.

    Returns:
        RowLayout: the layout; observations come first.

    Raises:
        ValueError: if a size is not positive or an observation has no static shape, or a key of the
            row's own.

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
    own: dict[NestedKey, tuple[Sequence[int], torch.dtype]] = {
        INSTRUCTION_ID_KEY: (one, torch.int64),
        ACTION_TOKENS_KEY: (chunk, torch.int64),
        ACTION_CHUNK_KEY: (chunk, torch.float32),
        SAMPLE_LOG_PROB_KEY: (chunk, torch.float32),
        ACTION_IS_PAD_KEY: ((chunk_size,), torch.bool),
        POLICY_VERSION_KEY: (one, torch.int64),
        GROUP_ID_KEY: (one, torch.int64),
        ROLLOUT_ID_KEY: (one, torch.int64),
        DECISION_INDEX_KEY: (one, torch.int64),
        ADVANTAGE_KEY: (one, torch.float32),
        REWARD_KEY: (one, torch.float32),
    }
    flags = (DONE_KEY, TERMINATED_KEY, TRUNCATED_KEY, SUCCESS_KEY)
    own |= dict.fromkeys(flags, (one, torch.bool))
    if collisions := [key for key in observation if key in own]:
        raise ValueError(
            f"observation must have no key of the row's own, got {collisions}. Move them below "
            "'observation'."
        )
    return RowLayout({**observation, **own})
