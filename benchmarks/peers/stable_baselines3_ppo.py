# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Stable-Baselines3: ``PPO`` on ``SubprocVecEnv``, one environment a process.

Settings: ``num_workers``, ``n_steps``, ``learner_threads``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from common import Clock, report, settings
from environment import ReachEnv
from network import (
    CLIP,
    EPOCHS,
    GAE_LAMBDA,
    GAMMA,
    LEARNING_RATE,
    LOG_STD,
    MINIBATCH,
    NUM_FEATURES,
    Torso,
)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv


class Extractor(BaseFeaturesExtractor):
    """The torso; images come as floats between 0 and 1."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=NUM_FEATURES)
        self.torso = Torso()

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.torso(observations)
        return features


class Watch(BaseCallback):
    """Ends the training once the clock has run down."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.is_over, self.has_learned = clock, False, False

    def _on_rollout_start(self) -> None:
        if self.has_learned:  # an update lies between two rollouts
            self.is_over = self.clock.learned(self.model.n_steps * self.model.n_envs)
        self.has_learned = True

    def _on_step(self) -> bool:
        return not self.is_over


def main() -> None:
    asked = settings()
    chosen = asked["settings"]
    torch.set_num_threads(chosen["learner_threads"])
    envs = SubprocVecEnv(
        [functools.partial(ReachEnv, channels_first=True)] * chosen["num_workers"],
        start_method="forkserver",
    )
    model = PPO(
        "CnnPolicy",
        envs,
        learning_rate=LEARNING_RATE,
        n_steps=chosen["n_steps"],
        batch_size=MINIBATCH,
        n_epochs=EPOCHS,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clip_range=CLIP,
        policy_kwargs={
            "features_extractor_class": Extractor,
            "net_arch": [],
            "log_std_init": LOG_STD,
        },
        seed=0,
        device="cpu",
    )
    clock = Clock(asked["warm_up_s"], asked["seconds"])
    model.learn(10**9, callback=Watch(clock))
    envs.close()
    report(clock, "stable-baselines3", "torch")


if __name__ == "__main__":
    main()
