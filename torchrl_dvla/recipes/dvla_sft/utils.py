# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Factories of the supervised recipe: from the config to the pieces."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from tensordict import TensorDictBase
from torch.optim.lr_scheduler import LambdaLR
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.vla import UniformActionTokenizer

from torchrl_dvla.data.augmentation import RandomShift, StateNoise
from torchrl_dvla.data.demonstrations import (
    Demonstration,
    make_demonstration_buffer,
    stack_demonstrations,
)
from torchrl_dvla.data.instructions import InstructionTable, InstructionTransform
from torchrl_dvla.data.schema import ACTION_CHUNK_KEY, STATE_KEY
from torchrl_dvla.envs import (
    LiberoChunkEnv,
    ManiSkillChunkEnv,
    validate_libero,
    validate_maniskill,
)
from torchrl_dvla.envs.libero_setup import load_init_states
from torchrl_dvla.modules import TransformersVLA
from torchrl_dvla.objectives.bc import ActionTokenBCLoss
from torchrl_dvla.recipes.dvla_sft.settings import ManiSkillSettings, Settings

_MIN_STATE_STD = 0.02


def check_tasks(cfg: Settings) -> None:
    """Require the tasks, and as many init states as are to be played.

    Raises:
        ValueError: naming the setting.
        FileNotFoundError: if assets are missing.
        ImportError: if the simulator is not installed.
        RuntimeError: if it cannot draw on this machine.
    """
    if isinstance(cfg.env, ManiSkillSettings):
        validate_maniskill(cfg.env.task)
        return
    for task_id in cfg.env.task_ids:
        try:
            task = validate_libero(cfg.env.task_suite, task_id)
        except ValueError as error:
            raise ValueError(f"env.task_ids must name tasks of the suite: {error}") from error
        if cfg.evaluation.num_episodes > len(load_init_states(task)):
            raise ValueError(
                f"evaluation.num_episodes must be at most {len(load_init_states(task))}, got "
                f"{cfg.evaluation.num_episodes}. The benchmark has no more scenes."
            )


def make_run_folder(cfg: Settings) -> Path:
    """Folder of snapshots and report: Hydra's output folder of this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def make_demonstration_folder(cfg: Settings) -> Path:
    """Folder that demonstrations of all runs share."""
    folder = Path(to_absolute_path(cfg.demonstrations.folder))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_env(cfg: Settings, task_id: int, *, recording: bool) -> LiberoChunkEnv | ManiSkillChunkEnv:
    """One simulator, as for training; while recording it observes more often."""
    kwargs: dict[str, Any] = {
        "chunk_size": cfg.env.chunk_size,
        "replan_interval": cfg.demonstrations.label_interval if recording else None,
        "camera_height": cfg.env.image_size,
        "camera_width": cfg.env.image_size,
        "max_episode_steps": cfg.env.max_episode_steps,
        "env_kwargs": None if cfg.env.env_kwargs is None else dict(cfg.env.env_kwargs),
    }
    if isinstance(cfg.env, ManiSkillSettings):
        return ManiSkillChunkEnv(cfg.env.task, **kwargs)
    shadows, msaa = cfg.env.shadows, cfg.env.msaa
    return LiberoChunkEnv(cfg.env.task_suite, task_id, shadows=shadows, msaa=msaa, **kwargs)


def make_demonstrations(cfg: Settings, found: list[Demonstration]) -> list[Demonstration]:
    """Those of the folder that this run asks for."""
    seeds = range(
        cfg.demonstrations.first_seed,
        cfg.demonstrations.first_seed + cfg.demonstrations.num_per_task,
    )
    return [
        demo
        for demo in found
        if demo.info.task_suite == cfg.env.task_suite
        and demo.info.task_id in cfg.env.task_ids
        and demo.info.seed in seeds
    ]


def make_tokenizer(cfg: Settings) -> UniformActionTokenizer:
    """Uniform bins whose outermost centres are -1 and +1.

    An odd number of bins has a centre at 0: standing still, full speed and both gripper commands
    are then exact.
    """
    edge = cfg.policy.num_bins / (cfg.policy.num_bins - 1)
    return UniformActionTokenizer(cfg.policy.num_bins, low=-edge, high=edge)


def make_splits(
    cfg: Settings, demonstrations: list[Demonstration]
) -> tuple[TensorDictBase, TensorDictBase, InstructionTable]:
    """Decisions to train on, decisions of other episodes to validate on, and the instructions."""
    step = max(2, len(demonstrations) // cfg.training.num_validation_demonstrations)
    chosen = range(0, len(demonstrations), step)[: cfg.training.num_validation_demonstrations]
    held_out = [demonstrations[index] for index in chosen]
    rest = [demo for index, demo in enumerate(demonstrations) if index not in chosen]
    tokenizer = make_tokenizer(cfg)
    rows, instructions = stack_demonstrations([*rest, *held_out], tokenizer)
    num_training = sum(len(demo.rows) for demo in rest)
    return rows[:num_training], rows[num_training:], instructions


def make_policy(
    cfg: Settings, instructions: InstructionTable, rows: TensorDictBase
) -> TransformersVLA:
    """A random policy of the sizes in the config, fitting the recorded data."""
    policy = TransformersVLA.tiny(
        instructions.since(0).values(),
        action_dim=rows.get(ACTION_CHUNK_KEY).shape[-1],
        chunk_size=cfg.env.chunk_size,
        state_dim=rows.get(STATE_KEY).shape[-1],
        action_tokenizer=make_tokenizer(cfg),
        backbone=cfg.policy.backbone,
        tokens_per_step=cfg.policy.tokens_per_step,
        seed=cfg.seed,
    )
    state = rows.get(STATE_KEY)
    assert policy.state_projector is not None
    # an entry that hardly moves must not be blown up to unit scale: its next change would swamp all
    policy.state_projector.set_statistics(state.mean(0), state.std(0).clamp_min(_MIN_STATE_STD))
    return policy


def make_buffer(
    cfg: Settings, rows: TensorDictBase, instructions: InstructionTable
) -> TensorDictReplayBuffer:
    """Replay buffer with the augmentations of the config."""
    return make_demonstration_buffer(
        rows,
        instructions,
        batch_size=cfg.training.batch_size,
        transforms=[RandomShift(cfg.training.max_shift), StateNoise(cfg.training.state_noise)],
    )


def make_validation_batch(rows: TensorDictBase, instructions: InstructionTable) -> TensorDictBase:
    """All held-out decisions as one batch, without augmentation."""
    return InstructionTransform(instructions).forward(rows)


def make_loss(policy: TransformersVLA) -> ActionTokenBCLoss:
    """Negative log-likelihood of the expert's tokens."""
    return ActionTokenBCLoss(policy)


def make_optimizer(
    cfg: Settings, loss: ActionTokenBCLoss
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW, warmed up, then a cosine down to a twentieth."""
    optimizer = torch.optim.AdamW(
        loss.parameters(),
        lr=cfg.training.lr,
        weight_decay=cfg.training.weight_decay,
        betas=(0.9, 0.95),
    )

    def scale(step: int) -> float:
        warm_up = min(1.0, (step + 1) / max(1, cfg.training.num_warmup_steps))
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / cfg.training.decay_steps)
        return warm_up * (0.05 + 0.95 * cosine)

    return optimizer, LambdaLR(optimizer, scale)
