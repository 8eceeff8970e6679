# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Does a loop of overlapping lanes cost the maximum of its lanes, or their sum?

    python benchmarks/overlap.py [--quick] [--mix NAME]

**The latencies are emulated**: an env step, a policy call and a learner's update each last a stated
time and hold no core, as on a machine with a simulator and an accelerator for each lane. The
figures are figures of the schedule, of no hardware. All else is real: ``DVLACollector`` with worker
processes, an inference process, pages, admission, and a publication of weights after each update.

A step lasts as long as a decision in LIBERO does on two cores (86 ms, ``libero_env.py``); costs of
the collector are milliseconds whatever the latencies are, so shorter ones would weigh them more.

In each mix, a worker does one env step a time of mean ``e``, so ``W`` workers do at most ``W / e``
decisions a second. A policy call of ``n`` rows lasts ``a + b n``; with batches of at most ``B``
rows the lane does at most ``B / (a + b B)``. The learner takes ``c`` a row: ``1 / c``. A loop can
do no more than the smallest of the three: the *bound*. Resets cost next to nothing.

overlap_efficiency
    decisions a second over the bound, of the worst mix: the smaller of the median of what was
    collected and of what was learned from in all repeats together. The goal is 0.95.
speedup_vs_sequential
    the same, over the sequential loop, in the mix ``sampling_equals_gradient``. The goal is 1.9.

The sequential loop is the same parts: collect, then learn, then publish, by admitting the groups
of one update at a time. It is at its best: its workers and its policy overlap as well (the
collector's own ``max_policy_lag=0`` steps in rounds, for the sake of repeatable runs, and is
slower), its rollouts are all of one length and as many as fill all environments a whole number of
times, so that none waits for a straggler.
``ideal_speedup`` is what there is to gain in a mix, were neither loop to lose any time.

timeline_cost
    share of the throughput that recording costs: spans told in a second, times what telling one
    costs, at the highest rate that the collector reaches here, without latencies. Beside it,
    throughput with recording over that without, whose noise is larger than the cost.

The last line of stdout is one JSON object. Repeats of the two loops take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from _machine import machine, paired_ratio, spread
from _small_policy import make_small_policy
from tensordict import TensorDictBase
from torchrl.modules.vla import TinyVLA

from torchrl_dvla.collectors import (
    DVLACollector,
    GroupConfig,
    InferenceConfig,
    SchedulerConfig,
    WorkerConfig,
)
from torchrl_dvla.data import PooledReplayBuffer
from torchrl_dvla.swimlane import Timeline, Track
from torchrl_dvla.testing import CountingChunkEnv, Latency, emulate_latency

DECISIONS_PER_ROLLOUT, GROUP_SIZE, GROUPS_PER_UPDATE = 4, 8, 3
ROWS_PER_UPDATE = DECISIONS_PER_ROLLOUT * GROUP_SIZE * GROUPS_PER_UPDATE


class HeavyTail(Latency):
    """A Pareto law whose draws have the stated mean exactly, 50 at a time.

    It deals its 50 quantiles in random order: the same tail, but a short repeat is no luck. The
    longest is about eight times as long as the mean.
    """

    def __init__(self, base_s: float, tail_index: float = 1.5, num: int = 50) -> None:
        super().__init__(base_s)
        draws = [(1 - (k + 0.5) / num) ** (-1 / tail_index) for k in range(num)]
        self._quantiles = [draw * base_s * num / sum(draws) for draw in draws]
        self._dealt: list[float] = []

    def sample(self, num_rows: int = 1) -> float:
        if not self._dealt:
            self._dealt = random.sample(self._quantiles, len(self._quantiles))
        return self._dealt.pop()


@dataclass(frozen=True)
class Mix:
    """Stated latencies in seconds, and the room that each lane has."""

    step_s: float
    infer_s: float
    infer_row_s: float
    learn_row_s: float
    max_batch_size: int
    num_workers: int = 8
    #: Three: one is stepped, one is with the policy, one is being reset.
    envs_per_worker: int = 3
    heavy_tailed: bool = False
    max_policy_lag: int = 2

    def rates(self) -> dict[str, float]:
        """Decisions a second that each lane can do at most."""
        call_s = self.infer_s + self.infer_row_s * self.max_batch_size
        return {
            "sampling": self.num_workers / self.step_s,
            "inference": self.max_batch_size / call_s,
            "gradient": 1 / self.learn_row_s,
        }

    def bound(self) -> float:
        return min(self.rates().values())

    def ideal_speedup(self) -> float:
        """Over a loop whose collection overlaps and whose learner waits for it."""
        rates = self.rates()
        collect = min(rates["sampling"], rates["inference"])
        return self.bound() * (1 / collect + 1 / rates["gradient"])


MIXES = {
    # 100, 444 and 100 decisions a second.
    "sampling_equals_gradient": Mix(0.080, 0.010, 0.001, 0.010, max_batch_size=8),
    # 100, 100 and 400. The policy has more rows than it takes at once: its batches are full.
    "sampling_equals_inference": Mix(0.080, 0.072, 0.001, 0.0025, max_batch_size=8),
    "sampling_bound": Mix(0.100, 0.010, 0.001, 0.005, max_batch_size=8),
    "inference_bound": Mix(0.040, 0.092, 0.001, 0.004, max_batch_size=8),
    "gradient_bound": Mix(0.080, 0.010, 0.001, 0.015, max_batch_size=8),
    "heavy_tailed_steps": Mix(0.080, 0.010, 0.001, 0.008, max_batch_size=8, heavy_tailed=True),
}
EQUAL, QUICK = "sampling_equals_gradient", ("sampling_equals_gradient", "inference_bound")
#: Where the sequential loop runs as well.
COMPARED = (EQUAL, "heavy_tailed_steps")


class RandomReturn(CountingChunkEnv):
    """Every rollout is of one length and has another return: no group is without contrast."""

    def __init__(self, latency: Latency) -> None:
        super().__init__(
            chunk_size=4,
            max_env_steps=4 * DECISIONS_PER_ROLLOUT,
            stop_on_success=False,
            image_size=(64, 64),
        )
        if latency.base_s:  # the step as the collector sees it, TorchRL's part of it included
            self.step = emulate_latency(self.step, latency)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict)
        return out.set("reward", torch.rand(1)) if out.get("done") else out


def make_env(mix: Mix) -> Any:
    torch.manual_seed(os.getpid())
    random.seed(os.getpid())
    return RandomReturn(HeavyTail(mix.step_s) if mix.heavy_tailed else Latency(mix.step_s))


def make_policy(mix: Mix) -> TinyVLA:
    policy = make_small_policy()
    if mix.infer_s:
        emulate_latency(policy, Latency(mix.infer_s, per_row_s=mix.infer_row_s))
    return policy


class Loop:
    """A collector and a learner's step of stated length; it may rest between two repeats."""

    def __init__(
        self,
        mix: Mix,
        *,
        sequential: bool = False,
        scheduler: SchedulerConfig | None = None,
        max_in_flight: int | None = None,
        timeout_s: float | None = 60.0,
    ) -> None:
        self.collector = DVLACollector(
            functools.partial(make_env, mix),
            make_policy(mix),
            replay_buffer=functools.partial(
                PooledReplayBuffer, batch_size=ROWS_PER_UPDATE, timeout_s=timeout_s
            ),
            group=GroupConfig(
                group_size=GROUP_SIZE,
                groups_per_update=GROUPS_PER_UPDATE,
                max_policy_lag=mix.max_policy_lag,
            ),
            workers=WorkerConfig(
                num_workers=mix.num_workers,
                envs_per_worker=mix.envs_per_worker,
                max_decisions=DECISIONS_PER_ROLLOUT,
                max_in_flight=max_in_flight,
            ),
            inference=InferenceConfig(max_batch_size=mix.max_batch_size),
            scheduler=scheduler,
        )
        self._num_learned, self._measured_s = 0, 0.0
        if sequential:
            self.collector.replay_buffer.admission.max_policy_lag = 0
        self._learn = emulate_latency(
            lambda batch: len(batch), Latency(0, per_row_s=mix.learn_row_s)
        )

    def update(self) -> int:
        """One update, published; returns its rows."""
        num_rows = sum(self._learn(batch) for batch in self.collector.replay_buffer)
        self.collector.update_policy_weights_()
        return num_rows

    def rows_per_s(self, min_s: float) -> float:
        """Decisions a second, over whole updates, once the loop is in its stride.

        What is learned from comes in bursts of whole groups, and so is counted over all repeats
        together, in :attr:`learned_per_s`.
        """
        for _ in range(1 if self._num_learned else 3):  # at first, its store has to fill
            self.update()
        self.collector.timeline.start()
        decisions = self._num_decisions()
        start_s = time.monotonic()
        while time.monotonic() < start_s + min_s:
            self._num_learned += self.update()
        elapsed_s = time.monotonic() - start_s
        self._measured_s += elapsed_s
        self.reading = self.collector.timeline.reading()
        return (self._num_decisions() - decisions) / elapsed_s

    @property
    def learned_per_s(self) -> float:
        return self._num_learned / self._measured_s

    def _num_decisions(self) -> int:
        return int(self.collector.stats().get("collector/decisions", 0))


@contextmanager
def running(mix: Mix, *, sequential: bool = False) -> Iterator[Loop]:
    loop = Loop(mix, sequential=sequential)
    try:
        loop.collector.start()
        yield loop
    finally:
        loop.collector.shutdown()


def measure(name: str, mix: Mix, num_repeats: int, min_s: float) -> dict[str, Any]:
    ours: list[float] = []
    theirs: list[float] = []
    with ExitStack() as stack:
        lanes = stack.enter_context(running(mix))
        rival = stack.enter_context(running(mix, sequential=True)) if name in COMPARED else None
        for repeat in range(num_repeats):
            with rival.collector.pause() if rival else nullcontext():
                ours.append(lanes.rows_per_s(min_s))
            if rival:
                with lanes.collector.pause():  # what has begun ends during the first update
                    theirs.append(rival.rows_per_s(min_s))
            print(
                f"{name} {repeat + 1}/{num_repeats}: {ours[-1]:.1f} rows/s of {mix.bound():.1f}, "
                f"sequential {theirs[-1:]}",
                file=sys.stderr,
                flush=True,
            )
        learned_per_s = lanes.learned_per_s
        scalars = {key: round(value, 3) for key, value in lanes.reading.scalars().items()}
    compared: dict[str, Any] = {}
    if theirs:
        compared = {
            "speedup": paired_ratio(ours, theirs),
            "ideal_speedup": round(mix.ideal_speedup(), 2),
            "sequential_rows_per_s": spread(theirs, 1),
        }
    return {
        # A loop that collects more than it learns from lives on its store.
        "efficiency": round(min(statistics.median(ours), learned_per_s) / mix.bound(), 3),
        "collected": spread((rate / mix.bound() for rate in ours), 3),
        "learned": round(learned_per_s / mix.bound(), 3),
        "rows_per_s": spread(ours, 1),
        **compared,
        "bound_rows_per_s": {lane: round(rate, 1) for lane, rate in mix.rates().items()},
        "timeline_of_last_repeat": scalars,
        "stated": asdict(mix),
    }


def span_cost_s(num_spans: int = 50_000) -> float:
    """CPU seconds of telling one span."""
    track, costs = Timeline().track("sampling"), []
    for _ in range(5):
        start_s = time.thread_time()
        for k in range(num_spans):
            track.add(k, k + 0.5, "step", "no_decision")
        costs.append((time.thread_time() - start_s) / num_spans)
    return statistics.median(costs)


def measure_timeline(num_repeats: int, min_s: float) -> dict[str, Any]:
    """What recording costs where decisions are as fast as they come."""
    mix = Mix(0, 0, 0, 0, max_batch_size=16, num_workers=2, envs_per_worker=8)
    recorded: list[float] = []
    bare: list[float] = []
    told: list[float] = []
    with running(mix) as loop:
        for _ in range(num_repeats):
            recorded.append(loop.rows_per_s(min_s))
            spans = loop.collector.timeline.spans()
            told.append(len(spans) / (spans[-1].end_s - spans[0].start_s))
            with mock.patch.object(Track, "add", lambda *args: None):
                bare.append(loop.rows_per_s(min_s))
    cost_s = span_cost_s()
    return {
        "cost": round(statistics.median(told) * cost_s, 5),
        "us_per_span": round(1e6 * cost_s, 3),
        "spans_per_s": spread(told, 0),
        "recorded_over_bare": paired_ratio(recorded, bare),
        "rows_per_s": spread(recorded, 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two mixes, short repeats")
    parser.add_argument("--mix", choices=list(MIXES), help="this mix alone")
    args = parser.parse_args()
    names = [args.mix] if args.mix else list(QUICK if args.quick else MIXES)
    num_repeats, min_s = (3, 1.5) if args.quick else (5, 3.0)
    torch.set_num_threads(1)  # the learner's process has one lane's worth to do
    mixes = {name: measure(name, MIXES[name], num_repeats, min_s) for name in names}
    result = {
        "benchmark": "overlap",
        "latencies": "emulated",
        "overlap_efficiency": min(mix["efficiency"] for mix in mixes.values()),
        "speedup_vs_sequential": mixes[EQUAL]["speedup"]["median"] if EQUAL in mixes else None,
    }
    if not args.mix:
        timeline = measure_timeline(num_repeats, min_s=1.0)
        result |= {"timeline_cost": timeline["cost"], "timeline": timeline}
    result |= {"mixes": mixes, "machine": machine(), "repeats": num_repeats, "quick": args.quick}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
