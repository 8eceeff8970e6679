# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Episodes in child processes: one simulator each, seeds handed out as they come free."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type
from tqdm import tqdm

from torchrl_dvla.data.schema import ACTION_IS_PAD_KEY, INIT_STATE_ID_KEY
from torchrl_dvla.envs import LiberoChunkEnv, ManiSkillChunkEnv
from torchrl_dvla.envs.libero_expert import record_demonstration
from torchrl_dvla.envs.maniskill_expert import record_pick_cube
from torchrl_dvla.modules import FlowVLA, TransformersVLA
from torchrl_dvla.recipes.dvla_sft import utils
from torchrl_dvla.recipes.dvla_sft.settings import Settings
from torchrl_dvla.streams import use_workers_output, workers_output
from torchrl_dvla.swimlane.managed_process import leave_signals_to_parent

# between two states of a progress bar: a terminal is redrawn, a log file grows
PAUSE_S = 0.2 if sys.stderr.isatty() else 10.0

# what a child process keeps between episodes: building a simulator takes seconds
_env: LiberoChunkEnv | ManiSkillChunkEnv
_policy: TransformersVLA | FlowVLA | None


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of one evaluation episode."""

    task_id: int
    number: int
    success: bool
    num_env_steps: int


def record_missing(cfg: Settings, folder: Path) -> None:
    """Record the demonstrations that *folder* does not hold yet."""
    for task_id in cfg.env.task_ids:
        paths = zip(utils.seeds_of(cfg), utils.paths_of(cfg, task_id, folder), strict=True)
        jobs = [(seed, path) for seed, path in paths if not path.exists()]
        if not jobs:
            continue
        with _pool(cfg, task_id, None, min(cfg.demonstrations.num_processes, len(jobs))) as pool:
            num_solved = 0
            bar = _finished(
                pool, _record, [(cfg, *job) for job in jobs], f"recording task {task_id}"
            )
            for num_done, solved in enumerate(bar, start=1):
                num_solved += solved
                bar.set_postfix_str(f"expert solved {num_solved}/{num_done}", refresh=False)


def evaluate(cfg: Settings, checkpoint: Path, *, greedy: bool) -> list[EpisodeResult]:
    """Play the benchmark's init states or held-out seeds: no demonstration starts from them."""
    results: list[EpisodeResult] = []
    for task_id in cfg.env.task_ids:
        jobs = [(cfg, task_id, number, greedy) for number in range(cfg.evaluation.num_episodes)]
        with _pool(cfg, task_id, checkpoint, cfg.evaluation.num_processes) as pool:
            name = f"{'greedy' if greedy else 'sampled'} evaluation of task {task_id}"
            bar = _finished(pool, _play, jobs, name)
            for num_done, result in enumerate(bar, start=1):
                results.append(result)
                num_solved = sum(r.success for r in results if r.task_id == task_id)
                bar.set_postfix_str(f"solved {num_solved}/{num_done}", refresh=False)
    return results


@contextmanager
def _pool(
    cfg: Settings, task_id: int, checkpoint: Path | None, num_processes: int
) -> Iterator[ProcessPoolExecutor]:
    # spawn: a simulator's GL context does not survive a fork
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(cfg, task_id, checkpoint, workers_output()),
    )
    try:
        yield pool
    except BaseException:
        # Nobody waits for an episode that is not wanted any more: it may take minutes.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(
    pool: ProcessPoolExecutor, function: Callable[..., Any], jobs: list[tuple[Any, ...]], name: str
) -> tqdm:
    futures = [pool.submit(function, *job) for job in jobs]
    results = (future.result() for future in as_completed(futures))
    return tqdm(results, total=len(jobs), desc=name, unit="episode", mininterval=PAUSE_S)


# ---- what runs in a child


def _start(
    cfg: Settings, task_id: int, checkpoint: Path | None, outputs: tuple[Connection, ...]
) -> None:
    global _env, _policy
    use_workers_output(outputs)
    leave_signals_to_parent()
    torch.set_num_threads(1)
    _env = utils.make_env(cfg, task_id, recording=checkpoint is None)
    _policy = None
    if checkpoint is not None:
        _policy = utils.load_clone(cfg, checkpoint)


def _record(cfg: Settings, seed: int, path: Path) -> bool:
    noise = cfg.demonstrations.noise
    if isinstance(_env, ManiSkillChunkEnv):
        demonstration = record_pick_cube(_env, seed=seed, noise=noise)
    else:
        demonstration = record_demonstration(_env, seed=seed, noise=noise)
    demonstration.save(path)
    return demonstration.info.success


def _play(cfg: Settings, task_id: int, number: int, greedy: bool) -> EpisodeResult:
    assert _policy is not None
    torch.manual_seed(cfg.evaluation.seed + number)
    _env.set_seed(cfg.evaluation.seed + number)
    exploration = ExplorationType.DETERMINISTIC if greedy else ExplorationType.RANDOM
    # of LIBERO this decides the scene; of ManiSkill the seed does
    tensordict = _env.reset(TensorDict({INIT_STATE_ID_KEY: torch.tensor([number])}, []))
    num_env_steps, done = 0, False
    while not done:
        with torch.no_grad(), set_exploration_type(exploration):
            decision = _policy(tensordict.unsqueeze(0).to(cfg.device)).squeeze(0)
        tensordict = _env.step(decision.to("cpu"))["next"]
        num_env_steps += int((~tensordict[ACTION_IS_PAD_KEY]).sum())
        done = bool(tensordict["done"])
    return EpisodeResult(task_id, number, bool(tensordict["success"]), num_env_steps)
