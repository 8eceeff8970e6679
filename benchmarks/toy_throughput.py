# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many decisions per second does the loop make on the toy task, beside TorchRL's own parts?

    python benchmarks/toy_throughput.py [--quick] [--stock-env]

Every arrangement plays the same task with the same policy (``TinyVLA``), collecting alone and then
collecting and learning with the same gradient step for every minibatch (``_toy_task.py``). Every
other round learns first, so that no mode has the start-up of an arrangement always before it:

ours        ``DVLACollector``: two workers on a core each, the policy in a process, pages,
            admission, lag 2.
recipe      the arrangement of TorchRL's VLA recipe: process ``Collector`` on ``ParallelEnv``, one
            shared ``ProcessInferenceServer``, ``MCAdvantage`` replay, pause, update, sync.
async       ``AsyncBatchedCollector``.
sync        ``Collector`` in this process on ``SerialEnv``: collect, update, collect.
vectorised  the same on ``ToyVLAEnv(batch_size=[64])``: one env step for all 64 environments. It
            stands apart: it forms no groups (``group_repeats`` needs single environments), and a
            simulator that a VLA policy is trained in has no batch dimension.

``_chunk`` after a name: on ``ToyChunkEnv``, which ``DVLACollector`` runs as well, so that the ratio
shows the collectors and not the environments. ``_stock``: on ``ToyVLAEnv`` with ``MultiAction``, as
TorchRL's recipe must.

ratio_vs_recipe          ours over ``recipe_chunk``, collecting and learning.
ratio_vs_best_torchrl    ours over the best of ``async_chunk`` and ``sync_chunk``, likewise. Both of
                         these compare with the same environment class.
*_collect_only           the same ratios without learning.
*_stock_env              with ``--stock-env``, which doubles the time: the same ratios against
                         TorchRL's arrangements on its own environment, as a user of the recipe
                         sees it, with the environment's share in it, and ``ratio_vs_vectorised``.
fraction_of_cpu_bound    our decisions/s over ``cores / (env_s + policy_s + update_s)``: CPU time
                         that ``env.step`` and ``reset``, the forward at our mean batch size
                         and the update at our share of learned decisions take when called directly,
                         on all cores at once, in the same run. 1 would be a collector that costs
                         nothing on cores that never rest.

How the settings of the rivals were found: ``--search recipe`` (or ``async``, ``sync``) measures the
alternatives in ``SEARCH`` and prints them; ``SETTINGS`` holds the best.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch
from _machine import in_processes, machine, paired_ratio, spread

Settings = dict[str, Any]
SETTINGS: dict[str, tuple[str, str, Settings]] = {
    "ours": ("ours", "chunk", {}),
    "recipe_chunk": (
        "recipe",
        "chunk",
        {"num_collectors": 1, "envs_per_collector": 8, "server_timeout": 0.01},
    ),
    "async_chunk": (
        "async",
        "chunk",
        {"num_envs": 8, "transport": "auto", "max_batch_size": 64},
    ),
    "sync_chunk": ("sync", "chunk", {"num_envs": 64, "batched_env": "serial"}),
}
STOCK = {
    name.replace("chunk", "stock"): (family, "stock", settings)
    for name, (family, kind, settings) in SETTINGS.items()
    if family != "ours"
}
STOCK["vectorised"] = ("sync", "vectorised", {"num_envs": 64, "batched_env": ""})
SEARCH: list[tuple[str, str, Settings]] = [
    *[
        ("recipe", "chunk", {"num_collectors": c, "envs_per_collector": e, "server_timeout": t})
        for c, e in ((1, 1), (1, 4), (1, 8), (1, 16), (2, 2), (2, 8))
        for t in (0.01, 0.001)
    ],
    *[
        ("async", "chunk", {"num_envs": n, "transport": "auto", "max_batch_size": 64})
        for n in (2, 4, 8, 16)
    ],
    *[
        ("async", "chunk", {"num_envs": 16, "transport": "driver", "envs_per_worker": e})
        for e in (4, 8)
    ],
    *[("sync", "chunk", {"num_envs": n, "batched_env": "serial"}) for n in (8, 32, 64)],
    ("sync", "chunk", {"num_envs": 4, "batched_env": "parallel"}),
]


class Ours:
    """``DVLACollector`` with the interface of the rivals."""

    def __init__(self, kind: str, *, envs_per_worker: int = 32, num_workers: int = 2) -> None:
        from _toy_task import (
            GROUP_SIZE,
            GROUPS_PER_UPDATE,
            MAX_DECISIONS,
            MINIBATCH,
            Update,
            make_chunk_env,
            make_policy,
        )

        from torchrl_dvla import DVLACollector, PooledReplayBuffer
        from torchrl_dvla.collectors import GroupConfig, WorkerConfig

        policy = make_policy()
        self._update = Update(policy)
        self.collector = DVLACollector(
            make_chunk_env,
            policy,
            replay_buffer=functools.partial(PooledReplayBuffer, batch_size=MINIBATCH),
            group=GroupConfig(
                group_size=GROUP_SIZE,
                groups_per_update=GROUPS_PER_UPDATE,
                max_policy_lag=2,
                max_drought=10**9,
            ),
            workers=WorkerConfig(
                num_workers=num_workers,
                envs_per_worker=envs_per_worker,
                max_decisions=MAX_DECISIONS,
                pin_workers=True,
            ),
        )
        self.num_learned = 0

    def __enter__(self) -> Ours:
        self.collector.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.collector.shutdown()

    def counters(self) -> dict[str, int]:
        return self.collector._counters.totals

    def num_decisions(self) -> int:
        return self.counters()["collector/decisions"]

    def collect_for(self, seconds: float) -> None:
        self._run(seconds, learn=False)

    def learn_for(self, seconds: float) -> None:
        self._run(seconds, learn=True)

    def _run(self, seconds: float, *, learn: bool) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            for batch in self.collector.replay_buffer:
                if learn:
                    self.num_learned += len(batch)
                    self._update(batch)
            self.collector.update_policy_weights_()


def run(
    connection: Connection,
    spec: tuple[str, str, Settings],
    args: argparse.Namespace,
    modes: tuple[str, str] = ("collect", "learn"),
) -> None:
    """In a process of its own: build, warm up, measure both ways."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null:
        sys.stdout = null
        from _toy_rivals import AsyncBatched, Sync, make_recipe

        family, kind, settings = spec
        make = {"ours": Ours, "recipe": make_recipe, "async": AsyncBatched, "sync": Sync}[family]
        out: dict[str, float] = {}
        with make(kind, **settings) as arrangement:
            while arrangement.num_decisions() < args.warm_up_decisions:
                arrangement.collect_for(0.5)
            # The processes of a recipe import torch one beside the other on the same cores: its
            # first collectors are at work long before the last.
            arrangement.collect_for(args.settle_s if family == "recipe" else 0.0)
            for mode in modes:
                spend = getattr(arrangement, f"{mode}_for")
                spend(0.2 * args.seconds)
                before, start_s = arrangement.num_decisions(), time.monotonic()
                learned = getattr(arrangement, "num_learned", 0)
                calls = _calls(arrangement)
                spend(args.seconds)
                decisions = arrangement.num_decisions() - before
                out[mode] = decisions / (time.monotonic() - start_s)
                if family == "ours":
                    out[f"{mode}_batch"] = decisions / (_calls(arrangement) - calls)
                    if mode == "learn":
                        out["learned_share"] = (arrangement.num_learned - learned) / decisions
        connection.send(out)


def _calls(arrangement: Any) -> int:
    return (
        arrangement.counters()["collector/inference_batches"]
        if isinstance(arrangement, Ours)
        else 0
    )


def bound(connection: Connection, batch_size: int, seconds: float) -> None:
    from _toy_task import cost_alone

    connection.send(cost_alone(batch_size, seconds))


def cost_on_all_cores(batch_size: float, seconds: float) -> dict[str, float]:
    """CPU seconds a decision, with every core at the same work."""
    cores = len(os.sched_getaffinity(0))
    found = in_processes(bound, [(max(1, round(batch_size)), seconds)] * cores)
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


def fraction(run: dict[str, float], cost: dict[str, float], mode: str) -> float:
    cores = len(os.sched_getaffinity(0))
    per_decision_s = cost["env_s"] + cost["policy_s"]
    if mode == "learn":
        per_decision_s += cost["update_s"] * run["learned_share"]
    return run[mode] * per_decision_s / cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--stock-env", action="store_true", help="TorchRL's environment as well")
    parser.add_argument("--search", help="measure other settings of one rival: recipe, async, sync")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a stretch")
    parser.add_argument("--repeats", type=int, help="5 by default, 1 with --quick")
    parser.add_argument("--warm-up-decisions", type=int, default=50)
    parser.add_argument("--settle-s", type=float, default=8.0, help="more, for the recipe")
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 5)
    if args.search:
        for spec in (spec for spec in SEARCH if spec[0] == args.search):
            print(spec, in_processes(run, [(spec, args)])[0], flush=True)
        return
    specs = {**SETTINGS, **STOCK} if args.stock_env else SETTINGS
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in specs}
    costs, fractions = [], {"collect": [], "learn": []}
    for repeat in range(args.repeats):
        step = 1 if repeat % 2 == 0 else -1
        modes = ("collect", "learn")[::step]
        for name in list(specs)[::step]:
            found = in_processes(run, [(specs[name], args, modes)])[0]
            runs[name].append(found)
            line = "  ".join(f"{key} {value:.2f}" for key, value in found.items())
            print(f"{repeat} {name:<14} {line}", file=sys.stderr)
            if name == "ours":  # in the same moment, for a machine that drifts
                costs.append(cost_on_all_cores(found["learn_batch"], args.seconds / 4))
                for mode, values in fractions.items():
                    values.append(fraction(found, costs[-1], mode))

    def column(name: str, mode: str) -> list[float]:
        return [one[mode] for one in runs[name]]

    def best(names: tuple[str, ...], mode: str) -> list[float]:
        return [max(found) for found in zip(*(column(name, mode) for name in names))]

    ratios = {}
    for suffix, mode in (("", "learn"), ("_collect_only", "collect")):
        ours = column("ours", mode)
        for env in ("chunk", "stock") if args.stock_env else ("chunk",):
            end = suffix + ("" if env == "chunk" else "_stock_env")
            others = best((f"async_{env}", f"sync_{env}"), mode)
            ratios[f"ratio_vs_recipe{end}"] = paired_ratio(ours, column(f"recipe_{env}", mode))
            ratios[f"ratio_vs_best_torchrl{end}"] = paired_ratio(ours, others)
        if args.stock_env:
            ratios[f"ratio_vs_vectorised{suffix}"] = paired_ratio(ours, column("vectorised", mode))
    result = {
        "benchmark": "toy_throughput",
        **{name: found["median"] for name, found in ratios.items()},
        "fraction_of_cpu_bound": spread(fractions["learn"])["median"],
        "fraction_of_cpu_bound_collect_only": spread(fractions["collect"])["median"],
        "spread": {**ratios, **{f"fraction_{k}": spread(v) for k, v in fractions.items()}},
        "decisions_per_s": {
            name: {mode: spread(column(name, mode), 1) for mode in ("collect", "learn")}
            for name in specs
        },
        "cpu_us_per_decision_alone": {
            name[:-2]: round(1e6 * statistics.median(cost[name] for cost in costs), 1)
            for name in costs[0]
        },
        "mean_batch": round(statistics.median(column("ours", "learn_batch")), 1),
        "learned_share": round(statistics.median(column("ours", "learned_share")), 2),
        "settings": {name: spec[2] for name, spec in specs.items()},
        "seconds": args.seconds,
        "repeats": args.repeats,
        "machine": machine("tensordict"),
        "quick": args.quick,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
