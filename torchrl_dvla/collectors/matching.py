# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Whether a policy and an environment fit each other, and the row that serves both."""

from __future__ import annotations

import torch
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.data import decision_layout
from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_TOKENS_KEY,
    INSTRUCTION_KEY,
    SAMPLE_LOG_PROB_KEY,
)
from torchrl_dvla.memory import RowLayout
from torchrl_dvla.swimlane.inference import POLICY_OUTPUTS
from torchrl_dvla.swimlane.messages import EnvSpecs

__all__ = ["match_policy"]


def match_policy(policy: TensorDictModuleBase, specs: EnvSpecs) -> RowLayout:
    """Call ``policy`` once on zeros and compare what it writes with what the environment takes.

    Args:
        policy (TensorDictModuleBase): the policy; lazy parameters are initialised by the call.
        specs (EnvSpecs): what the environment reads and writes.

    Returns:
        RowLayout: the row of one decision.

    Raises:
        ValueError: if the policy writes no chunk, no tokens or no log-prob for each token, or a
            chunk that the environment does not take.
    """
    tensordict = TensorDict(
        {key: torch.zeros(1, *shape, dtype=dtype) for key, shape, dtype in specs.observation},
        batch_size=[1],
    )
    tensordict.set(INSTRUCTION_KEY, NonTensorStack("probe"))
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        tensordict = policy(tensordict)
    shapes = {}
    for key in POLICY_OUTPUTS:
        value = tensordict.get(key, None)
        if value is None:
            raise ValueError(
                f"policy must write {key}, got {sorted(map(str, policy.out_keys))}. Build it with "
                "action_head='tokens', output_mode='both' and an action_tokenizer."
            )
        shapes[key] = tuple(value.shape[1:])
    if shapes[ACTION_TOKENS_KEY] != shapes[SAMPLE_LOG_PROB_KEY]:
        raise ValueError(
            f"policy must write one log-prob a token, got tokens {list(shapes[ACTION_TOKENS_KEY])} "
            f"and log-probs {list(shapes[SAMPLE_LOG_PROB_KEY])}. Build it with "
            "log_probs_mode='token'."
        )
    chunk_size, action_dim = shapes[ACTION_CHUNK_KEY]
    if action_dim != specs.action_dim or specs.chunk_size not in (-1, chunk_size):
        expected = "any" if specs.chunk_size == -1 else specs.chunk_size
        raise ValueError(
            f"policy must write chunks of [chunk_size={expected}, action_dim={specs.action_dim}], "
            f"as the environment takes them, got [{chunk_size}, {action_dim}]. Build the policy, "
            "or choose its checkpoint, for this environment."
        )
    observation = {key: (shape, dtype) for key, shape, dtype in specs.observation}
    return decision_layout(observation, chunk_size=chunk_size, action_dim=action_dim)
