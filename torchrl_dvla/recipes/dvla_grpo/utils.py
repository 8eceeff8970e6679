# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""From settings to objects."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch.optim.lr_scheduler import LambdaLR
from torchrl.checkpoint import Checkpoint
from torchrl.data.vla import UniformActionTokenizer
from torchrl.envs import EnvBase

from torchrl_dvla import (
    AsyncWeightUpdater,
    DVLACollector,
    EpisodeSpec,
    GRPOLoss,
    PooledReplayBuffer,
    TopologyAwareCollector,
)
from torchrl_dvla.envs import LiberoChunkEnv, ToyChunkEnv, libero_tasks
from torchrl_dvla.learner import LearnerFactory, LearnerRanks
from torchrl_dvla.memory import DualPool
from torchrl_dvla.modules import FlowVLA, TransformersVLA, load_policy, tiny_token_policy
from torchrl_dvla.modules.load_policy import policy_class
from torchrl_dvla.modules.master_weights import MasterWeights
from torchrl_dvla.recipes.dvla_grpo.settings import (
    FactorySettings,
    LiberoSettings,
    PolicySettings,
    Settings,
    ToySettings,
)
from torchrl_dvla.recording import (
    RunCheckpoints,
    TrainingScenes,
    check_writable,
    find_latest_checkpoint,
)
from torchrl_dvla.topology import NodePlacement, Placement

RECIPES = Path(__file__).resolve().parents[1]
TOY_INSTRUCTION = "push the T-shaped block onto the target"
#: Seeds of the scenes of an evaluation count down from here; those of training count up from
#: ``seed * 1_000_003``, so no training scene of a run is ever evaluated.
LAST_SEED = 2**31 - 1


def make_deterministic(cfg: Settings) -> None:
    """Seed every generator of this process, and share out the cores."""
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.optim.num_threads)
    device = torch.device(cfg.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # else page-locking takes memory of the first one


def find_policy(path: str) -> Path:
    """A policy's checkpoint, relative to where the recipe was started, else one of the recipes'."""
    given = Path(path).expanduser()
    shipped = RECIPES / given
    return shipped if shipped.exists() and not given.exists() else given


# -- environments ---------------------------------------------------------------------------------


def known_instructions(cfg: Settings) -> list[str]:
    """What the policy will be told; nothing if only the environment knows."""
    if isinstance(cfg.env, ToySettings):
        return [TOY_INSTRUCTION]
    if not isinstance(cfg.env, LiberoSettings):
        return []
    tasks = libero_tasks(cfg.env.task_suite)
    return [tasks[task_id].instruction for task_id in cfg.env.task_ids]


def make_env_factories(cfg: Settings) -> dict[str, Callable[[], EnvBase]]:
    """An environment factory for each task, by its name."""
    if isinstance(cfg.env, FactorySettings):
        return {cfg.env.target.rpartition(".")[2]: cfg.env.make}
    kwargs = asdict(cfg.env)
    if kwargs.pop("backend") == "toy":
        return {"toy": functools.partial(ToyChunkEnv, **kwargs)}
    suite, task_ids = kwargs.pop("task_suite"), kwargs.pop("task_ids")
    return {
        f"{suite}/{task_id}": functools.partial(LiberoChunkEnv, suite, task_id, **kwargs)
        for task_id in task_ids
    }


def make_evaluation_episodes(
    cfg: Settings, block: int = 0
) -> tuple[list[EpisodeSpec], list[EpisodeSpec]]:
    """Held-out episodes, and a subset, spread over tasks and scenes, for looks in between.

    LIBERO's are its benchmark init states, on which training never starts; those of other
    environments are seeds, other ones in each *block*.
    """
    names, count = list(make_env_factories(cfg)), cfg.eval.num_episodes
    is_libero = isinstance(cfg.env, LiberoSettings)
    last = LAST_SEED - block * count
    episodes = [
        EpisodeSpec(names[k % len(names)], last - k, k // len(names) if is_libero else -1)
        for k in range(count)
    ]
    size = min(cfg.eval.subset_episodes, count)
    by_task = sorted(range(count), key=lambda k: k % len(names))
    chosen = sorted(by_task[k * count // size] for k in range(size))
    return episodes, [episodes[k] for k in chosen]


# -- policy ---------------------------------------------------------------------------------------


def make_policy(cfg: Settings, device: str | None = None) -> TensorDictModuleBase:
    """The policy, on ``device``; by default the learner's."""
    settings = cfg.policy
    if isinstance(settings, FactorySettings):
        policy = settings.make()
        if not isinstance(policy, TensorDictModuleBase):
            raise ValueError(
                f"policy._target_ must make a TensorDictModuleBase, got {settings.target!r}, which "
                f"makes a {type(policy).__name__}. Wrap it in a TensorDictModule."
            )
        return policy.to(device or cfg.device)
    if settings.kind == "checkpoint":
        assert settings.path is not None
        folder = find_policy(settings.path)
        is_flow = policy_class(folder) is FlowVLA
        given = {name: getattr(settings, name) for name in (_OF_FLOWS if is_flow else _OF_TOKENS)}
        _refuse_others(settings, is_flow)
        policy = load_policy(
            folder,
            stated=settings.stated,
            lora=settings.lora.to_config(),
            dtype=settings.dtype,
            gradient_checkpointing=settings.gradient_checkpointing,
            **given,
        )
    elif isinstance(cfg.env, FactorySettings):
        raise AssertionError("Settings refuses what is built for an environment that it can read")
    elif settings.kind == "tiny":
        policy = TransformersVLA.tiny(
            known_instructions(cfg) or [TOY_INSTRUCTION],
            action_dim=settings.action_dim,
            chunk_size=cfg.env.chunk_size,
            state_dim=settings.state_dim,
            action_tokenizer=UniformActionTokenizer(settings.vocab_size, low=-1.0, high=1.0),
            backbone=settings.backbone,
            seed=cfg.seed,
            temperature=settings.temperature,
        )
        if settings.state_std is not None and policy.state_projector is not None:
            std = torch.tensor(settings.state_std)
            policy.state_projector.set_statistics(torch.zeros_like(std), std)
        if (lora := settings.lora.to_config()) is not None:
            policy.add_adapters(lora)
    else:
        policy = tiny_token_policy(
            settings.action_dim,
            cfg.env.chunk_size,
            vocab_size=settings.vocab_size,
            hidden_dim=settings.hidden_dim,
        )
    return policy.to(device or cfg.device)


#: Settings of a checkpoint that one kind of policy has, with what leaves it as it is.
_OF_TOKENS = {"freeze_vision": None, "freeze_language": None, "temperature": 1.0}
_OF_FLOWS = dict.fromkeys(
    ("freeze_prefix", "num_steps", "sampler", "noise_level", "initial_noise", "stochastic_step")
)


def _refuse_others(settings: PolicySettings, is_flow: bool) -> None:
    """Refuse settings of the other kind of policy."""
    others = _OF_TOKENS if is_flow else _OF_FLOWS
    found = {name: getattr(settings, name) for name in others}
    if found != others:
        kind = "flow policy" if is_flow else "policy of action tokens"
        remedy = " ".join(
            f"policy.{name}={'null' if value is None else value}" for name, value in others.items()
        )
        raise ValueError(
            f"policy must leave out {', '.join(others)} for a {kind}, got {found}. Set {remedy}."
        )


def make_loss(cfg: Settings, policy: TensorDictModuleBase, *, functional: bool = True) -> GRPOLoss:
    """The objective; with a KL term, the policy as it is now is the reference."""
    settings: dict[str, Any] = {**asdict(cfg.loss), "functional": functional}
    if settings["kl_to_ref_coeff"] is not None:
        # What is frozen is the same in both.
        shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
        settings["reference_network"] = copy.deepcopy(policy, shared).requires_grad_(False)
    return GRPOLoss(policy, **settings)


def make_optimizer(
    cfg: Settings, loss: GRPOLoss, progress: Callable[[], float]
) -> tuple[torch.optim.Optimizer, LambdaLR, MasterWeights]:
    """AdamW over what is trained, and its schedule.

    Of weights in a narrower dtype it steps float32 masters, which are returned as well.
    """
    masters = MasterWeights(parameter for parameter in loss.parameters() if parameter.requires_grad)
    optimizer = make_adamw(cfg, masters.stepped)
    masters.follow(optimizer)
    return optimizer, make_scheduler(cfg, optimizer, progress), masters


def make_adamw(cfg: Settings, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW over those of the parameters that are trained."""
    return torch.optim.AdamW(
        [parameter for parameter in parameters if parameter.requires_grad],
        lr=cfg.optim.lr,
        betas=cfg.optim.betas,
        weight_decay=cfg.optim.weight_decay,
    )


def make_scheduler(
    cfg: Settings, optimizer: torch.optim.Optimizer, progress: Callable[[], float]
) -> LambdaLR:
    """The learning rate, which rises at first and falls with the budget.

    Groups are few and noisy on a small machine: a rate that ends at ``final_lr_share`` averages
    over the last of them instead of following each.
    """
    warmup, final = max(1, cfg.optim.warmup_steps), cfg.optim.final_lr_share

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (1.0 - (1.0 - final) * progress())

    return LambdaLR(optimizer, factor)


def make_learner_factory(cfg: Settings) -> LearnerFactory:
    """How each rank of the learner makes what it learns with."""
    return LearnerFactory(
        policy=functools.partial(make_policy, cfg),
        loss=functools.partial(make_loss, cfg, functional=False),
        optimizer=functools.partial(make_adamw, cfg),
        device=cfg.device,
        num_threads=cfg.optim.num_threads,
        seed=cfg.seed,
    )


def make_learner_ranks(
    cfg: Settings, policy: TensorDictModuleBase, buffer: PooledReplayBuffer
) -> LearnerRanks:
    """The learner of several processes; the collector must be there, which binds ``buffer``."""
    ranks = LearnerRanks(
        make_learner_factory(cfg),
        policy,
        num_ranks=cfg.learner.num_ranks,
        strategy=cfg.learner.strategy,
        timeout_s=cfg.learner.timeout_s,
    )
    try:
        ranks.bind(buffer)
    except BaseException:
        ranks.close()
        raise
    return ranks


# -- collection -----------------------------------------------------------------------------------


def make_memory(cfg: Settings) -> DualPool:
    """Budgets of the two pools; the collector plans and allocates them."""
    return DualPool(cfg.memory.env_bytes, cfg.memory.model_bytes)


def make_replay_buffer(cfg: Settings) -> PooledReplayBuffer:
    """The buffer between collection and learning."""
    return PooledReplayBuffer(
        batch_size=cfg.optim.minibatch_size,
        num_epochs=cfg.optim.num_epochs,
        seed=cfg.seed,
        whole_rollouts=cfg.loss.needs_whole_rollouts,
    )


def make_updater(cfg: Settings, policy: TensorDictModuleBase) -> AsyncWeightUpdater:
    """The scheme that publishes; of a policy that is frozen in parts, what is trained alone.

    Several ranks hand all of their weights over, one after the other.
    """
    trained = [parameter.requires_grad for parameter in policy.parameters()]
    is_in_parts = any(trained) and not all(trained) and cfg.learner.num_ranks == 1
    return AsyncWeightUpdater(trainable_only=is_in_parts)


def make_collector(
    cfg: Settings, policy: TensorDictModuleBase, buffer: PooledReplayBuffer
) -> DVLACollector:
    """The collector, which fills ``buffer``: workers are up, nothing is collected yet."""
    policy_factory = None
    is_sharded = cfg.learner.num_ranks > 1 and cfg.learner.strategy == "fsdp"
    if cfg.inference_device is not None or is_sharded:  # what is sharded cannot be sent
        policy_factory = functools.partial(make_policy, cfg, cfg.inference_device or cfg.device)
    common: dict[str, Any] = {
        "policy_factory": policy_factory,
        "replay_buffer": buffer,
        "group": cfg.group,
        "weight_sync_schemes": {"policy": make_updater(cfg, policy)},
        "memory": make_memory(cfg),
        "rows_per_page": cfg.memory.rows_per_page,
        "seed": cfg.seed,
    }
    tasks = make_env_factories(cfg)
    if cfg.cluster is None:
        return DVLACollector(tasks, policy, workers=cfg.workers, inference=cfg.inference, **common)
    nodes = [
        NodePlacement(host, cfg.workers, cfg.inference, learner=index == 0)
        for index, host in enumerate(cfg.cluster.hosts)
    ]
    return TopologyAwareCollector(
        tasks,
        policy,
        placement=Placement(tuple(nodes)),
        address=cfg.cluster.address,
        heartbeat_timeout_s=cfg.cluster.heartbeat_timeout_s,
        **common,
    )


# -- what a run leaves behind ---------------------------------------------------------------------


def find_resumed_checkpoint(cfg: Settings) -> Path | None:
    """The checkpoint to go on from, or ``None`` for a new run.

    Raises:
        FileNotFoundError: if ``checkpoint.resume`` names a folder without one.
    """
    resume = cfg.checkpoint.resume
    if resume is None:
        return None
    if resume == "auto":
        runs = Path(cfg.log.dir) / cfg.name
        found = find_latest_checkpoint(runs, cfg.seed)
        if found is None:
            print(
                f"checkpoint.resume=auto: no checkpoint of seed {cfg.seed} in {runs}, so this is a "
                "new run"
            )
        return found
    given = Path(resume).expanduser()
    path = RunCheckpoints(given / "checkpoints").latest() or given
    if not (path / "manifest.json").is_file():
        raise FileNotFoundError(
            f"checkpoint.resume must be the folder of a training checkpoint, got {str(given)!r} "
            "without a complete one. Pass a run or a folder update-* of one, 'auto' for the newest "
            "run of this seed, or null to start anew; a folder with nothing but a policy belongs "
            "into policy.path."
        )
    return path


def find_training_scenes(cfg: Settings, resumed: Path | None) -> TrainingScenes:
    """Init states that the policy has been trained from before this run, as far as is on record."""
    if resumed is not None:
        folder = resumed / Checkpoint.manifest(resumed)["components"]["policy"]["path"]
    elif isinstance(cfg.policy, PolicySettings) and cfg.policy.kind != "checkpoint":
        return TrainingScenes()  # it begins anew
    elif isinstance(cfg.policy, PolicySettings):
        assert cfg.policy.path is not None
        folder = find_policy(cfg.policy.path)
    else:
        return TrainingScenes(gaps=[f"what made the policy of {cfg.policy.target}"])
    return TrainingScenes.load(folder)


def make_run_folder(cfg: Settings, resumed: Path | None) -> Path:
    """The folder of this run: that of the resumed one, or a new one named after the time."""
    if resumed is not None and resumed.absolute().parent.name == "checkpoints":
        return resumed.absolute().parents[1]  # else it is a copy somewhere
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    stem = check_writable(Path(cfg.log.dir) / cfg.name) / f"{now}_seed{cfg.seed}"
    folder, number = stem, 1
    while True:
        try:
            folder.mkdir()  # two runs that begin in the same second get a folder each
            return folder
        except FileExistsError:
            number += 1
            folder = stem.with_name(f"{stem.name}_{number}")
