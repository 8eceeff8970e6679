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

A loop can do no more than the slowest of its three lanes: the *bound*, which
``docs/source/guide/benchmarks.md`` derives, beside what the sequential loop is.

overlap_efficiency
    decisions a second over the bound, of the worst mix: the smaller of the median of what was
    collected and of what was learned from in all repeats together. The goal is 0.95.
    ``efficiency_of_law`` takes heavy-tailed steps by the mean of their law, not of their draws.
speedup_vs_sequential
    the same, over the sequential loop, in the mix ``sampling_equals_gradient``. The goal is 1.9.
    ``ideal_speedup`` is what there is to gain in a mix, were neither loop to lose any time.

The last line of stdout is one JSON object. Repeats of the two loops take turns.
"""

from __future__ import annotations

import functools
import os
import random
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from _machine import arguments, log, paired_ratio, report, spread
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.modules.vla import TinyVLA

from torchrl_dvla import DVLACollector, PooledReplayBuffer
from torchrl_dvla.collectors import GroupConfig, InferenceConfig, WorkerConfig
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv, Latency, emulate_latency

DECISIONS_PER_ROLLOUT, GROUP_SIZE, GROUPS_PER_UPDATE = 4, 8, 3
ROWS_PER_UPDATE = DECISIONS_PER_ROLLOUT * GROUP_SIZE * GROUPS_PER_UPDATE


class Draws:
    """Latencies that were drawn, and when, by all workers: a file to which each appends its own."""

    def __init__(self) -> None:
        file, self.path = tempfile.mkstemp()
        os.close(file)

    def note(self, duration_s: float) -> float:
        """A latency begins now; returns it."""
        with open(self.path, "ab", buffering=0) as file:
            file.write(struct.pack("dd", time.monotonic(), duration_s))
        return duration_s

    def seconds(self, start_s: float, end_s: float) -> float:
        """Seconds of latency between two moments, summed over the workers."""
        begin, duration = np.fromfile(self.path).reshape(-1, 2).T
        inside = np.minimum(begin + duration, end_s) - np.maximum(begin, start_s)
        return float(inside.clip(min=0.0).sum())

    def close(self) -> None:
        """Forget them."""
        os.unlink(self.path)


class HeavyTail(Latency):
    """A Pareto law whose draws have the stated mean exactly, 50 at a time.

    It deals its 50 quantiles in random order: the same tail, but a short repeat is no luck. The
    longest is about eight times as long as the mean.
    """

    def __init__(self, base_s: float, draws: Draws, tail_index: float = 1.5, num: int = 50) -> None:
        super().__init__(base_s)
        self._draws = draws
        law = [(1 - (k + 0.5) / num) ** (-1 / tail_index) for k in range(num)]
        self._quantiles = [quantile * base_s * num / sum(law) for quantile in law]
        self._dealt: list[float] = []

    def sample(self, num_rows: int = 1) -> float:
        if not self._dealt:
            self._dealt = random.sample(self._quantiles, len(self._quantiles))
        return self._draws.note(self._dealt.pop())


@dataclass(frozen=True)
class Mix:
    """Stated latencies in seconds, and the room that each lane has."""

    step_s: float
    infer_s: float
    infer_row_s: float
    learn_row_s: float
    max_batch_size: int
    num_workers: int = 8
    #: Four: one is stepped, one is with the policy, one is being reset, one is ready to be next.
    envs_per_worker: int = 4
    #: Of a row for others to share its policy call.
    max_wait_s: float = 0.01
    heavy_tailed: bool = False
    max_policy_lag: int = 2
    image_size: int = 64

    def rates(self, step_s: float | None = None) -> dict[str, float]:
        """Decisions a second that each lane can do at most, with steps of that mean."""
        call_s = self.infer_s + self.infer_row_s * self.max_batch_size
        return {
            "sampling": self.num_workers / (step_s or self.step_s),
            "inference": self.max_batch_size / call_s,
            "gradient": 1 / self.learn_row_s,
        }

    def bound(self, step_s: float | None = None) -> float:
        return min(self.rates(step_s).values())

    def ideal_speedup(self) -> float:
        """Over a loop whose collection overlaps and whose learner waits for it."""
        rates = self.rates()
        collect = min(rates["sampling"], rates["inference"])
        return self.bound() * (1 / collect + 1 / rates["gradient"])


class RandomReturn(CountingChunkEnv):
    """Every rollout is of one length and has another return: no group is without contrast."""

    def __init__(self, latency: Latency, image_size: int) -> None:
        super().__init__(
            chunk_size=4,
            max_env_steps=4 * DECISIONS_PER_ROLLOUT,
            stop_on_success=False,
            image_size=(image_size, image_size),
        )
        if latency.base_s:  # the step as the collector sees it, TorchRL's part of it included
            self.step = emulate_latency(self.step, latency)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict)
        return out.set("reward", torch.rand(1)) if out.get("done") else out


def make_env(mix: Mix, draws: Draws) -> Any:
    torch.manual_seed(os.getpid())
    random.seed(os.getpid())
    latency = HeavyTail(mix.step_s, draws) if mix.heavy_tailed else Latency(mix.step_s)
    return RandomReturn(latency, mix.image_size)


def make_policy(mix: Mix) -> TinyVLA:
    policy = tiny_token_policy(2, 4, vocab_size=8, hidden_dim=16)
    if mix.infer_s:
        emulate_latency(policy, Latency(mix.infer_s, per_row_s=mix.infer_row_s))
    return policy


class Repeat(NamedTuple):
    """What was counted in one repeat of one loop."""

    elapsed_s: float
    num_collected: int
    num_learned: int
    #: Mean of the latencies that the env steps had in fact.
    step_s: float

    @property
    def rate(self) -> float:
        """Decisions a second, as collected."""
        return self.num_collected / self.elapsed_s


class Loop:
    """A collector and a learner's step of stated length; it may rest between two repeats.

    A sequential one admits the groups of one update at a time: with a lag of 0 there is nothing
    left to admit until they are learned from and published. Policy calls and learner's step are
    emulated, but for a ``policy`` and its ``learn`` that are given. Further options are the
    collector's.
    """

    def __init__(
        self,
        mix: Mix,
        *,
        sequential: bool = False,
        policy: TensorDictModuleBase | None = None,
        learn: Callable[[TensorDictBase], int] | None = None,
        make_env: Callable[[Mix, Draws], Any] = make_env,
        **options: Any,
    ) -> None:
        self.mix, self._draws = mix, Draws()
        self._lag = 0 if sequential else mix.max_policy_lag
        self.publish_s: list[float] = []
        self.collector = DVLACollector(
            functools.partial(make_env, mix, self._draws),
            policy or make_policy(mix),
            replay_buffer=PooledReplayBuffer(batch_size=ROWS_PER_UPDATE, timeout_s=60.0),
            group=GroupConfig(
                group_size=GROUP_SIZE, groups_per_update=GROUPS_PER_UPDATE, max_policy_lag=self._lag
            ),
            workers=WorkerConfig(
                num_workers=mix.num_workers,
                envs_per_worker=mix.envs_per_worker,
                max_decisions=DECISIONS_PER_ROLLOUT,
                step_timeout_s=600.0,  # its processes may be stopped while others take turns
            ),
            inference=InferenceConfig(
                max_batch_size=mix.max_batch_size, max_wait_s=mix.max_wait_s, deterministic=False
            ),
            **options,
        )
        self._learn = learn or emulate_latency(
            lambda batch: len(batch), Latency(0, per_row_s=mix.learn_row_s)
        )

    def update(self, learn: Callable[[TensorDictBase], int] | None = None) -> int:
        """One update, published; returns its rows."""
        num_rows = sum((learn or self._learn)(batch) for batch in self.collector.replay_buffer)
        start_s = time.perf_counter()
        self.collector.update_policy_weights_()
        self.publish_s.append(time.perf_counter() - start_s)
        return num_rows

    def catch_up(self) -> None:
        """Get into stride, at first or after a rest, in which all that had begun has ended.

        It lies in the store, and admission holds sampling back until the learner has been through
        it: half a dozen updates. What lies there is learned from in no time instead, and the groups
        that begin then take as many updates as they may be old.
        """
        while self.collector.stats()["buffer/groups_stored"] >= GROUPS_PER_UPDATE:
            self.update(len)
        for _ in range(max(1, self._lag)):
            self.update()

    def run(self, min_s: float) -> Repeat:
        """What is done in a while of whole updates; the next run goes on where this one ends."""
        self.collector.timeline.start()
        before, start_s = self.num_decisions(), time.monotonic()
        num_learned = 0
        while time.monotonic() < start_s + min_s:
            num_learned += self.update()
        end_s = time.monotonic()
        num_collected = self.num_decisions() - before
        self.reading = self.collector.timeline.usage()
        step_s = self.mix.step_s
        if self.mix.heavy_tailed:
            step_s = self._draws.seconds(start_s, end_s) / num_collected
        return Repeat(end_s - start_s, num_collected, num_learned, step_s)

    def num_decisions(self) -> int:
        return int(self.collector.stats()["frames"])


@contextmanager
def running(mix: Mix, **kwargs: Any) -> Iterator[Loop]:
    loop = Loop(mix, **kwargs)
    try:
        with loop.collector:
            yield loop
    finally:
        loop._draws.close()


MIXES = {
    # 100, 444 and 100 decisions a second.
    "sampling_equals_gradient": Mix(0.080, 0.010, 0.001, 0.010, max_batch_size=8),
    # 100, 100 and 400. The policy has more rows than it takes at once: its batches are full.
    "sampling_equals_inference": Mix(0.080, 0.072, 0.001, 0.0025, max_batch_size=8),
    "sampling_bound": Mix(0.100, 0.010, 0.001, 0.005, max_batch_size=8),
    "inference_bound": Mix(0.040, 0.092, 0.001, 0.004, max_batch_size=8),
    "gradient_bound": Mix(0.080, 0.010, 0.001, 0.015, max_batch_size=8),
    # No two environments are in step, and the policy has time to spare: nobody waits for others. A
    # group waits for its slowest rollout: with a lag of 2, admission holds sampling back meanwhile.
    "heavy_tailed_steps": Mix(
        *(0.080, 0.010, 0.001, 0.008),
        max_batch_size=8,
        max_wait_s=0.0,
        heavy_tailed=True,
        max_policy_lag=4,
    ),
}
EQUAL, QUICK = "sampling_equals_gradient", ("sampling_equals_gradient", "inference_bound")


def measure(name: str, mix: Mix, num_repeats: int, min_s: float) -> dict[str, Any]:
    ours: list[Repeat] = []
    theirs: list[Repeat] = []
    with ExitStack() as stack:
        lanes = stack.enter_context(running(mix))
        # Its 24 rollouts an update fill three environments of each worker exactly.
        narrow = replace(mix, envs_per_worker=3)
        rival = stack.enter_context(running(narrow, sequential=True)) if name == EQUAL else None
        for repeat in range(num_repeats + 1):
            with rival.collector.pause() if rival else nullcontext():
                if rival or not repeat:
                    lanes.catch_up()
                ours.append(lanes.run(min_s))
            if rival:
                with lanes.collector.pause():
                    rival.catch_up()
                    theirs.append(rival.run(min_s))
            log(
                f"{name} {repeat}/{num_repeats}: {ours[-1].rate:.1f} rows/s of "
                f"{mix.bound(ours[-1].step_s):.1f}, sequential {[r.rate for r in theirs[-1:]]}"
            )
        scalars = {key: round(value, 3) for key, value in lanes.reading.scalars().items()}
    ours, theirs = ours[1:], theirs[1:]  # the first has filled the pipeline
    compared: dict[str, Any] = {}
    if theirs:
        compared = {
            "speedup": paired_ratio([r.rate for r in ours], [r.rate for r in theirs]),
            "ideal_speedup": round(mix.ideal_speedup(), 2),
            "sequential_rows_per_s": spread((r.rate for r in theirs), 1),
        }
    if mix.heavy_tailed:
        compared["efficiency_of_law"] = _efficiency(
            [r._replace(step_s=mix.step_s) for r in ours], mix
        )
    return {
        "efficiency": _efficiency(ours, mix),
        "collected": spread((r.rate / mix.bound(r.step_s) for r in ours), 3),
        "learned": _learned(ours, mix),
        "rows_per_s": spread((r.rate for r in ours), 1),
        **compared,
        "bound_rows_per_s": {lane: round(rate, 1) for lane, rate in mix.rates().items()},
        "timeline_of_last_repeat": scalars,
        "stated": asdict(mix),
    }


def _efficiency(repeats: list[Repeat], mix: Mix) -> float:
    """A loop that collects more than it learns from lives on its store: the smaller counts."""
    collected = statistics.median(r.rate / mix.bound(r.step_s) for r in repeats)
    return round(min(collected, _learned(repeats, mix)), 3)


def _learned(repeats: list[Repeat], mix: Mix) -> float:
    """What was learned from comes in bursts of whole cohorts: over all repeats together."""
    possible = sum(r.elapsed_s * mix.bound(r.step_s) for r in repeats)
    return round(sum(r.num_learned for r in repeats) / possible, 3)


def main() -> None:
    args = arguments(__doc__, "two mixes, short repeats", mix=str)
    names = [args.mix] if args.mix else list(QUICK if args.quick else MIXES)
    num_repeats, min_s = (3, 3.0) if args.quick else (5, 6.0)
    torch.set_num_threads(1)  # the learner's process has one lane's worth to do
    # Where groups end in bursts, so do updates: the more of them, the less the last one weighs.
    mixes = {name: measure(name, MIXES[name], num_repeats, min_s) for name in names}
    result = {
        "latencies": "emulated",
        "overlap_efficiency": min(mix["efficiency"] for mix in mixes.values()),
        "speedup_vs_sequential": mixes[EQUAL]["speedup"]["median"] if EQUAL in mixes else None,
    }
    result |= {"mixes": mixes, "repeats": num_repeats}
    report("overlap", result, args.quick)


if __name__ == "__main__":
    main()
