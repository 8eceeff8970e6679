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
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from omegaconf import DictConfig, OmegaConf

from torchrl_dvla.envs.libero_expert import ActionNoise
from torchrl_dvla.modules import TinyBackboneConfig
from torchrl_dvla.modules.formats import Stated
from torchrl_dvla.modules.tiny import TinyFlowConfig
from torchrl_dvla.recipes.device import check_device_name
from torchrl_dvla.recipes.libero_tasks import LiberoTasks
from torchrl_dvla.validation import (
    Count,
    Limit,
    Natural,
    NonNegative,
    Positive,
    Range,
    Section,
    Threads,
    check,
    check_path,
    from_mapping,
)

ACTION_DIM = 7
Seed = Annotated[int, Range(0, 2**31 - 1)]
ImageSize = Annotated[int, Range(1, 4096)]
Sampler = Literal["sde", "cps", "noise"]
StochasticStep = Literal["random", "all"] | Natural


@dataclass(frozen=True)
class LiberoSettings(LiberoTasks):
    """Arguments of :class:`~torchrl_dvla.envs.LiberoChunkEnv`, one for each of ``task_ids``."""

    image_size: ImageSize = 128


@dataclass(frozen=True)
class ManiSkillSettings(Section):
    """Arguments of :class:`~torchrl_dvla.envs.ManiSkillChunkEnv`; the expert knows one task."""

    backend: Literal["maniskill"]
    task: Literal["PickCube-v1"]
    chunk_size: Count
    max_episode_steps: Count
    image_size: ImageSize
    env_kwargs: Mapping[str, Any] | None = None

    #: As its demonstrations say: a suite of one.
    task_ids: ClassVar[tuple[int, ...]] = (0,)
    cameras: ClassVar[tuple[str, ...]] = ("base_camera",)
    replan_interval: ClassVar[int | None] = None
    #: Its demonstrations say it.
    state_dim: ClassVar[int | None] = None

    @property
    def task_suite(self) -> str:
        """The suite that its demonstrations name."""
        return self.task


@dataclass(frozen=True)
class DemonstrationSettings(Section):
    """Episodes of the scripted expert."""

    folder: str
    num_per_task: Count
    first_seed: Seed
    label_interval: Count
    num_processes: Count = 2
    noise: ActionNoise = field(default_factory=ActionNoise)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("folder", self.folder)


@dataclass(frozen=True)
class TokenSettings(Section):
    """A random policy of action tokens: its sizes, and how it samples."""

    kind: Literal["tokens"]
    num_bins: Annotated[int, Range(2)]
    backbone: TinyBackboneConfig
    tokens_per_step: Count = 1
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if ACTION_DIM % self.tokens_per_step:
            raise ValueError(
                f"tokens_per_step must be a divisor of {ACTION_DIM}, the action dimension, got "
                f"{self.tokens_per_step}. Use 1 or {ACTION_DIM}."
            )


@dataclass(frozen=True)
class FlowSettings(Section):
    """A random flow policy: its sizes, and how it samples."""

    kind: Literal["flow"]
    backbone: TinyFlowConfig
    num_steps: Count = 4
    sampler: Sampler = "sde"
    noise_level: Positive = 0.5
    initial_noise: NonNegative = 1.0
    stochastic_step: StochasticStep = "random"


@dataclass(frozen=True)
class FlowCheckpointSettings(Section):
    """A flow policy that goes on from a checkpoint; null leaves what that says."""

    kind: Literal["flow_checkpoint"]
    path: str
    statistics: Literal["checkpoint", "demonstrations"] = "checkpoint"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    freeze_prefix: bool | None = None
    num_steps: Count | None = None
    sampler: Sampler | None = None
    noise_level: Positive | None = None
    initial_noise: NonNegative | None = None
    stochastic_step: StochasticStep | None = None
    stated: Stated = field(default_factory=Stated)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("path", self.path)


#: By ``policy.kind``.
_POLICIES: dict[str, type[Section]] = {
    "tokens": TokenSettings,
    "flow": FlowSettings,
    "flow_checkpoint": FlowCheckpointSettings,
}


@dataclass(frozen=True)
class TrainingSettings(Section):
    """Behaviour cloning."""

    num_steps: Count
    decay_steps: Count
    batch_size: Count
    lr: Positive
    weight_decay: NonNegative = 0.0
    num_warmup_steps: Natural = 0
    max_grad_norm: Limit = 1.0
    max_shift: Natural = 0
    state_noise: NonNegative = 0.0
    num_threads: Threads = 1
    num_validation_demonstrations: Count = 1
    validate_every: Count = 100
    snapshot_steps: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_steps < self.num_steps:
            raise ValueError(
                f"decay_steps must be at least num_steps={self.num_steps}, got {self.decay_steps}. "
                "The learning rate would rise again: raise both."
            )


@dataclass(frozen=True)
class EvaluationSettings(Section):
    """Episodes on the benchmark's init states; on seeds from ``seed`` on where there are none."""

    num_episodes: Count
    num_processes: Count = 2
    seed: Seed = 0


@dataclass(frozen=True)
class Settings(Section):
    """All settings of a run."""

    seed: Seed
    env: LiberoSettings | ManiSkillSettings
    demonstrations: DemonstrationSettings
    policy: TokenSettings | FlowSettings | FlowCheckpointSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    checkpoint: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("checkpoint", self.checkpoint)
        check_device_name("device", self.device)
        start = getattr(self.policy, "path", None)
        if start and self.checkpoint and _absolute(start) == _absolute(self.checkpoint):
            raise ValueError(
                f"checkpoint must be another folder than policy.path, got {self.checkpoint!r} for "
                "both. What the policy came from would be overwritten: choose a new folder."
            )
        if self.demonstrations.label_interval > self.env.chunk_size:
            raise ValueError(
                f"demonstrations.label_interval must be at most env.chunk_size="
                f"{self.env.chunk_size}, got {self.demonstrations.label_interval}. Lower it."
            )
        backbone = getattr(self.policy, "backbone", None)
        if backbone is not None and backbone.image_size != self.env.image_size:
            raise ValueError(
                f"policy.backbone.image_size must be env.image_size={self.env.image_size}, got "
                f"{backbone.image_size}. Leave it out."
            )
        first, seed = self.demonstrations.first_seed, self.evaluation.seed
        recorded = range(first, first + self.demonstrations.num_per_task)
        evaluated = range(seed, seed + self.evaluation.num_episodes)
        if isinstance(self.env, ManiSkillSettings) and (
            recorded.start < evaluated.stop and evaluated.start < recorded.stop
        ):
            raise ValueError(
                f"evaluation.seed must be of scenes without a demonstration, got {seed}, and "
                f"demonstrations from demonstrations.first_seed={first} on. Set "
                f"evaluation.seed={recorded.stop}."
            )
        num_demonstrations = self.demonstrations.num_per_task * len(self.env.task_ids)
        if self.training.num_validation_demonstrations >= num_demonstrations:
            raise ValueError(
                "training.num_validation_demonstrations must be less than the "
                f"{num_demonstrations} demonstrations, got "
                f"{self.training.num_validation_demonstrations}. Lower it."
            )


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


def settings_from(cfg: DictConfig | Mapping[str, Any]) -> Settings:
    """The settings of a composed configuration.

    Raises:
        ValueError: for a setting that does not exist, is missing, of another type, out of range, or
            that does not fit the others.
    """
    is_config = OmegaConf.is_config(cfg)
    data: Any = OmegaConf.to_container(cfg, resolve=True) if is_config else copy.deepcopy(dict(cfg))
    env, policy = data.get("env"), data.get("policy")
    backbone = policy.get("backbone") if isinstance(policy, dict) else None
    if isinstance(env, Mapping) and isinstance(backbone, Mapping):
        # The images are the environment's.
        policy["backbone"] = {"image_size": env.get("image_size"), **backbone}
    if isinstance(env, Mapping):
        backend = check("env.backend", env.get("backend"), Literal["libero", "maniskill"])
        section = LiberoSettings if backend == "libero" else ManiSkillSettings
        data["env"] = from_mapping(section, env, "env")
    if isinstance(policy, Mapping):
        kind = check("policy.kind", policy.get("kind"), Literal[tuple(_POLICIES)])
        data["policy"] = from_mapping(_POLICIES[kind], policy, "policy")
    return from_mapping(Settings, data)
