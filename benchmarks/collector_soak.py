# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Does a run grow in memory, descriptors or threads, and lose pages or rows, as its processes die?

    python benchmarks/collector_soak.py [--quick] [--minutes 10]

A ``DVLACollector`` on an environment of almost no cost learns and publishes without pause; every
5 s it plays an evaluation and writes a checkpoint, and every 10 s a worker or the inference process
is killed. Sampled are the memory of the learner's process and of all below it, their descriptors
and threads, and the machine's use of ``/dev/shm``. Memory is the proportional set size of anonymous
and shared memory: the share of mapped files depends on other programs. There are no huge pages, and
the timeline is full (100,000 spans) from the start. Every row that is learned from is compared with
what the environment shows in that scene and decision.

The first half is warm-up: caches and allocators fill for minutes. The trend of a series is the
Theil-Sen slope of the rest: the median of the slopes between all pairs of samples. It *grows* if
Sen's interval of 95 % is above 0 and the trend makes 0.1 % of its median or more (1 % with
``--quick``, which ends where caches still fill): samples near in time are alike, which makes the
interval too narrow. Of fewer than 1,000 descriptors or threads 0.1 % is less than one. The last
line of stdout is one JSON object; the exit code is 1 unless the first three figures are 0:

growth                    series that grow, and ``growing``: which
rows_wrong                of ``rows_checked``: torn, or of another scene or decision
pages_lost                neither free nor of a stored group at the end; that every page has one
                          owner is checked at every kill as well
growth_bytes, growth_fds  0 unless the series grows; else median of the last fifth of the rest less
                          that of its first. ``series`` has both medians of all series
growth_bytes_per_minute   trend of the memory of all processes
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _machine import arguments, log, report
from tensordict import TensorDictBase

from torchrl_dvla import DVLACollector, GroupConfig, GRPOLoss, PooledReplayBuffer, WorkerConfig
from torchrl_dvla.data import EpisodeSpec, Group
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.recording import RunCheckpoints
from torchrl_dvla.testing import CountingChunkEnv

MAX_DECISIONS = 4
# Half right is a success and never ends the episode: contrast, and one length.
make_env = functools.partial(CountingChunkEnv, required_fraction=0.5, stop_on_success=False)


def sample() -> dict[str, float]:
    """Every series now."""
    shm, pids = os.statvfs("/dev/shm"), [os.getpid()]
    out = Counter(time_s=time.monotonic(), dev_shm_bytes=(shm.f_blocks - shm.f_bfree) * shm.f_bsize)
    for pid in pids:  # which grows meanwhile
        proc, who = Path(f"/proc/{pid}"), "learner" if pid == os.getpid() else "children"
        try:
            tasks = list((proc / "task").iterdir())
            pids += [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
            out["threads"] += len(tasks)  # a process that nobody has waited for still has one
            out["fds"] += len(os.listdir(proc / "fd"))
            for line in (proc / "smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    size = 1024 * int(line.split()[1])
                    out.update({"bytes": size, f"{who}_bytes": size})  # adds
        except OSError:
            pass  # it has ended
    return out


def describe(times: np.ndarray, values: np.ndarray, tolerance: float) -> dict[str, Any]:
    """Of the second half: medians of its first and last fifth, trend, interval, does it grow."""
    tenth = (times * 10 / times[-1]).astype(int)
    t, v = times[tenth >= 5] / 60, values[tenth >= 5]
    n, (i, j) = len(t), np.triu_indices(len(t), 1)
    reach = 1.96 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18) / 2 / len(i)  # by Kendall's statistic
    ranks = np.clip([0.5 - reach, 0.5, 0.5 + reach], 0, 1)
    low, trend, high = np.quantile((v[j] - v[i]) / (t[j] - t[i]), ranks).round(2).tolist()
    start, end = float(np.median(values[tenth == 5])), float(np.median(values[tenth >= 9]))
    grows = bool(low > 0 and trend * (t[-1] - t[0]) >= tolerance * np.median(v))
    interval = [low, high]
    return {"start": start, "end": end, "per_minute": trend, "interval": interval, "grows": grows}


def num_wrong(batch: TensorDictBase, cohort: list[Group]) -> int:
    """Rows that do not show the scene of their group after as many decisions, in every pixel."""
    env, specs = make_env(), {group.group_id: group.spec for group in cohort}
    rows = [specs[group_id] for group_id in batch["group_id"].flatten().tolist()]
    scenes = [env.scene(spec.seed, spec.init_state_id) for spec in rows]
    state, decisions = batch["observation", "state"], batch["decision_index"].flatten()
    right_steps = (state[:, -1] * env.max_env_steps).round()
    numbers = torch.tensor([scene.scene_id for scene in scenes])
    shown = torch.stack([numbers, decisions, right_steps], 1)[..., None]
    told = torch.tensor([[*scene.target] for scene in scenes])
    told = torch.cat([told, decisions[:, None] / MAX_DECISIONS], 1)
    is_right = (batch["observation", "image"].flatten(2) == shown).flatten(1).all(1)
    return int((~is_right | (state[:, :-1] != told).any(1)).sum())


def num_lost(collector: DVLACollector) -> int:
    """Pages that are neither free nor of a stored group once no group runs."""
    pool, groups = collector.memory.environment, collector.replay_buffer.groups
    with collector.pause():
        deadline_s = time.monotonic() + 60.0
        while groups.running and time.monotonic() < deadline_s:
            time.sleep(0.01)
        pool.check()
        num_stored = sum(len(group.pages) for group in groups.stored)
        return pool.num_pages - pool.num_free_pages - num_stored


def soak(collector: DVLACollector, policy: Any, duration_s: float, folder: str) -> tuple[Any, Any]:
    """Learn until ``duration_s`` is over; the samples, and how often each thing was done."""
    # Steps so small that the work stays the same.
    loss, optimizer = GRPOLoss(policy), torch.optim.AdamW(policy.parameters(), lr=1e-6)
    checkpoints = RunCheckpoints(folder, policy=policy, optimizer=optimizer, collector=collector)
    episodes = [EpisodeSpec("default", seed=10**9 + k) for k in range(4)]
    victims = ("dvla-env-0", "dvla-inference", "dvla-env-1")
    counts = Counter[str]()
    record = Path(folder) / "samples.jsonl"  # kept here, 300 of them would be growth

    def take_sample() -> None:
        with record.open("a") as file:
            file.write(json.dumps(sample()) + "\n")

    def kill() -> None:
        log(f"{counts['updates']} updates, {sample()}")
        collector.memory.environment.check()
        for process in multiprocessing.active_children():
            if process.name == victims[counts["kills"] % 3]:
                process.kill()

    for _ in range(100_000):
        collector.timeline.add("gradient", time.monotonic(), time.monotonic(), track="learner")
    chores = {
        "samples": (min(2.0, duration_s / 100), take_sample),
        "evaluations": (5.0, lambda: collector.evaluate(episodes).result(120.0)),
        "checkpoints": (5.0, lambda: checkpoints.save(collector.policy_version)),
        "kills": (10.0, kill),
    }
    start_s = time.monotonic()
    while (elapsed_s := time.monotonic() - start_s) < duration_s:
        for batch in collector.replay_buffer:
            loss(batch)["loss_objective"].backward()
            optimizer.step(), optimizer.zero_grad()
            counts["rows_checked"] += len(batch)
            counts["rows_wrong"] += num_wrong(batch, collector.replay_buffer.cohort)
        collector.update_policy_weights_()
        counts["updates"] += 1
        for name, (every_s, do) in chores.items():
            if elapsed_s >= every_s * (counts[name] + 1):
                do()
                counts[name] += 1
        stats = collector.stats()
    samples = [json.loads(line) for line in record.read_text().splitlines()]
    return samples, counts + Counter({k: v for k, v in stats.items() if k.startswith("faults/")})


def main() -> None:
    args = arguments(__doc__, "20 seconds", minutes=10.0)
    minutes = 1 / 3 if args.quick else args.minutes
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: 2 MiB of noise a huge page
    policy = tiny_token_policy(2, 4, vocab_size=8)
    with (
        tempfile.TemporaryDirectory() as folder,
        DVLACollector(
            make_env,
            policy,
            replay_buffer=PooledReplayBuffer(batch_size=32),
            group=GroupConfig(group_size=4, groups_per_update=2, on_no_signal="keep"),
            workers=WorkerConfig(num_workers=2, envs_per_worker=2, max_decisions=MAX_DECISIONS),
        ) as collector,
    ):
        samples, counts = soak(collector, policy, 60 * minutes, folder)
        pages_lost = num_lost(collector)
    times = np.array([one["time_s"] - samples[0]["time_s"] for one in samples])
    names = [name for name in samples[0] if name != "time_s"]
    tolerance = 0.01 if args.quick else 0.001
    series = {
        name: describe(times, np.array([one[name] for one in samples]), tolerance) for name in names
    }
    growth = {
        f"growth_{name}": one["end"] - one["start"] if one["grows"] else 0.0
        for name, one in series.items()
    }
    growing = [name for name, one in series.items() if one["grows"]]
    faults = {"growth": len(growing), "rows_wrong": counts["rows_wrong"], "pages_lost": pages_lost}
    result = faults | {"growing": growing, "rows_checked": counts["rows_checked"], **growth}
    result |= {"growth_bytes_per_minute": series["bytes"]["per_minute"], "minutes": minutes}
    report("collector_soak", result | {"counts": counts, "series": series}, args.quick)
    raise SystemExit(any(faults.values()))


if __name__ == "__main__":
    main()
