# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does a decision cost beyond the environment's step and the policy's forward?

    python benchmarks/collector_overhead.py [--quick] [--num-envs 64]

64 environments whose step does nothing and a policy that computes nothing run under
``DVLACollector``, in the arrangement of a real run: worker processes, an inference process, the
coordinator's thread. CPU time (user and system) of every process of the run is read from the
kernel's clocks before and after a stretch of decisions; the time inside ``env.step``,
``env.reset`` and the policy's ``forward`` is measured there by the thread's CPU clock and taken
off. What is left is the price of the collector:

overhead_us_per_decision
    CPU microseconds a decision of coordinator, workers and inference process together, outside
    environment and policy. The goal is below 60. One policy call serves all environments
    (``max_batch_size=64``), which suits steps of no cost: there is nothing to overlap.
overhead_us_in_halves
    the same with the default, two batches in turns, so that one half is simulated while the other
    is with the policy: twice the messages.
breakdown
    both by process.
with_draw_us_per_decision
    the first with the learner's thread, which does nothing here but draw every batch from the
    replay buffer.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import machine, spread
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import Bounded, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase

CHUNK_SIZE, ACTION_DIM, IMAGE_SIZE = 4, 2, 32


class Meter:
    """CPU seconds spent inside of something, in a file that outlives the process that counts."""

    def __init__(self, folder: str, role: str) -> None:
        path = Path(folder) / f"{role}-{os.getpid()}-{id(self)}"
        # Through a memoryview: writing an item of a numpy.memmap takes microseconds.
        self._seconds = memoryview(np.memmap(path, dtype=np.float64, mode="w+", shape=(1,)))

    def __call__(self, function: Any) -> Any:
        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            start_s = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[0] += time.thread_time() - start_s

        return measured

    @staticmethod
    def total_s(folder: str, role: str) -> float:
        files = Path(folder).glob(f"{role}-*")
        return float(sum(np.fromfile(path, dtype=np.float64)[0] for path in files))


class FreeEnv(EnvBase):
    """Speaks the schema and does nothing; an episode has ``num_decisions`` decisions."""

    def __init__(self, folder: str, num_decisions: int) -> None:
        super().__init__()
        self._length = num_decisions
        self.observation_spec = Composite(
            observation=Composite(
                image=Unbounded(shape=(3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8),
                state=Unbounded(shape=(2 * ACTION_DIM,)),
            ),
            language_instruction=NonTensor(shape=(), example_data="do nothing"),
        )
        chunk = Bounded(-1.0, 1.0, shape=(CHUNK_SIZE, ACTION_DIM))
        self.full_action_spec = Composite(vla_action=Composite(chunk=chunk))
        self.reward_spec = Unbounded(shape=(1,))
        meter = Meter(folder, "env")
        self.step, self.reset = meter(self.step), meter(self.reset)  # type: ignore[method-assign]

    def _observe(self, is_over: bool) -> dict[str, Any]:
        return {
            "observation": TensorDict(
                {
                    "image": torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8),
                    "state": torch.zeros(2 * ACTION_DIM),
                }
            ),
            "language_instruction": "do nothing",
            "done": torch.tensor([is_over]),
            "terminated": torch.tensor([is_over]),
        }

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        self._left = self._length
        return TensorDict(self._observe(False))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self._left -= 1
        # Half of the rollouts are a success, so that most groups have contrast and are kept.
        reward = torch.rand(1).round() if not self._left else torch.zeros(1)
        return TensorDict({**self._observe(not self._left), "reward": reward})

    def _set_seed(self, seed: int | None) -> None:
        pass


class FreePolicy(TensorDictModuleBase):
    """Writes what a token policy writes, computed from nothing."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.in_keys = [("observation", "image"), ("observation", "state"), "language_instruction"]
        self.out_keys = [("vla_action", name) for name in ("chunk", "tokens", "log_probs")]
        self.weight = nn.Parameter(torch.zeros(1))
        self._folder, self._meter = folder, None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self._meter is None:
            self._meter = Meter(self._folder, "policy")(self._decide)
        return self._meter(tensordict)

    def _decide(self, tensordict: TensorDictBase) -> TensorDictBase:
        shape = (*tensordict.batch_size, CHUNK_SIZE, ACTION_DIM)
        tokens = torch.zeros(shape, dtype=torch.int64)
        values = {"chunk": torch.zeros(shape), "tokens": tokens, "log_probs": torch.zeros(shape)}
        return tensordict.set("vla_action", TensorDict(values, batch_size=tensordict.batch_size))


def cpu_s(pid: int) -> float:
    """CPU seconds of another process, by the kernel's own clock of it."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) returns on Linux


def measure(args: argparse.Namespace, folder: str, max_batch_size: int | None) -> dict[str, float]:
    """One run: microseconds a decision by process."""
    from torchrl_dvla import DVLACollector, PooledReplayBuffer
    from torchrl_dvla.collectors import GroupConfig, InferenceConfig, WorkerConfig

    collector = DVLACollector(
        functools.partial(FreeEnv, folder, args.decisions),
        FreePolicy(folder),
        policy_factory=functools.partial(FreePolicy, folder),  # a meter of its own
        replay_buffer=functools.partial(PooledReplayBuffer, batch_size=256, timeout_s=60.0),
        group=GroupConfig(group_size=8, groups_per_update=16, max_policy_lag=2, max_drought=10**9),
        workers=WorkerConfig(
            num_workers=args.num_workers,
            envs_per_worker=args.num_envs // args.num_workers,
            max_decisions=args.decisions,
        ),
        inference=InferenceConfig(max_batch_size=max_batch_size),
    )

    def totals() -> dict[str, float]:
        children = {child.name: child.pid for child in multiprocessing.active_children()}
        out = {name: cpu_s(pid) for name, pid in children.items() if name.startswith("dvla-")}
        out["learner"] = time.thread_time()
        out["coordinator"] = time.process_time() - out["learner"]
        out["env"], out["policy"] = Meter.total_s(folder, "env"), Meter.total_s(folder, "policy")
        return out

    def learn_until(deadline_s: float) -> None:
        while time.monotonic() < deadline_s:
            for _ in collector.replay_buffer:
                pass
            collector.update_policy_weights_()

    try:
        collector.start()
        learn_until(time.monotonic() + args.warm_up_s)
        decisions, batches, before = _counts(collector), _batches(collector), totals()
        start_s = time.monotonic()
        learn_until(start_s + args.seconds)
        after, wall_s = totals(), time.monotonic() - start_s
        decisions, batches = _counts(collector) - decisions, _batches(collector) - batches
    finally:
        collector.shutdown()
    spent = {name: 1e6 * (after[name] - before[name]) / decisions for name in before}
    workers = sum(value for name, value in spent.items() if name.startswith("dvla-env"))
    return {
        "coordinator": spent["coordinator"],
        "workers": workers - spent["env"],
        "inference": spent["dvla-inference"] - spent["policy"],
        "learner": spent["learner"],
        "env": spent["env"],
        "policy": spent["policy"],
        "decisions_per_s": decisions / wall_s,
        "mean_batch": decisions / batches,
    }


def _counts(collector: Any) -> int:
    return collector._counters.totals["collector/decisions"]


def _batches(collector: Any) -> int:
    return collector._counters.totals["collector/inference_batches"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three short runs")
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--decisions", type=int, default=16, help="of an episode")
    parser.add_argument("--seconds", type=float, help="of a run; 6 by default, 2 with --quick")
    parser.add_argument("--warm-up-s", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, help="5 by default, 3 with --quick")
    args = parser.parse_args()
    args.seconds = args.seconds or (2.0 if args.quick else 6.0)
    args.repeats = args.repeats or (3 if args.quick else 5)
    torch.set_num_threads(1)
    ways = {"at_once": args.num_envs, "in_halves": None}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for repeat in range(args.repeats):
        for way, max_batch_size in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                run = measure(args, folder, max_batch_size)
            run["overhead"] = run["coordinator"] + run["workers"] + run["inference"]
            run["with_draw"] = run["overhead"] + run["learner"]
            runs[way].append(run)
            line = "  ".join(f"{name} {value:.1f}" for name, value in run.items())
            print(f"{repeat} {way} {line}", file=sys.stderr)

    def column(way: str, name: str) -> dict[str, float]:
        return spread((run[name] for run in runs[way]), digits=1)

    names = ("coordinator", "workers", "inference", "learner", "env", "policy")
    result = {
        "benchmark": "collector_overhead",
        "overhead_us_per_decision": column("at_once", "overhead")["median"],
        "overhead_us_in_halves": column("in_halves", "overhead")["median"],
        "with_draw_us_per_decision": column("at_once", "with_draw")["median"],
        "spread": {way: column(way, "overhead") for way in ways},
        "breakdown": {way: {f"{name}_us": column(way, name) for name in names} for way in ways},
        "decisions_per_s": {way: column(way, "decisions_per_s") for way in ways},
        "mean_batch": {way: column(way, "mean_batch")["median"] for way in ways},
        "workload": {
            "num_envs": args.num_envs,
            "num_workers": args.num_workers,
            "decisions_per_episode": args.decisions,
            "observation": f"{IMAGE_SIZE}x{IMAGE_SIZE} image, state of {2 * ACTION_DIM}",
            "seconds": args.seconds,
            "repeats": args.repeats,
        },
        "machine": machine(),
        "quick": args.quick,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
