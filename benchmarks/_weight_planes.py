# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Both planes at once: processes that move observations without rest, beside a weight store."""

from __future__ import annotations

import itertools
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
    """Processes that move rows without rest, and how much they moved."""

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


def measure_planes(rounds: int, publishes: int, window_s: float) -> dict[str, object]:
    """What each plane does to the other.

    The reader's decisions are emulated, so beside one process of the data plane there is a core for
    the learner, and what is measured is the planes and not the want of cores. The same with no core
    left (a data-plane process for each of two) is told beside it.
    """
    node, data = Node("dvla", 1, MEGABYTES), DataPlane(2)
    flat = torch.ones(MEGABYTES << 18)
    targets = itertools.cycle([torch.zeros_like(flat) for _ in range(3)])
    counts = {"alone": 0, "saturated": 1, "no_core_left": 2}
    latencies: dict[str, list[float]] = {name: [] for name in counts}
    rates: dict[str, list[float]] = {"alone": [], "beside_publish": [], "beside_copy": []}
    beside: dict[str, Callable[[], object]] = {
        "alone": lambda: time.sleep(0.01),
        "beside_publish": node.publish,
        "beside_copy": lambda: next(targets).copy_(flat),
    }
    weight_rates: dict[str, list[float]] = {name: [] for name in beside}
    try:
        with node.ordered("emulate"):
            for _ in range(6):
                node.adopt_s(), next(targets).copy_(flat)
            for number in range(rounds):
                for name, count in counts.items():
                    data.start(count)
                    latencies[name] += [node.adopt_s() for _ in range(publishes)]
                    data.stop()
                data.start(1)
                for name, work in beside.items():
                    first, start, num_calls = data.moved_bytes(), time.monotonic(), 0
                    while time.monotonic() - start < window_s:
                        work()
                        num_calls += 1
                    elapsed_s = time.monotonic() - start
                    rates[name].append((data.moved_bytes() - first) / elapsed_s)
                    weight_rates[name].append(num_calls * (MEGABYTES << 20) / elapsed_s)
                data.stop()
                print(f"planes: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        node.close()
        data.close()
    p99 = {name: quantile(values, 0.99) for name, values in latencies.items()}
    p50 = {name: quantile(values, 0.5) for name, values in latencies.items()}
    losses = [1 - a / b for a, b in zip(rates["beside_publish"], rates["beside_copy"], strict=True)]
    return {
        "adopt_p99_growth": p99["saturated"] / p99["alone"] - 1,
        "adopt_p50_growth": p50["saturated"] / p50["alone"] - 1,
        "adopt_p99_growth_no_core_left": p99["no_core_left"] / p99["alone"] - 1,
        "data_plane_loss": statistics.median(losses),
        "data_plane_loss_spread": spread(losses, 3),
        "data_plane_gb_per_s": {n: spread(r / 1e9 for r in v) for n, v in rates.items()},
        "weights_gb_per_s": {
            n: spread(r / 1e9 for r in v) for n, v in weight_rates.items() if n != "alone"
        },
        "adopt_p99_s": p99,
        "adopt_p50_s": p50,
        "num_adoptions_each": rounds * publishes,
        "megabytes": MEGABYTES,
    }
