# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does it cost the learner to bring new weights to other nodes, and when do they have them?

    python benchmarks/weight_broadcast.py [--quick] [--megabytes 4] [--repeats 5]

Every node is a process. Where the machine allows it, each is in a network namespace of its own,
with 25 MB/s and 2 ms between them (``network: emulated``, see ``testing.EmulatedNetwork``): TCP is
real, but all nodes share this machine's cores, so the bandwidth is set low enough for the
network, not the cores, to be the bottleneck. The same is measured over the loopback device, where
bytes cost nothing but CPU time, of the same cores for all nodes: a tree cannot win there.

In turns and in random order the nodes get a version by ``chain``, by ``binomial``, by ``whole`` (a
chain without pipelining: one bucket) and two rivals: ``gloo``, one ``torch.distributed.broadcast``
in a Gloo group of all nodes, of one contiguous tensor (its best case, and it has no settings); and
``torchrl``, ``DistributedWeightSyncScheme.send``, of one tensor as well. Its only setting,
``sync``, was tried with both values and made no difference beyond the noise. What the cost model
picks is one of the first two. The last line of stdout is one JSON object; keys at the
top are those of the emulated network, if there is one:

learner_cost_8_over_1   CPU seconds of the learner's process per version, with 8 nodes over with 1:
                        with 1 a version is one message, with more it goes in buckets.
                        ``_same_buckets``: the same where it goes in as many with 1 node as with 8.
                        ``_apart``: the same where another process of the learner's host has the
                        broadcast; ``host_cost_8_over_1_apart``: of both processes together
stall_8_over_1          the same of the time that ``publish`` takes
learner_bytes_8_over_1  the same of the bytes that the learner's node sends
rival_stall_8_over_1    the same of the time that the learner is held up by each rival
stall_over_rival        our stall over each rival's, with 8 nodes
ratio_vs_gloo_broadcast time until all 8 nodes have the large version, of the rival over the pick
ratio_vs_torchrl        the same
chain_over_binomial     the same, of the chain over the binomial tree
pipelining_gain         the same, of ``whole`` over the chain
model_pick_over_best    time of the pick over that of the better shape: the worst over sizes and
                        numbers of nodes, each the median
predicted               table of what the cost model says beside what was measured
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # emulated hosts have no names

from typing import Any

import torch
from _broadcast_hosts import Hosts
from _machine import machine, paired_ratio, spread

from torchrl_dvla.testing import EmulatedNetwork
from torchrl_dvla.weight_update import LinkModel
from torchrl_dvla.weight_update.broadcast.cost import choose_plan

NUM_NODES = 8
LINK = LinkModel(latency_s=0.002, bytes_per_s=25e6, overhead_s=200e-6)
#: Over loopback there is no link to model; a message costs the cores that all nodes share.
LOOPBACK = LinkModel(latency_s=50e-6, bytes_per_s=2e9, overhead_s=1e-3)
SHAPES = ("chain", "binomial")
RIVALS = ("gloo", "torchrl")
SMALL_BYTES = 65_536
#: The learner's cost of a turn is the median over so many.
VERSIONS_PER_TURN = 3


def measure_times(
    hosts: Hosts, sizes: dict[str, int], nodes: list[int], link: LinkModel, num_repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds until the last node has a version, by size and number of nodes, and by way."""
    generator, out = random.Random(0), {}
    for size, num_bytes in sizes.items():
        for num_nodes in nodes:
            ours = [*SHAPES, *(["whole"] if size == "large" and num_nodes == NUM_NODES else [])]
            for way in ours:
                how = (
                    {"shapes": ["chain"], "num_buckets": 1} if way == "whole" else {"shapes": [way]}
                )
                hosts.start(way, num_bytes, num_nodes, link, **how)
            seconds: dict[str, list[float]] = {way: [] for way in (*ours, *RIVALS)}
            for repeat in range(num_repeats + 1):
                for way in generator.sample(list(seconds), len(seconds)):
                    if way == "gloo":
                        taken, _, _ = hosts.gloo(num_bytes, num_nodes)
                    elif way == "torchrl":
                        taken, _, _ = hosts.torchrl(size, num_nodes)
                    else:
                        taken, *_ = hosts.bring(way, num_nodes)
                    if repeat:  # the first one opens connections
                        seconds[way].append(taken)
            for way in ours:
                hosts.stop(way, num_nodes)
            out[f"{size}, {num_nodes} nodes"] = seconds
            medians = {way: round(statistics.median(s), 4) for way, s in seconds.items()}
            log(f"{size}, {num_nodes} nodes: {medians}")
    return out


def measure_cost(
    hosts: Hosts, num_bytes: int, nodes: list[int], link: LinkModel, num_repeats: int
) -> dict[str, dict[str, dict[int, list[float]]]]:
    """What the learner pays for a version.

    Returns:
        ``cpu_s``, ``stall_s`` and ``bytes`` by way and number of nodes. The ways of ours are
        ``ours``, ``cut`` (one node, but in the buckets of the most nodes), ``apart`` (the broadcast
        in a process of its own) and, of that, ``apart_host`` (both processes together).
    """
    generator, ends = random.Random(1), [1, NUM_NODES]
    num_buckets = choose_plan(NUM_NODES, num_bytes, link).num_buckets
    turns: list[tuple[str, int, dict[str, Any]]] = [
        *(("ours", n, {}) for n in nodes),
        ("cut", 1, {"num_buckets": num_buckets}),
        *(("apart", n, {"apart": True}) for n in ends),
    ]
    rivals = [(rival, n) for rival in RIVALS for n in ends]
    cost: dict[str, dict[str, dict[int, list[float]]]] = {
        what: defaultdict(lambda: defaultdict(list)) for what in ("cpu_s", "stall_s", "bytes")
    }
    for way, num_nodes, how in turns:
        hosts.start(f"{way} {num_nodes}", num_bytes, num_nodes, link, **how)
        hosts.bring(f"{way} {num_nodes}", num_nodes)  # the first one warms up
    for repeat in range(num_repeats):
        for way, num_nodes, _ in generator.sample(turns, len(turns)):
            name, samples = f"{way} {num_nodes}", list[tuple[float, float, float]]()
            before = hosts.sent_bytes(name)
            for _ in range(VERSIONS_PER_TURN):
                _, *sample = hosts.bring(name, num_nodes)
                samples.append(tuple(sample))
            stall_s, cpu_s, leader_s = (statistics.median(column) for column in zip(*samples))
            sent_bytes = (hosts.sent_bytes(name) - before) / VERSIONS_PER_TURN
            cost["bytes"][way][num_nodes].append(sent_bytes)
            cost["stall_s"][way][num_nodes].append(stall_s)
            cost["cpu_s"][way][num_nodes].append(cpu_s)
            if way == "apart":
                cost["cpu_s"]["apart_host"][num_nodes].append(cpu_s + leader_s)
        for rival, num_nodes in generator.sample(rivals, len(rivals)):
            if rival == "gloo":
                _, stall_s, cpu_s = hosts.gloo(num_bytes, num_nodes)
            else:
                _, stall_s, cpu_s = hosts.torchrl("large", num_nodes)
            cost["stall_s"][rival][num_nodes].append(stall_s)
            cost["cpu_s"][rival][num_nodes].append(cpu_s)
        log(f"learner's cost, repeat {repeat + 1} of {num_repeats}")
    for way, num_nodes, _ in turns:
        hosts.stop(f"{way} {num_nodes}", num_nodes)
    return cost


def measure(
    link: LinkModel | None, sizes: dict[str, int], nodes: list[int], num_repeats: int
) -> dict[str, Any]:
    """Everything over one network."""
    model = LOOPBACK if link is None else link
    with contextlib.ExitStack() as stack:
        hosts = Hosts(stack, NUM_NODES, link)
        hosts.join_rivals(nodes, sizes)
        cost = measure_cost(hosts, sizes["large"], nodes, model, num_repeats)
        seconds = measure_times(hosts, sizes, nodes, model, num_repeats)
    predicted, pick_over_best = [], []
    for size, num_bytes in sizes.items():
        for num_nodes in nodes:
            taken = seconds[f"{size}, {num_nodes} nodes"]
            medians = {shape: statistics.median(taken[shape]) for shape in SHAPES}
            pick = choose_plan(num_nodes, num_bytes, model).shape
            pick_over_best.append(medians[pick] / min(medians.values()))
            for shape in SHAPES:
                plan = choose_plan(num_nodes, num_bytes, model, [shape])
                predicted.append(
                    {
                        "size": size,
                        "nodes": num_nodes,
                        "shape": shape,
                        "buckets": plan.num_buckets,
                        "predicted_s": round(plan.predicted_s, 4),
                        "measured_s": round(medians[shape], 4),
                        "is_pick": shape == pick,
                    }
                )
    large = seconds[f"large, {NUM_NODES} nodes"]
    pick = choose_plan(NUM_NODES, sizes["large"], model).shape
    stall_s, cpu_s, ours = cost["stall_s"], cost["cpu_s"], cost["bytes"]["ours"]
    eight_s = cpu_s["ours"][NUM_NODES]
    return {
        "learner_cost_8_over_1": paired_ratio(eight_s, cpu_s["ours"][1]),
        "learner_cost_8_over_1_same_buckets": paired_ratio(eight_s, cpu_s["cut"][1]),
        "learner_cost_8_over_1_apart": paired_ratio(cpu_s["apart"][NUM_NODES], cpu_s["apart"][1]),
        "host_cost_8_over_1_apart": paired_ratio(
            cpu_s["apart_host"][NUM_NODES], cpu_s["apart_host"][1]
        ),
        "stall_8_over_1": paired_ratio(stall_s["ours"][NUM_NODES], stall_s["ours"][1]),
        "learner_bytes_8_over_1": paired_ratio(ours[NUM_NODES], ours[1]),
        "rival_stall_8_over_1": {
            way: paired_ratio(stall_s[way][NUM_NODES], stall_s[way][1]) for way in RIVALS
        },
        "stall_over_rival": {
            way: spread(
                (a / b for a, b in zip(stall_s["ours"][NUM_NODES], stall_s[way][NUM_NODES])), 4
            )
            for way in RIVALS
        },
        "ratio_vs_gloo_broadcast": paired_ratio(large["gloo"], large[pick]),
        "ratio_vs_torchrl": paired_ratio(large["torchrl"], large[pick]),
        "chain_over_binomial": paired_ratio(large["chain"], large["binomial"]),
        "pipelining_gain": paired_ratio(large["whole"], large["chain"]),
        "model_pick_over_best": round(max(pick_over_best), 2),
        "predicted": predicted,
        "seconds": {
            case: {way: spread(values, 4) for way, values in taken.items()}
            for case, taken in seconds.items()
        },
        "learner_cpu_s": {
            way: {n: spread(values, 4) for n, values in by_nodes.items()}
            for way, by_nodes in cost["cpu_s"].items()
        },
        "learner_stall_s": {
            way: {n: spread(values, 4) for n, values in by_nodes.items()}
            for way, by_nodes in stall_s.items()
        },
    }


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, help="the large version; default 4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="1 and 8 nodes, 2 MB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    megabytes = args.megabytes or (2 if args.quick else 4)
    nodes = [1, NUM_NODES] if args.quick else [1, 2, 4, NUM_NODES]
    sizes = {"large": megabytes << 20, "small": SMALL_BYTES}
    obstacle = EmulatedNetwork.obstacle()
    results = {}
    for network, link in (("emulated", LINK), ("loopback", None)):
        if network == "loopback" or not obstacle:
            log(network)
            results[network] = measure(link, sizes, nodes, args.repeats)
    first = next(iter(results))
    print(
        json.dumps(
            {
                "benchmark": "weight_broadcast",
                "network": first,
                "network_obstacle": obstacle,
                **results.pop(first),
                **results,
                "workload": {
                    "bytes": sizes,
                    "nodes": nodes,
                    "repeats": args.repeats,
                    "emulated_bytes_per_s": LINK.bytes_per_s,
                    "emulated_latency_s": LINK.latency_s,
                },
                "machine": machine(),
                "quick": args.quick,
            }
        )
    )


if __name__ == "__main__":
    main()
