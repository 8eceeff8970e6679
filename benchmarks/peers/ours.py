# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``DVLACollector`` with ``GRPOLoss`` and ``PooledReplayBuffer``.

Settings: ``num_workers``, ``envs_per_worker``, ``groups_per_update``, ``group_size``,
``max_policy_lag``, ``max_batch_size``, ``max_wait_s``, ``inference_threads``, ``learner_threads``,
``check_finite``. Beside the result it tells what the lanes did in the stretch.
"""

from __future__ import annotations

import torch
from common import Clock, report, settings
from environment import ACTION_DIM, EPISODE_STEPS, ReachEnv
from network import CLIP, EPOCHS, LEARNING_RATE, MINIBATCH, GaussianHead, Torso
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.nn import TensorDictModule as Mod
from torch import distributions, nn

from torchrl_dvla import (
    DVLACollector,
    GroupConfig,
    GRPOLoss,
    InferenceConfig,
    PooledReplayBuffer,
    WorkerConfig,
)
from torchrl_dvla.envs import ChunkEnv

COUNTS = (
    "collector/decisions",
    "collector/inference_batches",
    "buffer/groups_kept",
    "buffer/no_signal_groups",
    "buffer/groups_dropped",
    "buffer/wait_s",
)


class Policy(nn.Module):
    """Images to mean and standard deviation of chunks of one action, ``[*B, 1, action_dim]``."""

    def __init__(self) -> None:
        super().__init__()
        self.torso, self.head = Torso(), GaussianHead(ACTION_DIM)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = self.head(self.torso(image))
        return mean.unsqueeze(-2), std.unsqueeze(-2)


def make_env() -> ChunkEnv:
    return ChunkEnv(ReachEnv(), chunk_size=1)


def make_policy() -> ProbabilisticTensorDictSequential:
    torch.manual_seed(0)
    return ProbabilisticTensorDictSequential(
        Mod(Policy(), in_keys=[("observation", "image")], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=[("vla_action", "chunk")],
            distribution_class=distributions.Normal,
            return_log_prob=True,
            log_prob_key=("vla_action", "log_probs"),
        ),
    )


def main() -> None:
    asked = settings()
    chosen = asked["settings"]
    torch.set_num_threads(chosen["learner_threads"])
    policy = make_policy().eval()
    loss = GRPOLoss(policy, clip_epsilon=CLIP, check_finite=chosen["check_finite"])
    optimizer = torch.optim.Adam(policy.parameters(), LEARNING_RATE)
    buffer = PooledReplayBuffer(batch_size=MINIBATCH, num_epochs=EPOCHS)
    clock = Clock(asked["warm_up_s"], asked["seconds"])
    with DVLACollector(
        make_env,
        policy,
        replay_buffer=buffer,
        group=GroupConfig(
            group_size=chosen["group_size"],
            groups_per_update=chosen["groups_per_update"],
            max_policy_lag=chosen["max_policy_lag"],
        ),
        workers=WorkerConfig(
            num_workers=chosen["num_workers"],
            envs_per_worker=chosen["envs_per_worker"],
            max_decisions=EPISODE_STEPS,
        ),
        inference=InferenceConfig(
            max_batch_size=chosen["max_batch_size"],
            max_wait_s=chosen["max_wait_s"],
            num_threads=chosen["inference_threads"],
        ),
    ) as collector:
        usage, before = collector.timeline.usage(), collector.stats()
        is_over = False
        while not is_over:
            rows = 0
            for batch in buffer:
                loss(batch)["loss_objective"].backward()
                optimizer.step()
                optimizer.zero_grad()
                rows += len(batch)
            collector.update_policy_weights_()
            had_started = clock.has_started
            is_over = clock.learned(rows // EPOCHS)
            if clock.has_started and not had_started:
                usage, before = collector.timeline.usage(), collector.stats()
        stretch, after = collector.timeline.usage().since(usage), collector.stats()
        lanes = {name: round(value, 3) for name, value in stretch.scalars().items()}
        counts = {name: after[name] - before[name] for name in COUNTS}
    report(clock, "torch", "torchrl", "tensordict", lanes=lanes, counts=counts)


if __name__ == "__main__":
    main()
