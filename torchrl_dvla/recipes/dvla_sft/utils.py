# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Factories of the supervised recipe: from the config to the pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import OmegaConf
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
from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    CAMERA_KEYS,
    STATE_KEY,
)
from torchrl_dvla.envs import (
    LiberoChunkEnv,
    ManiSkillChunkEnv,
    validate_libero,
    validate_maniskill,
)
from torchrl_dvla.envs.libero_setup import load_init_states
from torchrl_dvla.modules import FlowVLA, TransformersVLA, load_policy
from torchrl_dvla.modules.load_policy import policy_class
from torchrl_dvla.modules.policy_inputs import RangeScaler, Standardizer
from torchrl_dvla.objectives.bc import ActionTokenBCLoss, FlowMatchingLoss
from torchrl_dvla.recipes import dvla_grpo
from torchrl_dvla.recipes.dvla_sft.settings import (
    ACTION_DIM,
    FlowCheckpointSettings,
    FlowSettings,
    LiberoSettings,
    ManiSkillSettings,
    Settings,
    TokenSettings,
)
from torchrl_dvla.recipes.terminal import override
from torchrl_dvla.recording import TrainingScenes

_MIN_STD = 0.02
_QUANTILES = (0.01, 0.99)
_VALIDATION_SEED = 0


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


def check_policy(cfg: Settings) -> None:
    """Require a policy that can be made and fits the environment, before anything is recorded.

    Raises:
        ValueError: naming the setting.
        FileNotFoundError: if the checkpoint to go on from is none.
    """
    wanted: dict[str, tuple[Any, Any]] = {}
    policy, env = make_policy(cfg, ["any task"], state_dim=cfg.env.state_dim or 1), cfg.env
    if isinstance(cfg.policy, FlowCheckpointSettings):
        config = policy.config
        wanted = {
            "env.chunk_size": (env.chunk_size, policy.chunk_size),
            "env.image_size": ((env.image_size, env.image_size), config.image_size),
            "number of env.cameras": (len(env.cameras), config.num_cameras),
            "action_dim": (ACTION_DIM, config.action_dim),
        }
        if config.state_dim and env.state_dim is not None:
            wanted["state_dim, which env.orientation decides,"] = (env.state_dim, config.state_dim)
    problems = [
        f"{name} must be {of_policy} as the policy's in policy.path, got {here}."
        for name, (here, of_policy) in wanted.items()
        if here != of_policy
    ]
    if problems:
        raise ValueError(" ".join([*problems, "Change it, or choose another checkpoint."]))


def check_demonstrations(cfg: Settings, folder: Path) -> None:
    """Require that demonstrations which *folder* holds already are those of these settings.

    Raises:
        ValueError: if one is damaged, of another scene or of other sizes.
    """
    env = cfg.env
    image = (3, env.image_size, env.image_size)
    wanted: dict[Any, tuple[int, ...]] = dict.fromkeys(CAMERA_KEYS[: len(env.cameras)], image)
    wanted[ACTION_CHUNK_KEY] = (env.chunk_size, ACTION_DIM)
    scenes = [
        (path, (env.task_suite, task_id, seed))
        for task_id in env.task_ids
        for path, seed in zip(paths_of(cfg, task_id, folder), seeds_of(cfg), strict=True)
        if path.exists()
    ]
    for path, scene in scenes:
        demonstration = Demonstration.load(path)
        rows, info = demonstration.rows, demonstration.info
        if (recorded := (info.task_suite, info.task_id, info.seed)) != scene:
            raise ValueError(
                f"demonstrations.folder must hold what its files are named after, got {path} with "
                f"task {recorded[1]} of {recorded[0]}, seed {recorded[2]}. Delete it; it will be "
                "recorded again."
            )
        sizes = {STATE_KEY: (env.state_dim or rows.get(STATE_KEY).shape[-1],), **wanted}
        keys = {*sizes, *CAMERA_KEYS} & set(rows.keys(True, True))
        found = {key: tuple(rows.get(key).shape[1:]) for key in keys}
        if found != sizes:
            raise ValueError(
                "demonstrations.folder must hold demonstrations with "
                f"{_words(sizes)}, as env says, got {path} with {_words(found)}. Choose another "
                "folder to record in, or the settings of env that it was recorded with."
            )


def _words(sizes: dict[Any, tuple[int, ...]]) -> str:
    return ", ".join(f"{key[-1]} {list(size)}" for key, size in sorted(sizes.items()))


def paths_of(cfg: Settings, task_id: int, folder: Path) -> Iterator[Path]:
    """Files of the demonstrations of a task, in the order of :func:`seeds_of`."""
    # a seed is another scene where objects are shuffled
    is_shuffled = isinstance(cfg.env, LiberoSettings) and cfg.env.shuffle_objects
    name = f"{cfg.env.task_suite}_{task_id}{'_shuffled' * is_shuffled}"
    for seed in seeds_of(cfg):
        yield folder / name / f"{seed:06d}.safetensors"


def seeds_of(cfg: Settings) -> range:
    """Seeds of the scenes of each task."""
    first = cfg.demonstrations.first_seed
    return range(first, first + cfg.demonstrations.num_per_task)


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
        "replan_interval": cfg.demonstrations.label_interval
        if recording
        else cfg.env.replan_interval,
        "camera_height": cfg.env.image_size,
        "camera_width": cfg.env.image_size,
        "max_episode_steps": cfg.env.max_episode_steps,
        "env_kwargs": None if cfg.env.env_kwargs is None else dict(cfg.env.env_kwargs),
    }
    if isinstance(cfg.env, ManiSkillSettings):
        return ManiSkillChunkEnv(cfg.env.task, **kwargs)
    names = ("cameras", "orientation", "shadows", "msaa", "shuffle_objects")
    kwargs |= {name: getattr(cfg.env, name) for name in names}
    return LiberoChunkEnv(cfg.env.task_suite, task_id, **kwargs)


def make_demonstrations(cfg: Settings, folder: Path) -> list[Demonstration]:
    """Those of the folder that this run asks for and that reached the goal.

    Raises:
        ValueError: if there are none but one: with nothing to train on, or to validate on.
    """
    paths = [path for task_id in cfg.env.task_ids for path in paths_of(cfg, task_id, folder)]
    found = [Demonstration.load(path) for path in paths if path.exists()]
    successes = [demo for demo in found if demo.info.success]
    if len(successes) < 2:
        raise ValueError(
            f"demonstrations must hold at least two in which the expert reached the goal, got "
            f"{len(successes)} of {len(found)} in {folder} of {cfg.env.task_suite} "
            f"{list(cfg.env.task_ids)}. Raise demonstrations.num_per_task, lower "
            "demonstrations.noise, or choose other tasks."
        )
    return successes


def training_scenes(cfg: Settings, demonstrations: list[Demonstration]) -> TrainingScenes:
    """Init states that the policy was cloned from, those of validation included."""
    scenes = TrainingScenes()
    if isinstance(cfg.policy, FlowCheckpointSettings):
        scenes = TrainingScenes.load(Path(cfg.policy.path).expanduser())
    for info in (demo.info for demo in demonstrations):
        scenes.add(f"{info.task_suite}/{info.task_id}", info.init_state_hash)
    return scenes


def make_tokenizer(settings: TokenSettings) -> UniformActionTokenizer:
    """Uniform bins whose outermost centres are -1 and +1.

    An odd number of bins has a centre at 0: standing still, full speed and both gripper commands
    are then exact.
    """
    edge = settings.num_bins / (settings.num_bins - 1)
    return UniformActionTokenizer(settings.num_bins, low=-edge, high=edge)


def make_splits(
    cfg: Settings, demonstrations: list[Demonstration]
) -> tuple[TensorDictBase, TensorDictBase, InstructionTable]:
    """Decisions to train on, decisions of other episodes to validate on, and the instructions."""
    step = max(2, len(demonstrations) // cfg.training.num_validation_demonstrations)
    chosen = range(0, len(demonstrations), step)[: cfg.training.num_validation_demonstrations]
    held_out = [demonstrations[index] for index in chosen]
    rest = [demo for index, demo in enumerate(demonstrations) if index not in chosen]
    settings = cfg.policy
    tokenizer = make_tokenizer(settings) if isinstance(settings, TokenSettings) else None
    rows, instructions = stack_demonstrations([*rest, *held_out], tokenizer)
    num_training = sum(len(demo.rows) for demo in rest)
    return rows[:num_training], rows[num_training:], instructions


def make_policy(
    cfg: Settings, instructions: Sequence[str], *, state_dim: int
) -> TransformersVLA | FlowVLA:
    """A random policy of the sizes in the config, or that of the checkpoint to go on from."""
    settings = cfg.policy
    if isinstance(settings, FlowCheckpointSettings):
        return _load_flow(settings)
    sizes: dict[str, Any] = {
        "action_dim": ACTION_DIM,
        "chunk_size": cfg.env.chunk_size,
        "state_dim": state_dim,
        "num_cameras": len(cfg.env.cameras),
        "seed": cfg.seed,
    }
    try:
        if isinstance(settings, FlowSettings):
            given = {name: getattr(settings, name) for name in ("num_steps", *_OF_SAMPLER)}
            return FlowVLA.tiny(instructions, backbone=settings.backbone, **given, **sizes)
        return TransformersVLA.tiny(
            instructions,
            action_tokenizer=make_tokenizer(settings),
            backbone=settings.backbone,
            tokens_per_step=settings.tokens_per_step,
            **sizes,
        )
    except ValueError as error:
        raise ValueError(f"policy.{error}") from error


_OF_SAMPLER = ("sampler", "noise_level", "initial_noise", "stochastic_step")


def _load_flow(settings: FlowCheckpointSettings) -> FlowVLA:
    folder = Path(settings.path).expanduser()
    if (folder / "config.json").is_file() and policy_class(folder) is not FlowVLA:
        raise ValueError(
            f"policy.path must be the folder of a flow policy, got {str(folder)!r}, which holds "
            "another kind. Cloning goes on from flow policies only; policy=tokens begins anew."
        )
    names = ("dtype", "freeze_prefix", "num_steps", *_OF_SAMPLER)
    given = {name: getattr(settings, name) for name in names}
    policy = load_policy(folder, stated=settings.stated, **given)
    assert isinstance(policy, FlowVLA)
    return policy


def load_clone(cfg: Settings, checkpoint: Path) -> TransformersVLA | FlowVLA:
    """The policy that came out, on its device, as GRPO will sample from it."""
    if isinstance(cfg.policy, TokenSettings):
        policy = load_policy(checkpoint, temperature=cfg.policy.temperature)
    else:
        policy = load_policy(checkpoint)
    return policy.to(cfg.device).eval()


def set_statistics(cfg: Settings, policy: TransformersVLA | FlowVLA, rows: TensorDictBase) -> None:
    """Give a policy the statistics of the decisions that it is cloned from.

    Those of the actions are of what the loss counts: env steps that are padded are left out. A
    checkpoint that was trained with others keeps them unless the config says otherwise.
    """
    if getattr(cfg.policy, "statistics", "demonstrations") == "checkpoint":
        return
    state = rows.get(STATE_KEY)
    if isinstance(policy, FlowVLA):
        _fit(policy.action_statistics, rows.get(ACTION_CHUNK_KEY)[~rows.get(ACTION_IS_PAD_KEY)])
        if policy.use_state:
            _fit(policy.state_statistics, state)
    else:
        assert policy.state_projector is not None
        _fit(policy.state_projector, state)


def _fit(scaler: Standardizer | RangeScaler, values: torch.Tensor) -> None:
    """Statistics of values ``[N, S]``.

    An entry that hardly moves must not be blown up to unit scale: its next change would swamp all.
    """
    if isinstance(scaler, Standardizer):
        scaler.set_statistics(values.mean(0), values.std(0).clamp_min(_MIN_STD))
        return
    # torch.quantile takes 16 million numbers at most
    low, high = torch.from_numpy(np.quantile(values.numpy(), _QUANTILES, axis=0)).float()
    centre, half = (low + high) / 2, ((high - low) / 2).clamp_min(_MIN_STD)
    scaler.set_range(centre - half, centre + half)


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


def make_loss(policy: TransformersVLA | FlowVLA) -> ActionTokenBCLoss | FlowMatchingLoss:
    """Likelihood of the expert's tokens, or error of the velocity towards its chunk."""
    return FlowMatchingLoss(policy) if isinstance(policy, FlowVLA) else ActionTokenBCLoss(policy)


@torch.no_grad()
def validate(loss: ActionTokenBCLoss | FlowMatchingLoss, batch: TensorDictBase) -> dict[str, float]:
    """What the loss says of the held-out decisions.

    A flow's noises and times are the same at each call, in all runs: curves can be compared.
    """
    devices = [batch.device] if batch.device is not None and batch.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_VALIDATION_SEED)
        return {name: float(value) for name, value in loss(batch).items()}


def make_optimizer(
    cfg: Settings, loss: ActionTokenBCLoss | FlowMatchingLoss
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW over what is trained, warmed up, then a cosine down to a twentieth."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in loss.parameters() if parameter.requires_grad],
        lr=cfg.training.lr,
        weight_decay=cfg.training.weight_decay,
        betas=(0.9, 0.95),
    )

    def scale(step: int) -> float:
        warm_up = min(1.0, (step + 1) / max(1, cfg.training.num_warmup_steps))
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / cfg.training.decay_steps)
        return warm_up * (0.05 + 0.95 * cosine)

    return optimizer, LambdaLR(optimizer, scale)


def training_settings(cfg: Settings, checkpoint: str) -> list[str]:
    """What the main recipe is told to train the policy in the environment that it was cloned in."""
    if isinstance(cfg.env, ManiSkillSettings):
        told = ["--config-name", "maniskill"]
    else:
        told, size = [], cfg.env.image_size
        names = ["task_suite", "task_ids", "chunk_size", "replan_interval", "cameras"]
        names += ["orientation", "shadows", "msaa", "shuffle_objects"]
        found: dict[str, Any] = {name: getattr(cfg.env, name) for name in names}
        found |= {"camera_height": size, "camera_width": size}
        path = Path(dvla_grpo.__file__).parent / "config/env/libero.yaml"
        default: Any = OmegaConf.to_container(OmegaConf.load(path))
        for name, value in found.items():
            value = list(value) if isinstance(value, tuple) else value
            if name.startswith("task_") or value != default[name]:
                told.append(f"env.{name}={_typed(value)}")
        num_env_steps = cfg.env.env_steps_per_decision
        if num_env_steps != default["chunk_size"]:
            num_decisions = -(-default["max_episode_steps"] // num_env_steps)
            told.append(f"workers.max_decisions={num_decisions}")
    if not isinstance(cfg.policy, TokenSettings):
        told.append("policy=flow_checkpoint")
    return [*told, override("policy.path", checkpoint)]


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
