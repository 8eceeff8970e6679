# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Play held-out episodes greedily, and print the success of each task with 95 % Wilson intervals.

POLICY is a folder that save_pretrained wrote, a run of `train`, or one of its checkpoints
(update-*). Of a run, its last checkpoint is taken, with its settings and the held-out episodes that
it plays itself.

  torchrl-dvla evaluate runs/libero/2026-01-31_12-00-00_seed0 --videos 4
  torchrl-dvla evaluate my/policy --config-name libero env.task_suite=libero_goal env.task_ids=[0,1]

With --suite, a whole suite of LIBERO by the benchmark's protocol instead: all its tasks and init
states, its horizon and its rendering. What was interrupted goes on with the same command.

  torchrl-dvla evaluate my/policy --suite libero_object --rendering benchmark,blank --workers 8
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchrl_dvla import EpisodeSpec
from torchrl_dvla.collectors import Evaluation, EvaluationResult
from torchrl_dvla.commands.saved_policy import SavedPolicy, add_settings
from torchrl_dvla.commands.suite_evaluation import RENDERINGS, blank_images, evaluate_suite
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import Settings, to_dict
from torchrl_dvla.recipes.dvla_grpo.train import begin_evaluation
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy, check_settings
from torchrl_dvla.recording import (
    GracefulStop,
    StopRequested,
    SuccessRate,
    check_writable,
    encode_gif,
)
from torchrl_dvla.validation import Count, Natural, Range, check

#: Pause between two looks at how far an evaluation is.
_POLL_S = 0.2
#: Pause between progress lines where the output is no terminal.
_LINE_EVERY_S = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    parser.add_argument(
        "policy", metavar="POLICY", help="folder of a policy, a run or a checkpoint"
    )
    add_settings(parser, "those of the run; of a policy alone, libero")
    of_suite = "of each task with --suite, by default all init states; else over all tasks"
    parser.add_argument("--episodes", type=int, help=of_suite + "; default: eval.num_episodes")
    parser.add_argument("--workers", type=int, help="simulators; default: workers.num_workers")
    other = "other scenes, where they follow from seeds; default: 0, those that a run evaluates"
    parser.add_argument("--seed", type=int, default=0, help=other)
    parser.add_argument("--videos", type=int, default=0, metavar="N", help="GIFs of the first N")
    parser.add_argument("--video-dir", default="videos", metavar="DIR", help="default: videos")
    parser.add_argument("--json", metavar="FILE", help="write outcomes and settings there as well")
    drawn = (
        "blank: all images grey, to see what is solved without looking; with --suite also "
        "benchmark (its default): with shadows; fast: without shadows and multisampling"
    )
    parser.add_argument("--rendering", metavar="NAME,NAME", help=drawn)
    suite = parser.add_argument_group("a whole suite of LIBERO")
    suite.add_argument("--suite", help="libero_spatial, _object, _goal, _10 or _90")
    suite.add_argument("--tasks", metavar="ID,ID", help="such as 0,3; default: all")
    suite.add_argument("--out", metavar="FOLDER", help="default: evaluations/<suite>-<policy>")
    limit = "env steps of an episode, if not the suite's: for a quick look"
    suite.add_argument("--horizon", type=int, metavar="N", help=limit)


def run(args: argparse.Namespace) -> int:
    """Plays them and prints a table; 128 plus the signal's number if one ended it."""
    saved = SavedPolicy.find(args.policy)
    if args.workers is not None:
        args.overrides = [*args.overrides, f"workers.num_workers={args.workers}"]
    if args.suite is not None:
        return evaluate_suite(args, saved)
    for name in ("tasks", "out", "horizon"):
        if (given := getattr(args, name)) is not None:
            raise ValueError(
                f"--{name} must be used with --suite, got {given!r} without. Add --suite "
                "libero_object, or leave it out."
            )
    if args.rendering not in (None, "blank"):
        raise ValueError(
            f"--rendering must be blank without --suite, got {args.rendering!r}. Leave it out for "
            "images as the policy's environment draws them."
        )
    cfg = saved.settings(args)
    num_episodes = check("--episodes", args.episodes or cfg.eval.num_episodes, Count)
    videos = check("--videos", args.videos, Natural)
    most = utils.LAST_SEED // 2 // num_episodes
    block = check("--seed", args.seed, int, Range(0, most, remedy="Use a smaller one."))
    video_dir = check_writable(args.video_dir, name="--video-dir") if videos else None
    if args.json:  # what cannot be written is said before the episodes are played
        try:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).open("a").close()
        except OSError as error:
            raise ValueError(
                f"--json must be a file that can be written to, got {args.json!r} "
                f"({error.strerror}). Choose another one."
            ) from error
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, num_episodes=num_episodes))
    check_settings(cfg)
    utils.make_deterministic(cfg)
    policy = saved.load(cfg)
    check_policy(cfg, policy)
    episodes, _ = utils.make_evaluation_episodes(cfg, block)
    with GracefulStop() as stop, contextlib.ExitStack() as stack:
        if args.rendering is not None:
            stack.enter_context(blank_images(policy))
        try:
            with stop.interruptible():
                collector = utils.make_collector(cfg, policy, utils.make_replay_buffer(cfg))
                stack.push(collector)  # shuts it down; it samples nothing for training
                evaluation = begin_evaluation(collector, episodes, num_videos=videos)
                assert evaluation is not None  # no task is quarantined yet
                result = _wait(evaluation, cfg.eval.timeout_s)
        except StopRequested:
            print(f"{stop.reason}: ended before all episodes were played", file=sys.stderr)
            return 128 + signal.Signals[str(stop.reason)]
    print(_table(episodes, result))
    if args.rendering is not None:
        print(f"{args.rendering} rendering: {RENDERINGS[args.rendering]}")
    for index, frames in sorted(result.frames.items()):
        assert video_dir is not None
        outcome = "success" if result.successes[index] else "failure"
        task = re.sub(r"\W+", "_", episodes[index].task)
        path = video_dir / f"{index:03d}_{task}_{outcome}.gif"
        path.write_bytes(encode_gif(frames, fps=cfg.eval.video_fps))
        print(f"video: {path}")
    if args.json:
        data = _as_data(saved, cfg, episodes, result) | {"rendering": args.rendering}
        Path(args.json).write_text(json.dumps(data, indent=2) + "\n")
        print(f"json: {args.json}")
    return 0


def _wait(evaluation: Evaluation, timeout_s: float | None) -> EvaluationResult:
    """The result, with a progress bar until it is there."""
    start_s, total = time.monotonic(), len(evaluation.episodes)
    pause_s = 0.1 if sys.stderr.isatty() else _LINE_EVERY_S
    with tqdm(total=total, desc="evaluating", unit="episode", mininterval=pause_s) as bar:
        while not evaluation.done():
            if timeout_s is not None and time.monotonic() - start_s > timeout_s:
                break
            time.sleep(_POLL_S)
            bar.update(evaluation.num_finished - bar.n)
        result = evaluation.result(0.0)
        bar.update(total - bar.n)
    return result


def _by_task(
    episodes: Sequence[EpisodeSpec], result: EvaluationResult
) -> dict[str, tuple[SuccessRate, float | None]]:
    """Success of each task, with the mean env steps of its successes."""
    out = {}
    for task in dict.fromkeys(spec.task for spec in episodes):
        of_task = [k for k, spec in enumerate(episodes) if spec.task == task]
        lengths = [result.num_env_steps[k] for k in of_task if result.successes[k]]
        success = SuccessRate.of([result.successes[k] for k in of_task])
        out[task] = success, sum(lengths) / len(lengths) if lengths else None
    return out


def _table(episodes: Sequence[EpisodeSpec], result: EvaluationResult) -> str:
    by_task = _by_task(episodes, result)
    rows = [("task", "success", "", "95 % interval", "env steps of a success")]
    if len(by_task) > 1:
        everything = [spec._replace(task="all") for spec in episodes]
        by_task |= _by_task(everything, result)
    for task, (success, length) in by_task.items():
        low, high = success.interval
        rows.append(
            (
                task,
                f"{100 * success.rate:.1f} %",
                f"{success.num_successes}/{success.num_episodes}",
                f"{100 * low:.1f}-{100 * high:.1f}",
                "-" if length is None else f"{length:.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths)).rstrip() for row in rows
    )


def _as_data(
    saved: SavedPolicy, cfg: Settings, episodes: Sequence[EpisodeSpec], result: EvaluationResult
) -> dict[str, Any]:
    success = SuccessRate.of(result.successes)
    return {
        "policy": str(saved.folder.absolute()),
        "update": saved.manifest["metadata"]["update"] if saved.manifest else None,
        "num_successes": success.num_successes,
        "num_episodes": success.num_episodes,
        "success_rate": success.rate,
        "interval": success.interval,
        "tasks": {
            task: {
                "num_successes": of_task.num_successes,
                "num_episodes": of_task.num_episodes,
                "success_rate": of_task.rate,
                "interval": of_task.interval,
                "mean_env_steps_of_success": length,
            }
            for task, (of_task, length) in _by_task(episodes, result).items()
        },
        "episodes": [
            {
                "task": spec.task,
                "seed": spec.seed,
                "init_state_id": spec.init_state_id,
                "success": bool(result.successes[k]),
                "return": result.episode_returns[k],
                "env_steps": result.num_env_steps[k],
            }
            for k, spec in enumerate(episodes)
        ],
        "settings": to_dict(cfg),
    }
