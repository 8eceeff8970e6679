# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How far is the planner's rate from that of a real run on this machine?

    python benchmarks/planner.py [--quick] [--config-name libero]

In each repeat, ``calibrate`` measures the lane costs of a configuration, in lockstep with one
worker; then ``DVLACollector`` runs with the recipe's learner, for workers and environments of
several numbers in turn, at the configuration's lag, and the planner predicts each. The learning
rate is so small that episodes stay as they are. Nothing is emulated.

error_<case>        predicted over measured decisions/s, minus one; the median over repeats.
core_error_<case>   the same of decisions a core second: the cores that the run's processes kept
                    busy, whatever else the machine did meanwhile
left_error_<case>   the same as ``error`` for a plan on the cores that other programs left:
                    ``others`` is how many they took, ``load`` the load average at the end.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from _machine import arguments, in_process, log, report, spread

from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.calibration import calibrate
from torchrl_dvla.recipes.dvla_grpo.settings import Settings, compose_settings
from torchrl_dvla.recipes.dvla_grpo.train import learn
from torchrl_dvla.recording import GracefulStop
from torchrl_dvla.topology import ClusterSpec, LaneCosts, RunPlan, plan_run

#: Workers and environments of each, by configuration; seconds of a measurement.
CASES = {"toy": [(1, 1), (1, 8), (2, 8)], "libero": [(2, 1)]}
SECONDS = {"toy": 6.0, "libero": 60.0}
#: Updates before a measurement, and of a calibration.
UPDATES = {"toy": (3, 3), "libero": (1, 1)}
KEYS = ("error", "core_error", "left_error", "core_ms", "sampling", "inference", "gradient")


def settings(name: str) -> Settings:
    return compose_settings(name, ["optim.lr=1e-9"])


def with_workers(cfg: Settings, num_workers: int, envs_per_worker: int) -> Settings:
    workers = replace(cfg.workers, num_workers=num_workers, envs_per_worker=envs_per_worker)
    return replace(cfg, workers=workers)


def predict(cfg: Settings, costs: LaneCosts) -> RunPlan:
    return plan_run(
        ClusterSpec.local(),
        costs,
        workers=cfg.workers,
        inference=cfg.inference,
        group=cfg.group,
        num_workers=cfg.workers.num_workers,
        max_policy_lag=cfg.group.max_policy_lag,
    )


def errors(plan: RunPlan, run: dict[str, float]) -> dict[str, float]:
    """Predicted over measured, minus one."""
    num_cores, rate = ClusterSpec.local().nodes[0].num_cores, plan.decisions_per_s
    shares = {load.what: load.share for load in plan.loads}
    core_s = shares.pop("cores") * num_cores / rate  # of a decision
    left = min((num_cores - run["others"]) / core_s, rate / max(shares.values()))
    return {
        "error": rate / run["decisions_per_s"] - 1,
        "core_error": 1e-3 * run["core_ms"] / core_s - 1,
        "left_error": left / run["decisions_per_s"] - 1,
    }


def measured_costs(cfg: Settings, num_updates: int) -> LaneCosts:
    """In a process of its own."""
    warnings.filterwarnings("ignore")
    return calibrate(cfg, num_updates=num_updates)


def measured_rate(cfg: Settings, seconds: float, num_warm_ups: int) -> dict[str, float]:
    """Decisions per second and the busy share of each lane, in a process of its own."""
    warnings.filterwarnings("ignore")
    utils.make_deterministic(cfg)
    policy, buffer = utils.make_policy(cfg), utils.make_replay_buffer(cfg)
    loss = utils.make_loss(cfg, policy)
    optimizer, scheduler, _ = utils.make_optimizer(cfg, loss, lambda: 0.0)
    stop = GracefulStop()
    with utils.make_collector(cfg, policy, buffer) as collector:

        def update() -> None:
            learn(cfg, loss, optimizer, scheduler, collector, stop)
            collector.update_policy_weights_()

        for _ in range(num_warm_ups):
            update()
        start_s, usage = time.monotonic(), collector.timeline.usage()
        decisions, cores, machine_s = (
            int(collector.stats()["frames"]),
            core_seconds(),
            busy_seconds(),
        )
        while time.monotonic() - start_s < seconds:
            update()
        decisions = int(collector.stats()["frames"]) - decisions
        wall_s = time.monotonic() - start_s
        cores, machine_s = core_seconds() - cores, busy_seconds() - machine_s
        shares = collector.timeline.usage().since(usage).shares()
    return {
        "decisions_per_s": decisions / wall_s,
        "core_ms": 1e3 * cores / decisions,
        "others": (machine_s - cores) / wall_s,
        "load": os.getloadavg()[0],
        **shares,
    }


def core_seconds() -> float:
    """Seconds that this process and those that it has started have run."""
    total = time.process_time()
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def busy_seconds() -> float:
    """Seconds that the cores of this machine have been busy."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    args = arguments(__doc__, "one repeat", config_name="toy")
    cfg, cases = settings(args.config_name), CASES[args.config_name]
    num_repeats = 1 if args.quick else 5 if args.config_name == "toy" else 3
    num_warm_ups, num_updates = UPDATES[cfg.name]
    names = {case: f"{case[0]}x{case[1]}" for case in cases}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    costs: list[LaneCosts] = []
    for repeat in range(num_repeats):
        costs.append(in_process(measured_costs, cfg, num_updates))
        log(costs[-1])
        for case in cases[:: 1 if repeat % 2 == 0 else -1]:
            plan = predict(with_workers(cfg, *case), costs[-1])
            changed = with_workers(cfg, *case)
            run = in_process(measured_rate, changed, SECONDS[cfg.name], num_warm_ups)
            run["predicted"] = plan.decisions_per_s
            run |= errors(plan, run)
            run["bound"] = f"{plan.bounded_by.what}"
            log(f"{names[case]}: {run}")
            found[names[case]].append(run)
    result: dict[str, Any] = {"config": cfg.name, "cases": {}}
    for name, runs in found.items():
        for error in ("error", "core_error", "left_error"):
            result[f"{error}_{name}"] = spread(run[error] for run in runs)["median"]
        result["cases"][name] = {
            "bounded_by": sorted({run["bound"] for run in runs}),
            **{
                key: spread((run[key] for run in runs), 3)
                for key in ("decisions_per_s", "predicted", "others", "load")
            },
            **{key: spread(run[key] for run in runs) for key in KEYS},
        }
    names_of_costs = ("env_step_s", "reset_s", "call_s", "call_row_s", "learn_row_s", "loop_s")
    result["costs"] = {
        name: spread((getattr(one, name) for one in costs), 7)
        for name in (*names_of_costs, "publish_s", "learned_share", "decisions_per_rollout")
    }
    report("planner", result, args.quick)


if __name__ == "__main__":
    main()
