# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does a decision cost beyond the environment's step and the policy's forward?

    python benchmarks/collector_overhead.py [--quick]

``CountingChunkEnv`` and a tiny policy under ``DVLACollector``, 64 environments in two workers. CPU
time of every process is read from the kernel's clocks before and after a stretch of decisions; the
time inside ``env.step``, ``env.reset`` and the policy's ``forward`` is measured there and taken
off. The last line of stdout is one JSON object: ``overhead_us_per_decision``, CPU microseconds of
the loop's thread, workers and inference process together, and ``breakdown`` by process.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import arguments, log, report, spread

from torchrl_dvla import DVLACollector, GroupConfig, PooledReplayBuffer, WorkerConfig
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv

NUM_WORKERS, NUM_ENVS, DECISIONS = 2, 64, 16


def meter(folder: str, role: str, owner: Any, *names: str) -> Any:
    """Count the CPU seconds inside of methods, in a file that outlives the process."""
    path = Path(folder) / f"{role}-{os.getpid()}-{id(owner)}"
    seconds = memoryview(np.memmap(path, dtype=np.float64, mode="w+", shape=(1,)))

    def measured(function: Any, *args: Any, **kwargs: Any) -> Any:
        start_s = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[0] += time.thread_time() - start_s

    for name in names:
        setattr(owner, name, functools.partial(measured, getattr(owner, name)))
    return owner


def make_env(folder: str) -> CountingChunkEnv:
    # Half right is a success, as a random policy is half of the time: most groups are kept.
    env = CountingChunkEnv(
        chunk_size=4, max_env_steps=4 * DECISIONS, required_fraction=0.5, stop_on_success=False
    )
    return meter(folder, "env", env, "step", "reset")


def run(folder: str, seconds: float) -> dict[str, float]:
    """Microseconds a decision, by process."""
    policy = tiny_token_policy(2, 4, vocab_size=8, hidden_dim=16)
    collector = DVLACollector(
        functools.partial(make_env, folder),
        policy,
        policy_factory=functools.partial(meter, folder, "policy", policy, "forward"),
        replay_buffer=PooledReplayBuffer(batch_size=256, timeout_s=60.0),
        group=GroupConfig(groups_per_update=16, max_policy_lag=2, max_no_signal_groups=10**9),
        workers=WorkerConfig(NUM_WORKERS, NUM_ENVS // NUM_WORKERS, DECISIONS),
    )

    def learn_for(seconds: float) -> dict[str, float]:
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            for _ in collector.replay_buffer:
                pass
            collector.update_policy_weights_()
        # Of another process, by its id: what clock_getcpuclockid(3) returns on Linux.
        out = {"learner": time.thread_time(), "decisions": collector.stats()["frames"]}
        out["loop"] = time.process_time() - out["learner"]
        for role in ("env", "policy"):
            files = Path(folder).glob(f"{role}-*")
            out[role] = float(sum(np.fromfile(path, dtype=np.float64)[0] for path in files))
        cpu_s = {
            p.name: time.clock_gettime(~p.pid << 3 | 2) for p in multiprocessing.active_children()
        }
        out["inference"] = cpu_s["dvla-inference"] - out["policy"]
        workers_s = sum(value for name, value in cpu_s.items() if name.startswith("dvla-env"))
        return {**out, "workers": workers_s - out["env"]}

    with collector:
        before = learn_for(1.0)
        after = learn_for(seconds)
    num_decisions = after.pop("decisions") - before["decisions"]
    spent = {name: 1e6 * (after[name] - before[name]) / num_decisions for name in after}
    return {**spent, "overhead": spent["loop"] + spent["workers"] + spent["inference"]}


def main() -> None:
    args = arguments(__doc__, "three short runs")
    torch.set_num_threads(1)
    seconds, num_repeats = (2.0, 3) if args.quick else (6.0, 5)
    runs: list[dict[str, float]] = []
    for _ in range(num_repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(folder, seconds))
        log({name: round(value, 1) for name, value in runs[-1].items()})
    breakdown = {f"{name}_us": spread((one[name] for one in runs), 1) for name in runs[0]}
    result = {
        "overhead_us_per_decision": breakdown["overhead_us"]["median"],
        "breakdown": breakdown,
        "workload": {"num_envs": NUM_ENVS, "num_workers": NUM_WORKERS, "seconds": seconds},
    }
    report("collector_overhead", result, args.quick)


if __name__ == "__main__":
    main()
