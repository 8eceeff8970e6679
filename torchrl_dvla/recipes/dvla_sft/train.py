# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Supervised start of the main job: demonstrations, behaviour cloning, checkpoint.

    python -m torchrl_dvla sft
    python -m torchrl_dvla sft training.num_steps=1200 env.task_ids=[0,3]
    python -m torchrl_dvla sft policy=flow
    python -m torchrl_dvla sft --config-name maniskill

Each stage takes up where it was interrupted: demonstrations that exist are not recorded again.
Every setting is in ``config/*.yaml``; README.md beside this file explains them.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from torchrl_dvla.data.schema import STATE_KEY
from torchrl_dvla.recipes.device import check_device
from torchrl_dvla.recipes.dvla_sft import utils
from torchrl_dvla.recipes.dvla_sft.episodes import PAUSE_S, evaluate, record_missing
from torchrl_dvla.recipes.dvla_sft.settings import Settings, settings_from
from torchrl_dvla.recipes.terminal import command, messages_only, shortened
from torchrl_dvla.recording import GracefulStop, StopRequested
from torchrl_dvla.streams import share_terminal

CONFIG = Path(__file__).parent / "config"


@hydra.main(version_base="1.3", config_path=str(CONFIG), config_name="libero_object")
def main(config: DictConfig) -> None:
    """Records demonstrations, clones them, and plays the policy that comes out."""
    share_terminal()
    with messages_only(), GracefulStop() as stop:
        try:
            with stop.interruptible():
                train(settings_from(config))
        except StopRequested:
            print(f"{stop.reason}: ended; what was recorded is kept", flush=True)
    if stop.requested:
        sys.exit(128 + signal.Signals[str(stop.reason)])  # as the main recipe


def train(cfg: Settings) -> None:
    """The three stages, with checked settings."""
    check_device("device", cfg.device)
    utils.check_tasks(cfg)
    utils.check_policy(cfg)
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.training.num_threads)
    run_folder = utils.make_run_folder(cfg)
    demonstration_folder = utils.make_demonstration_folder(cfg)

    # -- demonstrations ---------------------------------------------------------------------------
    utils.check_demonstrations(cfg, demonstration_folder)
    record_missing(cfg, demonstration_folder)
    demonstrations = utils.make_demonstrations(cfg, demonstration_folder)

    # -- behaviour cloning ------------------------------------------------------------------------
    training, validation, instructions = utils.make_splits(cfg, demonstrations)
    state_dim = training.get(STATE_KEY).shape[-1]
    policy = utils.make_policy(cfg, list(instructions.since(0).values()), state_dim=state_dim)
    utils.set_statistics(cfg, policy, training)
    policy.to(cfg.device)
    buffer = utils.make_buffer(cfg, training, instructions)
    validation_batch = utils.make_validation_batch(validation, instructions).to(cfg.device)
    loss = utils.make_loss(policy)
    optimizer, scheduler = utils.make_optimizer(cfg, loss)
    curve = []
    steps = range(1, cfg.training.num_steps + 1)
    for step in tqdm(steps, desc="cloning", unit="step", mininterval=PAUSE_S):
        losses = loss(buffer.sample().to(cfg.device))
        losses["loss_bc"].backward()
        max_norm = cfg.training.max_grad_norm or math.inf
        torch.nn.utils.clip_grad_norm_(loss.parameters(), max_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % cfg.training.validate_every == 0 or step == cfg.training.num_steps:
            held_out = utils.validate(loss, validation_batch)
            point = {"step": step, "train": float(losses["loss_bc"].detach())}
            curve.append(point | {"validation": held_out.pop("loss_bc"), **held_out})
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in curve[-1].items()))
        if step in cfg.training.snapshot_steps:
            policy.save_pretrained(run_folder / f"step_{step:05d}")
    checkpoint = Path(cfg.checkpoint or run_folder / "policy")
    policy.save_pretrained(checkpoint)
    utils.training_scenes(cfg, demonstrations).save(checkpoint)

    # -- closed loop ------------------------------------------------------------------------------
    rows = []
    for greedy in (True, False):
        results = evaluate(cfg, checkpoint, greedy=greedy)
        successes = [result.success for result in results]
        lengths = [result.num_env_steps for result in results if result.success]
        rows.append(
            {
                "actions": "greedy" if greedy else "sampled",
                "num_episodes": len(successes),
                "success_rate": sum(successes) / len(successes),
                "mean_num_env_steps_of_success": sum(lengths) / max(1, len(lengths)),
            }
        )
    report = {
        "num_demonstrations": len(demonstrations),
        "num_decisions": len(training),
        "curve": curve,
        "evaluation": rows,
        "config": asdict(cfg),
    }
    (run_folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"report:     {shortened(run_folder / 'report.json')}")
    print(f"checkpoint: {shortened(checkpoint)}")
    print("train:      " + command("train", *utils.training_settings(cfg, shortened(checkpoint))))
