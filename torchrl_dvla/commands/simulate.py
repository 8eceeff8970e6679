# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a run is predicted to do on clusters that are not there, by discrete-event simulation.

With the lane costs that `calibrate` has measured, it simulates that run on more nodes like this
one, or like those of a file. Without them it simulates policies of any size on nodes of GPUs, by
assumptions that it prints with every prediction and that options change. Nothing is measured.

  torchrl-dvla simulate --nodes 8 64 --parameters 3e9 70e9 1e12 --picture scaling.svg
  torchrl-dvla simulate --nodes 1 2 4 --costs costs.json --cluster cluster.yaml
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torchrl_dvla import GroupConfig, WorkerConfig
from torchrl_dvla.topology import ClusterSpec, LaneCosts
from torchrl_dvla.topology.scaling import (
    MEANINGS,
    Assumptions,
    Prediction,
    predict,
    predict_policy,
    with_efficiency,
)
from torchrl_dvla.topology.scaling_svg import draw_scaling
from torchrl_dvla.topology.simulation import simulate_run

_HEAD: tuple[str, ...] = ("policy", "nodes", "learning GPUs", "predicted decisions/s", "bounded by")
_HEAD += ("efficiency", "work", "lag", "a version every", "on its way")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    parser.add_argument("--nodes", type=int, nargs="+", default=[8], help="default: 8")
    parser.add_argument("--max-policy-lag", type=int, metavar="L", help="default: the least needed")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--picture", metavar="FILE", help="SVG file to draw the predictions to")
    costs = parser.add_argument_group("a run whose costs are known")
    costs.add_argument("--costs", metavar="FILE", help="lane costs, as `calibrate` writes them")
    costs.add_argument("--cluster", metavar="FILE", help="YAML of nodes; default: this machine")
    costs.add_argument("--learner-gpus", type=int, default=0, metavar="N", help="default: 0, a CPU")
    for name, default in (("num-workers", 2), ("envs-per-worker", 1)):
        costs.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    for name, default in (("group-size", 8), ("groups-per-update", 4)):
        text = f"default: {default}" + " a node" * (name == "groups-per-update")
        costs.add_argument(f"--{name}", type=int, default=default, help=text)
    assumed = parser.add_argument_group("policies of any size, by assumptions")
    assumed.add_argument("--parameters", type=float, nargs="+", metavar="P", help="e.g. 3e9 1e12")
    for name, meaning in MEANINGS.items():
        value = getattr(Assumptions(), name)
        text, flag = f"{meaning}; default: {value:g}", f"--{name.replace('_', '-')}"
        assumed.add_argument(flag, type=type(value), help=text, metavar="X")


def run(args: argparse.Namespace) -> int:
    """Prints the predictions, and what they rest on."""
    given = {name: getattr(args, name) for name in MEANINGS if getattr(args, name) is not None}
    if (args.costs is None) == (args.parameters is None):
        raise ValueError(
            "--costs or --parameters must be given, and not both, got "
            f"{'neither' if args.costs is None else 'both'}. Costs are measured by `torchrl-dvla "
            "calibrate`; --parameters 3e9 takes assumptions instead."
        )
    if args.costs is not None and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} must go with --parameters, got --costs. Leave one of them out.")
    counts = sorted(set(args.nodes))
    if args.costs is not None:
        costs = LaneCosts.load(args.costs)
        predictions = with_efficiency([_predict_costs(args, costs, number) for number in counts])
        basis = [f"lane costs of {costs.name!r}, {args.costs}, on nodes that share nothing else"]
    else:
        assumptions = Assumptions(**given)
        basis, predictions = assumptions.lines(), []
        for size in args.parameters:
            options: dict[str, Any] = {"max_policy_lag": args.max_policy_lag, "seed": args.seed}
            found = [predict_policy(number, size, assumptions, **options) for number in counts]
            predictions += with_efficiency(found)
    if args.json:
        result = {"predicted": [_as_dict(each) for each in predictions], "assumptions": basis}
        print(json.dumps(result))
    else:
        print(
            "\n".join([*_table(predictions), "", "Predicted, not measured. Assumptions:", *basis])
        )
    if args.picture:
        title = "lane costs of a calibration" if args.costs else "policies by size, on GPU nodes"
        Path(args.picture).write_text(draw_scaling(predictions, title), encoding="utf-8")
    return 0


def _predict_costs(args: argparse.Namespace, costs: LaneCosts, num_nodes: int) -> Prediction:
    cluster = ClusterSpec.from_yaml(args.cluster) if args.cluster else ClusterSpec.local()
    if num_nodes < 1:
        raise ValueError(f"--nodes must be at least 1, got {num_nodes}. Raise it.")
    nodes = cluster.nodes[:num_nodes]
    more = range(len(nodes), num_nodes)
    nodes += tuple(replace(nodes[-1], host=f"{nodes[-1].host} {number}") for number in more)
    workers = WorkerConfig(num_workers=args.num_workers, envs_per_worker=args.envs_per_worker)
    group = GroupConfig(
        group_size=args.group_size, groups_per_update=num_nodes * args.groups_per_update
    )
    return predict(
        costs.name,
        lambda lag: simulate_run(
            ClusterSpec(nodes),
            costs,
            workers=workers,
            group=replace(group, max_policy_lag=lag),
            num_learner_gpus=args.learner_gpus,
            seed=args.seed,
        ),
        num_nodes=num_nodes,
        num_learner_gpus=args.learner_gpus,
        max_policy_lag=args.max_policy_lag,
    )


def _as_dict(each: Prediction) -> dict[str, Any]:
    found = asdict(each)
    if each.run is not None:
        found["bounded_by"] = each.run.bounded_by.what
    return found


def _table(predictions: list[Prediction]) -> list[str]:
    rows: list[tuple[str, ...]] = [_HEAD]
    for each in predictions:
        start = each.policy, f"{each.num_nodes:,}"
        if each.run is None:
            rows.append((*start, "-", "-", f"no room: {each.problem}"))
            continue
        run = each.run
        shares = ("-" if x is None else f"{x:.2f}" for x in (each.efficiency, each.work_share))
        times = f"{run.update_s:.3g} s", f"{run.transfer_s:.3g} s"
        rows.append(
            (
                *start, str(each.num_learner_gpus), each.rate, run.bounded_by.what, *shares,
                str(each.max_policy_lag), *times,
            )
        )  # fmt: skip
    widths = [
        max((len(row[k]) for row in rows if len(row) == len(_HEAD)), default=0)
        for k in range(len(_HEAD))
    ]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows
    ]
