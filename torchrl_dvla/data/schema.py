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
``("vla_action", "chunk")``        float32  [chunk, A]    inference lane
``("vla_action", "log_probs")``    float32  [chunk, A]    inference lane; [chunk] = one an env step
``("vla_action", "tokens")``       int64    [chunk, A]    inference lane, of a token policy
``("vla_action", ...)``            any      any           inference lane: what else a policy writes
``"policy_version"``               int64    [1]           inference lane
``"action_is_pad"``                bool     [chunk]       env worker; True = never executed
``"group_id"``, ``"rollout_id"``   int64    [1]           collector
``"decision_index"``               int64    [1]           collector
``"advantage"``                    float32  [1]           collector, when the group is complete
``("next", "reward")``             float32  [1]           env worker
``("next", "done")`` and siblings  bool     [1]           env worker
=================================  =======  ============  ==========================================

A policy says by its ``out_keys`` which of these it writes. What its log-probabilities are of,
:func:`sampled_key`, is tokens, a denoising path, or else the chunk itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from tensordict import NestedKey, unravel_key_list
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
    "ACTION_PATH_KEY",
    "ACTION_TOKENS_KEY",
    "ADVANTAGE_KEY",
    "CAMERA_KEYS",
    "DECISION_INDEX_KEY",
    "DONE_KEY",
    "GROUP_ID_KEY",
    "IMAGE_KEY",
    "INIT_STATE_ID_KEY",
    "INSTRUCTION_ID_KEY",
    "INSTRUCTION_KEY",
    "NUM_DECISIONS_KEY",
    "OBSERVATION_KEY",
    "POLICY_VERSION_KEY",
    "REWARD_KEY",
    "ROLLOUT_ID_KEY",
    "SAMPLE_LOG_PROB_KEY",
    "SEED_KEY",
    "STATE_KEY",
    "SUCCESS_KEY",
    "TERMINATED_KEY",
    "TRUNCATED_KEY",
    "VLA_ACTION_KEY",
    "decision_layout",
    "recorded_keys",
    "sampled_key",
]

#: Last part of the key of an action mask, TorchRL's name for it.
ACTION_MASK = "action_mask"
#: Images of the scene and, where there is a second camera, at the wrist.
CAMERA_KEYS: tuple[NestedKey, ...] = (IMAGE_KEY, ("observation", "wrist_image"))
#: States of a denoising process, of which a flow policy's log-probabilities are.
ACTION_PATH_KEY: NestedKey = ("vla_action", "path")
#: Log-probabilities of what was sampled, under the behaviour policy.
SAMPLE_LOG_PROB_KEY: NestedKey = ("vla_action", "log_probs")
#: Version of the weights that took the decision.
POLICY_VERSION_KEY: NestedKey = "policy_version"
#: Group of rollouts that share one initial state.
GROUP_ID_KEY: NestedKey = "group_id"
ROLLOUT_ID_KEY: NestedKey = "rollout_id"
#: Position of the decision in its rollout, from 0.
DECISION_INDEX_KEY: NestedKey = "decision_index"
#: Decisions of the row's rollout. Not in rows: batches of an update get it as they are handed out.
NUM_DECISIONS_KEY: NestedKey = "num_decisions"
ADVANTAGE_KEY: NestedKey = "advantage"
#: Index of the instruction in the side table of strings.
INSTRUCTION_ID_KEY: NestedKey = "instruction_id"
#: State entry that environments read at reset: the initial state to start from, -1 or absent lets
#: them sample. Declared in ``state_spec``, for transforms pass nothing else on; a reset returns it.
INIT_STATE_ID_KEY: NestedKey = "init_state_id"
#: Entry int64 ``[1]`` of a reset, of environments that have it: a hash of the initial state that is
#: played, however it was chosen. Equal states have equal ones, in all processes.
INIT_STATE_HASH_KEY: NestedKey = "init_state_hash"
#: That of an environment without it.
NO_HASH = -1
#: State entry int64 ``[N, 1]`` that batched environments read at a reset: the seed of each episode
#: that begins, so that the rollouts of a group share their scene wherever they are played.
SEED_KEY: NestedKey = "seed"
REWARD_KEY: NestedKey = ("next", "reward")
DONE_KEY: NestedKey = ("next", "done")
TERMINATED_KEY: NestedKey = ("next", "terminated")
TRUNCATED_KEY: NestedKey = ("next", "truncated")
SUCCESS_KEY: NestedKey = ("next", "success")
#: What a policy may write for itself alone: large, and made anew by the loss.
_NOT_RECORDED = {(VLA_ACTION_KEY, "logits"), (VLA_ACTION_KEY, "mask")}


def sampled_key(out_keys: Iterable[NestedKey]) -> NestedKey:
    """The entry that a policy's log-probabilities are of: tokens, a path, or else the chunk.

    Args:
        out_keys (iterable of NestedKey): what the policy writes. Tokens count as written if the
            chunk is not listed either, as by a policy that lists no single entries.

    Examples:
        >>> sampled_key([("vla_action", "chunk"), ("vla_action", "log_probs")])
        ('vla_action', 'chunk')
        >>> sampled_key([("vla_action", "chunk"), ("vla_action", "tokens")])
        ('vla_action', 'tokens')
    """
    written = unravel_key_list(list(out_keys))
    for key in (ACTION_TOKENS_KEY, ACTION_PATH_KEY, ACTION_CHUNK_KEY):
        if key in written:
            return key
    return ACTION_TOKENS_KEY


def recorded_keys(out_keys: Iterable[NestedKey]) -> list[NestedKey]:
    """The entries of a decision that a policy fills: all that it writes below ``"vla_action"``.

    What was sampled, chunk and log-probabilities are always among them, logits and masks never.

    Args:
        out_keys (iterable of NestedKey): what the policy writes.

    Examples:
        >>> recorded_keys(["loc", ("vla_action", "chunk"), ("vla_action", "log_probs")])
        [('vla_action', 'chunk'), ('vla_action', 'log_probs')]
    """
    written = unravel_key_list(list(out_keys))
    keys = [sampled_key(written), ACTION_CHUNK_KEY, SAMPLE_LOG_PROB_KEY]
    keys += [key for key in written if key[0] == VLA_ACTION_KEY and key not in _NOT_RECORDED]
    return list(dict.fromkeys(keys))


def decision_layout(
    observation: Mapping[NestedKey, tuple[Sequence[int], torch.dtype]],
    *,
    chunk_size: int,
    action_dim: int,
    recorded: Mapping[NestedKey, tuple[Sequence[int], torch.dtype]] | None = None,
) -> RowLayout:
    """The row of one decision, as the table above describes it.

    Args:
        observation (Mapping): shape and dtype of every observation tensor, by full key.

    Keyword Args:
        chunk_size (int): env steps of a chunk.
        action_dim (int): dimension ``A`` of an action.
        recorded (Mapping, optional): shape and dtype of what the policy writes, in the order of
            :func:`recorded_keys`. Defaults to tokens, chunk and log-probabilities.

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
    of_chunk = (chunk, torch.float32)
    if recorded is None:
        recorded = {
            ACTION_TOKENS_KEY: (chunk, torch.int64),
            ACTION_CHUNK_KEY: of_chunk,
            SAMPLE_LOG_PROB_KEY: of_chunk,
        }
    own: dict[NestedKey, tuple[Sequence[int], torch.dtype]] = {
        INSTRUCTION_ID_KEY: (one, torch.int64),
        **recorded,
        ACTION_CHUNK_KEY: of_chunk,
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
