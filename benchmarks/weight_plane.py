# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does it cost to give new weights to everybody on a node?

    python benchmarks/weight_plane.py [--quick] [--megabytes 10] [--readers 2]

Reader processes serve a policy without rest (a stack of square linear layers, batch 4) while the
learner publishes. The same processes run under three schemes: ``dvla`` (this project's
``AsyncWeightUpdater``), ``multiprocess`` and ``shared`` (TorchRL's ``MultiProcessWeightSyncScheme``
and ``SharedMemWeightSyncScheme``). The last line of stdout is one JSON object:

stall_over_copy           learner's time in ``publish`` over one ``copy_`` of as many bytes, with no
                          reader; ``*_unchecked`` is without the search for NaN
stall_many_over_one       the stall with all readers serving over that with one
adopt_s                   time from the call of publish until every reader has finished a decision
                          with the new weights, for each scheme
ratio_vs_multiprocess     adopt_s of ``multiprocess`` over ours (larger is better for us)
ratio_vs_shared_mem       our adopt_s over that of ``shared``, which writes under its readers' feet
torn_reads                reads that found two versions in one model, of ``num_reads``, each scheme
resident_over_model       memory of the slots and what all readers have added of their own, over the
                          model's; the learner's own model is not counted
served_while_publishing   decisions/s while a version is published every 100 ms over those without

Every ratio compares two sides of one run; times are lower quartiles of repeats. With fewer cores
than processes the two sides share them, and adopt_s is mostly the wait for a core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.weight_update import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from torchrl_dvla.weight_update import AsyncWeightUpdater, WeightStore

WIDTH = 512  # 1 MiB a layer
SCHEMES: dict[str, Callable[[], WeightSyncScheme]] = {
    "dvla": AsyncWeightUpdater,
    "multiprocess": MultiProcessWeightSyncScheme,
    "shared": SharedMemWeightSyncScheme,
}


class Policy(nn.Module):
    """A stack of square layers, every weight of which is the number of its version."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(megabytes))
        self.requires_grad_(False)

    def forward(self, inputs: torch.Tensor, check: bool = False) -> tuple[int, bool]:
        """One decision: the version it began with, and (``check``) whether it read only that."""
        # In every scheme the last weight is written last.
        version = int(self.layers[-1].weight[-1, -1])
        if check:
            extremes = [torch.aminmax(layer.weight) for layer in self.layers]
            return version, {float(v) for pair in extremes for v in pair} == {float(version)}
        for layer in self.layers:
            inputs = layer(inputs)
        return version, True


def set_version(policy: Policy, version: int) -> Policy:
    for parameter in policy.parameters():
        parameter.fill_(float(version))
    return policy


def memory_bytes(field: str, mapping: str = "") -> int:
    """A field of this process's memory map, summed over the mappings of that name."""
    total, is_wanted = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if not line.split()[0].endswith(":"):  # the head of a mapping
                is_wanted = mapping in line
            elif is_wanted and line.startswith(f"{field}:"):
                total += int(line.split()[1]) * 1024
    return total


# -- the readers -----------------------------------------------------------------------------------


def serve(
    connection: Connection,
    scheme: WeightSyncScheme,
    words: torch.Tensor,
    index: int,
    megabytes: int,
) -> None:
    """Follow orders. ``words[index]`` is the version served now and the number of decisions."""
    torch.set_num_threads(1)
    inputs = torch.zeros(4, WIDTH)
    nn.Linear(WIDTH, WIDTH)(inputs)  # the library's own workspaces are not weights
    before = memory_bytes("Anonymous")
    with torch.device("meta" if isinstance(scheme, AsyncWeightUpdater) else "cpu"):
        policy = Policy(megabytes)
    scheme.init_on_receiver(model_id="policy", model=policy, worker_idx=index)
    scheme.connect(worker_idx=index)
    policy(inputs)
    connection.send(memory_bytes("Anonymous") - before)
    while (order := connection.recv()) != "stop":
        num_reads = num_torn = 0
        while not connection.poll(None if order == "idle" else 0):
            version, is_whole = policy(inputs, check=order == "check")
            num_reads += 1
            num_torn += not is_whole
            words[index, 0] = version
            words[index, 1] += 1
        connection.recv()
        connection.send((num_reads, num_torn))
    scheme.shutdown()


class Node:
    """The learner and its readers under one scheme."""

    def __init__(self, name: str, num_readers: int, megabytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.policy = Policy(megabytes)
        set_version(self.policy, 0)
        self.version = 0
        self.words = torch.zeros(num_readers, 2, dtype=torch.int64).share_memory_()
        self.scheme = SCHEMES[name]()
        self.scheme.init_on_sender(
            model=self.policy,
            model_id="policy",
            devices=[torch.device("cpu")] * num_readers,
            ctx=context,
        )
        pipes = [context.Pipe() for _ in range(num_readers)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(
                target=serve, args=(theirs, self.scheme, self.words, index, megabytes), daemon=True
            )
            for index, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that a reader that fails is heard
        self.scheme.connect()
        self._reader_bytes = [pipe.recv() for pipe in self._pipes]

    def publish(self) -> None:
        self.version += 1
        set_version(self.policy, self.version)
        self.scheme.send(weights=TensorDict.from_module(self.policy))

    def resident_bytes(self) -> int:
        for _ in range(4):  # every slot has been written
            self.publish()
        # The pages of the slots are shared, so they are counted once, where all of them are mapped.
        return memory_bytes("Rss", "memfd:torchrl_dvla") + sum(self._reader_bytes)

    @contextmanager
    def ordered(self, order: str, num_readers: int | None = None) -> Iterator[list[int]]:
        """The readers do as told meanwhile; the list then holds their reads and torn reads."""
        pipes = self._pipes[:num_readers]
        counts: list[int] = []
        for pipe in pipes:
            pipe.send(order)
        yield counts
        for pipe in pipes:
            pipe.send("enough")
        answers = [pipe.recv() for pipe in pipes]
        counts += [sum(answer[0] for answer in answers), sum(answer[1] for answer in answers)]

    def wait_until_served(self, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while int(self.words[:, 0].min()) < self.version:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Version {self.version} is not served: {self.words}.")
            time.sleep(1e-4)

    def close(self) -> None:
        # First the scheme: TorchRL's flush queues that only a living reader empties.
        self.scheme.shutdown()
        for pipe in self._pipes:
            pipe.send("stop")
        for process in self._processes:
            process.join(timeout=20.0)
            if process.is_alive():
                process.kill()
                process.join()


# -- the questions ---------------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def undisturbed(times: list[float]) -> float:
    """The lower quartile: what else runs on the machine only ever adds time."""
    return statistics.quantiles(times, n=4)[0]


def measure_stall(megabytes: int, repeats: int) -> dict[str, float]:
    policy = set_version(Policy(megabytes), 1)
    flat = torch.ones(megabytes * WIDTH * WIDTH)
    # As many targets in turn as the store has slots: one alone might stay in the cache.
    targets = itertools.cycle([torch.zeros_like(flat) for _ in range(3)])
    with WeightStore(policy) as store, WeightStore(policy, check_finite=False) as unchecked:
        calls: dict[str, Callable[[], Any]] = {
            "copy_s": lambda: next(targets).copy_(flat),
            "stall_s": store.publish,
            "stall_unchecked_s": unchecked.publish,
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
        for _ in range(repeats + 3):
            random.shuffle(names)  # else a scheduler's time slice may always end in the same call
            for name in names:
                times[name].append(timed(calls[name]))
    return {name: undisturbed(values[3:]) for name, values in times.items()}


def measure_adoption(node: Node, repeats: int) -> list[float]:
    times = []
    with node.ordered("serve"):
        for _ in range(repeats + 1):
            node.version += 1
            set_version(node.policy, node.version)
            weights = TensorDict.from_module(node.policy)
            start = time.perf_counter()
            node.scheme.send(weights=weights)
            node.wait_until_served()
            times.append(time.perf_counter() - start)
    return times[1:]


def measure_torn(node: Node, seconds: float) -> dict[str, int]:
    with node.ordered("check") as counts:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            node.publish()
    return {"num_reads": counts[0], "torn_reads": counts[1]}


def measure_contended_stall(node: Node, repeats: int) -> float:
    stalls = []
    for count in (1, None):
        with node.ordered("serve", count):
            times = []
            for _ in range(repeats):
                set_version(node.policy, node.version)
                times.append(timed(node.scheme.publish))
                node.version += 1
                time.sleep(0.01)
        stalls.append(undisturbed(times))
    return stalls[1] / stalls[0]


def measure_served(node: Node, seconds: float, rounds: int) -> float:
    """One reader, so that on two cores learner and reader have one each."""
    ratios = []
    for _ in range(rounds):
        rates = []
        for is_publishing in (False, True):
            with node.ordered("serve", 1):
                first, start = int(node.words[0, 1]), time.monotonic()
                while time.monotonic() - start < seconds:
                    if is_publishing:
                        node.publish()
                    time.sleep(0.1)
                rates.append((int(node.words[0, 1]) - first) / (time.monotonic() - start))
        ratios.append(rates[1] / rates[0])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats: below a minute")
    parser.add_argument("--megabytes", type=int, default=10, help="size of the model")
    parser.add_argument("--readers", type=int, default=2, help="reader processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeats, seconds, rounds = (15, 1.0, 7) if args.quick else (60, 6.0, 15)
    result: dict[str, Any] = {
        "benchmark": "weight_plane",
        "megabytes": args.megabytes,
        "readers": args.readers,
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    stalls = measure_stall(args.megabytes, 4 * repeats)
    result.update(stalls)
    result["stall_over_copy"] = stalls["stall_s"] / stalls["copy_s"]
    result["stall_over_copy_unchecked"] = stalls["stall_unchecked_s"] / stalls["copy_s"]
    nodes: dict[str, Node] = {}
    times: dict[str, list[float]] = {name: [] for name in SCHEMES}
    torn: dict[str, dict[str, int]] = {}
    try:
        for name in SCHEMES:
            nodes[name] = Node(name, args.readers, args.megabytes)
        dvla = nodes["dvla"]
        model_bytes = args.megabytes * WIDTH * WIDTH * 4
        result["resident_over_model"] = dvla.resident_bytes() / model_bytes
        result["stall_many_over_one"] = measure_contended_stall(dvla, repeats)
        result["served_while_publishing"] = measure_served(dvla, seconds, rounds)
        for _ in range(rounds):  # in turns, with the readers of the others at rest
            for name, node in nodes.items():
                times[name] += measure_adoption(node, repeats // 3)
        for name, node in nodes.items():
            torn[name] = measure_torn(node, seconds)
    finally:
        for node in nodes.values():
            node.close()
    adopt_s = {name: undisturbed(values) for name, values in times.items()}
    for name in SCHEMES:
        print(f"{name}: adopted after {adopt_s[name] * 1e3:.2f} ms, {torn[name]}")
    result["adopt_s"] = adopt_s
    result["ratio_vs_multiprocess"] = adopt_s["multiprocess"] / adopt_s["dvla"]
    result["ratio_vs_shared_mem"] = adopt_s["dvla"] / adopt_s["shared"]
    result["reads"] = torn
    result["torn_reads"] = torn["dvla"]["torn_reads"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
