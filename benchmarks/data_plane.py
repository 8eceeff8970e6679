# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many bytes of decisions a second get from environment processes into a learner's batches?

    python benchmarks/data_plane.py [--quick] [--tune]

A decision is two 256x256x3 uint8 cameras, proprioception, 8x7 tokens, chunk and log-probs, reward
and flags: 0.4 MB. **The job**, the same for every arrangement: processes that have frames (16
pre-rendered ones each, drawing costs nothing) and the outputs of a policy (constants, the policy
costs nothing) hand decisions over; another process, the learner's, takes as many rows in batches of
64. Counted are rows in batches. Every decision crosses a process boundary once, is kept in a buffer
of 400 MB that was touched before, and is part of one batch (ours: each exactly once; the
others: as many rows as were written, drawn at random, which is their cheapest sampler).

``dvla``          environment workers write pages of 16 rows by ``RowWriter`` and are sent page
                  handles, nothing else; groups of 4 rollouts of 64 decisions pass
                  ``GroupAssembler`` and ``Admission``; the learner iterates a
                  ``PooledReplayBuffer``
``lazy``          TorchRL's process-backed ``Collector``, whose workers write to the shared
                  ``LazyTensorStorage`` that the learner samples
``memmap``        the same with ``LazyMemmapStorage``, in memory (/dev/shm) where there is room
``async``         TorchRL's ``AsyncBatchedCollector``: process slots, chunked transitions, a
                  ``LazyTensorStorage`` in the learner's process
                  (the policy's request is proprioception alone)

The rivals' environment overrides ``step_and_maybe_reset``, so they do not pay for the checks of
``EnvBase``, and leaves ``("next", "observation")`` out, so no frame travels twice. ``SETTINGS``
for ``lazy``, the best of the rivals, are the best of the grid that ``--tune`` runs (processes, rows
of a message, threads of the learner): 0.72 GB/s, the other seven 0.38 to 0.65. Those of the others
come from a few trials by hand, with one environment process each, because on two cores the learner
needs the other.

``memcpy`` is one stream of the same bytes, from and to memory of 400 MB in blocks of a batch, while
all others are stopped. Arrangements are started once and stopped by signal while another is
measured; they take turns. The last line of stdout is one JSON object:

bytes_per_s, memcpy_bytes_per_s   medians over the repeats
fraction_of_memcpy                of ``dvla``; median of the ratio within one repeat
fraction_of_memcpy_pair           the same over one of two such streams that run at once, as the
                                  worker's and the learner's copies do: what the memory leaves
torchrl_bytes_per_s               of each rival
ratio_vs_best_torchrl             ``dvla`` over the best of them in the same repeat
copies_per_frame                  bytes that copying calls moved, over bytes of the batches, counted
                                  in ``dvla``'s processes by wrapping those calls
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _data_plane import BATCH, DECISIONS, ROW_BYTES, ROWS, Copied, Dvla, TorchRL, row_layout
from _machine import machine, paired_ratio, spread

RIVALS = ("lazy", "memmap", "async")
#: Workers; rows of a message to the learner (rivals); threads of the learner.
SETTINGS: dict[str, dict[str, int]] = {
    "dvla": {"workers": 1, "rows": DECISIONS, "threads": 1},
    "lazy": {"workers": 1, "rows": 64, "threads": 2},
    "memmap": {"workers": 1, "rows": 64, "threads": 1},
    "async": {"workers": 1, "rows": 64, "threads": 1},
}


# -- processes that take turns ---------------------------------------------------------------------


def serve(name: str, settings: dict[str, int], count: bool) -> None:
    """One arrangement: for each number of seconds on stdin, a line of figures on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print
    torch.set_num_threads(settings["threads"])
    side: Any
    if name == "dvla":
        side = Dvla(settings, count)
    else:
        side = TorchRL(name, settings)
    side.take(1.0)  # touches what the learner's side touches
    gathered = Copied()
    if count:
        from torchrl_dvla.data import fields

        gathered.wrap(fields, "_take", lambda source, numbers, out: out.nbytes)
        before = sum(side.copied.values())
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        rows, elapsed_s = side.take(float(line))
        answer = {"rows": rows, "bytes_per_s": rows * ROW_BYTES / elapsed_s}
        if count:
            answer["gathered_bytes"] = gathered.nbytes
            answer["written_bytes"] = sum(side.copied.values()) - before
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    side.close()


class Arrangement:
    """An arrangement in a process group of its own, stopped except when it is measured."""

    def __init__(self, name: str, settings: dict[str, int], count: bool = False) -> None:
        print(f"starting {name} {settings}", file=sys.stderr)
        command = [sys.executable, __file__, "--serve", name, "--settings", json.dumps(settings)]
        self.process = subprocess.Popen(
            [*command, *(["--count"] if count else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.name = name

    def wait(self) -> None:
        """Until it has warmed up; it is stopped then."""
        if self._read() != "ready":
            raise RuntimeError(f"{self.name} did not start")
        self.pause()

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def measure(self, seconds: float) -> dict[str, float]:
        os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        answer: dict[str, float] = json.loads(self._read())
        self.pause()
        return answer

    def end(self) -> None:
        """Let it end by itself, which removes what it has in /dev/shm; then end what is left."""
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(20.0)
        except subprocess.TimeoutExpired:
            print(f"process {self.process.pid} had to be killed", file=sys.stderr)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Memcpy:
    """Streams of plain copies, each between two blocks of its own that no cache holds."""

    def __init__(self, num_streams: int) -> None:
        self.streams = [
            [np.ones(ROWS * ROW_BYTES, np.uint8) for _ in range(2)] for _ in range(num_streams)
        ]

    def measure(self, seconds: float) -> dict[str, float]:
        with ThreadPoolExecutor(len(self.streams)) as pool:  # copying drops the interpreter lock
            rates = pool.map(lambda stream: self._copy(*stream, seconds), self.streams)
            return {"bytes_per_s": min(rates)}

    def _copy(self, source: np.ndarray, target: np.ndarray, seconds: float) -> float:
        block, start_s, copied = BATCH * ROW_BYTES, time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - start_s) < seconds:
            at = copied % (source.nbytes - block + 1) // 64 * 64
            ctypes.memmove(target.ctypes.data + at, source.ctypes.data + at, block)
            copied += block
        return copied / elapsed_s


def tune(names: Sequence[str], seconds: float, repeats: int) -> None:
    """The rates of every setting of each arrangement, in turns."""
    for name in names:
        grid = [
            {"workers": workers, "rows": rows, "threads": threads}
            for workers in (1, 2)
            for rows in ((64,) if name.startswith("dvla") else (16, 64))
            for threads in (1, 2)
        ]
        sides = [Arrangement(name, settings) for settings in grid]
        try:
            for side in sides:
                side.wait()
            rates = [
                [side.measure(seconds)["bytes_per_s"] / 1e9 for side in sides]
                for _ in range(repeats)
            ]
        finally:
            for side in sides:
                side.end()
        for settings, values in zip(grid, zip(*rates)):
            print(f"{name} {settings}: {spread(values)} GB/s", flush=True)


def main() -> None:
    # Whoever ends this process means the arrangements too, which are in sessions of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short turns, under a minute")
    parser.add_argument("--tune", action="store_true", help="run the grid of settings instead")
    parser.add_argument("--only", nargs="*", help="arrangements; by default all")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, json.loads(args.settings), args.count)
        return
    if args.tune:
        tune(args.only or RIVALS, 1.0, 3)
        return
    seconds, repeats = (0.8, 5) if args.quick else (4.0, 7)
    names = args.only or ["dvla", *RIVALS]
    environment, sides = machine("tensordict"), {}
    try:
        counting = Arrangement("dvla", SETTINGS["dvla"], count=True)
        sides |= {name: Arrangement(name, SETTINGS[name]) for name in names}
        for side in (counting, *sides.values()):
            side.wait()
        counted = counting.measure(1.0)
        counting.end()
        turns: dict[str, Any] = {"memcpy": Memcpy(1), "memcpy_pair": Memcpy(2), **sides}
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for repeat in range(repeats):
            for name, turn in turns.items():
                rates[name].append(turn.measure(seconds)["bytes_per_s"])
            latest = {name: f"{values[-1] / 1e9:.2f}" for name, values in rates.items()}
            print(f"repeat {repeat}, GB/s: {latest}", file=sys.stderr)
    finally:
        for side in sides.values():
            side.end()
    print(json.dumps(report(rates, counted) | {"quick": args.quick, "machine": environment}))


def report(rates: dict[str, list[float]], counted: dict[str, float]) -> dict[str, Any]:
    """The figures of the issue, from the rates of each turn."""
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}

    def figures(own: str, rivals: tuple[str, ...]) -> dict[str, Any]:
        measured = [name for name in rivals if name in rates]
        best = [max(turn) for turn in zip(*(rates[name] for name in measured))]
        memcpy, rival = paired_ratio(rates[own], rates["memcpy"]), {"median": None}
        if best:
            rival = paired_ratio(rates[own], best)
        return {
            "bytes_per_s": medians[own],
            "fraction_of_memcpy": memcpy["median"],
            "fraction_spread": memcpy,
            "fraction_of_memcpy_pair": paired_ratio(rates[own], rates["memcpy_pair"])["median"],
            "torchrl_bytes_per_s": {name: medians[name] for name in measured},
            "ratio_vs_best_torchrl": rival["median"],
            "ratio_spread": rival,
        }

    moved = counted["gathered_bytes"] + counted["written_bytes"]
    return {
        "benchmark": "data_plane",
        "memcpy_bytes_per_s": medians["memcpy"],
        **figures("dvla", RIVALS),
        "copies_per_frame": round(moved / (counted["rows"] * row_layout().row_bytes), 2),
        "gb_per_s": {n: spread(value / 1e9 for value in values) for n, values in rates.items()},
        "settings": {name: SETTINGS[name] for name in rates if name in SETTINGS},
    }


if __name__ == "__main__":
    main()
