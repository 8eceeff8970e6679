# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What do faults cost, and is anything lost or learned from twice?

    python benchmarks/faults.py [--quick]

One ``DVLACollector`` samples and a learner takes its groups, in phases by turns: undisturbed, and
under faults. Under faults a worker is killed every 5 s and one hangs every 20 s, counted on a clock
that runs in those phases only. Four workers hold an environment each, whose step takes an
*emulated* 50 ms that hold no core; the deadline of a step is 1.5 s.

throughput_ratio
    finished rollouts a second under faults over those of the undisturbed phase before; median.
groups_lost
    admitted groups that were neither learned from, nor dropped for their returns, nor still open.
rows_learned_twice
    decisions that came to the learner more than once.
recovery_p99_s
    from a kill, or from the moment of a hang, until that worker works on a rollout again, less the
    start-up of the environment. A hang's deadline is part of it.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import arguments, log, paired_ratio, report, spread
from tensordict import TensorDictBase

from torchrl_dvla import DVLACollector, GroupConfig, PooledReplayBuffer, WorkerConfig
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv

NUM_WORKERS, STEP_S, STEP_TIMEOUT_S = 4, 0.05, 1.5
KILL_EVERY_S, HANG_EVERY_S = 5.0, 20.0


def make_env_factory(folder: str) -> Any:
    """Environments that hang when they find a request, and say when and where they do."""

    def make() -> CountingChunkEnv:  # nested, so that it is pickled by value
        class Hanging(CountingChunkEnv):
            def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
                request = Path(folder) / "request"
                if request.exists():
                    try:
                        request.unlink()
                    except FileNotFoundError:
                        return super()._step(tensordict)  # another worker was first
                    name = multiprocessing.current_process().name
                    note = Path(folder) / f"hang-{time.monotonic_ns()}"
                    note.write_text(f"{time.monotonic()} {name.rsplit('-', 1)[1]}")
                    threading.Event().wait()
                return super()._step(tensordict)

        # Half right is a success and never ends the episode: contrast in most groups, one length.
        return Hanging(
            max_env_steps=32,
            chunk_size=4,
            required_fraction=0.5,
            stop_on_success=False,
            step_latency_s=STEP_S,
        )

    return make


class Learner(threading.Thread):
    """Takes every update as it comes and counts how often each decision did."""

    def __init__(self, collector: DVLACollector) -> None:
        super().__init__(daemon=True)
        self.collector = collector
        self.rows: Counter[tuple[int, int]] = Counter()
        self.num_groups = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            for batch in self.collector.replay_buffer:
                ids, numbers = batch["rollout_id"].flatten(), batch["decision_index"].flatten()
                self.rows.update(zip(ids.tolist(), numbers.tolist(), strict=True))
            self.num_groups += len(self.collector.replay_buffer.cohort)
            self.collector.update_policy_weights_()


def phase(
    collector: DVLACollector, duration_s: float, clock_s: float | None, folder: str
) -> tuple[float, list[tuple[float, int]]]:
    """Finished rollouts a second, and the kills ``(time, worker)``; faults if there is a clock."""
    start_s, kills = time.monotonic(), []
    before = collector.stats()["collector/episodes"]
    next_kill = next_hang = float("inf")
    if clock_s is not None:
        next_kill = clock_s + (KILL_EVERY_S / 2 - clock_s) % KILL_EVERY_S
        next_hang = clock_s + (3 * HANG_EVERY_S / 8 - clock_s) % HANG_EVERY_S
    while (elapsed_s := time.monotonic() - start_s) < duration_s:
        now = (clock_s or 0.0) + elapsed_s
        if now >= next_kill:
            next_kill += KILL_EVERY_S
            index = len(kills) % NUM_WORKERS
            name = f"dvla-env-{index}"
            for process in multiprocessing.active_children():
                if process.name == name:
                    kills.append((time.monotonic(), index))
                    process.kill()
        if now >= next_hang:
            next_hang += HANG_EVERY_S
            (Path(folder) / "request").touch()
        time.sleep(0.01)
    after = collector.stats()["collector/episodes"]
    return (after - before) / (time.monotonic() - start_s), kills


def recoveries(
    collector: DVLACollector, faults: list[tuple[float, int]], startup_s: float
) -> list[float]:
    """Seconds from each fault to the next work of its worker, less the start-up."""
    starts: dict[str, list[float]] = {}
    for span in collector.timeline.spans():
        if span.lane == "sampling":
            starts.setdefault(span.track, []).append(span.start_s)
    out = []
    for at_s, index in faults:
        later = [s for s in starts.get(f"worker {index}", []) if s > at_s]
        if later:
            out.append(max(0.0, min(later) - at_s - startup_s))
    return out


def main() -> None:
    args = arguments(__doc__, "two short pairs of phases")
    num_repeats, phase_s = (2, 10.0) if args.quick else (5, 25.0)
    torch.manual_seed(0)
    policy = tiny_token_policy(2, 4, vocab_size=8, hidden_dim=16)
    with tempfile.TemporaryDirectory() as folder:
        make_env = make_env_factory(folder)
        start_s = time.monotonic()
        make_env()
        startup_s = time.monotonic() - start_s
        collector = DVLACollector(
            make_env,
            policy,
            replay_buffer=PooledReplayBuffer(batch_size=256),
            group=GroupConfig(group_size=4, groups_per_update=2, max_policy_lag=2),
            workers=WorkerConfig(NUM_WORKERS, max_decisions=8, step_timeout_s=STEP_TIMEOUT_S),
        )
        learner = Learner(collector)
        collector.start()
        learner.start()
        time.sleep(3.0)  # the first calls of everything
        quiet, faulty, kills, clock_s = [], [], [], 0.0
        for repeat in range(num_repeats):
            quiet.append(phase(collector, phase_s, None, folder)[0])
            rate, more = phase(collector, phase_s, clock_s, folder)
            faulty.append(rate)
            kills += more
            clock_s += phase_s
            log(f"repeat {repeat}: {quiet[-1]:.2f} {rate:.2f} rollouts/s")
            time.sleep(2.0)  # the last fault is over before the next undisturbed phase
        learner.stopping.set()
        learner.join(60.0)
        with collector.pause():
            # All of one instant, for collection goes on meanwhile.
            state = collector.state_dict()["buffer"]["_groups"]
            stats = collector.stats()
        num_admitted = state["num_admitted"]
        lost = stats.get("faults/groups_dropped", 0)
        dropped = int(sum(count for count, _ in state["drops"].values()))
        num_stored, num_open = len(state["groups"]), len(state["reopened"])
        unaccounted = num_admitted - learner.num_groups - dropped - num_stored - num_open
        hangs = []
        for note in sorted(Path(folder).glob("hang-*")):
            at, index = note.read_text().split()
            hangs.append((float(at), int(index)))
        after_kill = recoveries(collector, kills, startup_s)
        after_hang = recoveries(collector, hangs, startup_s)
        collector.shutdown()
    p99_s = float(np.percentile(after_kill + after_hang, 99, method="higher"))
    ratio = paired_ratio(faulty, quiet)
    result = {
        "throughput_ratio": ratio["median"],
        "groups_lost": int(lost + unaccounted),
        "rows_learned_twice": sum(count - 1 for count in learner.rows.values()),
        "recovery_p99_s": round(p99_s, 3),
        "ratios": ratio,
        "rollouts_per_s": {"undisturbed": spread(quiet), "under_faults": spread(faulty)},
        "recovery_s": {"kill": spread(after_kill, 3), "hang": spread(after_hang, 3)},
        "env_startup_s": round(startup_s, 4),
        "faults": {"kills": len(kills), "hangs": len(hangs)},
        "recovered": len(after_kill) + len(after_hang),
        "replaced": stats.get("faults/workers_replaced", 0),
        "groups": {"admitted": num_admitted, "learned": learner.num_groups, "dropped": dropped},
        "emulated": {"step_s": STEP_S, "holds_a_core": False},
        "workload": {"workers": NUM_WORKERS, "phase_s": phase_s, "repeats": num_repeats},
    }
    report("faults", result, args.quick)


if __name__ == "__main__":
    main()
