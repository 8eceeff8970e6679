# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Evaluation of a whole suite of LIBERO by the benchmark's protocol: ``evaluate --suite``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import nn
from tqdm import tqdm

from torchrl_dvla import EpisodeSpec
from torchrl_dvla.collectors import Evaluation
from torchrl_dvla.commands.saved_policy import SavedPolicy
from torchrl_dvla.data import Rollout
from torchrl_dvla.data.schema import CAMERA_KEYS, NO_HASH
from torchrl_dvla.envs import LIBERO_SUITES
from torchrl_dvla.envs.libero_setup import (
    LIBERO_HORIZONS,
    LiberoTask,
    hash_init_state,
    libero_tasks,
    load_init_states,
)
from torchrl_dvla.modules.fingerprint import hash_weights
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import (
    DemoSettings,
    FactorySettings,
    LearnerSettings,
    LiberoSettings,
    Settings,
    to_dict,
)
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy, check_settings
from torchrl_dvla.recipes.terminal import shortened
from torchrl_dvla.recording import (
    EpisodeKey,
    EpisodeRecord,
    GracefulStop,
    StopRequested,
    SuiteRecord,
    SuiteReport,
    TrainingScenes,
    encode_gif,
)
from torchrl_dvla.recording.suite_record import write_whole
from torchrl_dvla.validation import Count, Natural, check

__all__ = ["RENDERINGS", "blank_images", "evaluate_suite", "protocol_settings"]

#: How frames are drawn, by the name of the rendering.
RENDERINGS: dict[str, str] = {
    "benchmark": "shadows, reflections and 4 samples per pixel, as the benchmark draws",
    "fast": "without shadows, reflections and multisampling",
    "blank": "all images grey, so that it says what the policy does without looking",
}
#: Value of each colour of a pixel of a grey image.
_GREY = 128
#: Env steps without motion before an episode, in which objects come to rest.
_SETTLE_STEPS = 10
#: Decisions of an episode, until the protocol's horizon is known.
_MAX_DECISIONS = 10_000
#: Settings that the protocol decides.
_DECIDED = re.compile(
    r"env\.(task_suite|task_ids|max_episode_steps|settle_steps|shadows|msaa|shuffle_objects)"
    r"|eval\.num_episodes|workers\.max_decisions|cluster(\..+)?|learner(\..+)?"
)
#: Pause between two looks at how far an evaluation is, and between lines without a terminal.
_POLL_S, _LINE_EVERY_S = 0.2, 15.0


@dataclass(frozen=True)
class _Suite:
    """What is to be played.

    Args:
        name (str): of the suite.
        tasks (dict): the tasks by index.
        hashes (dict): hash of each init state that is played, by task.
        renderings (tuple of str): one after the other.
        horizon (int): env steps of an episode.
    """

    name: str
    tasks: Mapping[int, LiberoTask]
    hashes: Mapping[int, Sequence[int]]
    renderings: tuple[str, ...]
    horizon: int

    @property
    def num_episodes(self) -> int:
        """Init states of each task."""
        return len(next(iter(self.hashes.values())))

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Suite:
        """That of the command line.

        Raises:
            ValueError: for an unknown suite or task, or more episodes than there are init states.
            FileNotFoundError: if a task has none.
            ImportError: if LIBERO is not installed.
        """
        name = check("--suite", args.suite, Literal[LIBERO_SUITES])
        found = libero_tasks(name)
        given = [] if args.tasks is None else args.tasks.split(",")
        chosen = [int(text) if text.strip().isdecimal() else -1 for text in given]
        if not all(0 <= task_id < len(found) for task_id in chosen):
            raise ValueError(
                f"--tasks must be numbers from 0 to {len(found) - 1} in {name}, separated by "
                f"commas, got {args.tasks!r}. Leave it out for all."
            )
        if args.episodes is not None:
            check("--episodes", args.episodes, Count)
        tasks = {task_id: found[task_id] for task_id in sorted(set(chosen or range(len(found))))}
        states = {task_id: load_init_states(task) for task_id, task in tasks.items()}
        most = min(map(len, states.values()))
        num_episodes = most if args.episodes is None else args.episodes
        if num_episodes > most:
            raise ValueError(
                f"--episodes must be at most {most} with --suite, for it counts those of each "
                f"task, got {num_episodes}. The benchmark has no more init states."
            )
        horizon = LIBERO_HORIZONS[name]
        if args.horizon is not None:
            horizon = check("--horizon", args.horizon, Count)
        asked = (args.rendering or "benchmark").replace(" ", "").split(",")
        if unknown := [name for name in asked if name not in RENDERINGS]:
            raise ValueError(
                f"--rendering must be of {', '.join(RENDERINGS)}, separated by commas, got "
                f"{unknown[0]!r}. Leave it out for the benchmark's."
            )
        renderings = tuple(each for each in RENDERINGS if each in asked)
        return cls(name, tasks, _hashes(states, num_episodes), renderings, horizon)

    def spec(self, key: EpisodeKey) -> EpisodeSpec:
        """What an episode starts from; the seed decides where fixtures stand."""
        task = f"{self.name}/{key.task_id}"
        return EpisodeSpec(task, utils.LAST_SEED - key.init_state_id, key.init_state_id)


def _hashes(states: Mapping[int, np.ndarray], num: int) -> dict[int, list[int]]:
    return {task_id: [hash_init_state(s) for s in of[:num]] for task_id, of in states.items()}


def protocol_settings(cfg: Settings, suite: str, task_ids: Sequence[int], horizon: int) -> Settings:
    """Settings of a policy, with what the benchmark's protocol decides in place of its own.

    What the policy was made for stays: cameras, size of the images, chunks, the form of the state.

    Raises:
        ValueError: if they are those of another environment.
    """
    env = cfg.env
    if not isinstance(env, LiberoSettings):
        kind = env.target if isinstance(env, FactorySettings) else env.backend
        raise ValueError(
            f"--suite must be left out for a policy whose settings are not those of LIBERO, got "
            f"{suite!r} and env {kind!r}. Leave it out, or pass the settings of the policy in "
            "LIBERO, e.g. --config-name libero."
        )
    # The benchmark's arm starts where the init state says; its own resets do not vary that.
    kwargs = {k: v for k, v in (env.env_kwargs or {}).items() if k != "initialization_noise"}
    env = dataclasses.replace(
        env,
        task_suite=suite,
        task_ids=tuple(task_ids),
        max_episode_steps=horizon,
        settle_steps=_SETTLE_STEPS,
        shuffle_objects=False,
        env_kwargs=kwargs or None,
    )
    num_decisions = -(-horizon // env.env_steps_per_decision)
    return dataclasses.replace(
        cfg,
        env=env,
        workers=dataclasses.replace(cfg.workers, max_decisions=num_decisions),
        eval=dataclasses.replace(cfg.eval, num_episodes=len(env.task_ids)),
        cluster=None,
        demo=DemoSettings(),
        learner=LearnerSettings(),
    )


def with_rendering(cfg: Settings, rendering: str, task_id: int) -> Settings:
    """Settings of one task under one rendering."""
    is_full, env = rendering == "benchmark", cfg.env
    assert isinstance(env, LiberoSettings)
    faces = None if is_full else env.max_mesh_faces
    env = dataclasses.replace(
        env, task_ids=(task_id,), shadows=is_full, msaa=is_full, max_mesh_faces=faces
    )
    return dataclasses.replace(cfg, env=env)


def _compared(cfg: Settings, suite: _Suite, policy: TensorDictModuleBase) -> dict[str, Any]:
    """All that the outcome of an episode depends on."""
    data = to_dict(cfg)
    env = {k: v for k, v in data["env"].items() if k not in ("task_ids", "shadows", "msaa")}
    of_policy = {k: v for k, v in data["policy"].items() if k not in ("path", "stated")}
    return {
        "suite": suite.name,
        "policy_sha256": hash_weights(policy),
        "policy": of_policy,
        "env": env,
    }


def evaluate_suite(args: argparse.Namespace, saved: SavedPolicy) -> int:
    """Play what is not on record yet, and write the report.

    Returns:
        0; or 128 plus the signal's number if one ended it.

    Raises:
        ValueError: for what does not fit, before a worker starts.
    """
    _refuse_others(args)
    # Enough for any chunk; protocol_settings says how many they are.
    args.overrides = [f"workers.max_decisions={_MAX_DECISIONS}", *args.overrides]
    cfg = saved.settings(args)
    suite = _Suite.of(args)
    videos = check("--videos", args.videos, Natural)
    cfg = protocol_settings(cfg, suite.name, list(suite.tasks), suite.horizon)
    check_settings(cfg)
    utils.make_deterministic(cfg)
    policy = saved.load(cfg)
    check_policy(cfg, policy)
    scenes = TrainingScenes.load(saved.folder)
    settings = _compared(cfg, suite, policy)
    out = args.out or Path("evaluations") / f"{suite.name}-{settings['policy_sha256'][:8]}"
    record = SuiteRecord(out, settings)
    try:
        report = _report(cfg, suite, args.policy, scenes, record)
        if record.episodes:
            print(f"going on with {shortened(record.folder)}: {report.num_played} are played")
        with GracefulStop() as stop, _bar(report) as bar:
            try:
                _play_missing(cfg, suite, policy, record, report, videos, stop, bar)
            except StopRequested:
                _write(report, record, cfg, saved, settings)
                bar.close()
                print(
                    f"{stop.reason}: {report.num_played} of {len(report.keys())} episodes are in "
                    f"{shortened(record.folder)}; the same command goes on from there",
                    file=sys.stderr,
                )
                return 128 + signal.Signals[str(stop.reason)]
        _write(report, record, cfg, saved, settings)
    finally:
        record.close()
    print(report.to_text())
    names = ["report.md", "report.json", "episodes.jsonl"]
    print(f"written: {shortened(record.folder)}: {', '.join(names + ['videos'] * (videos > 0))}")
    return 0


def _refuse_others(args: argparse.Namespace) -> None:
    """Refuse what belongs to an evaluation without a suite, or what the protocol decides."""
    for name, default in (("seed", 0), ("json", None), ("video_dir", "videos")):
        if (given := getattr(args, name)) != default:
            raise ValueError(
                f"--{name.replace('_', '-')} must be left out with --suite, got {given!r}. Scenes "
                "are the benchmark's init states, and all that is written is in --out."
            )
    for text in args.overrides:
        setting = text.partition("=")[0].lstrip("+~")
        if _DECIDED.fullmatch(setting):
            raise ValueError(
                f"{setting} must be left out with --suite, whose protocol decides it, got "
                f"{text!r}. Use --tasks, --episodes, --horizon and --rendering."
            )


def _report(
    cfg: Settings, suite: _Suite, policy: str, scenes: TrainingScenes, record: SuiteRecord
) -> SuiteReport:
    """The report, which follows the record."""
    standard = LIBERO_HORIZONS[suite.name]
    horizon = f"at most {suite.horizon} env steps"
    if suite.horizon != standard:
        horizon += f" (the protocol has {standard})"
    env = cfg.env
    assert isinstance(env, LiberoSettings)
    return SuiteReport(
        policy=policy,
        suite=suite.name,
        instructions={task_id: task.instruction for task_id, task in suite.tasks.items()},
        num_episodes=suite.num_episodes,
        renderings={name: RENDERINGS[name] for name in suite.renderings},
        protocol=(
            f"Greedy, {horizon} after {_SETTLE_STEPS} to settle, {env.env_steps_per_decision} env "
            f"steps a decision, images of {env.camera_height} x {env.camera_width} of "
            f"{', '.join(env.cameras)}."
        ),
        episodes=record.episodes,
        overlap=scenes.overlap(number for of_task in suite.hashes.values() for number in of_task),
    )


def _bar(report: SuiteReport) -> tqdm:
    pause_s = 0.1 if sys.stderr.isatty() else _LINE_EVERY_S
    total, done = len(report.keys()), report.num_played
    return tqdm(total=total, initial=done, desc="evaluating", unit="episode", mininterval=pause_s)


def _play_missing(
    cfg: Settings,
    suite: _Suite,
    policy: TensorDictModuleBase,
    record: SuiteRecord,
    report: SuiteReport,
    num_videos: int,
    stop: GracefulStop,
    bar: tqdm,
) -> None:
    """Task after task, on workers of its own: each simulator that is open takes two gigabytes."""
    for rendering in suite.renderings:
        for task_id in suite.tasks:
            keys = [EpisodeKey(rendering, task_id, k) for k in range(suite.num_episodes)]
            keys = [key for key in keys if key not in record.episodes]
            if not keys:
                continue
            bar.set_description(f"{rendering} {suite.name}/{task_id}")

            def take(
                number: int,
                rollout: Rollout,
                frames: torch.Tensor | None,
                keys: Sequence[EpisodeKey] = keys,
            ) -> None:
                episode = _episode(suite, keys[number], rollout)
                if frames is not None:
                    _write_video(record.folder, episode, frames, cfg.eval.video_fps)
                record.add(episode)
                mean = report.mean(episode.rendering)
                assert mean is not None
                bar.set_postfix_str(f"success {100 * mean[0]:.0f} %", refresh=False)
                bar.update()

            task_cfg = with_rendering(cfg, rendering, task_id)
            with contextlib.ExitStack() as stack:
                if rendering == "blank":
                    stack.enter_context(blank_images(policy))
                with stop.interruptible():
                    buffer = utils.make_replay_buffer(task_cfg)
                    collector = utils.make_collector(task_cfg, policy, buffer)
                stack.push(collector)  # shuts it down; it samples nothing for training
                evaluation = collector.evaluate(
                    [suite.spec(key) for key in keys],
                    # Missing ones come in order, so those with a video come first.
                    num_frames_episodes=sum(key.init_state_id < num_videos for key in keys),
                )
                follow(evaluation, take, cfg.eval.timeout_s, stop)


@contextlib.contextmanager
def blank_images(policy: TensorDictModuleBase) -> Iterator[None]:
    """Grey images for a policy, and for copies made of it meanwhile; videos have them as drawn."""
    handle = policy.register_forward_pre_hook(_see_grey)
    try:
        yield
    finally:
        handle.remove()


def _see_grey(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    seen = args[0].copy()  # the policy writes into what it is given, and returns it
    for key in set(CAMERA_KEYS) & set(seen.keys(True, True)):
        seen.set(key, torch.full_like(seen.get(key), _GREY))
    return seen, *args[1:]


def follow(
    evaluation: Evaluation,
    take: Callable[[int, Rollout, torch.Tensor | None], None],
    timeout_s: float | None,
    stop: GracefulStop,
) -> None:
    """Hand each episode over as it ends, until all have.

    Args:
        evaluation (Evaluation): under way.
        take (Callable): called with number, rollout and frames of an episode, once for each. No
            signal interrupts it.
        timeout_s (float, optional): how long no episode may end.
        stop (GracefulStop): ends the wait.

    Raises:
        StopRequested: if a stop is asked for.
        TimeoutError: if no episode has ended for too long.
        RuntimeError: if one cannot be played.
    """
    taken: set[int] = set()
    since_s = time.monotonic()
    while True:
        is_done = evaluation.done()
        for number, (rollout, frames) in evaluation.finished().items():
            if number not in taken:
                taken.add(number)
                take(number, rollout, frames)
                since_s = time.monotonic()
        if is_done:
            try:
                evaluation.result(0.0)
            except RuntimeError as error:
                raise RuntimeError(
                    f"Every episode must come to its end, got one that did not: {error} The same "
                    "command plays those that are missing."
                ) from error
            return
        if timeout_s is not None and time.monotonic() - since_s > timeout_s:
            raise TimeoutError(
                f"An episode must end within eval.timeout_s={timeout_s:g} s of the one before, got "
                f"none since: {len(taken)} of {len(evaluation.episodes)} have ended. Raise it; the "
                "same command goes on with the others."
            )
        with stop.interruptible():
            time.sleep(_POLL_S)


def _episode(suite: _Suite, key: EpisodeKey, rollout: Rollout) -> EpisodeRecord:
    """The record of a rollout, which must have started from the init state that was asked for."""
    expected = suite.hashes[key.task_id][key.init_state_id]
    was_reset = rollout.num_rows > 0 or rollout.init_state_hash != NO_HASH  # else it was refused
    if was_reset and rollout.init_state_hash != expected:
        raise RuntimeError(
            f"Episode {key.init_state_id} of task {key.task_id} must start from the benchmark's "
            f"init state {expected:016x}, got {rollout.init_state_hash:016x}. The files of LIBERO "
            "have changed while it was played: begin anew in another folder."
        )
    return EpisodeRecord(
        rendering=key.rendering,
        task_id=key.task_id,
        init_state_id=key.init_state_id,
        init_state_hash=f"{expected:016x}",
        success=bool(rollout.success),
        num_env_steps=rollout.num_env_steps,
        duration_s=round(rollout.duration_s, 3),
    )


def _write_video(folder: Path, episode: EpisodeRecord, frames: torch.Tensor, fps: float) -> None:
    outcome = "success" if episode.success else "failure"
    name = f"{episode.rendering}_{episode.task_id:02d}_{episode.init_state_id:02d}_{outcome}.gif"
    (folder / "videos").mkdir(exist_ok=True)
    (folder / "videos" / name).write_bytes(encode_gif(frames, fps=fps))


def _write(
    report: SuiteReport,
    record: SuiteRecord,
    cfg: Settings,
    saved: SavedPolicy,
    settings: Mapping[str, Any],
) -> None:
    data = report.to_dict() | {
        "policy": str(saved.folder.absolute()),
        "policy_sha256": settings["policy_sha256"],
        "update": saved.manifest["metadata"]["update"] if saved.manifest else None,
        "settings": to_dict(cfg),
    }
    write_whole(record.folder / "report.md", report.to_markdown())
    write_whole(record.folder / "report.json", json.dumps(data, indent=2) + "\n")
