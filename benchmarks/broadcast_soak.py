# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Does every living node get the newest weights, whole, whoever is killed or stopped and whenever?

    python benchmarks/broadcast_soak.py [--quick] [--seconds 60] [--nodes 4] [--seed 0]

A learner publishes without rest to nodes that each have a relay and a reader, all processes of
their own. At random moments nodes are killed (SIGKILL) and replaced a little later, and nodes or
the learner are stopped (SIGSTOP) for a time around the broadcast's time-out and go on. Then the
disturbance ends, and every node has to get the version that was published last; or the learner
itself is killed, in the middle of a transfer, and every node has to keep a whole version. All of it
repeats, as a chain or a binomial tree. The last line of stdout is one JSON object, and the exit
code is 0 if every figure that should be 0 is:

torn_reads         adoptions that mixed two versions; each is read twice
num_backwards      adoptions of an older version than the one before
num_stale          nodes that did not get the last version within 30 s of the last disturbance
num_slow_publishes publishes that took more than half of the time-out: the learner waited for a node
num_bad_ends       processes that died by themselves, did not end when asked to, or left a thread
num_left           processes that were left, and files of theirs in /dev/shm (the stores' memory has
                   no name: it goes with the last process)
settle_s           from the last disturbance until the last node had the last version
publish_s          longest publish of each learner
num_adoptions, num_node_kills, num_node_stops, num_learner_kills, num_learner_stops
"""

from __future__ import annotations

import collections
import ctypes
import heapq
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _machine import arguments, log, report, spread
from torch import nn

from torchrl_dvla.weight_update import WeightBroadcast, WeightRelay, WeightStore

TIMEOUT_S = 1.0
SETTLED_WITHIN_S = 30.0
FAILURES = ("torn_reads", "num_backwards", "num_stale", "num_slow_publishes", "num_bad_ends")
COUNTS = ("adoptions", "node_kills", "node_stops", "learner_kills", "learner_stops", "epochs")

PROCESSES: list[BaseProcess] = []  # of the whole run
FORK = multiprocessing.get_context("fork")


class LearnerState(ctypes.Structure):
    """What the learner shares: where it listens, what it should do, and what it found."""

    NAMES = "port is_last last_version num_stops num_slow slowest_ns nodes_end"
    _fields_ = [(name, ctypes.c_int64) for name in NAMES.split()]


class NodeState(ctypes.Structure):
    """What a node shares, through all its processes; the version is -1 before the first."""

    NAMES = "num_adoptions num_torn num_backwards version is_clean"
    _fields_ = [(name, ctypes.c_int64) for name in NAMES.split()]


class Weights(nn.Module):
    """Part ``k`` of version ``v`` holds ``v + k / 8`` everywhere; 4 MiB in all."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.arange(8).div(8)[k].repeat(131_072) for k in range(8))

    def is_whole(self, version: int) -> bool:
        """Whether every element is what it should be, read twice."""
        return all(
            bool((part == version + k / 8).all())
            for _ in range(2)
            for k, part in enumerate(self.parts)
        )


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    process = FORK.Process(target=target, args=args, daemon=True)
    process.start()
    PROCESSES.append(process)
    return process


def no_threads_left() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("dvla")]


def learn(state: LearnerState, shape: str) -> None:
    """Publish without rest until told which version is the last one."""
    module = Weights()
    with WeightStore(module, 4) as store:
        broadcast = WeightBroadcast(store.reader("broadcast"), shapes=[shape], timeout_s=TIMEOUT_S)
        state.port = int(broadcast.address.rpartition(":")[2])
        while not state.nodes_end:
            time.sleep(0.002)
            is_last, num_stops = state.is_last, state.num_stops
            if is_last and state.last_version:
                continue
            with torch.no_grad():
                torch._foreach_add_(list(module.parts), 1.0)
            start_ns = time.monotonic_ns()
            version = store.publish()
            taken_ns = time.monotonic_ns() - start_ns
            if num_stops == state.num_stops:  # else it was this process that stood still
                state.slowest_ns = max(state.slowest_ns, taken_ns)
                state.num_slow += taken_ns > TIMEOUT_S / 2 * 1e9
            if is_last:
                state.last_version = version
        broadcast.close()
    if not no_threads_left():
        raise RuntimeError("the learner has threads left")


def serve(learner: LearnerState, state: NodeState, index: int) -> None:
    """A node: a relay, and a reader that checks every weight of every version it meets."""
    with torch.device("meta"):
        source = Weights()
    relay = WeightRelay(f"127.0.0.1:{learner.port}", source, name=f"node {index}")
    reader, module, previous = relay.store.reader("worker"), Weights(), -1
    while not learner.nodes_end:
        if relay.version >= 0:  # readers can adopt it
            version = reader.adopt_into(module)
            if version != previous:
                state.num_adoptions += 1
                state.num_torn += not module.is_whole(version)
                state.num_backwards += version < previous
                state.version = previous = version
        time.sleep(0.001)
    state.num_torn += previous >= 0 and not module.is_whole(reader.adopt_into(module))
    reader.close()
    relay.close()
    state.is_clean = no_threads_left()


class Epoch:
    """One learner from birth to death, and its nodes."""

    def __init__(
        self, generator: random.Random, num_nodes: int, totals: collections.Counter[str]
    ) -> None:
        self.generator, self.totals = generator, totals
        self.state = FORK.Value(LearnerState, lock=False)
        self.states = [FORK.Value(NodeState, lock=False) for _ in range(num_nodes)]
        self.shape = generator.choice(["chain", "binomial"])
        self.learner = start(learn, self.state, self.shape)
        wait_until(lambda: self.state.port, "a learner")
        self.nodes: dict[int, BaseProcess] = {}
        self.later: list[tuple[float, int, str]] = []  # heap: when, whom (-1: learner), what
        for index in range(num_nodes):
            self.start(index)

    def start(self, index: int) -> None:
        self.states[index].version = -1
        self.nodes[index] = start(serve, self.state, self.states[index], index)

    def disturb(self) -> None:
        """Kill or stop a process, and schedule when that ends."""
        index = self.generator.randrange(len(self.states))
        busy = {whom for _, whom, _ in self.later}
        until_s = time.monotonic() + self.generator.uniform(0.0, 2.0 * TIMEOUT_S)
        kind = self.generator.random()
        if kind < 0.05 and -1 not in busy:
            self.state.num_stops += 1
            os.kill(self.learner.pid, signal.SIGSTOP)
            self.totals["num_learner_stops"] += 1
            heapq.heappush(self.later, (until_s, -1, "continue"))
        elif index not in busy and kind < 0.55:
            os.kill(self.nodes[index].pid, signal.SIGSTOP)
            self.totals["num_node_stops"] += 1
            heapq.heappush(self.later, (until_s, index, "continue"))
        elif index not in busy:
            self.totals["num_bad_ends"] += not is_killed(self.nodes.pop(index))
            self.totals["num_node_kills"] += 1
            heapq.heappush(self.later, (until_s, index, "start"))

    def mend(self, *, all_of_it: bool = False) -> None:
        """Continue and start those whose time it is."""
        while self.later and (all_of_it or self.later[0][0] <= time.monotonic()):
            _, whom, what = heapq.heappop(self.later)
            if what == "start":
                self.start(whom)
            else:
                os.kill((self.learner if whom == -1 else self.nodes[whom]).pid, signal.SIGCONT)

    def settle(self) -> float:
        """The disturbance ends; the time until every node has the last version."""
        self.mend(all_of_it=True)
        start_s = time.monotonic()
        self.state.is_last = 1
        wait_until(lambda: self.state.last_version, "the last version")
        last = self.state.last_version
        while behind := [state.version for state in self.states if state.version < last]:
            if time.monotonic() > start_s + SETTLED_WITHIN_S:
                self.totals["num_stale"] += len(behind)
                log(f"stale ({self.shape}): {behind} of {last}")
                break
            time.sleep(0.005)
        return time.monotonic() - start_s

    def end(self) -> None:
        """The learner ends, orderly or in the middle of a transfer; then the nodes do."""
        if self.generator.random() < 0.5:
            self.state.is_last = self.state.last_version = 0  # it publishes again
            time.sleep(self.generator.uniform(0.0, 0.2))
            self.totals["num_bad_ends"] += not is_killed(self.learner)
            self.totals["num_learner_kills"] += 1
            # Nodes have found out, or not yet.
            time.sleep(self.generator.choice([0.0, 0.5 * TIMEOUT_S, 1.5 * TIMEOUT_S]))
            self.state.nodes_end = 1
        else:
            self.state.nodes_end = 1
            self.totals["num_bad_ends"] += not has_ended(self.learner)
        for index, node in self.nodes.items():
            is_clean = has_ended(node) and self.states[index].is_clean
            self.totals["num_bad_ends"] += not is_clean
        for state in self.states:
            self.totals["num_adoptions"] += state.num_adoptions
            self.totals["torn_reads"] += state.num_torn
            self.totals["num_backwards"] += state.num_backwards
        self.totals["num_slow_publishes"] += self.state.num_slow


def is_killed(process: BaseProcess) -> bool:
    """Kill a process; whether it was alive."""
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def has_ended(process: BaseProcess) -> bool:
    """Wait for a process that should end; it is killed if it does not."""
    process.join(10.0 * TIMEOUT_S)
    return not is_killed(process) and process.exitcode == 0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come")
        time.sleep(0.005)


def main() -> None:
    args = arguments(__doc__, "20 seconds", seconds=float, nodes=4, seed=0)
    torch.set_num_threads(1)
    seconds = args.seconds or (20.0 if args.quick else 60.0)
    totals = collections.Counter(dict.fromkeys((*FAILURES, *(f"num_{n}" for n in COUNTS)), 0))
    generator, settle_s, publish_s = random.Random(args.seed), list[float](), list[float]()
    start_s = time.monotonic()
    while time.monotonic() < start_s + seconds:
        epoch = Epoch(generator, args.nodes, totals)
        end_s = time.monotonic() + generator.uniform(2.0, 8.0)
        while time.monotonic() < end_s:
            time.sleep(generator.uniform(0.0, 0.8))
            epoch.mend()
            epoch.disturb()
        settle_s.append(epoch.settle())
        epoch.end()
        publish_s.append(epoch.state.slowest_ns / 1e9)
        totals["num_epochs"] += 1
        log(f"{epoch.shape}: settled in {settle_s[-1]:.2f} s, {dict(totals)}")
    pids = {process.pid for process in PROCESSES}
    left = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    files = [
        name for name in os.listdir("/dev/shm") if pids & set(map(int, re.findall(r"\d+", name)))
    ]
    result = {
        **totals,
        "num_left": len(left) + len(files),
        "settle_s": spread(settle_s),
        "publish_s": spread(publish_s, 4),
        "nodes": args.nodes,
        "timeout_s": TIMEOUT_S,
        "seed": args.seed,
        "duration_s": round(time.monotonic() - start_s, 1),
    }
    report("broadcast_soak", result, args.quick)
    if any(result[key] for key in (*FAILURES, "num_left")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
