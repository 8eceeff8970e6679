# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A deterministic queueing model of the four lanes, for the scheduler's tests."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from torchrl_dvla.swimlane import Reading


@dataclass(frozen=True)
class LaneModel:
    """Workers step their environments one after the other; one policy; one learner.

    A policy call of ``n`` rows lasts ``(infer_s + n * infer_row_s) / speed``, the learner's
    ``learn_row_s`` a row and pass, ``/ speed``; the speed of each of the two is its share of
    ``num_cores``. Sampling is at most ``store`` decisions ahead of the learner.
    """

    num_workers: int = 4
    step_s: float = 0.02
    infer_s: float = 0.02
    infer_row_s: float = 0.001
    learn_row_s: float = 0.001
    rows_per_update: int = 64
    store: int = 192
    num_cores: int | None = None

    def run(
        self,
        *,
        num_envs: int,
        max_batch_size: int,
        batch_wait_s: float = 0.0,
        num_epochs: int = 1,
        inference_threads: int | None = None,
        num_decisions: int = 1200,
    ) -> tuple[float, Reading]:
        """Decisions a second in the steady state, and what the timeline would say."""
        speed = learner_speed = 1.0
        if self.num_cores is not None:
            assert inference_threads is not None
            speed, learner_speed = inference_threads, self.num_cores - inference_threads
        learn_s = self.rows_per_update * num_epochs * self.learn_row_s / learner_speed
        events: list[tuple[float, int, str, tuple[int, ...]]] = []
        queues: list[list[int]] = [[] for _ in range(self.num_workers)]
        working = [False] * self.num_workers
        ready: list[tuple[float, int]] = [(0.0, env) for env in range(num_envs)]
        parked: list[int] = []
        busy = dict.fromkeys(("sampling", "inference", "gradient"), 0.0)
        calling = learning = False
        collected = learned = order = timer = 0
        now = half_s = 0.0
        half = num_decisions // 2

        def push(time_s: float, kind: str, envs: tuple[int, ...]) -> None:
            nonlocal order
            order += 1
            heapq.heappush(events, (time_s, order, kind, envs))

        while collected < num_decisions:
            # Sampling may not run away from the learner.
            while parked and collected - learned < self.store:
                ready.append((now, parked.pop(0)))
            if not learning and collected - learned >= self.rows_per_update:
                learning = True
                push(now + learn_s, "learned", ())
                busy["gradient"] += learn_s
            if ready and not calling:
                waited = now - ready[0][0]
                full = len(ready) >= min(max_batch_size, num_envs)
                if full or waited >= batch_wait_s - 1e-9:
                    batch, ready = ready[:max_batch_size], ready[max_batch_size:]
                    call_s = (self.infer_s + len(batch) * self.infer_row_s) / speed
                    busy["inference"] += call_s
                    calling = True
                    push(now + call_s, "decided", tuple(env for _, env in batch))
                else:
                    timer += 1
                    push(ready[0][0] + batch_wait_s, "timer", ())
            for worker in range(self.num_workers):
                if queues[worker] and not working[worker]:
                    working[worker] = True
                    busy["sampling"] += self.step_s / self.num_workers
                    push(now + self.step_s, "stepped", (queues[worker].pop(0),))
            now, _, kind, envs = heapq.heappop(events)
            if kind == "decided":
                calling = False
                for env in envs:
                    queues[env % self.num_workers].append(env)
            elif kind == "stepped":
                working[envs[0] % self.num_workers] = False
                collected += 1
                if collected == half:
                    half_s, busy = now, dict.fromkeys(busy, 0.0)
                if collected - learned < self.store:
                    ready.append((now, envs[0]))
                else:
                    parked.append(envs[0])
            elif kind == "learned":
                learning = False
                learned += self.rows_per_update
        wall_s = now - half_s
        lanes = dict.fromkeys(busy, 1)
        shares = {lane: min(wall_s, seconds) for lane, seconds in busy.items()}
        saturated = shares["gradient"] > 0.95 * wall_s
        rest_s = wall_s - shares["sampling"]
        idle = {("sampling", "no_admission" if saturated else "no_decision"): rest_s}
        return half / wall_s, Reading(wall_s, shares, idle, lanes)
