# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does stale data cost in samples, and what does it buy in time?

    python benchmarks/staleness.py [--quick] [--csv staleness.csv] [--repeats 5]

The toy task from scratch, greedy success on held-out scenes over equal numbers of updates (so of
decisions, all groups counted), seed by seed:

forced     the learner begins an update only when admission lets nothing more in, so the lag *is*
           the bound (0, 1, 2, 4), whatever is faster; with the plain clip (``behavior``) and with
           the decoupled loss (``decoupled``). ``success`` is greedy, at the end; ``area`` is the
           mean over the evaluations; ``lag`` is what the rows had.
as it is   the learner never waits for more than a cohort: seconds until ``SOLVED`` of the held-out
           scenes are solved, with bound 0 (the synchronous loop) and bound 1, in turns.

``worst_loss`` is the largest drop of the median success against bound 0, by loss. The last line of
stdout is one JSON object.
"""

from __future__ import annotations

import csv
import functools
import statistics
import time
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
UPDATES, EVERY, SOLVED = 60, 6, 0.9
GROUPS, GROUP_SIZE, EPOCHS = 8, 8, 2
HELD_OUT = [EpisodeSpec("default", seed=1_000_000 + k) for k in range(50)]

make_env = functools.partial(
    ToyChunkEnv, chunk_size=4, action_dim=2, image_size=16, success_steps=2, success_tol=0.35
)


def train(lag: int, importance: str, seed: int, num_updates: int, forced: bool) -> dict[str, Any]:
    """One run: what every evaluation found, and when."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    policy = tiny_token_policy(2, 4, vocab_size=16, hidden_dim=128)
    buffer = PooledReplayBuffer(batch_size=128, num_epochs=EPOCHS, timeout_s=300.0)
    success, times_s, lags, decisions = [], [], [], 0
    with DVLACollector(
        make_env,
        policy,
        replay_buffer=buffer,
        group=GroupConfig(
            group_size=GROUP_SIZE,
            groups_per_update=GROUPS,
            max_policy_lag=lag,
            on_no_signal="keep",  # equal data: no group is sampled for nothing
        ),
        workers=WorkerConfig(num_workers=2, envs_per_worker=8, max_decisions=4),
        seed=seed,
    ) as collector:
        loss = GRPOLoss(policy, importance=importance, entropy_coeff=0.01)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
        groups, learned_s = buffer.groups, 0.0
        for update in range(num_updates + 1):
            if update % EVERY == 0:
                success.append(collector.evaluate(HELD_OUT, greedy=True).result(300.0).success_rate)
                times_s.append(learned_s)
            start_s = time.monotonic()
            while forced and len(groups.stored) < GROUPS * (lag + 1):
                time.sleep(0.002)
            loss.version = collector.policy_version
            batches = list(buffer)
            for batch in batches:
                lags.append(
                    float((collector.policy_version - batch["policy_version"]).float().mean())
                )
                if importance == "decoupled":
                    loss.write_proximal_log_prob(batch)
            for batch in batches:
                decisions += len(batch)
                losses = loss(batch)
                (losses["loss_objective"] + losses["loss_entropy"]).backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            collector.update_policy_weights_()
            learned_s += time.monotonic() - start_s
    return {
        "success": success,
        "times_s": times_s,
        "lag": statistics.mean(lags[len(lags) // 4 :]),  # the first cohorts are of one version
        "decisions": decisions // EPOCHS,
    }


def seconds_until(run: dict[str, Any], num_updates: int) -> float:
    """Seconds of sampling and learning until the held-out scenes are solved; inf if never."""
    solved = [t for t, rate in zip(run["times_s"], run["success"]) if rate >= SOLVED]
    return solved[0] if solved else float("inf")


def main() -> None:
    options = arguments(__doc__ or "", "two seeds, a few updates", repeats=5, csv=str)
    repeats, num_updates = (2, 12) if options.quick else (options.repeats, UPDATES)
    kinds = [(lag, name, True) for lag in LAGS for name in LOSSES]
    kinds += [(lag, "behavior", False) for lag in (0, 1)]
    runs: dict[tuple[int, str, bool], list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for seed in range(repeats):
        for kind in kinds if seed % 2 == 0 else kinds[::-1]:
            lag, name, forced = kind
            run = in_process(train, lag, name, seed, num_updates, forced)
            runs[kind].append(run)
            log(f"seed {seed}, {kind}: {run}")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(
                ["max_policy_lag", "loss", "forced", "seed", "update", "seconds", "success"]
            )
            for kind, found in runs.items():
                for seed, run in enumerate(found):
                    for k, rate in enumerate(run["success"]):
                        table.writerow([*kind, seed, k * EVERY, round(run["times_s"][k], 2), rate])
    forced = {
        f"{name}, lag {lag}": {
            "success": spread(run["success"][-1] for run in runs[lag, name, True]),
            "area": spread(statistics.mean(run["success"]) for run in runs[lag, name, True]),
            "lag": spread(run["lag"] for run in runs[lag, name, True]),
        }
        for name in LOSSES
        for lag in LAGS
    }
    seconds = {
        lag: [seconds_until(run, num_updates) for run in runs[lag, "behavior", False]]
        for lag in (0, 1)
    }
    result = {
        "updates": num_updates,
        "decisions": runs[0, "behavior", True][0]["decisions"],
        "forced": forced,
        "worst_loss": {
            name: round(
                max(
                    forced[f"{name}, lag 0"]["area"]["median"]
                    - forced[f"{name}, lag {lag}"]["area"]["median"]
                    for lag in LAGS
                ),
                3,
            )
            for name in LOSSES
        },
        "seconds_until_solved": {f"lag {lag}": spread(found) for lag, found in seconds.items()},
        "time_sync_over_async": spread(a / b for a, b in zip(seconds[0], seconds[1])),
    }
    report("staleness", result, options.quick)


if __name__ == "__main__":
    main()
