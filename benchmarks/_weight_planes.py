# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Both planes at once: processes that move observations all the time, beside a weight store."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from _machine import spread
from _weight_node import Node, fork_server

from torchrl_dvla.memory import EnvironmentPool, RowLayout

MEGABYTES = 64
_LAYOUT = {"image": ((128, 128, 3), torch.uint8), "state": ((8,), torch.float32)}
_NUM_PAGES, _ROWS_PER_PAGE, _BATCH = 64, 8, 64
_WINDOW_S = 0.25


def move_rows(connection: Connection, words: torch.Tensor) -> None:
    """A whole data plane in one process: write rows of a pool, gather batches; count the bytes."""
    torch.set_num_threads(1)
    layout = RowLayout(_LAYOUT)
    moved = words.numpy()
    with EnvironmentPool(layout, _NUM_PAGES, _ROWS_PER_PAGE) as pool:
        images, states = pool.rows["image"], pool.rows["state"]
        image, state = torch.randint(0, 255, (128, 128, 3)).byte(), torch.zeros(8)
        order = torch.randperm(len(images))
        connection.send("ready")
        while connection.recv() == "run":
            while not connection.poll(0):
                for start in range(0, len(images), _BATCH):
                    for row in range(start, start + _BATCH):
                        images[row].copy_(image)
                        states[row].copy_(state)
                    chosen = order[start : start + _BATCH]
                    images.index_select(0, chosen), states.index_select(0, chosen)
                    moved[0] += 2 * _BATCH * layout.row_bytes
            connection.recv()
            connection.send("done")


class DataPlane:
    """Processes that move rows all the time, and how much they moved."""

    def __init__(self, num_processes: int) -> None:
        context = fork_server()
        self._words = [
            torch.zeros(1, dtype=torch.int64).share_memory_() for _ in range(num_processes)
        ]
        pipes = [context.Pipe() for _ in range(num_processes)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=move_rows, args=(theirs, words), daemon=True)
            for (_, theirs), words in zip(pipes, self._words, strict=True)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()
        for pipe in self._pipes:
            pipe.recv()

    def start(self, count: int) -> None:
        self._running = self._pipes[:count]
        for pipe in self._running:
            pipe.send("run")

    def stop(self) -> None:
        for pipe in self._running:
            pipe.send("enough")
        for pipe in self._running:
            pipe.recv()

    def moved_bytes(self) -> int:
        return sum(int(words[0]) for words in self._words)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send("stop")
        for process in self._processes:
            process.join(timeout=20.0)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def measure_planes(rounds: int, publishes: int) -> dict[str, object]:
    """What each plane does to the other.

    The reader's decisions are emulated, so beside one process of the data plane there is a core for
    the learner, and what is measured is the planes and not the want of cores. The same with no core
    left (a data-plane process for each of two) is reported beside it.

    The loads take turns, some publishes at a time. Each publish is timed in its two parts, until
    the version is visible and from there until it is adopted, and has a plain copy of as many bytes
    beside it, under the same load.
    """
    node, data = Node("dvla", 1, MEGABYTES), DataPlane(2)
    flat = torch.ones(MEGABYTES << 18)
    targets = itertools.cycle([torch.zeros_like(flat) for _ in range(3)])
    counts = {"alone": 0, "saturated": 1, "no_core_left": 2}
    parts = ("adopt", "copy", "until_visible", "from_visible")
    times: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in parts} for name in counts
    }
    beside: dict[str, Callable[[], object]] = {
        "alone": lambda: time.sleep(0.01),
        "beside_publish": node.publish,
        "beside_copy": lambda: next(targets).copy_(flat),
    }
    rates: dict[str, list[float]] = {name: [] for name in beside}
    weight_rates: dict[str, list[float]] = {name: [] for name in beside}

    def adopt(into: dict[str, list[float]]) -> None:
        adopt_s = node.adopt_s()
        (stats,) = node.scheme.store.adoption_stats().values()
        into["adopt"].append(adopt_s)
        into["until_visible"].append(adopt_s - stats.latency_last_s)
        into["from_visible"].append(stats.latency_last_s)
        start = time.perf_counter()
        next(targets).copy_(flat)
        into["copy"].append(time.perf_counter() - start)

    def compete(name: str) -> None:
        first, start, num_calls = data.moved_bytes(), time.monotonic(), 0
        while time.monotonic() - start < _WINDOW_S:
            beside[name]()
            num_calls += 1
        elapsed_s = time.monotonic() - start
        rates[name].append((data.moved_bytes() - first) / elapsed_s)
        weight_rates[name].append(num_calls * (MEGABYTES << 20) / elapsed_s)

    try:
        with node.ordered("emulate"):
            for _ in range(6):
                node.adopt_s(), next(targets).copy_(flat)
            for number in range(rounds):
                for name in random.sample(list(counts), len(counts)):
                    data.start(counts[name])
                    for _ in range(publishes):
                        adopt(times[name])
                    data.stop()
                data.start(1)
                for name in random.sample(list(beside), len(beside)):
                    compete(name)
                data.stop()
                print(f"planes: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        node.close()
        data.close()

    def growth(part: str, q: float, load: str = "saturated") -> float:
        return quantile(times[load][part], q) / quantile(times["alone"][part], q) - 1

    # A window alone mostly shows which core each process got: the windows of a fifth of the rounds
    # are one repeat.
    sums = {name: [sum(rates[name][k::5]) for k in range(5)] for name in rates}
    losses = [1 - a / b for a, b in zip(sums["beside_publish"], sums["beside_copy"], strict=True)]
    return {
        **{f"{part}_p99_growth": growth(part, 0.99) for part in parts},
        **{f"{part}_p50_growth": growth(part, 0.5) for part in parts},
        "adopt_p99_growth_no_core_left": growth("adopt", 0.99, "no_core_left"),
        "data_plane_loss": statistics.median(losses),
        "data_plane_loss_spread": spread(losses, 3),
        "data_plane_gb_per_s": {n: spread(r / 1e9 for r in v) for n, v in rates.items()},
        "weights_gb_per_s": {
            n: spread(r / 1e9 for r in v) for n, v in weight_rates.items() if n != "alone"
        },
        "seconds": {
            load: {
                part: {"p50": quantile(v, 0.5), "p99": quantile(v, 0.99)}
                for part, v in by_part.items()
            }
            for load, by_part in times.items()
        },
        "num_adoptions_each": rounds * publishes,
        "megabytes": MEGABYTES,
    }
