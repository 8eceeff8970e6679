# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does it cost to give new weights to everybody on a node?

    python benchmarks/weight_plane.py [--quick] [--megabytes 10 300 2048] [--readers 8]

Reader processes serve a policy all the time (a stack of square linear layers, batch 4) while the
learner publishes. The same loop runs under ``dvla`` (this project's ``AsyncWeightUpdater``) and
TorchRL's own ways: ``multiprocess`` and ``shared`` (``MultiProcessWeightSyncScheme``,
``SharedMemWeightSyncScheme``) and ``process_server`` (``ProcessInferenceServer`` with its
``update_model_weights``). Readers serve in two ways: ``emulate``, a decision of 5 ms on a device
that is not there, so that cores are left for the weights; and ``compute``, the layers on the CPU,
so that eight readers and a learner share the cores there are.

The last line of stdout is one JSON object. Where a figure is measured for several models and
ways of serving, the key of the issue is the *worst* of them and ``by_model`` has them all:

stall_over_copy           learner's time in ``publish`` over one ``copy_`` of as many bytes
stall_8_over_1            that time with all readers serving (emulated) over that with one;
                          ``copy_8_over_1`` is the same of a plain copy beside the same readers
ratio_vs_whole_versions   adoption time of ``multiprocess`` and of ``process_server``, the smaller,
                          over ours (larger is better): from the call of publish until the last
                          reader begins a decision with the new weights
ratio_vs_shared_mem       our adoption time over that of ``shared``, which writes under its readers'
                          feet
torn_reads                reads of ours that mixed two versions, of ``num_reads``; ``reads`` has all
                          schemes. ``weight_soak.py`` is the long run
resident_over_model       memory of the slots and what all readers have added of their own, over the
                          model's; the learner's own model is not counted
served_while_publishing   decisions/s of one reader (computed) while a version is published every
                          100 ms, over those without; ``served_while_copying``: while as many
                          bytes are copied
adopt_p99_growth          of publish-to-adopt, by a saturated data plane; ``copy_p99_growth`` is
                          that of a plain copy in the same run; ``_weight_planes.py``
data_plane_loss           of its bytes/s, by weights that are published all the time, beyond what
                          one core of plain copying costs it

How the rivals were set up. TorchRL's schemes, given a model on the CPU, hand readers the learner's
own parameters: training shows through before anything is sent, and there is no publish to time. So
``shared`` got a buffer of its own and ``multiprocess`` one for each worker. Both wait for
acknowledgements (``sync``), which does not count: the clock stops when the readers act. Servers are
updated all at once from threads, and asked all the time; eight that are idle take 0.04 s for 10 MB.

Models above 512 MB are served emulated only, and compared with schemes that send whole versions
only where memory holds the copies of both. Schemes take turns within each round; ratios are medians
over the rounds of the ratio within one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _machine import machine, paired_ratio, spread
from _weight_node import DECISIONS, SCHEMES, Node, ServerNode, make_policy, set_version
from _weight_planes import measure_planes

from torchrl_dvla.memory import available_bytes
from torchrl_dvla.weight_update import WeightStore

# Models that ours and a scheme that sends whole versions hold at the most, with two readers. With
# eleven free, the kernel ended the benchmark.
_NUM_COPIES_OF_A_PAIR = 14

AnyNode = Node | ServerNode
Times = dict[str, dict[str, list[list[float]]]]


def say(text: str) -> None:
    print(f"{time.monotonic() - _STARTED_S:6.1f} s  {text}", file=sys.stderr, flush=True)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_stall(megabytes: int, repeats: int) -> dict[str, Any]:
    """Ratio to a plain copy, in turns. No reader: who reads is the next question."""
    policy = set_version(make_policy(megabytes), 1)
    flat = torch.ones(megabytes << 18)
    # Several targets in turn, as the store has slots: one alone might stay in the cache.
    num_targets = 3 if megabytes <= 512 else 1
    targets = itertools.cycle([torch.zeros_like(flat) for _ in range(num_targets)])
    with WeightStore(policy) as store:
        calls = {"copy_s": lambda: next(targets).copy_(flat), "stall_s": store.publish}
        times: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
        for _ in range(repeats + 3):
            random.shuffle(names)  # else a scheduler's time slice may always end in the same call
            for name in names:
                times[name].append(timed(calls[name]))
    copies, stalls = times["copy_s"][3:], times["stall_s"][3:]
    return {
        "stall_over_copy": statistics.median(stalls) / statistics.median(copies),
        "stall_over_copy_spread": spread(a / b for a, b in zip(stalls, copies, strict=True)),
        "stall_s": statistics.median(stalls),
        "copy_s": statistics.median(copies),
    }


def plain_copy(megabytes: int) -> Callable[[], None]:
    """A call that copies as many bytes: a large model's in several passes over half a GB."""
    part = min(megabytes, 512)
    flat = torch.ones(part << 18)
    targets = itertools.cycle([torch.zeros_like(flat) for _ in range(3 if part < 512 else 1)])

    def copy() -> None:
        for _ in range(megabytes // part):
            next(targets).copy_(flat)

    return copy


def measure_contended_stall(node: Node, rounds: int, repeats: int) -> dict[str, Any]:
    """With all readers and with one, in turns, beside plain copies under the same readers."""
    calls = {"stall": node.publish, "copy": plain_copy(node.megabytes)}
    names = list(calls)
    ratios: dict[str, list[float]] = {name: [] for name in (*names, "stall_over_copy")}
    for _ in range(rounds):
        medians: dict[int | None, dict[str, float]] = {}
        for count in random.sample([1, None], 2):
            times: dict[str, list[float]] = {name: [] for name in names}
            with node.ordered("emulate", count):
                for _ in range(repeats):
                    node.train()
                    for name in random.sample(names, 2):
                        times[name].append(timed(calls[name]))
                        time.sleep(0.01)
            medians[count] = {name: statistics.median(values) for name, values in times.items()}
        for name in names:
            ratios[name].append(medians[None][name] / medians[1][name])
        ratios["stall_over_copy"].append(ratios["stall"][-1] / ratios["copy"][-1])
    return {
        "stall_8_over_1": statistics.median(ratios["stall"]),
        "stall_8_over_1_spread": spread(ratios["stall"]),
        "copy_8_over_1": spread(ratios["copy"]),
        "stall_8_over_1_beyond_copy": spread(ratios["stall_over_copy"]),
    }


def measure_adoption(nodes: list[AnyNode], order: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Median adoption times of each round, scheme by scheme; the readers of the others are idle."""
    times: dict[str, list[float]] = {node.name: [] for node in nodes}
    for number in range(rounds):
        random.shuffle(nodes)
        for node in nodes:
            with node.ordered(order):
                node.adopt_s()
                times[node.name].append(statistics.median(node.adopt_s() for _ in range(repeats)))
        say(f"adoption, {order}: round {number + 1} of {rounds}")
    ours = times["dvla"]
    out: dict[str, Any] = {"adopt_s": {name: spread(v, 4) for name, v in times.items()}}
    for name, theirs in times.items():
        if name == "shared":
            out["ratio_vs_shared"] = spread(a / b for a, b in zip(ours, theirs, strict=True))
        elif name != "dvla":
            out[f"ratio_vs_{name}"] = spread(b / a for a, b in zip(ours, theirs, strict=True))
    return out


def measure_served(node: Node, window_s: float, rounds: int) -> dict[str, Any]:
    """One reader, so that on two cores learner and reader have one each; windows in turns."""
    calls: dict[str, Callable[[], None] | None] = {
        "alone": None,
        "publishing": node.publish,
        "copying": plain_copy(node.megabytes),
    }
    rates: dict[str, list[float]] = {name: [] for name in calls}
    with node.ordered("compute", 1):
        for _ in range(rounds):
            for name in random.sample(list(calls), len(calls)):
                first, start = int(node.words[0, DECISIONS]), time.monotonic()
                next_s = start
                while next_s - start < window_s:
                    if (call := calls[name]) is not None:
                        call()
                    next_s += 0.1
                    time.sleep(max(0.0, next_s - time.monotonic()))
                decisions = int(node.words[0, DECISIONS]) - first
                rates[name].append(decisions / (time.monotonic() - start))
    say("served while publishing")
    served = [a / b for a, b in zip(rates["publishing"], rates["alone"], strict=True)]
    return {
        "served_while_publishing": statistics.median(served),
        "served_while_publishing_spread": spread(served, 3),
        "served_while_copying": paired_ratio(rates["copying"], rates["alone"]),
        "served_publishing_over_copying": paired_ratio(rates["publishing"], rates["copying"]),
    }


def measure_model(megabytes: int, num_readers: int, quick: bool) -> dict[str, Any]:
    """Everything about one size of model, in the time and the memory that it leaves."""
    is_small, is_large = megabytes <= 64, megabytes > 512
    out: dict[str, Any] = {"megabytes": megabytes}
    say(f"{megabytes} MB: stall")
    out.update(measure_stall(megabytes, 40 if is_small else 5 if is_large else 15))
    nodes: list[AnyNode] = []
    try:
        dvla = Node("dvla", num_readers, megabytes)
        nodes.append(dvla)
        out["resident_over_model"] = dvla.resident_bytes() / (megabytes << 20)
        rounds = 5 if quick or not is_small else 11
        out.update(measure_contended_stall(dvla, rounds, 15 if is_small else 2 if is_large else 5))
        if not is_large:
            window_s = 0.5 if is_small else 1.0
            out.update(measure_served(dvla, window_s, 5 if quick else 15 if is_small else 11))
        names = ["shared"] if is_large else ["shared", "multiprocess", "process_server"]
        nodes += [make_node(name, num_readers, megabytes) for name in names]
        say(f"{megabytes} MB: {num_readers} readers under each scheme")
        repeats = 5 if is_small else 2
        out["emulate"] = measure_adoption(nodes, "emulate", rounds, repeats)
        if not is_large:
            out["compute"] = measure_adoption(nodes, "compute", 5, 2 if quick else repeats)
        if is_small:
            out["reads"] = {node.name: node.torn(1.5 if quick else 5.0) for node in nodes}
        if is_large:
            while nodes:
                nodes.pop().close()
            free = available_bytes()
        if is_large and (free is None or free > _NUM_COPIES_OF_A_PAIR * (megabytes << 20)):
            # Copies for eight readers do not fit: two readers, one scheme at a time beside ours.
            for name in ("multiprocess", "process_server"):
                nodes = [Node("dvla", 2, megabytes), make_node(name, 2, megabytes)]
                pair = measure_adoption(nodes, "emulate", 5, 1)
                out["emulate"][f"ratio_vs_{name}"] = pair[f"ratio_vs_{name}"]
                out["emulate"][f"adopt_s_2_readers_{name}"] = pair["adopt_s"]
                while nodes:
                    nodes.pop().close()
    finally:
        for node in nodes:
            node.close()
    # A run that is ended early has not measured in vain.
    print(json.dumps(out), file=sys.stderr, flush=True)
    return out


def make_node(name: str, num_readers: int, megabytes: int) -> AnyNode:
    if name in SCHEMES:
        return Node(name, num_readers, megabytes)
    return ServerNode(num_readers, megabytes)


def measure_readers(megabytes: int, rounds: int) -> dict[str, Any]:
    """Adoption times of ours and of the shared buffer for 1 to 8 readers."""
    out: dict[str, Any] = {}
    for count in (1, 2, 4, 8):
        nodes: list[AnyNode] = [Node("dvla", count, megabytes), Node("shared", count, megabytes)]
        try:
            out[str(count)] = measure_adoption(nodes, "emulate", rounds, 5)
        finally:
            for node in nodes:
                node.close()
    return out


def worst(models: list[dict[str, Any]], serving: tuple[str, ...]) -> dict[str, float | None]:
    """The keys of the issue, over all models (and ways of serving); None for what none measured."""
    out: dict[str, float | None] = {
        key: max(model[key] for model in models)
        for key in ("stall_over_copy", "stall_8_over_1", "resident_over_model")
    }
    served = [m["served_while_publishing"] for m in models if "served_while_publishing" in m]
    out["served_while_publishing"] = min(served, default=None)
    parts = [model[way] for model in models for way in serving if way in model]
    out["ratio_vs_shared_mem"] = max(part["ratio_vs_shared"]["median"] for part in parts)
    whole: list[float] = []
    for name in ("multiprocess", "process_server"):
        key = f"ratio_vs_{name}"
        ratios = [part[key]["median"] for part in parts if key in part]
        out[key] = min(ratios, default=None)
        whole += ratios
    out["ratio_vs_whole_versions"] = min(whole, default=None)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 MB only: below a minute")
    parser.add_argument("--megabytes", type=int, nargs="+", help="sizes of the models")
    parser.add_argument("--readers", type=int, default=8, help="reader processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for megabytes in args.megabytes or ([10] if args.quick else [10, 300, 2048]):
        free = available_bytes()
        # The most at one time: our four copies and another scheme's three, or the copies of all.
        need = (8 if megabytes > 512 else 4 + 4 * args.readers) * (megabytes << 20)
        if free is not None and free < need:
            skipped[str(megabytes)] = f"needs {need >> 30} GiB, {free >> 30} are free"
            continue
        models.append(measure_model(megabytes, args.readers, args.quick))
    if not models:
        sys.exit(f"No model fits into memory: {skipped}")
    result: dict[str, Any] = {"benchmark": "weight_plane", "readers": args.readers}
    result.update(worst(models, ("emulate", "compute")))
    result["emulate_only"] = worst(models, ("emulate",))
    say("planes")
    planes = measure_planes(5 if args.quick else 25, 15)
    for key in ("adopt_p99_growth", "copy_p99_growth", "data_plane_loss"):
        result[key] = planes[key]
    reads = models[0].get("reads", {})
    result["torn_reads"] = reads.get("dvla", {}).get("torn_reads")
    result.update(planes=planes, reads=reads, by_model=models, skipped=skipped)
    if not args.quick:
        result["by_readers"] = measure_readers(10, 5)
    result["emulated"] = "decisions of 5 ms on a device that is not there, in all parts `emulate`"
    result["quick"] = args.quick
    result["machine"] = machine()
    print(json.dumps(result))


_STARTED_S = time.monotonic()

if __name__ == "__main__":
    main()
