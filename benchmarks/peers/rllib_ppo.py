# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RLlib: PPO and APPO.

Settings: ``algorithm`` (ppo, appo), ``num_workers``, ``envs_per_worker``, ``vectorize`` (sync,
async: environments of a runner in processes of their own), ``rollout_fragment_length``,
``train_batch_size``, ``num_learners`` (0: in this process), ``learner_threads``.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import gymnasium
import ray
import torch
from common import Clock, report, settings
from environment import ACTION_DIM, ReachEnv
from network import (
    CLIP,
    EPOCHS,
    GAE_LAMBDA,
    GAMMA,
    LEARNING_RATE,
    MINIBATCH,
    NUM_FEATURES,
    GaussianHead,
    Torso,
)
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import (
    TARGET_NETWORK_ACTION_DIST_INPUTS,
    TargetNetworkAPI,
    ValueFunctionAPI,
)
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import nn


class Module(TorchRLModule, ValueFunctionAPI, TargetNetworkAPI):
    """Actor and critic over one torso."""

    def setup(self) -> None:
        self.torso, self.head = Torso(), GaussianHead(ACTION_DIM)
        self.critic = nn.Linear(NUM_FEATURES, 1)

    def make_target_networks(self) -> None:
        self.target_torso = make_target_network(self.torso)
        self.target_head = make_target_network(self.head)

    def get_target_network_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.torso, self.target_torso), (self.head, self.target_head)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        inputs = _inputs(self.target_head(self.target_torso(batch[Columns.OBS])))
        return {TARGET_NETWORK_ACTION_DIST_INPUTS: inputs}

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: _inputs(self.head(self.torso(batch[Columns.OBS])))}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        features = self.torso(batch[Columns.OBS])
        inputs = _inputs(self.head(features))
        return {Columns.ACTION_DIST_INPUTS: inputs, Columns.EMBEDDINGS: features}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        features = self.torso(batch[Columns.OBS]) if embeddings is None else embeddings
        values: torch.Tensor = self.critic(features).squeeze(-1)
        return values


def _inputs(mean_and_std: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    mean, std = mean_and_std
    return torch.cat([mean, std.log()], -1)


def learned_decisions(result: dict[str, Any]) -> int:
    """Decisions learned from so far.

    The learner counts rows: those after the end of each fragment, which are there for their value,
    and those that fill up the last minibatch as well. So no more count than were sampled; where
    batches are dropped because the learner is behind, the count is up to an eighth too large.
    """
    learners = result.get("learners", {}).get("__all_modules__", {})
    num_rows = int(learners.get("num_module_steps_trained_lifetime", 0))
    num_sampled = int(result.get("env_runners", {}).get("num_env_steps_sampled_lifetime", 0))
    return min(num_rows // EPOCHS, num_sampled)


def main() -> None:
    asked = settings()
    chosen = asked["settings"]
    torch.set_num_threads(chosen["learner_threads"])
    # Ray counts cores to place actors, two each here; how many run at once is the settings' matter.
    ray.init(
        num_cpus=16,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=os.environ["TMPDIR"],
        object_store_memory=10**9,
    )
    is_appo = chosen["algorithm"] == "appo"
    vectorize = {"sync": gymnasium.VectorizeMode.SYNC, "async": gymnasium.VectorizeMode.ASYNC}
    config = (
        (APPOConfig if is_appo else PPOConfig)()
        .environment(ReachEnv, env_config={"channels_first": True})
        .env_runners(
            num_env_runners=chosen["num_workers"],
            num_envs_per_env_runner=chosen["envs_per_worker"],
            gym_env_vectorize_mode=vectorize[chosen["vectorize"]],
            rollout_fragment_length=chosen["rollout_fragment_length"],
        )
        .learners(num_learners=chosen["num_learners"])
        .training(
            train_batch_size_per_learner=chosen["train_batch_size"],
            minibatch_size=MINIBATCH,
            num_epochs=EPOCHS,
            lr=LEARNING_RATE,
            gamma=GAMMA,
            lambda_=GAE_LAMBDA,
            clip_param=CLIP,
            entropy_coeff=0.0,
            # Every decision is learned from twice, by the epochs.
            **(
                {"use_circular_buffer": False}
                if is_appo
                else {"kl_coeff": 0.0, "use_kl_loss": False}
            ),
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=Module))
        .reporting(min_time_s_per_iteration=0, metrics_num_episodes_for_smoothing=10)
        .debugging(seed=0, log_level="ERROR")
    )
    clock = Clock(asked["warm_up_s"], asked["seconds"])
    algorithm = config.build_algo()
    learned, is_over = 0, False
    while not is_over:
        now = learned_decisions(algorithm.train())
        if now > learned:
            is_over = clock.learned(now - learned)
        learned = now
    algorithm.stop()
    ray.shutdown()
    report(clock, "ray", "torch", "gymnasium")


if __name__ == "__main__":
    main()
