# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does stale data cost in samples, and what does it buy in time?

    python benchmarks/staleness.py [--quick] [--csv staleness.csv] [--repeats 5] [--runs runs.jsonl]

The toy task from scratch (``staleness_libero.py``: LIBERO), greedy success on held-out scenes over
equal numbers of updates, so of groups with contrast, seed by seed. ``env_steps`` are all that were
sampled for them, groups without contrast included:

forced     the learner begins an update only when admission lets nothing more in, so the lag *is*
           the bound (0, 1, 2, 4), whatever is faster; with the plain clip (``behavior``) and with
           the decoupled loss (``decoupled``), which has nothing to correct without a lag.
           ``success`` is greedy, at the end; ``area`` is the mean over all evaluations; ``lag`` is
           what the rows had.
as it is   with bound 1 the learner waits for nothing but its groups. ``seconds`` are those of all
           updates, beside those of the synchronous loop, which is bound 0; ``rate_async_over_sync``
           compares env steps/s, for how many groups have contrast is chance;
           ``seconds_until_solved`` those until ``SOLVED`` of the held-out scenes are solved, by
           seed.

What is evaluated are snapshots, afterwards: whoever samples meanwhile would get ahead for nothing.
With ``--runs`` every run is written down as it ends, and one that is there is not repeated: the
same command goes on where an earlier one was stopped.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from _machine import arguments, in_process, log, report, spread

from torchrl_dvla import (
    DVLACollector,
    EpisodeSpec,
    GroupConfig,
    GRPOLoss,
    PooledReplayBuffer,
    WorkerConfig,
)
from torchrl_dvla.envs import ToyChunkEnv
from torchrl_dvla.modules import tiny_token_policy

LAGS = (0, 1, 2, 4)
LOSSES = ("behavior", "decoupled")
SOLVED, EPOCHS, GROUP_SIZE = 0.9, 2, 8


@dataclass(frozen=True)
class Task:
    """What is learned, and in what amounts."""

    make_env: Any  # as DVLACollector takes it
    make_policy: Callable[[], Any]
    held_out: Sequence[EpisodeSpec]
    workers: WorkerConfig
    num_updates: int
    evaluate_every: int
    groups_per_update: int
    lr: float
    entropy_coeff: float = 0.0


@dataclass(frozen=True)
class Kind:
    """Under which bound, with which loss, and whether the lag is made to be the bound."""

    lag: int
    importance: str = "behavior"
    is_forced: bool = True


def train(task: Task, kind: Kind, seed: int, num_updates: int) -> dict[str, Any]:
    """One run: how good it was at which update, and when."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    policy = task.make_policy()
    buffer = PooledReplayBuffer(batch_size=128, num_epochs=EPOCHS, timeout_s=300.0)
    snapshots, times_s, lags, decisions = [], [], [], 0
    with DVLACollector(
        task.make_env,
        policy,
        replay_buffer=buffer,
        group=GroupConfig(
            group_size=GROUP_SIZE,
            groups_per_update=task.groups_per_update,
            max_policy_lag=kind.lag,
            on_no_signal="keep",  # of a task that is solved no group has contrast
        ),
        workers=task.workers,
        seed=seed,
    ) as collector:
        loss = GRPOLoss(policy, importance=kind.importance, entropy_coeff=task.entropy_coeff)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=task.lr)
        num_admissible = task.groups_per_update * (kind.lag + 1)
        collector.start()
        start_s = time.monotonic()
        for update in range(num_updates + 1):
            if update % task.evaluate_every == 0:
                snapshots.append(copy.deepcopy(policy.state_dict()))
                times_s.append(time.monotonic() - start_s)
            if update == num_updates:
                break
            while kind.is_forced and len(buffer.groups.stored) < num_admissible:
                time.sleep(0.002)
            loss.version = collector.policy_version
            batches = list(buffer)
            for batch in batches:
                lags.append(
                    float((collector.policy_version - batch["policy_version"]).float().mean())
                )
                if kind.importance == "decoupled":
                    loss.write_proximal_log_prob(batch)
            for batch in batches:
                decisions += len(batch)
                losses = loss(batch)
                sum(v for key, v in losses.items() if key.startswith("loss_")).backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            collector.update_policy_weights_()
        sampled = collector.stats()
    return {
        "success": evaluate(task, policy, snapshots),
        "times_s": times_s,
        "lag": statistics.mean(lags[len(lags) // 4 :]),  # the first cohorts are of one version
        "decisions": decisions // EPOCHS,
        "env_steps": sampled["collector/env_steps"],
    }


def evaluate(task: Task, policy: Any, snapshots: list[dict[str, Any]]) -> list[float]:
    """Greedy success of each; afterwards, for whoever samples meanwhile gets ahead for nothing."""
    success = []
    with contextlib.ExitStack() as stack:
        collector = DVLACollector(task.make_env, policy, workers=task.workers)
        stack.push(collector)  # shuts it down; it samples nothing for training
        for weights in snapshots:
            policy.load_state_dict(weights)
            collector.update_policy_weights_()
            found = collector.evaluate(task.held_out, greedy=True).result(600.0)
            success.append(found.success_rate)
    return success


def seconds_until_solved(run: dict[str, Any]) -> float | None:
    """Seconds of sampling and learning until the held-out scenes are solved, if they ever are."""
    solved = (t for t, rate in zip(run["times_s"], run["success"]) if rate >= SOLVED)
    return next(solved, None)


def env_steps_per_s(run: dict[str, Any]) -> float:
    """Env steps per second of sampling and learning, however many groups had contrast."""
    return run["env_steps"] / run["times_s"][-1]


def measure(
    task: Task,
    kinds: Sequence[Kind],
    repeats: int,
    num_updates: int,
    csv_file: str | None,
    record: str | None,
) -> dict[str, Any]:
    """What every kind came to, seed by seed, every other seed backwards."""
    runs: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    path = Path(record or os.devnull)
    lines = path.read_text().splitlines() if path.is_file() else []
    known = {tuple(line.pop("of")): line for line in map(json.loads, lines)}
    for seed in range(repeats):
        for kind in kinds if seed % 2 == 0 else kinds[::-1]:
            of = (*astuple(kind), seed, num_updates)
            if of not in known:
                known[of] = in_process(train, task, kind, seed, num_updates)
                with path.open("a") as file:
                    file.write(json.dumps({"of": of, **known[of]}) + "\n")
            runs[kind].append(known[of])
            log(f"seed {seed}, {kind}: {runs[kind][-1]}")
    if csv_file:
        with open(csv_file, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(
                ["max_policy_lag", "loss", "forced", "seed", "update", "seconds", "success"]
            )
            for kind, found in runs.items():
                for seed, run in enumerate(found):
                    for k, rate in enumerate(run["success"]):
                        update, seconds = k * task.evaluate_every, round(run["times_s"][k], 2)
                        table.writerow([*astuple(kind), seed, update, seconds, rate])
    learned = {
        kind: {
            "success": spread(run["success"][-1] for run in found),
            "area": spread(statistics.mean(run["success"]) for run in found),
            "lag": spread(run["lag"] for run in found),
            "env_steps": spread((run["env_steps"] for run in found), 0),
        }
        for kind, found in runs.items()
    }
    timed = {"lag 0": runs[Kind(0)], "lag 1": runs[Kind(1, is_forced=False)]}
    seconds = {name: [run["times_s"][-1] for run in found] for name, found in timed.items()}
    return {
        "updates": num_updates,
        "decisions": spread((run["decisions"] for run in runs[Kind(0)]), 0),
        "forced": {
            f"{kind.importance}, lag {kind.lag}": found
            for kind, found in learned.items()
            if kind.is_forced
        },
        "as_it_is": learned[Kind(1, is_forced=False)],
        "seconds": {name: spread(found) for name, found in seconds.items()},
        "seconds_until_solved": {
            name: [seconds_until_solved(run) for run in found] for name, found in timed.items()
        },
        "time_sync_over_async": spread(a / b for a, b in zip(seconds["lag 0"], seconds["lag 1"])),
        "rate_async_over_sync": spread(
            env_steps_per_s(overlapped) / env_steps_per_s(in_turn)
            for in_turn, overlapped in zip(*timed.values())
        ),
    }


make_toy = functools.partial(
    ToyChunkEnv, chunk_size=4, action_dim=2, image_size=16, success_steps=2, success_tol=0.35
)
TOY = Task(
    make_env=make_toy,
    make_policy=functools.partial(tiny_token_policy, 2, 4, vocab_size=16, hidden_dim=128),
    held_out=[EpisodeSpec("default", seed=1_000_000 + k) for k in range(50)],
    workers=WorkerConfig(num_workers=2, envs_per_worker=8, max_decisions=4),
    num_updates=60,
    evaluate_every=6,
    groups_per_update=8,
    lr=2e-3,
    entropy_coeff=0.01,
)


def main() -> None:
    options = arguments(__doc__ or "", "two seeds, a few updates", repeats=5, csv=str, runs=str)
    kinds = [Kind(lag, name) for lag in LAGS for name in LOSSES if lag or name == "behavior"]
    kinds.append(Kind(1, is_forced=False))
    repeats, num_updates = (2, 12) if options.quick else (options.repeats, TOY.num_updates)
    result = measure(TOY, kinds, repeats, num_updates, options.csv, options.runs)
    report("staleness", result, options.quick)


if __name__ == "__main__":
    main()
