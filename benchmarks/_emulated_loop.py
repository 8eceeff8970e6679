# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A collector whose lanes last stated times and hold no core, and a learner's loop on it."""

from __future__ import annotations

import functools
import os
import random
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
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
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv, Latency, emulate_latency

__all__ = ["Loop", "Mix", "Repeat", "running"]

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


def make_env(mix: Mix, draws: Draws) -> Any:
    torch.manual_seed(os.getpid())
    random.seed(os.getpid())
    return RandomReturn(HeavyTail(mix.step_s, draws) if mix.heavy_tailed else Latency(mix.step_s))


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
        self.mix, self._draws = mix, Draws()
        self.collector = DVLACollector(
            functools.partial(make_env, mix, self._draws),
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
            inference=InferenceConfig(max_batch_size=mix.max_batch_size, max_wait_s=mix.max_wait_s),
            scheduler=scheduler,
        )
        if sequential:
            self.collector.replay_buffer.admission.max_policy_lag = 0
        self._learn = emulate_latency(
            lambda batch: len(batch), Latency(0, per_row_s=mix.learn_row_s)
        )

    def update(self) -> int:
        """One update, published; returns its rows."""
        return self._update(self._learn)

    def _update(self, learn: Callable[[TensorDictBase], int]) -> int:
        num_rows = sum(learn(batch) for batch in self.collector.replay_buffer)
        self.collector.update_policy_weights_()
        return num_rows

    def catch_up(self) -> None:
        """Get into stride, at first or after a rest, in which all that had begun has ended.

        It lies in the store, and admission holds sampling back until the learner has been through
        it: half a dozen updates. What lies there is learned from in no time instead, and the groups
        that begin then take as many updates as they may be old.
        """
        admission = self.collector.replay_buffer.admission
        while admission.stats()["groups_completed"] >= GROUPS_PER_UPDATE:
            self._update(len)
        for _ in range(max(1, admission.max_policy_lag)):
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

    def close(self) -> None:
        """End the lanes."""
        self.collector.shutdown()
        self._draws.close()

    def num_decisions(self) -> int:
        return int(self.collector.stats().get("collector/decisions", 0))


@contextmanager
def running(mix: Mix, *, sequential: bool = False) -> Iterator[Loop]:
    loop = Loop(mix, sequential=sequential)
    try:
        loop.collector.start()
        yield loop
    finally:
        loop.close()
