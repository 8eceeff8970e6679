# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The environment and the policy of the tests of this folder, and of the runs that they start."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tensordict.nn import InteractionType
from torchrl.modules.vla import TinyVLA

from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv

ENV_KWARGS: dict[str, Any] = {
    "action_dim": 2,
    "chunk_size": 4,
    "max_env_steps": 12,
    "length": "heavy_tailed",
}
make_env = functools.partial(CountingChunkEnv, **ENV_KWARGS)


def make_policy(action_dim: int = 2, chunk_size: int = 4) -> TinyVLA:
    torch.manual_seed(0)
    return tiny_token_policy(
        action_dim,
        chunk_size,
        vocab_size=8,
        hidden_dim=16,
        default_interaction_type=InteractionType.RANDOM,
    )


def make_initialised_policy() -> TinyVLA:
    """The policy after its first call, which makes its lazy parameters."""
    policy = make_policy()
    observed = make_env().reset().unsqueeze(0)
    torch.manual_seed(0)
    policy(observed)
    return policy
