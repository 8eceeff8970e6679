# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Greedy evaluation beside training: a future, played on the collector's own workers.

Prints how often a random policy succeeds in held-out scenes, before and after a few updates.
"""

from __future__ import annotations

import functools

import torch

from torchrl_dvla import (
    DVLACollector,
    EpisodeSpec,
    GroupConfig,
    GRPOLoss,
    PooledReplayBuffer,
    WorkerConfig,
)
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv

NUM_UPDATES = 12


def main() -> None:
    torch.manual_seed(0)
    policy = tiny_token_policy(2, 4, vocab_size=8)
    buffer = PooledReplayBuffer(batch_size=128, num_epochs=2)
    held_out = [EpisodeSpec("default", seed=1_000 + k) for k in range(40)]
    with DVLACollector(
        functools.partial(CountingChunkEnv, chunk_size=4, max_env_steps=12),
        policy,
        replay_buffer=buffer,
        group=GroupConfig(group_size=8, groups_per_update=8, max_policy_lag=1),
        workers=WorkerConfig(num_workers=2, envs_per_worker=4, max_decisions=4),
    ) as collector:
        loss = GRPOLoss(policy, entropy_coeff=0.03)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
        before = collector.evaluate(held_out)
        for _ in range(NUM_UPDATES):
            for batch in buffer:
                losses = loss(batch)
                (losses["loss_objective"] + losses["loss_entropy"]).backward()
                optimizer.step()
                optimizer.zero_grad()
            collector.update_policy_weights_()
        after = collector.evaluate(held_out)
        for name, evaluation in (("before", before), ("after", after)):
            result = evaluation.result(60.0)
            print(f"{name}: {result.success_rate:.0%} under policy version {result.policy_version}")


if __name__ == "__main__":
    main()
