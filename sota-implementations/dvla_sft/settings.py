# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Settings as typed dataclasses: what ``config/*.yaml`` and the command line may hold.

Each section is a dataclass that checks its own types, ranges and what has to fit together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchrl_dvla.envs import LIBERO_SUITES
from torchrl_dvla.envs.libero_expert import ActionNoise
from torchrl_dvla.modules import TinyBackboneConfig
from torchrl_dvla.validation import COUNT, THREADS, Range, check_fields, check_path, from_mapping

ACTION_DIM = 7


@dataclass(frozen=True)
class EnvSettings:
    """Arguments of :class:`~torchrl_dvla.envs.LiberoChunkEnv`, one for each of ``task_ids``."""

    task_suite: str
    task_ids: tuple[int, ...]
    chunk_size: int
    max_episode_steps: int
    image_size: int
    shadows: bool = True
    msaa: bool = True
    env_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        sizes = {"chunk_size": COUNT, "max_episode_steps": COUNT, "image_size": Range(1, 4096)}
        check_fields(self, task_ids=Range(0), **sizes)
        if self.task_suite not in LIBERO_SUITES:
            raise ValueError(
                f"task_suite must be one of {', '.join(LIBERO_SUITES)}, got {self.task_suite!r}. "
                "Correct the name."
            )
        if not self.task_ids or len(set(self.task_ids)) < len(self.task_ids):
            raise ValueError(
                "task_ids must name at least one task, and each once, got "
                f"{list(self.task_ids)}. Use [0]."
            )


@dataclass(frozen=True)
class DemonstrationSettings:
    """Episodes of the scripted expert."""

    folder: str
    num_per_task: int
    first_seed: int
    label_interval: int
    num_processes: int = 2
    noise: ActionNoise = field(default_factory=ActionNoise)

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("num_per_task", "label_interval", "num_processes"), COUNT)
        check_fields(self, first_seed=Range(0, 2**31 - 1), **counts)
        check_path("folder", self.folder)


@dataclass(frozen=True)
class PolicySettings:
    """Sizes of the policy."""

    num_bins: int
    backbone: TinyBackboneConfig
    tokens_per_step: int = 1

    def __post_init__(self) -> None:
        check_fields(self, num_bins=Range(2), tokens_per_step=COUNT)
        if ACTION_DIM % self.tokens_per_step:
            raise ValueError(
                f"tokens_per_step must be a divisor of {ACTION_DIM}, the action dimension, got "
                f"{self.tokens_per_step}. Use 1 or {ACTION_DIM}."
            )


@dataclass(frozen=True)
class TrainingSettings:
    """Behaviour cloning."""

    num_steps: int
    decay_steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    num_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    max_shift: int = 0
    state_noise: float = 0.0
    num_threads: int = 1
    num_validation_demonstrations: int = 1
    validate_every: int = 100
    snapshot_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = ("num_steps", "decay_steps", "batch_size", "validate_every", "snapshot_steps")
        check_fields(
            self,
            lr=Range(above=0),
            weight_decay=Range(0),
            num_warmup_steps=Range(0),
            max_grad_norm=Range(above=0),
            max_shift=Range(0),
            state_noise=Range(0),
            num_threads=THREADS,
            num_validation_demonstrations=COUNT,
            **dict.fromkeys(names, COUNT),
        )
        if self.decay_steps < self.num_steps:
            raise ValueError(
                f"decay_steps must be at least num_steps={self.num_steps}, got {self.decay_steps}. "
                "The learning rate would rise again: raise both."
            )


@dataclass(frozen=True)
class EvaluationSettings:
    """Episodes on the benchmark's init states."""

    num_episodes: int
    temperature: float = 1.0
    num_processes: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"num_episodes": COUNT, "num_processes": COUNT}
        check_fields(self, temperature=Range(above=0), seed=Range(0, 2**31 - 1), **counts)


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    seed: int
    env: EnvSettings
    demonstrations: DemonstrationSettings
    policy: PolicySettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, seed=Range(0, 2**32 - 1))
        check_path("checkpoint", self.checkpoint)
        if self.demonstrations.label_interval > self.env.chunk_size:
            raise ValueError(
                f"demonstrations.label_interval must be at most env.chunk_size="
                f"{self.env.chunk_size}, got {self.demonstrations.label_interval}. Lower it."
            )
        if self.policy.backbone.image_size != self.env.image_size:
            raise ValueError(
                f"policy.backbone.image_size must be env.image_size={self.env.image_size}, got "
                f"{self.policy.backbone.image_size}. Leave it out."
            )
        num_demonstrations = self.demonstrations.num_per_task * len(self.env.task_ids)
        if self.training.num_validation_demonstrations >= num_demonstrations:
            raise ValueError(
                "training.num_validation_demonstrations must be less than the "
                f"{num_demonstrations} demonstrations, got "
                f"{self.training.num_validation_demonstrations}. Lower it."
            )


def settings_from(cfg: DictConfig | Mapping[str, Any]) -> Settings:
    """The settings of a composed configuration.

    Raises:
        ValueError: for a setting that does not exist, is missing, of another type, out of range, or
            that does not fit the others.
    """
    is_config = OmegaConf.is_config(cfg)
    data = OmegaConf.to_container(cfg, resolve=True) if is_config else copy.deepcopy(dict(cfg))
    env, policy = data.get("env"), data.get("policy")
    backbone = policy.get("backbone") if isinstance(policy, Mapping) else None
    if isinstance(env, Mapping) and isinstance(backbone, Mapping):
        # The images are the environment's.
        policy["backbone"] = {"image_size": env.get("image_size"), **backbone}
    return from_mapping(Settings, data)
