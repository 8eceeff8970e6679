# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The environment and the policy of the tests with Ray, sent to the nodes by value."""

from __future__ import annotations

import functools

import torch
from tensordict.nn import InteractionType, TensorDictModuleBase

from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv

make_env = functools.partial(
    CountingChunkEnv, action_dim=2, chunk_size=4, max_env_steps=12, required_fraction=0.5
)


def make_policy() -> TensorDictModuleBase:
    torch.manual_seed(0)
    return tiny_token_policy(
        2, 4, vocab_size=8, hidden_dim=16, default_interaction_type=InteractionType.RANDOM
    )


def fail_to_build() -> TensorDictModuleBase:
    with open("/nowhere/the-checkpoint") as file:
        return file  # type: ignore[return-value]
