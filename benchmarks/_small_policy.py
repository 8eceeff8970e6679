# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The policy of benchmarks whose latencies are emulated: its own work is next to nothing."""

from __future__ import annotations

from torchrl.data.vla import UniformActionTokenizer
from torchrl.modules.vla import TinyVLA

__all__ = ["make_small_policy"]


def make_small_policy() -> TinyVLA:
    """Chunks of 4 actions of 2 numbers, from 8 tokens; as ``CountingChunkEnv`` takes them."""
    return TinyVLA(
        action_dim=2,
        chunk_size=4,
        action_head="tokens",
        vocab_size=8,
        hidden_dim=16,
        output_mode="both",
        log_probs_mode="token",
        return_vla_action_container=False,
        action_tokenizer=UniformActionTokenizer(8, low=-1.0, high=1.0),
    )
