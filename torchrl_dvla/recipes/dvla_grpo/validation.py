# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Validation of what settings.py cannot know: the machine, the assets, the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchrl.modules.vla import VLAWrapperBase

from torchrl_dvla import AsyncWeightUpdater
from torchrl_dvla.collectors.validation import match_policy, plan_memory
from torchrl_dvla.data.schema import IMAGE_KEY, STATE_KEY
from torchrl_dvla.envs import validate_libero
from torchrl_dvla.envs.libero_setup import load_init_states
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import LiberoSettings, Settings
from torchrl_dvla.recording import check_backend, check_writable
from torchrl_dvla.swimlane.messages import EnvSpecs


def check_settings(cfg: Settings) -> None:
    """Refuse settings that this machine cannot serve; the error names the setting and a remedy.

    Raises:
        ValueError: for a device that is not there, or a log folder that cannot be written to.
        FileNotFoundError: if assets of LIBERO are missing.
        ImportError: if LIBERO, or what ``log.backend`` needs, is not installed.
    """
    check_backend(cfg.log.backend)
    found = torch.accelerator.current_accelerator()
    for name, wanted in (("device", cfg.device), ("inference_device", cfg.inference_device)):
        device = torch.device(wanted or "cpu")
        count = torch.accelerator.device_count() if found and found.type == device.type else 0
        if device.type != "cpu" and (device.index or 0) >= count:
            raise ValueError(
                f"{name} must be one that torch sees, got {wanted!r} and {count} of its kind. Use "
                f"{name}=cpu, or a build of torch for the GPUs of this machine."
            )
    if isinstance(cfg.env, LiberoSettings):
        env = cfg.env
        num_states = -(-cfg.eval.num_episodes // len(env.task_ids))
        for task_id in env.task_ids:
            try:
                task = validate_libero(env.task_suite, task_id)
            except ValueError as error:
                raise ValueError(f"env.task_ids must name tasks of the suite: {error}") from error
            if num_states and num_states > len(load_init_states(task)):
                raise ValueError(
                    f"eval.num_episodes must be at most {len(load_init_states(task))} for each of "
                    f"env.task_ids, got {cfg.eval.num_episodes}. The benchmark has no more scenes."
                )
    check_writable(Path(cfg.log.dir))


def check_policy(cfg: Settings, policy: VLAWrapperBase) -> None:
    """Refuse a policy that does not fit the environment, and pools that do not fit the memory.

    Raises:
        ValueError: if a size of the policy differs from the environment's, a budget is too small,
            or this machine has not that much memory.
    """
    env, config = cfg.env, getattr(policy, "config", None)
    num_cameras = len(env.cameras) if isinstance(env, LiberoSettings) else 1
    is_libero = isinstance(env, LiberoSettings)
    sides = "env.camera_height and env.camera_width" if is_libero else "env.image_size"
    # What this environment has, what the policy was made for, and what to do about it; its actions
    # are checked below.
    sizes: dict[str, tuple[Any, Any, str]] = {}
    if config:
        wanted = (3, *config.image_size)
        sizes["image_shape"] = (env.image_shape, wanted, f"Set {sides}.")
        if config.state_dim:
            remedy = "Choose a policy.checkpoint for this environment."
            sizes["state_dim"] = (env.state_dim, config.state_dim, remedy)
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
    observation: list[tuple[Any, tuple[int, ...], torch.dtype]]
    observation = [(key, env.image_shape, torch.uint8) for key in images]
    observation.append((STATE_KEY, (env.state_dim,), torch.float32))
    specs = EnvSpecs(tuple(observation), env.chunk_size, env.action_dim)
    layout = match_policy(policy, specs)
    try:
        plan_memory(
            utils.make_memory(cfg),
            layout,
            group=cfg.group,
            workers=cfg.workers,
            replay_buffer=utils.make_replay_buffer(cfg),
            weight_bytes=AsyncWeightUpdater().store_bytes(policy),
            rows_per_page=cfg.memory.rows_per_page,
        )
    except ValueError as error:
        raise ValueError(f"memory.{error}") from None
