# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Validation of what settings.py cannot know: the machine, the assets, the policy."""

from __future__ import annotations

import inspect
import math
import os
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase

from torchrl_dvla.collectors.validation import match_policy, plan_memory
from torchrl_dvla.data.schema import CAMERA_KEYS, IMAGE_KEY, STATE_KEY
from torchrl_dvla.envs import validate_libero
from torchrl_dvla.envs.libero_setup import load_init_states
from torchrl_dvla.learner import launched_rank
from torchrl_dvla.memory import Plan
from torchrl_dvla.modules.adapters import import_peft
from torchrl_dvla.modules.config import PolicyConfig
from torchrl_dvla.recipes.device import check_device
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import (
    FactorySettings,
    LiberoSettings,
    PolicySettings,
    Settings,
    ToySettings,
)
from torchrl_dvla.recording import check_backend
from torchrl_dvla.swimlane import EnvProcesses
from torchrl_dvla.swimlane.messages import EnvSpecs


def check_settings(cfg: Settings) -> None:
    """Refuse settings that this machine cannot serve; the error names the setting and a remedy.

    Raises:
        ValueError: for a device that is not there, or a ``_target_`` that cannot be imported or
            does not take its arguments.
        FileNotFoundError: if assets of LIBERO are missing.
        ImportError: if LIBERO, PEFT for adapters, or what ``log.backend`` needs, is not installed.
    """
    check_backend(cfg.log.backend)
    check_device("device", cfg.device)
    check_device("inference_device", cfg.inference_device or "cpu")
    if isinstance(cfg.policy, PolicySettings) and cfg.policy.lora.rank is not None:
        import_peft()
    _check_ranks(cfg)
    for name, section in (("env", cfg.env), ("policy", cfg.policy)):
        if isinstance(section, FactorySettings):
            _check_factory(name, section.to_dict())
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


def _check_ranks(cfg: Settings) -> None:
    """Require a device, or a core, for each rank of the learner, and a launcher that agrees."""
    num_ranks, device = cfg.learner.num_ranks, torch.device(cfg.device)
    if launched_rank() is not None:
        world_size, local_size = (int(os.environ[f"{kind}WORLD_SIZE"]) for kind in ("", "LOCAL_"))
        if world_size != num_ranks:
            raise ValueError(
                f"learner.num_ranks must be the number of processes that torchrun starts, got "
                f"{num_ranks} and WORLD_SIZE={world_size}. Set learner.num_ranks={world_size}, or "
                "leave torchrun out: the recipe starts its ranks by itself."
            )
        if local_size != world_size:
            raise ValueError(
                f"the ranks of the learner must be on one machine, got {local_size} of "
                f"{world_size} here: they read rows from shared memory. Use --nnodes=1; "
                "cluster.hosts spreads sampling over machines."
            )
    if num_ranks == 1:
        return
    if isinstance(cfg.policy, PolicySettings) and cfg.policy.lora.rank is not None:
        raise ValueError(
            f"learner.num_ranks must be 1 with policy.lora.rank={cfg.policy.lora.rank}, got "
            f"{num_ranks}: adapters are small enough for one rank. Leave one of them out."
        )
    if device.type == "cpu":
        found, kind = len(os.sched_getaffinity(0)), "cores"
    else:
        found, kind = torch.accelerator.device_count() - (device.index or 0), "devices"
    if num_ranks > found:
        raise ValueError(
            f"learner.num_ranks must be at most the {found} {kind} from device={cfg.device} on, "
            f"got {num_ranks}. Ranks that share one only wait for each other: lower it."
        )


def _check_factory(name: str, call: Mapping[str, Any]) -> None:
    """Require that what ``_target_`` names is there and takes its arguments; nested ones first."""
    target, arguments = call["_target_"], {}
    for key, value in call.items():
        if isinstance(value, Mapping) and "_target_" in value:
            _check_factory(f"{name}.{key}", value)
        if key not in ("_target_", "_args_", "_partial_", "_convert_", "_recursive_"):
            arguments[key] = value
    try:
        made_by = pkgutil.resolve_name(target)
    except Exception as error:  # whatever its module raises when it is imported
        raise ValueError(
            f"{name}._target_ must be the dotted path of a function or class, got {target!r}: "
            f"{error}. Run where its module can be imported, or set PYTHONPATH to its folder."
        ) from error
    if not callable(made_by):
        raise ValueError(
            f"{name}._target_ must be the dotted path of a function or class, got {target!r}, a "
            f"{type(made_by).__name__}. Name what makes it."
        )
    # A class may have a metaclass that takes anything, as TorchRL's environments do.
    has_init = inspect.isclass(made_by) and made_by.__init__ is not object.__init__
    try:
        signature = inspect.signature(made_by.__init__ if has_init else made_by)
    except ValueError:  # written in C
        return
    takes = ", ".join(list(signature.parameters)[1 if has_init else 0 :]) or "none"
    bind = signature.bind_partial if call.get("_partial_") else signature.bind
    try:
        bind(*([None] if has_init else []), *call.get("_args_", ()), **arguments)
    except TypeError as error:
        raise ValueError(
            f"{name} must hold the arguments of {target}, which takes {takes}; got "
            f"{sorted(arguments)}: {error}. Correct them, or begin without any: {name}=factory."
        ) from None


def find_specs(cfg: Settings) -> EnvSpecs:
    """What an environment reads and writes; one that is not our own says so in a worker.

    Raises:
        RuntimeError: with the worker's traceback if the environment cannot be built.
        TimeoutError: if that takes longer than ``workers.start_timeout_s``.
    """
    env = cfg.env
    if isinstance(env, FactorySettings):
        processes = EnvProcesses(
            utils.make_env_factories(cfg),
            1,
            num_threads=cfg.workers.num_threads,
            env_vars=cfg.workers.env_vars,
            start_method=cfg.workers.start_method,
        )
        try:
            return processes.wait_ready(cfg.workers.start_timeout_s)
        finally:
            processes.stop(cfg.workers.stop_timeout_s)
    num_cameras = len(env.cameras) if isinstance(env, LiberoSettings) else 1
    observation: list[tuple[Any, tuple[int, ...], torch.dtype]]
    observation = [(key, env.image_shape, torch.uint8) for key in CAMERA_KEYS[:num_cameras]]
    observation.append((STATE_KEY, (env.state_dim,), torch.float32))
    return EnvSpecs(tuple(observation), env.chunk_size, env.action_dim)


def check_policy(cfg: Settings, policy: TensorDictModuleBase) -> Plan:
    """Refuse a policy that does not fit the environment, and pools that do not fit the memory.

    Returns:
        The sizes of the pools, as the collector will plan them.

    Raises:
        ValueError: if a size of the policy differs from the environment's, a budget is too small,
            or this machine has not that much memory.
    """
    specs, config = find_specs(cfg), getattr(policy, "config", None)
    found = {key: shape for key, shape, _ in specs.observation}
    # What this environment has, what the policy was made for, and what to do about it; its actions
    # are checked below.
    sizes: dict[str, tuple[Any, Any, str]] = {}
    if isinstance(config, PolicyConfig):
        wrong_images = wrong_cameras = "Choose a policy for this environment."
        if isinstance(cfg.env, LiberoSettings):
            wrong_images = "Set env.camera_height and env.camera_width."
            wrong_cameras = "Add robot0_eye_in_hand to env.cameras, or remove it."
        elif isinstance(cfg.env, ToySettings):
            wrong_images = "Set env.image_size."
        num_cameras = sum(key in found for key in CAMERA_KEYS)
        sizes["image_shape"] = (found.get(IMAGE_KEY), (3, *config.image_size), wrong_images)
        if config.state_dim:
            state_dim = math.prod(found.get(STATE_KEY, (0,)))
            remedy = "Choose a policy.path for this environment."
            sizes["state_dim"] = (state_dim, config.state_dim, remedy)
        sizes["number of cameras"] = (num_cameras, config.num_cameras, wrong_cameras)
    problems = [
        f"{name} must be {wanted} as the policy's, got {here}. {remedy}"
        for name, (here, wanted, remedy) in sizes.items()
        if here != wanted
    ]
    if problems:
        raise ValueError(" ".join(problems))
    narrow = {p.dtype for p in policy.parameters() if p.requires_grad and p.dtype.itemsize < 4}
    if cfg.learner.num_ranks > 1 and narrow:
        raise ValueError(
            f"policy.dtype must be float32 with learner.num_ranks={cfg.learner.num_ranks}, got "
            f"{sorted(map(str, narrow))}: ranks step no float32 masters. Use one rank, or float32."
        )
    known = utils.known_instructions(cfg)
    longest = {"instruction": max(known, key=len)} if known else {}
    layout = match_policy(policy, specs, **longest)  # a prompt may be too long for the policy
    try:
        return plan_memory(
            utils.make_memory(cfg),
            layout,
            group=cfg.group,
            workers=cfg.workers,
            rollouts_per_env=specs.num_rollouts,
            replay_buffer=utils.make_replay_buffer(cfg),
            weight_bytes=utils.make_updater(cfg, policy).store_bytes(policy),
            rows_per_page=cfg.memory.rows_per_page,
        )
    except ValueError as error:
        raise ValueError(f"memory.{error}") from None
