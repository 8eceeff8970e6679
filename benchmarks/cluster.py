# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What do more nodes bring, what does it cost that one of them dies, and what crosses between them?

    python benchmarks/cluster.py [--quick]

**The latencies are emulated**: an env step and a policy call last a stated time and hold no core,
as on nodes with a simulator and an accelerator of their own. All nodes are nodes of Ray's on this
machine, over the loopback interface: the figures are of the schedule, of no hardware, no network.
All else is real: actors, workers, inference processes, pages, admission, grants, versions.

decisions_per_s
    decisions a second of complete groups, those without contrast included.
scaling_efficiency
    decisions a second on 2, 4 and 8 nodes over so many times those of one. The goal is 0.95 at 4.
ratio_one_node_vs_local
    one node by way of Ray over ``DVLACollector``. The goal is 0.97.
ratio_vs_ray_collector
    decisions a second on 2 nodes over those of TorchRL's ``RayCollector``, asynchronous, with as
    many environments, a process each, and updates; an update lasts a stated time, too, and ends
    with a publication. The rival takes the better of two sizes of its batches. The goal is 3. All
    else has the four environments of a node in one process, where their steps take turns.
data_bytes_ratio, weight_bytes_ratio
    bytes of groups that came over those of their rows; of versions that went over one a node. Both
    are counted where they are sent; the goal is 1 within 5 %.
learner_stall_ratio
    duration of a publish with 8 nodes over that with one. The goal is 1.15. A publish also frees
    the pages of what was learned, eight times as many groups with 8 nodes:
    ``learner_stall_ratio_equal_work`` is over one node that has all 32 environments and the same
    groups an update. ``publish_ms`` is the duration, ``publish_cpu_ms`` the core time of it.
killed
    one of four nodes is killed and comes back: rates over the rate before, in the ten seconds after
    the loss and from 15 s after its return (goals 0.7 and 0.95); groups lost and learned twice (0).

The last line of stdout is one JSON object. Arrangements take turns within a repeat.
"""

from __future__ import annotations

import functools
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cloudpickle
import torch
from _machine import arguments, in_process, log, paired_ratio, report, spread
from tensordict.nn import InteractionType, TensorDictModuleBase

from torchrl_dvla import DVLACollector, GroupConfig, PooledReplayBuffer, TopologyAwareCollector
from torchrl_dvla.collectors import InferenceConfig, WorkerConfig
from torchrl_dvla.modules import tiny_token_policy
from torchrl_dvla.testing import CountingChunkEnv, emulate_latency
from torchrl_dvla.topology import NodePlacement, Placement
from torchrl_dvla.topology.nodes import NodeState, apart
from torchrl_dvla.topology.ray_runtime import RayRuntime, stay_private

STEP_S, INFER_S, UPDATE_S = 0.04, 0.01, 0.3
ENVS_PER_NODE, GROUP_SIZE, DECISIONS = 4, 4, 6
WORKERS = WorkerConfig(envs_per_worker=ENVS_PER_NODE, num_workers=1, max_decisions=DECISIONS)

#: As many environments, each in a process of its own, as the rival has them.
ONE_EACH = replace(WORKERS, num_workers=ENVS_PER_NODE, envs_per_worker=1)

make_env = functools.partial(
    CountingChunkEnv,
    chunk_size=4,
    max_env_steps=4 * DECISIONS,
    stop_on_success=False,
    step_latency_s=STEP_S,
)


def make_policy(infer_s: float = INFER_S) -> TensorDictModuleBase:
    """A tiny policy, whose call lasts a stated time."""
    torch.manual_seed(0)
    policy = tiny_token_policy(
        2, 4, vocab_size=8, hidden_dim=64, default_interaction_type=InteractionType.RANDOM
    )
    policy(make_env(step_latency_s=0.0).reset().unsqueeze(0))  # lazy parameters
    return emulate_latency(policy, infer_s)


def make_collector(
    num_nodes: int, workers: WorkerConfig = WORKERS, groups_per_update: int | None = None
) -> DVLACollector:
    """A collector of so many nodes; of 0, on this machine without Ray."""
    # In a process of its own the script is no __main__, and nodes cannot import it.
    cloudpickle.register_pickle_by_value(sys.modules[make_policy.__module__])
    common: dict[str, Any] = {
        "policy_factory": make_policy,
        "replay_buffer": PooledReplayBuffer(batch_size=96, timeout_s=120.0),
        "group": GroupConfig(
            group_size=GROUP_SIZE,
            groups_per_update=groups_per_update or max(2, 2 * num_nodes),
            on_no_signal="keep",  # the policy learns nothing
            max_no_signal_groups=1,
        ),
    }
    policy = make_policy(0.0)  # the learner only publishes: its own calls do not matter
    if not num_nodes:
        return DVLACollector(make_env, policy, workers=workers, **common)
    nodes = [
        NodePlacement("localhost", workers, InferenceConfig(), learner=index == 0)
        for index in range(num_nodes)
    ]
    if num_nodes == 1:  # without an address it would not go by way of Ray
        RayRuntime(["localhost"], [workers.num_workers], object_store_bytes=128 << 20)
    return TopologyAwareCollector(
        make_env,
        policy,
        placement=Placement(tuple(nodes)),
        address="auto" if num_nodes == 1 else None,
        heartbeat_timeout_s=5.0,
        **common,
    )


class Learner:
    """Takes cohorts and publishes, and keeps what there is to know of it."""

    def __init__(self, collector: DVLACollector, update_s: float = 0.0) -> None:
        self.collector, self._update_s = collector, update_s
        self.learned: list[int] = []
        self.max_lag, self.publish_s, self.publish_cpu_s = 0, [], []
        #: Decisions sampled until the end of each update.
        self.times_s: list[float] = []
        self.decisions: list[int] = []

    def run(self, seconds: float) -> float:
        """Learn for so long; returns decisions a second."""
        start_s, before = time.monotonic(), self._count()
        while time.monotonic() < start_s + seconds:
            for batch in self.collector.replay_buffer:
                lag = self.collector.policy_version - batch["policy_version"]
                self.max_lag = max(self.max_lag, int(lag.max()))
            groups = self.collector.replay_buffer.cohort
            self.learned += [group.group_id for group in groups]
            time.sleep(self._update_s)
            published_s, cpu_s = time.monotonic(), time.thread_time()
            self.collector.update_policy_weights_()
            self.publish_s.append(time.monotonic() - published_s)
            self.publish_cpu_s.append(time.thread_time() - cpu_s)
            self.times_s.append(time.monotonic())
            self.decisions.append(self._count())
        return (self._count() - before) / (time.monotonic() - start_s)

    def rate(self, start_s: float, end_s: float) -> float:
        """Decisions a second that arrived between two moments."""
        updates = list(zip(self.times_s, self.decisions))
        before = [entry for entry in updates if entry[0] <= start_s][-1]
        after = next(entry for entry in updates if entry[0] >= end_s)
        return (after[1] - before[1]) / (after[0] - before[0])

    def _count(self) -> int:
        # Of whole groups: those that a lost node had begun do not count.
        stats = self.collector.replay_buffer.groups.stats()
        num_groups = stats["groups_kept"] + stats["groups_dropped"]
        return int(num_groups) * GROUP_SIZE * DECISIONS


def measure(
    num_nodes: int,
    seconds: float,
    update_s: float = 0.0,
    workers: WorkerConfig = WORKERS,
    groups_per_update: int | None = None,
) -> dict[str, float]:
    """One arrangement, in a process of its own."""
    with make_collector(num_nodes, workers, groups_per_update) as collector:
        learner = Learner(collector, update_s)
        learner.run(2.0)
        wait_healthy(collector, learner)
        learner.publish_s.clear()
        learner.publish_cpu_s.clear()
        before = collector.stats()
        rate = learner.run(seconds)
        after = collector.stats()
        out = {
            "decisions_per_s": rate,
            "publish_s": statistics.median(learner.publish_s),
            "publish_cpu_s": statistics.median(learner.publish_cpu_s),
            "max_lag": learner.max_lag,
        }
        if num_nodes:
            grown = {key: after[key] - before[key] for key in after if key in before}
            rows = grown["cluster/groups_received"] * GROUP_SIZE * DECISIONS
            layout = collector.cluster._plan.weight_layout
            version_bytes = sum(b.numel * b.dtype.itemsize for b in layout.buckets)
            versions = grown["policy_version"] * num_nodes
            out["data_bytes_ratio"] = grown["cluster/bytes_received"] / (
                rows * collector.plan.row_bytes
            )
            out["weight_bytes_ratio"] = grown["cluster/bytes_sent"] / (versions * version_bytes)
        return out


def wait_healthy(collector: DVLACollector, learner: Learner) -> None:
    """Learn until all nodes work."""
    if isinstance(collector, TopologyAwareCollector):
        nodes = collector.cluster.nodes
        while any(node.state is not NodeState.HEALTHY for node in nodes):
            learner.run(0.2)


def beside(learner: Learner, function: Callable[[], Any]) -> Any:
    """Call what takes seconds, here, where Ray sets signal handlers, while the learner goes on."""
    over = threading.Event()

    def learn() -> None:
        while not over.is_set():
            learner.run(0.1)

    learning = apart(learn)
    try:
        return function()
    finally:
        over.set()
        learning.result()


def measure_killed(seconds: float, absent_s: float) -> dict[str, float]:
    """Four nodes, of which one is killed and comes back."""
    with make_collector(4) as collector:
        learner = Learner(collector)
        learner.run(2.0)
        wait_healthy(collector, learner)
        before = learner.run(seconds)
        killed_s = time.monotonic()
        add_again = beside(learner, collector.cluster.runtime.kill_machine)
        learner.run(absent_s)
        again_s = time.monotonic()
        beside(learner, add_again)
        wait_healthy(collector, learner)
        history = collector.cluster.history
        back_s = time.monotonic()
        after = learner.run(seconds)
        lost_s = next(t for t, _, state in history if t > killed_s and state is NodeState.DEAD)
        groups = collector.replay_buffer.groups
        with groups.lock:
            stats = groups.stats()
        places = ("learned", "dropped", "in_flight", "stored")
        return {
            "rate_without": learner.rate(lost_s, lost_s + min(10.0, absent_s)) / before,
            "rate_after": after / before,
            "noticed_after_s": lost_s - killed_s,
            "healthy_after_s": back_s - again_s,
            "groups_resampled": collector.cluster.totals["groups_resampled"],
            "groups_lost": stats["groups_admitted"] - sum(stats[f"groups_{p}"] for p in places),
            "groups_learned_twice": len(learner.learned) - len(set(learner.learned)),
            "max_lag": learner.max_lag,
        }


def measure_rival(num_nodes: int, seconds: float, frames_per_batch: int) -> dict[str, float]:
    """TorchRL's ``RayCollector``, asynchronous, with as many environments, one process each."""
    import ray
    from torchrl.collectors.distributed import RayCollector
    from torchrl.envs import ParallelEnv

    stay_private()
    ray.init("local", num_cpus=num_nodes, include_dashboard=False, log_to_driver=False)
    collector = RayCollector(
        [functools.partial(ParallelEnv, ENVS_PER_NODE, make_env)] * num_nodes,
        make_policy(),
        collector_kwargs={"max_frames_per_traj": DECISIONS},
        frames_per_batch=frames_per_batch,
        total_frames=10**9,
        num_collectors=num_nodes,
        sync=False,
        remote_configs={"num_cpus": 1, "num_gpus": 0, "memory": 2**28},
        update_after_each_batch=False,
    )
    update_decisions = 2 * num_nodes * GROUP_SIZE * DECISIONS  # those of a cohort
    num_decisions, num_updates, start_s = 0, 0, None
    try:
        for batch in collector:
            num_decisions += batch.numel()
            if num_decisions >= (num_updates + 1) * update_decisions:
                num_updates += 1
                time.sleep(UPDATE_S)
                collector.update_policy_weights_()
                if start_s is None and num_updates == 2:  # all of them have begun
                    start_s, before = time.monotonic(), num_decisions
                elif start_s is not None and time.monotonic() > start_s + seconds:
                    break
        return {"decisions_per_s": (num_decisions - before) / (time.monotonic() - start_s)}
    finally:
        collector.shutdown()
        ray.shutdown()


def main() -> None:
    options = arguments(__doc__, "one repeat of a few seconds", repeats=5)
    repeats, seconds = (1, 4.0) if options.quick else (options.repeats, 8.0)
    counts = (1, 2, 4, 8)
    runs: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        jobs = [("local", measure, 0), *((f"nodes_{n}", measure, n) for n in counts)]
        jobs += [("updates_2", measure, 2, UPDATE_S, ONE_EACH)]
        jobs += [("nodes_1_of_8_workers", measure, 1, 0.0, replace(WORKERS, num_workers=8), 16)]
        jobs += [
            (f"ray_{frames}", measure_rival, 2, frames)
            for frames in (ENVS_PER_NODE * DECISIONS, 4 * ENVS_PER_NODE * DECISIONS)
        ]
        for name, function, *args in jobs if repeat % 2 == 0 else jobs[::-1]:
            found = in_process(function, args[0], seconds, *args[1:])
            runs.setdefault(name, []).append(found)
            log(f"{name}: {found}")
        killed = in_process(measure_killed, seconds, 6.0 if options.quick else 15.0)
        runs.setdefault("killed", []).append(killed)
        log(f"killed: {killed}")
    rates = {name: [run["decisions_per_s"] for run in found] for name, found in runs.items()
             if name != "killed"}  # fmt: skip
    rivals = [max(pair) for pair in zip(*(r for name, r in rates.items() if "ray_" in name))]
    wall, cpu = (
        {name: [1e3 * run[key] for run in runs[name]] for name in runs if "nodes_" in name}
        for key in ("publish_s", "publish_cpu_s")
    )
    result = {
        "emulated": {"env_step_s": STEP_S, "policy_call_s": INFER_S, "update_s": UPDATE_S},
        "decisions_per_s": {name: spread(found, 1) for name, found in rates.items()},
        "scaling_efficiency": {
            str(n): spread(b / a / n for a, b in zip(rates["nodes_1"], rates[f"nodes_{n}"]))
            for n in counts[1:]
        },
        "ratio_one_node_vs_local": paired_ratio(rates["nodes_1"], rates["local"]),
        "ratio_vs_ray_collector": paired_ratio(rates["updates_2"], rivals),
        "learner_stall_ratio": paired_ratio(wall["nodes_8"], wall["nodes_1"]),
        "learner_stall_ratio_equal_work": paired_ratio(
            wall["nodes_8"], wall["nodes_1_of_8_workers"]
        ),
        "publish_ms": {name: spread(found) for name, found in wall.items()},
        "publish_cpu_ms": {name: spread(found) for name, found in cpu.items()},
        "data_bytes_ratio": spread(run["data_bytes_ratio"] for run in runs["nodes_4"]),
        "weight_bytes_ratio": spread(run["weight_bytes_ratio"] for run in runs["nodes_4"]),
        "max_lag": max(run["max_lag"] for name in runs for run in runs[name] if "max_lag" in run),
        "killed": {key: spread(run[key] for run in runs["killed"]) for key in runs["killed"][0]},
    }
    report("cluster", result, options.quick, "ray")


if __name__ == "__main__":
    main()
