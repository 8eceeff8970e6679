# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Validation of the settings before a process is started."""

from __future__ import annotations

import torch
import utils
from omegaconf import DictConfig, OmegaConf
from torchrl.modules.vla import VLAWrapperBase

from torchrl_dvla import AsyncWeightUpdater
from torchrl_dvla.collectors.validation import match_policy, plan_memory
from torchrl_dvla.data.schema import IMAGE_KEY, STATE_KEY
from torchrl_dvla.envs import validate_libero
from torchrl_dvla.recording import check_writable
from torchrl_dvla.swimlane.messages import EnvSpecs

#: Position and orientation of the gripper, and its two fingers: what LiberoChunkEnv reports.
LIBERO_STATE_DIM = 9
LIBERO_ACTION_DIM = 7
_KINDS = ("checkpoint", "tiny", "tiny_vla")


def check_settings(cfg: DictConfig) -> None:
    """Refuse settings that cannot work; the error names the setting and a remedy.

    Raises:
        ValueError: for a value out of range.
        FileNotFoundError: if assets of LIBERO are missing.
        ImportError: if LIBERO is not installed.
    """
    _check_policy_kind(cfg)
    utils.make_group_config(cfg)
    workers = utils.make_worker_config(cfg)
    for section, names in {
        "optim": ("lr", "minibatch_size", "num_epochs", "num_threads", "max_grad_norm"),
        "train": ("num_updates",),
        "checkpoint": ("every_updates", "keep"),
        "memory": ("rows_per_page",),
        "policy": ("temperature",),
    }.items():
        for name in names:
            if not cfg[section][name] > 0:
                raise ValueError(
                    f"{section}.{name} must be positive, got {cfg[section][name]}. Start from the "
                    "value in config/."
                )
    minutes = cfg.train.max_minutes
    if minutes is not None and minutes <= 0:
        raise ValueError(
            f"train.max_minutes must be positive, got {minutes}. Use null for no limit."
        )
    for name in ("device", "inference_device"):
        device = torch.device(cfg[name] or "cpu")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"{name} must be one that torch sees, got {cfg[name]!r} and "
                f"{torch.cuda.device_count()} CUDA device(s). Use {name}=cpu, or a CUDA build of "
                "torch on a machine with GPUs."
            )
    if cfg.env.backend == "libero":
        _check_libero(cfg, workers.max_decisions)
    elif cfg.env.backend != "toy":
        raise ValueError(f"env.backend must be 'toy' or 'libero', got {cfg.env.backend!r}.")
    check_writable(utils.make_path(cfg.log.dir))


def _check_policy_kind(cfg: DictConfig) -> None:
    kind = cfg.policy.kind
    if kind == "checkpoint" and OmegaConf.is_missing(cfg.policy, "checkpoint"):
        raise ValueError(
            "policy.checkpoint must be given, got nothing. Make one with the dvla_sft recipe and "
            "pass policy.checkpoint=<its folder>."
        )
    if kind not in _KINDS:
        raise ValueError(f"policy.kind must be one of {_KINDS}, got {kind!r}. Correct the name.")
    if kind == "tiny_vla" and (cfg.env.backend != "toy" or cfg.policy.temperature != 1.0):
        raise ValueError(
            "policy.kind=tiny_vla must be used with env.backend=toy and policy.temperature=1.0, "
            f"got {cfg.env.backend!r} and {cfg.policy.temperature}. Use policy.kind=tiny elsewhere."
        )


def _check_libero(cfg: DictConfig, max_decisions: int) -> None:
    env = cfg.env
    if not env.task_ids:
        raise ValueError("env.task_ids must name at least one task, got none. Use [0].")
    num_states = -(-cfg.eval.num_episodes // len(env.task_ids))
    for task_id in env.task_ids:
        validate_libero(
            env.task_suite,
            task_id,
            camera_height=env.camera_height,
            camera_width=env.camera_width,
            chunk_size=env.chunk_size,
            replan_interval=env.replan_interval,
            init_state_ids=range(num_states),
        )
    needed = -(-env.max_episode_steps // (env.replan_interval or env.chunk_size))
    if max_decisions < needed:
        raise ValueError(
            f"workers.max_decisions must be at least {needed}, got {max_decisions}: episodes of "
            f"env.max_episode_steps={env.max_episode_steps} would be cut short. Raise one or lower "
            "the other."
        )


def check_policy(cfg: DictConfig, policy: VLAWrapperBase) -> None:
    """Refuse a policy that does not fit the environment, and pools that do not fit the memory.

    Raises:
        ValueError: if a size of the policy differs from the environment's, a budget is too small,
            or this machine has not that much memory.
    """
    env, config = cfg.env, getattr(policy, "config", None)
    if env.backend == "libero":
        height, width, num_cameras = env.camera_height, env.camera_width, len(env.cameras)
        action_dim, state_dim = LIBERO_ACTION_DIM, LIBERO_STATE_DIM
    else:
        height, width, num_cameras = env.image_size, env.image_size, 1
        action_dim, state_dim = env.action_dim, 2 * env.action_dim
    image_shape = (3, height, width)
    # What this environment has, what the policy was made for, and what to do about it; its actions
    # are looked at below.
    sizes = {}
    if config:
        wanted = (3, *config.image_size)
        sizes["image_shape"] = (image_shape, wanted, "Render at the policy's size.")
        if config.state_dim:
            sizes["state_dim"] = (state_dim, config.state_dim, "Use its proprioception keys.")
    remedy = "Add robot0_eye_in_hand to env.cameras, or remove it."
    sizes["number of cameras"] = (num_cameras, config.num_cameras if config else 1, remedy)
    problems = [
        f"{name} must be {wanted} as the policy's, got {found}. {remedy}"
        for name, (found, wanted, remedy) in sizes.items()
        if found != wanted
    ]
    if problems:
        raise ValueError(" ".join(problems))
    images = [IMAGE_KEY, ("observation", "wrist_image")][:num_cameras]
    observation = [(key, image_shape, torch.uint8) for key in images]
    observation.append((STATE_KEY, (state_dim,), torch.float32))
    plan_memory(
        utils.make_memory(cfg),
        match_policy(policy, EnvSpecs(tuple(observation), env.chunk_size, action_dim)),
        group=utils.make_group_config(cfg),
        workers=utils.make_worker_config(cfg),
        replay_buffer=utils.make_replay_buffer(cfg),
        weight_bytes=AsyncWeightUpdater().store_bytes(policy),
        rows_per_page=cfg.memory.rows_per_page,
    )
