# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Gymnasium's MuJoCo Reacher from pixels: a camera above a two-link arm, and torques.

It needs ``pip install "gymnasium[mujoco]"``. Prints how many of 100 held-out scenes the policy
solves greedily, every ten updates. One run of these settings went from 20 % to 70 %, with 40 % and
89 % on the way: greedy success swings, and the settings are first guesses. It took 440 s of CPU.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch

from torchrl_dvla import DVLACollector, GroupConfig, GRPOLoss, PooledReplayBuffer, WorkerConfig
from torchrl_dvla.data import EpisodeSpec
from torchrl_dvla.envs import ChunkEnv
from torchrl_dvla.modules import tiny_token_policy

NUM_UPDATES = 100
CAMERA = {"distance": 0.6, "azimuth": 90.0, "elevation": -90.0, "lookat": np.zeros(3)}


class Touch(gym.Wrapper):
    """Reacher that is solved, and over, once the fingertip is within 5 cm of the target.

    It rewards being solved alone: Reacher's own reward is a distance, which says nothing about
    success, and it ends by its time limit alone.
    """

    def step(self, action):
        observed, _, terminated, truncated, info = self.env.step(action)
        solved = bool(np.linalg.norm(observed[-2:]) < 0.05)  # from the fingertip to the target
        info["success"] = solved
        return observed, float(solved), terminated or solved, truncated, info


def make_env() -> ChunkEnv:
    size = {"width": 64, "height": 64}
    env = gym.make("Reacher-v5", render_mode="rgb_array", default_camera_config=CAMERA, **size)
    # Frames alone: the state that Reacher observes has the target in it.
    return ChunkEnv(Touch(env), image_key="render")


def main() -> None:
    torch.manual_seed(0)
    policy = tiny_token_policy(action_dim=2, chunk_size=4, vocab_size=5, use_state=False)
    buffer = PooledReplayBuffer(batch_size=256, num_epochs=2)
    held_out = [EpisodeSpec("default", seed=10**9 + k) for k in range(100)]
    with DVLACollector(
        make_env,
        policy,
        replay_buffer=buffer,
        group=GroupConfig(group_size=8, groups_per_update=8),
        workers=WorkerConfig(num_workers=2, envs_per_worker=8, max_decisions=12),
    ) as collector:
        loss = GRPOLoss(policy)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        for update in range(NUM_UPDATES):
            if update % 10 == 0:
                success_rate = collector.evaluate(held_out).result().success_rate
                print(f"update {update}: {success_rate:.0%} solved")
            for batch in buffer:
                loss(batch)["loss_objective"].backward()
                optimizer.step()
                optimizer.zero_grad()
            collector.update_policy_weights_()
        success_rate = collector.evaluate(held_out).result().success_rate
        print(f"update {NUM_UPDATES}: {success_rate:.0%} solved")


if __name__ == "__main__":
    main()
