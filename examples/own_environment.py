# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An environment of your own: thirty lines of gymnasium, wrapped in ChunkEnv, and learned.

Prints how often a policy solves held-out scenes, before and after training.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch

from torchrl_dvla import (
    DVLACollector,
    EpisodeSpec,
    GroupConfig,
    GRPOLoss,
    PooledReplayBuffer,
    WorkerConfig,
)
from torchrl_dvla.envs import ChunkEnv
from torchrl_dvla.modules import tiny_token_policy

MAX_UPDATES = 40


class Reach(gym.Env):
    """A white dot moves to a green one; the reward is paid once, when it is there."""

    def __init__(self) -> None:
        image = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
        state = gym.spaces.Box(-1, 1, (4,), np.float32)
        self.observation_space = gym.spaces.Dict({"image": image, "state": state})
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # seeds np_random: the rollouts of a group share their scene
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        self.num_steps = 0
        return self._observe(), {}

    def step(self, action):
        self.num_steps += 1
        self.position = np.clip(self.position + 0.25 * action, -1, 1)
        solved = bool(np.abs(self.position - self.goal).max() < 0.3)
        info = {"is_success": solved}
        return self._observe(), float(solved), solved, self.num_steps >= 12, info

    def _observe(self):
        image = np.zeros((16, 16, 3), np.uint8)
        for (x, y), colour in ((self.goal, (0, 255, 0)), (self.position, (255, 255, 255))):
            image[round((y + 1) * 7.5), round((x + 1) * 7.5)] = colour
        state = np.concatenate([self.position, self.goal]).astype(np.float32)
        return {"image": image, "state": state}


def make_env() -> ChunkEnv:
    return ChunkEnv(
        Reach(),
        chunk_size=3,
        image_key="image",
        state_key="state",
        instruction="reach the green dot",
        success="is_success",
    )


def main() -> None:
    torch.manual_seed(0)
    policy = tiny_token_policy(action_dim=2, chunk_size=3, vocab_size=8)
    buffer = PooledReplayBuffer(batch_size=128, num_epochs=2)
    held_out = [EpisodeSpec("default", seed=1_000 + k) for k in range(50)]
    with DVLACollector(
        make_env,
        policy,
        replay_buffer=buffer,
        group=GroupConfig(group_size=8, groups_per_update=8, max_policy_lag=1),
        workers=WorkerConfig(num_workers=1, envs_per_worker=16, max_decisions=4),
    ) as collector:
        loss = GRPOLoss(policy)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
        print(f"before: {collector.evaluate(held_out).result(60.0).success_rate:.0%}")
        for _ in range(MAX_UPDATES):
            for batch in buffer:
                loss(batch)["loss_objective"].backward()
                optimizer.step()
                optimizer.zero_grad()
            collector.update_policy_weights_()
            success_rate = collector.stats()["collector/success_rate"]
            if success_rate > 0.9:  # sampled; groups that all succeed teach nothing any more
                break
        print(f"update {collector.policy_version}: {success_rate:.0%} while training")
        print(f"after: {collector.evaluate(held_out).result(60.0).success_rate:.0%}")


if __name__ == "__main__":
    main()
