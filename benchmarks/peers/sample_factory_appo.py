# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Sample Factory: APPO.

Settings: ``num_workers``, ``num_envs_per_worker``, ``worker_num_splits``,
``num_batches_per_epoch``, ``num_batches_to_accumulate``, ``async_rl``,
``policy_workers_per_policy``, ``set_workers_cpu_affinity``. Inference workers and learner have a
thread each, which is the library's.
"""

from __future__ import annotations

import math
import os
from typing import Any

from common import Clock, report, settings
from environment import EPISODE_STEPS, ReachEnv
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
from sample_factory.algo.utils.context import global_model_factory
from sample_factory.algo.utils.misc import LEARNER_ENV_STEPS, ExperimentStatus
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.model.encoder import Encoder
from sample_factory.train import make_runner


class TorsoEncoder(Encoder):
    """The torso; images come as floats between 0 and 1."""

    def __init__(self, cfg: Any, obs_space: Any) -> None:
        super().__init__(cfg)
        self.torso = Torso()

    def forward(self, observations: dict[str, Any]) -> Any:
        return self.torso(observations["obs"])

    def get_out_size(self) -> int:
        return NUM_FEATURES


def make_env(name: str, cfg: Any, env_config: Any, render_mode: Any = None) -> ReachEnv:
    env = ReachEnv(channels_first=True)
    env.render_mode = render_mode
    return env


def main() -> None:
    asked = settings()
    chosen = {
        **asked["settings"],
        "num_epochs": EPOCHS,
        "batch_size": MINIBATCH,
        "rollout": EPISODE_STEPS,
        "learning_rate": LEARNING_RATE,
        "gamma": GAMMA,
        "gae_lambda": GAE_LAMBDA,
        "ppo_clip_ratio": CLIP,
        "exploration_loss_coeff": 0.0,
        "use_rnn": False,
        "adaptive_stddev": False,
        "initial_stddev": math.exp(LOG_STD),
        "obs_scale": 255.0,
        "normalize_input": False,
        "normalize_returns": False,
        # Nothing is written beside the training.
        "train_dir": os.environ["TMPDIR"],
        "save_every_sec": 10**6,
        "save_best_every_sec": 10**6,
        "experiment_summaries_interval": 10**6,
        "log_to_file": False,
        "with_wandb": False,
        "device": "cpu",
        "env": "reach",
        "experiment": "peers",
        "seed": 0,
    }
    register_env("reach", make_env)
    global_model_factory().register_encoder_factory(TorsoEncoder)
    argv = [f"--{name}={value}" for name, value in chosen.items()]
    parser, _ = parse_sf_args(argv)
    _, runner = make_runner(parse_full_cfg(parser, argv))
    clock = Clock(asked["warm_up_s"], asked["seconds"])
    learned = 0

    def count(runner: Any, message: dict[str, Any], policy_id: int) -> None:
        nonlocal learned
        now = message[LEARNER_ENV_STEPS]
        if now > learned and clock.learned(now - learned):
            runner.cfg.train_for_env_steps = 0  # it ends after this update
        learned = now

    runner.policy_msg_handlers[LEARNER_ENV_STEPS].append(count)
    if runner.init() == ExperimentStatus.SUCCESS:
        runner.run()
    report(clock, "sample-factory", "torch", "gymnasium")


if __name__ == "__main__":
    main()
