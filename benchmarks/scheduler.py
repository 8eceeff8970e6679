# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Does the scheduler find, from bad settings, what the best static setting reaches?

    python benchmarks/scheduler.py [--quick]

**The latencies are emulated** (see ``overlap.py``); lanes, processes and messages are real. 8
workers with 3 environments each take 40 ms a step; a policy call of ``n`` rows takes ``40 + n`` ms;
the learner is fast. So a call of one row at a time allows 24 decisions a second, and one rollout
under way 12.

Three collectors of equal latencies run in one process and take turns:

bad         ``max_in_flight=1, max_batch_size=1``, for good.
adaptive    starts there, with a ``SchedulerConfig``.
best        the best of a grid of static settings (``max_in_flight`` x ``max_batch_size``), each
            measured once for choosing, and the winner again beside the adaptive one.

adaptive_over_best_static
    decisions a second of the adaptive collector once its scheduler has come to rest, over those of
    the best static setting: the median over repeats in turns. The goal is 0.95.
convergence_s
    seconds until the adaptive collector first came within 5 % of the best for two windows in a row,
    from the bad start.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _emulated_loop import Loop, Mix
from _machine import machine, paired_ratio, spread

from torchrl_dvla.collectors import SchedulerConfig

MIX = Mix(0.040, 0.040, 0.001, 0.001, max_batch_size=1, envs_per_worker=3)
IN_FLIGHT, BATCH_SIZES = (8, 16, 24), (4, 8, 12, 24)
WINDOW_S = 0.5


class Side:
    """A loop whose learner runs in a thread of its own; it rests unless it is measured."""

    def __init__(self, scheduler: SchedulerConfig | None = None) -> None:
        # While it rests, its learner waits for as long as that takes.
        self.loop = Loop(MIX, scheduler=scheduler, max_in_flight=1, timeout_s=None)
        self.collector = self.loop.collector
        self._stopping = False
        self._thread = threading.Thread(target=self._learn, daemon=True)
        self._thread.start()

    def _learn(self) -> None:
        try:
            while not self._stopping:
                self.loop.update()
        except RuntimeError:
            if not self._stopping:
                raise

    def use(self, max_in_flight: int, max_batch_size: int) -> None:
        coordinator = self.collector._coordinator
        coordinator.max_in_flight = max_in_flight
        coordinator.batcher.max_batch_size = max_batch_size

    @contextmanager
    def running(self) -> Iterator[None]:
        self.collector._admit(True)
        try:
            yield
        finally:
            self.collector._admit(False)

    def num_decisions(self) -> int:
        return self.collector._counters.totals["collector/decisions"]

    def rate(self, duration_s: float, warm_s: float = 1.0) -> float:
        """Decisions a second, after a while of getting into its stride."""
        time.sleep(warm_s)
        start_s, decisions = time.monotonic(), self.num_decisions()
        time.sleep(duration_s)
        return (self.num_decisions() - decisions) / (time.monotonic() - start_s)

    def close(self) -> None:
        self._stopping = True
        self.loop.close()
        self._thread.join(10.0)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def find_best(static: Side, duration_s: float) -> dict[str, Any]:
    """Each setting of the grid once."""
    rates = {}
    with static.running():
        for setting in itertools.product(IN_FLIGHT, BATCH_SIZES):
            if setting[1] <= setting[0]:
                static.use(*setting)
                rates[setting] = static.rate(duration_s)
                say(f"in flight {setting[0]}, batch {setting[1]}: {rates[setting]:.1f}/s")
    best = max(rates, key=rates.__getitem__)
    return {"max_in_flight": best[0], "max_batch_size": best[1]}


def converge(adaptive: Side, limit_s: float) -> list[tuple[float, float]]:
    """Rates in windows, by their end, until the scheduler rests."""
    scheduler = adaptive.collector._tuner.scheduler
    start_s, decisions = time.monotonic(), adaptive.num_decisions()
    curve: list[tuple[float, float]] = []
    while time.monotonic() < start_s + limit_s and not scheduler.at_rest:
        time.sleep(WINDOW_S)
        now = adaptive.num_decisions()
        curve.append((time.monotonic() - start_s, (now - decisions) / WINDOW_S))
        decisions = now
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short, with a small grid")
    args = parser.parse_args()
    num_repeats, duration_s, limit_s = (3, 1.5, 22.0) if args.quick else (5, 3.0, 90.0)
    global IN_FLIGHT, BATCH_SIZES
    if args.quick:
        IN_FLIGHT, BATCH_SIZES = (8, 24), (4, 12)
    torch.set_num_threads(1)
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("torchrl_dvla").setLevel(logging.INFO)
    static, adaptive = Side(), Side(SchedulerConfig(window_s=WINDOW_S))
    try:
        with static.running():
            bad = static.rate(duration_s)
        best = find_best(static, duration_s)
        static.use(**best)
        with adaptive.running():
            curve = converge(adaptive, limit_s)
            rested = adaptive.collector._tuner.scheduler.at_rest
        ours: list[float] = []
        theirs: list[float] = []
        adaptive_settings = dict(adaptive.collector._tuner.scheduler.settings)
        for repeat in range(num_repeats):
            with adaptive.running():
                ours.append(adaptive.rate(duration_s))
            with static.running():
                theirs.append(static.rate(duration_s))
            say(f"{repeat + 1}/{num_repeats}: adaptive {ours[-1]:.1f}/s, best {theirs[-1]:.1f}/s")
        scheduler = adaptive.collector._tuner.scheduler
        target = 0.95 * statistics.median(theirs)
        reached = [
            end_s
            for (_, first), (end_s, second) in itertools.pairwise(curve)
            if min(first, second) >= target
        ]
        ratio = paired_ratio(ours, theirs)
        result = {
            "benchmark": "scheduler",
            "latencies": "emulated",
            "adaptive_over_best_static": ratio["median"],
            "convergence_s": round(reached[0], 1) if reached else None,
            "at_rest_after_s": round(curve[-1][0], 1) if rested else None,
            "best_static_over_bad": round(statistics.median(theirs) / bad, 2),
            "ratio": ratio,
            "adaptive_per_s": spread(ours, 1),
            "best_static_per_s": spread(theirs, 1),
            "bad_static_per_s": round(bad, 1),
            "best_static": best,
            "adaptive": adaptive_settings,
            "num_moves": scheduler.num_moves,
            "machine": machine(),
            "repeats": num_repeats,
            "quick": args.quick,
        }
    finally:
        static.close()
        adaptive.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
