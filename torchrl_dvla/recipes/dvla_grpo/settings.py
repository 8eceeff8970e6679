# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Settings as typed dataclasses: what ``config/*.yaml`` and the command line may hold.

Each section is a dataclass that checks its types, its ranges and what has to fit together.
``group``, ``workers``, ``inference`` and ``policy.backbone`` are the package's own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_dvla import GroupConfig, InferenceConfig, WorkerConfig
from torchrl_dvla.functional import Reduction
from torchrl_dvla.learner import Strategy
from torchrl_dvla.memory import DualPool
from torchrl_dvla.modules import LoraConfig, TinyBackboneConfig
from torchrl_dvla.modules.formats import Stated
from torchrl_dvla.objectives.grpo import ROLLOUT_LEVELS, KLEstimator, RatioLevel
from torchrl_dvla.objectives.validation import check_trust_region
from torchrl_dvla.recipes.device import check_device_name
from torchrl_dvla.recipes.libero_tasks import LiberoTasks
from torchrl_dvla.recording import LogBackend
from torchrl_dvla.validation import (
    Count,
    Limit,
    Natural,
    NonNegative,
    Positive,
    Range,
    Seconds,
    Section,
    Threads,
    check,
    check_path,
    from_mapping,
)

#: The folder of the configurations.
CONFIG = Path(__file__).parent / "config"

Size = Annotated[int, Range(1, 4096)]
Beta = Annotated[float, Range(0, below=1)]


@dataclass(frozen=True)
class ToySettings(Section):
    """Arguments of :class:`~torchrl_dvla.envs.ToyChunkEnv`."""

    backend: Literal["toy"]
    action_dim: Size
    chunk_size: Size
    image_size: Size
    success_steps: Count
    success_tol: Positive

    @property
    def state_dim(self) -> int:
        """Entries of the state: the last action and the target."""
        return 2 * self.action_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the image, ``(3, height, width)``."""
        return (3, self.image_size, self.image_size)


@dataclass(frozen=True)
class LiberoSettings(LiberoTasks):
    """Arguments of :class:`~torchrl_dvla.envs.LiberoChunkEnv`, one for each of ``task_ids``."""

    camera_height: Size = 128
    camera_width: Size = 128
    settle_steps: Natural = 10
    max_mesh_faces: Count | None = None

    action_dim: ClassVar[int] = 7

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the images, ``(3, height, width)``."""
        return (3, self.camera_height, self.camera_width)


@dataclass(frozen=True)
class FactorySettings(Section):
    """A call of any function or class, by Hydra's rules: in YAML, ``_target_`` and its arguments.

    Arguments that have a ``_target_`` of their own are made first. Lists and mappings arrive as
    plain ones, unless ``_convert_`` says something else.
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The form of the YAML file."""
        return {"_target_": self.target, **self.arguments}

    def make(self) -> Any:
        """What the call returns.

        Raises:
            ValueError: if it raises, with what it raised as the cause.
        """
        try:
            return hydra.utils.instantiate({"_convert_": "all", **self.to_dict()})
        except InstantiationException as error:
            raise ValueError(
                f"_target_ must make what it is for, got an error: {error} Correct its arguments."
            ) from error.__cause__ or error


@dataclass(frozen=True)
class LoraSettings(Section):
    """Arguments of :class:`~torchrl_dvla.modules.LoraConfig`; without a rank, no adapters."""

    rank: Count | None = None
    alpha: Positive | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is None and not (self.alpha is None and self.targets is None):
            raise ValueError(
                f"rank must be given with alpha or targets, got alpha={self.alpha} and targets="
                f"{self.targets}. Without it there are no adapters: add rank=8, or leave them out."
            )
        self.to_config()

    def to_config(self) -> LoraConfig | None:
        """The adapters, or ``None``."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return LoraConfig(**given) if given else None


@dataclass(frozen=True)
class PolicySettings(Section):
    """The policy; which of the settings count depends on ``kind``."""

    kind: Literal["checkpoint", "tiny", "tiny_vla"]
    path: str | None = None
    temperature: Positive = 1.0
    freeze_vision: bool | None = None
    freeze_language: bool | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    gradient_checkpointing: bool | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    freeze_prefix: bool | None = None
    num_steps: Count | None = None
    sampler: Literal["sde", "cps", "noise"] | None = None
    noise_level: Positive | None = None
    initial_noise: NonNegative | None = None
    stochastic_step: Literal["random", "all"] | Natural | None = None
    stated: Stated = field(default_factory=Stated)
    action_dim: Size = 2
    state_dim: Natural = 0
    state_std: tuple[Positive, ...] | None = None
    vocab_size: Annotated[int, Range(2)] = 256
    hidden_dim: Count = 128
    backbone: TinyBackboneConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("path", self.path)
        if self.kind == "tiny_vla" and self.lora.rank is not None:
            raise ValueError(
                f"lora.rank must be null with kind=tiny_vla, got {self.lora.rank}. It has no "
                "transformer: use kind=tiny."
            )
        if self.kind == "checkpoint" and self.path is None:
            raise ValueError(
                "path must be given, got nothing. Pass policy.path=<folder> of a checkpoint that "
                "you have, or make one with the dvla_sft recipe."
            )
        if self.state_std is not None and len(self.state_std) != self.state_dim:
            raise ValueError(
                f"state_std must have state_dim={self.state_dim} entries, got "
                f"{list(self.state_std)}. Give one for each, or null."
            )


@dataclass(frozen=True)
class MemorySettings(Section):
    """Arguments of :class:`~torchrl_dvla.memory.DualPool`, and the size of its pages."""

    rows_per_page: Count = 4
    env_bytes: int | str | None = None
    model_bytes: int | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        DualPool(self.env_bytes, self.model_bytes)


@dataclass(frozen=True)
class LossSettings(Section):
    """Arguments of :class:`~torchrl_dvla.GRPOLoss`; the policy at the start is its reference."""

    clip_epsilon: float | tuple[float, float] = (0.2, 0.28)
    dual_clip: float | None = None
    trust_std: float | None = None
    ratio_level: RatioLevel = "token"
    reduction: Reduction = "token_mean"
    entropy_coeff: float = 0.0
    kl_to_ref_coeff: NonNegative | None = None
    kl_estimator: KLEstimator = "k3"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trust_region(self.clip_epsilon, dual_clip=self.dual_clip, trust_std=self.trust_std)
        if self.reduction == "none":
            raise ValueError("reduction must not be 'none', got 'none'. A step needs one loss.")

    @property
    def needs_whole_rollouts(self) -> bool:
        """Whether a minibatch must hold every decision of each of its rollouts."""
        return self.ratio_level in ROLLOUT_LEVELS


@dataclass(frozen=True)
class OptimSettings(Section):
    """AdamW, its schedule and its minibatches."""

    lr: Positive
    minibatch_size: Count
    final_lr_share: Annotated[float, Range(0, 1)] = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    warmup_steps: Natural = 0
    max_grad_norm: Limit = 1.0
    micro_batch_size: Count | None = None
    num_epochs: Count = 1
    num_threads: Threads = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.micro_batch_size or 1) > self.minibatch_size:
            raise ValueError(
                f"micro_batch_size must be at most minibatch_size={self.minibatch_size}, got "
                f"{self.micro_batch_size}. Use null for the minibatch at once."
            )


@dataclass(frozen=True)
class LearnerSettings(Section):
    """Processes that learn together, see :class:`~torchrl_dvla.learner.LearnerRanks`."""

    num_ranks: Count = 1
    strategy: Strategy = "fsdp"
    timeout_s: Seconds = 300.0


@dataclass(frozen=True)
class TrainSettings(Section):
    """Budgets of the training; without an update, the policy is evaluated and that is all."""

    num_updates: Natural
    max_minutes: Limit = None
    timeout_s: Seconds | None = 900.0


@dataclass(frozen=True)
class EvalSettings(Section):
    """Greedy evaluations."""

    num_episodes: Annotated[int, Range(0, 10**6, remedy="0 evaluates nothing.")]
    subset_episodes: Natural = 0
    every_minutes: Annotated[float, Range(0, remedy="Use null for never.")] | None = 5.0
    num_videos: Natural = 2
    video_fps: Annotated[float, Range(0.01, 1000)] = 5.0
    timeout_s: Seconds | None = 1800.0


@dataclass(frozen=True)
class CheckpointSettings(Section):
    """Training checkpoints."""

    resume: str | None = None
    every_updates: Count = 25
    keep: Count = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("resume", self.resume)


@dataclass(frozen=True)
class LogSettings(Section):
    """Where a run is recorded; a relative ``dir`` is one of the working directory."""

    dir: str = "runs"
    backend: LogBackend = "tensorboard"
    line_every_s: NonNegative = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("dir", self.dir)
        object.__setattr__(self, "dir", str(Path(self.dir).expanduser().absolute()))


@dataclass(frozen=True)
class ClusterSettings(Section):
    """Arguments of :class:`~torchrl_dvla.TopologyAwareCollector`; ``workers`` is that of a node."""

    hosts: tuple[str, ...]
    address: str | None = None
    heartbeat_timeout_s: Seconds = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hosts:
            raise ValueError(
                "hosts must name at least one node, got none. The first is that of the learner."
            )


@dataclass(frozen=True)
class DemoSettings(Section):
    """What a run does to itself, to show what comes of it."""

    kill_node: bool = False


@dataclass(frozen=True)
class Settings(Section):
    """All settings of a run."""

    name: str
    seed: Annotated[int, Range(0, 2**32 - 1, remedy="NumPy takes 32 bits.")]
    device: str
    env: ToySettings | LiberoSettings | FactorySettings
    policy: PolicySettings | FactorySettings
    optim: OptimSettings
    train: TrainSettings
    eval: EvalSettings
    inference_device: str | None = None
    group: GroupConfig = field(default_factory=GroupConfig)
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    memory: MemorySettings = field(default_factory=MemorySettings)
    loss: LossSettings = field(default_factory=LossSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)
    cluster: ClusterSettings | None = None
    demo: DemoSettings = field(default_factory=DemoSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.demo.kill_node and (
            self.cluster is None or self.cluster.address or len(self.cluster.hosts) < 2
        ):
            raise ValueError(
                "demo.kill_node must be false but for several nodes on this machine, got true. Use "
                "--config-name toy_cluster."
            )
        if self.optim.minibatch_size < self.learner.num_ranks:
            raise ValueError(
                f"optim.minibatch_size must be at least learner.num_ranks={self.learner.num_ranks},"
                f" got {self.optim.minibatch_size}: a rank would have no row. Raise one or lower "
                "the other."
            )
        sizes = {n: getattr(self.optim, n) for n in ("minibatch_size", "micro_batch_size")}
        for name, size in sizes.items() if self.loss.needs_whole_rollouts else ():
            if size is not None and size < self.workers.max_decisions:
                raise ValueError(
                    f"optim.{name} must be at least workers.max_decisions="
                    f"{self.workers.max_decisions} with loss.ratio_level={self.loss.ratio_level}, "
                    f"got {size}: no rollout may be split. Raise one or lower the other."
                )
        is_folder_name = self.name.isprintable() and not set("/\\") & set(self.name)
        if not is_folder_name or self.name.strip(". ") == "" or len(self.name.encode()) > 200:
            raise ValueError(
                f"name must be the name of one folder, got {self.name!r}. The folder that it is "
                "made in is log.dir."
            )
        check_device_name("device", self.device)
        check_device_name("inference_device", self.inference_device or "cpu")
        try:
            self.inference.is_deterministic(self.group.max_policy_lag)
        except ValueError as error:
            raise ValueError(f"inference.{error}") from None
        self._check_policy()
        env = self.env
        if isinstance(env, LiberoSettings):
            needed = -(-env.max_episode_steps // env.env_steps_per_decision)
            if self.workers.max_decisions < needed:
                raise ValueError(
                    f"workers.max_decisions must be at least {needed}, got "
                    f"{self.workers.max_decisions}: episodes of env.max_episode_steps="
                    f"{env.max_episode_steps} would be cut short. Raise one or lower the other."
                )

    def _check_policy(self) -> None:
        env, policy = self.env, self.policy
        if isinstance(policy, FactorySettings) or policy.kind == "checkpoint":
            return  # compared with the environment itself
        if isinstance(env, FactorySettings):
            raise ValueError(
                f"policy.kind must be checkpoint with an env._target_, got {policy.kind!r}: the "
                "sizes and words of the environment are not known here. Or name what makes the "
                "policy: policy=factory policy._target_=<dotted path>."
            )
        if policy.kind == "tiny_vla" and (env.backend != "toy" or policy.temperature != 1.0):
            raise ValueError(
                "policy.kind=tiny_vla must be used with env.backend=toy and "
                f"policy.temperature=1.0, got {env.backend!r} and {policy.temperature}. Use "
                "policy.kind=tiny elsewhere."
            )
        wanted = {"policy.action_dim": (policy.action_dim, env.action_dim)}
        if policy.kind == "tiny" and policy.state_dim:
            wanted["policy.state_dim"] = (policy.state_dim, env.state_dim)
        for name, (found, expected) in wanted.items():
            if found != expected:
                raise ValueError(
                    f"{name} must be {expected}, as in env, got {found}. Set {name}={expected}."
                )


def compose_settings(
    source: str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    config_dir: str | None = None,
) -> Settings:
    """The settings that the command line gives a run.

    Args:
        source (str or Mapping): name of a configuration, or the settings of another run.
        overrides (sequence of str): in Hydra's grammar, such as ``"env.task_ids=[1,2]"``.

    Keyword Args:
        config_dir (str, optional): a folder of configurations beside those of the recipe.

    Raises:
        ValueError: as :func:`settings_from`, or for a configuration or an override that Hydra
            refuses.

    Examples:
        >>> cfg = compose_settings("toy", ["seed=7"])
        >>> cfg.name, cfg.seed, compose_settings(to_dict(cfg), ["seed=8"]).seed
        ('toy', 7, 8)
    """
    name = source if isinstance(source, str) else "settings_of_a_run"
    if not isinstance(source, str):
        ConfigStore.instance().store(name, OmegaConf.create(dict(source)))
    given, folder = list(overrides), CONFIG
    if config_dir is not None:
        # Hydra finds the first file in the one folder, and what that names in the other as well.
        folder, other = CONFIG, Path(config_dir).expanduser().absolute()
        if (other / f"{name}.yaml").is_file():
            folder, other = other, folder
        escaped = str(other).replace("'", "\\'")
        given.append(f"hydra.searchpath=['file://{escaped}']")
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            return settings_from(hydra.compose(name, given))
    except MissingConfigException as error:
        names = ", ".join(sorted(path.stem for path in CONFIG.glob("*.yaml")))
        raise ValueError(
            f"--config-name must be one of {names}, or one in --config-dir, got "
            f"{error.missing_cfg_file}, which is not there. Correct it."
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(
            "The settings must be a configuration and overrides of what is in it, got "
            f"{' '.join([name, *overrides])!r}: {error}"
        ) from error


def settings_from(cfg: DictConfig | Mapping[str, Any]) -> Settings:
    """The settings of a composed configuration.

    Raises:
        ValueError: for a setting that does not exist, is missing, of another type, out of range, or
            that does not fit the others.
    """
    is_config = OmegaConf.is_config(cfg)
    data: Any = OmegaConf.to_container(cfg, resolve=True) if is_config else copy.deepcopy(dict(cfg))
    group = data.get("group")
    if isinstance(group, dict) and "normalise_std" in group:  # of a run by an older version
        is_divided = check("group.normalise_std", group.pop("normalise_std"), bool)
        group.setdefault("advantage", "mean_std" if is_divided else "mean")
    policy = data.get("policy")
    if isinstance(policy, dict) and "checkpoint" in policy and "_target_" not in policy:
        policy.setdefault("path", policy.pop("checkpoint"))  # as above
    # Which settings these sections have depends on what they make.
    for name in ("env", "policy"):
        section = data.get(name)
        if isinstance(section, Mapping) and "_target_" in section:
            arguments = dict(section)
            if (target := arguments.pop("_target_")) == "???":
                raise ValueError(
                    f"{name}._target_ must be given, got nothing. Pass "
                    f"{name}._target_=<dotted path>."
                )
            if name == "policy" and "lora" in arguments:
                raise ValueError(
                    f"policy.lora must be left out with policy._target_, got {arguments['lora']}. "
                    "Put the adapters on in the function that _target_ names, or save the policy by"
                    " save_pretrained and pass policy=checkpoint policy.path=<its folder>."
                )
            data[name] = FactorySettings(check(f"{name}._target_", target, str), arguments)
    env = data.get("env")
    if isinstance(env, Mapping):
        kinds = {"toy": ToySettings, "libero": LiberoSettings}
        backend = check("env.backend", env.get("backend"), Literal["toy", "libero"])
        data["env"] = from_mapping(kinds[backend], env, "env")
    return from_mapping(Settings, data)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their full names, as they are typed on the command line.

    Examples:
        >>> flat({"seed": 0, "optim": {"lr": 0.1}})
        {'seed': 0, 'optim.lr': 0.1}
    """
    out: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        out |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain data, for a checkpoint or a log."""
    plain: Any = OmegaConf.to_container(OmegaConf.create(asdict(settings)))
    for name in ("env", "policy"):
        section = getattr(settings, name)
        if isinstance(section, FactorySettings):
            plain[name] = section.to_dict()
    return dict(plain)
