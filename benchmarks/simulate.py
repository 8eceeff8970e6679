# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Does the simulation reproduce what was measured, and what does it predict beyond that?

    python benchmarks/simulate.py [--quick] [--measured overlap.json,cluster.json]

worst_error
    largest absolute error of the points below; the goal is 0.10.
points
    decisions a second of the arrangements of ``overlap.py`` and ``cluster.py`` with emulated
    latencies: measured, simulated with the same settings and stated latencies, and simulated over
    measured, minus one. Nothing is fitted. The two are run first, or their last lines are read:
    ``--measured`` takes files that hold them. Left out is what has no stated latencies.
paper
    D-VLA's two tables (``paper_tables.py``), with that file's one fitted number: ``shape`` says
    whether 3:1 helps pi0.5 and hurts OpenVLA-OFT on 16 GPUs, as reported.
predicted
    8 to 1,024 nodes, 3 B to 1 T parameters; **predicted, never measured**, by ``assumptions``.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cluster
import overlap
import paper_tables
from _machine import arguments, log, report

from torchrl_dvla.collectors import GroupConfig, InferenceConfig, WorkerConfig
from torchrl_dvla.topology import ClusterSpec, GPUSpec, LaneCosts, NodeSpec, simulate_run
from torchrl_dvla.topology.scaling import Assumptions, predict_policy, with_efficiency

NODES = (8, 16, 32, 64, 128, 256, 512, 1024)
PARAMETERS = (3e9, 7e9, 30e9, 70e9, 200e9, 1e12)
QUICK_NODES, QUICK_PARAMETERS = (8, 64), (3e9, 1e12)
#: What is predicted beside the built-in assumptions: a slower network, and racks for the largest.
RACK = Assumptions(gpus_per_node=72, gpu_bytes=186 * 2**30, host_bytes=17 * 2**40)
SLOW_NETWORK = Assumptions(network_bytes_per_s=50e9)
#: Emulated latencies hold no core.
FREE_CORES = 10**6


def nodes(count: int) -> ClusterSpec:
    return ClusterSpec(tuple(NodeSpec(f"node {k}", FREE_CORES, 2**40) for k in range(count)))


def heavy_tail(generator: random.Random, num: int = 50) -> Iterator[float]:
    """As ``overlap.HeavyTail`` deals them."""
    law = [(1 - (k + 0.5) / num) ** (-1 / 1.5) for k in range(num)]
    while True:
        for factor in generator.sample(law, num):
            yield factor * num / sum(law)


def simulate_mix(mix: overlap.Mix, sequential: bool = False) -> float:
    costs = LaneCosts(
        "mix",
        env_step_s=mix.step_s,
        env_steps_per_decision=1,
        decisions_per_rollout=overlap.DECISIONS_PER_ROLLOUT,
        call_s=mix.infer_s,
        call_row_s=mix.infer_row_s,
        learn_row_s=mix.learn_row_s,
        row_bytes=1,
        version_bytes=1,
    )
    found = simulate_run(
        nodes(1),
        costs,
        workers=WorkerConfig(
            num_workers=mix.num_workers, envs_per_worker=3 if sequential else mix.envs_per_worker
        ),
        inference=InferenceConfig(
            max_batch_size=mix.max_batch_size, max_wait_s=mix.max_wait_s, deterministic=False
        ),
        group=GroupConfig(
            group_size=overlap.GROUP_SIZE,
            groups_per_update=overlap.GROUPS_PER_UPDATE,
            max_policy_lag=0 if sequential else mix.max_policy_lag,
        ),
        **({"step_law": heavy_tail, "num_updates": 100} if mix.heavy_tailed else {}),
    )
    return found.decisions_per_s


def simulate_nodes(count: int, groups_per_update: int) -> float:
    costs = LaneCosts(
        "cluster",
        env_step_s=cluster.STEP_S,
        env_steps_per_decision=1,
        decisions_per_rollout=cluster.DECISIONS,
        call_s=cluster.INFER_S,
        call_row_s=1e-9,
        learn_row_s=1e-9,  # its learner takes cohorts and publishes
        row_bytes=1,
        version_bytes=1,
    )
    group = GroupConfig(group_size=cluster.GROUP_SIZE, groups_per_update=groups_per_update)
    found = simulate_run(nodes(count), costs, workers=cluster.WORKERS, group=group, num_updates=60)
    return found.decisions_per_s


def compare_overlap(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Measured and simulated."""
    found = {}
    for name, measured in result["mixes"].items():
        mix = overlap.MIXES[name]
        if measured["stated"] != asdict(mix):
            raise ValueError(f"{name} must have the settings of overlap.py. Measure it again.")
        rate = measured["rows_per_s"]["median"]
        if mix.heavy_tailed:  # those that were drawn are not of the mean that the law has
            rate = measured["collected"]["median"] * mix.bound()
        found[name] = rate, simulate_mix(mix)
        if "sequential_rows_per_s" in measured:
            rate = measured["sequential_rows_per_s"]["median"]
            found[f"{name}, sequential"] = rate, simulate_mix(mix, sequential=True)
    return found


def compare_cluster(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Measured and simulated."""
    rates, found = result["decisions_per_s"], {}
    for name, count in {"local": 1, "nodes_1": 1, "nodes_2": 2, "nodes_4": 4}.items():
        simulated = simulate_nodes(count, max(2, 2 * count))
        found[f"cluster, {name}"] = rates[name]["median"], simulated
    return found


def last_line(text: str) -> dict[str, Any]:
    return dict(json.loads(text.strip().splitlines()[-1]))


def measured(files: str | None, quick: bool) -> list[dict[str, Any]]:
    """Results of the two benchmarks: those of files, or new ones."""
    if files:
        return [last_line(Path(name).read_text()) for name in files.split(",")]
    results = []
    for name in ("overlap.py", "cluster.py"):
        log(f"{name} is run")
        command = [sys.executable, str(Path(__file__).with_name(name)), *["--quick"] * quick]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(last_line(done.stdout))
    return results


def paper() -> dict[str, Any]:
    """D-VLA's two tables, simulated."""
    tflops = paper_tables.PEAK * paper_tables.ACHIEVED
    _, rollout_s = paper_tables.fit(tflops)
    rows = []
    for name, num_gpus, learning, reported in paper_tables.FITTED + paper_tables.PREDICTED:
        costs = paper_tables.lane_costs(name, rollout_s, tflops, paper_tables.POLICIES)
        gpus, count = (GPUSpec(),) * 8, num_gpus // 8
        found = simulate_run(
            ClusterSpec(tuple(NodeSpec(f"node {k}", 1, 2**40, gpus=gpus) for k in range(count))),
            costs,
            workers=WorkerConfig(num_workers=1, envs_per_worker=384),
            group=GroupConfig(group_size=48, groups_per_update=8 * count),
            num_learner_gpus=learning,
        )
        rows.append(
            {
                "policy": name,
                "gpus": num_gpus,
                "split": f"{(num_gpus - learning) // learning}:1",
                "reported": reported,
                "simulated": round(found.decisions_per_s, 1),
                "error": round(found.decisions_per_s / reported - 1, 3),
            }
        )
    gains = {key: paper_tables.gains(rows, key) for key in ("reported", "simulated")}
    return {
        "gain_of_3_to_1": gains,
        "shape": gains["simulated"]["pi0.5"] > 1 > gains["simulated"]["OpenVLA-OFT"],
        "largest_error": max(abs(row["error"]) for row in rows),
        "table": rows,
    }


def grid(assumptions: Assumptions, counts: tuple[int, ...], sizes: tuple[float, ...]) -> list[Any]:
    """A row a policy: feasible or not and why, rate, bound, efficiency, lag."""
    rows = []
    for size in sizes:
        found = with_efficiency([predict_policy(count, size, assumptions) for count in counts])
        for each in found:
            row: dict[str, Any] = {"policy": each.policy, "nodes": each.num_nodes}
            if each.run is None:
                row |= {"feasible": False, "why": each.problem}
            else:
                row |= {
                    "feasible": True,
                    "learner_gpus": each.num_learner_gpus,
                    "decisions_per_s": float(f"{each.run.decisions_per_s:.4g}"),
                    "bounded_by": each.run.bounded_by.what,
                    "efficiency": round(each.efficiency or 0.0, 3),
                    "work_share": round(each.work_share or 0.0, 3),
                    "max_policy_lag": each.max_policy_lag,
                    "update_s": float(f"{each.run.update_s:.3g}"),
                    "transfer_s": float(f"{each.run.transfer_s:.3g}"),
                }
            log(row)
            rows.append(row)
    return rows


def main() -> None:
    args = arguments(__doc__, "both measured quickly, and a small grid", measured=str)
    points: dict[str, dict[str, float]] = {}
    loads = {}
    for result in measured(args.measured, args.quick):
        compare = {"overlap": compare_overlap, "cluster": compare_cluster}[result["benchmark"]]
        loads[result["benchmark"]] = result["machine"]["load"]
        for name, (real, simulated) in compare(result).items():
            points[name] = {
                "measured": round(real, 2),
                "simulated": round(simulated, 2),
                "error": round(simulated / real - 1, 3),
            }
            log(f"{name}: {points[name]}")
    counts, sizes = (QUICK_NODES, QUICK_PARAMETERS) if args.quick else (NODES, PARAMETERS)
    result = {
        "worst_error": max(abs(point["error"]) for point in points.values()),
        "points": points,
        "load_when_measured": loads,
        "paper": paper(),
        "predicted": grid(Assumptions(), counts, sizes),
        "predicted_on_slow_network": grid(SLOW_NETWORK, counts[:: len(counts) - 1], sizes[:-1]),
        "predicted_on_racks": grid(RACK, counts[1:6], sizes[-1:]),
        "assumptions": Assumptions().lines(),
    }
    report("simulate", result, args.quick, "simpy")


if __name__ == "__main__":
    main()
