# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does it cost the learner to bring new weights to other nodes, and when do they have them?

    python benchmarks/weight_broadcast.py [--quick]

Every node is a process. Where the machine allows it, each is in a network namespace of its own,
with 25 MB/s and 2 ms between them (``network: emulated``, see ``testing.EmulatedNetwork``): TCP is
real, but all nodes share this machine's cores, so the bandwidth is set low enough for the
network, not the cores, to be the bottleneck. The same is measured over the loopback device, where
bytes cost nothing but CPU time, of the same cores for all nodes: a tree cannot win there.

In random order the nodes get a version by ``chain``, by ``binomial``, by ``whole`` (a chain without
pipelining: one bucket) and two rivals: ``gloo``, one ``torch.distributed.broadcast`` in a Gloo
group of all nodes, of one contiguous tensor (its best case, and it has no settings); and
``torchrl``, ``DistributedWeightSyncScheme.send``, of one tensor as well. Its only setting,
``sync``, was tried with both values and made no difference beyond the noise. What the cost model
picks is one of the first two. The last line of stdout is one JSON object; keys at the top are those
of the emulated network, if there is one:

learner_cost_8_over_1   CPU seconds of the learner's process per large version, with 8 nodes over
                        with 1: with 1 it is one message, with more it goes in buckets
learner_bytes_8_over_1  the same of the bytes that the learner's node sends
ratio_vs_gloo_broadcast time until all 8 nodes have the large version, of the rival over the pick
ratio_vs_torchrl        the same
pipelining_gain         the same, of ``whole`` over the chain
model_pick_over_best    time of the pick over that of the better shape: the worst over sizes and
                        numbers of nodes, each the median
predicted               table of what the cost model says beside what was measured
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # emulated hosts have no names

import torch
import torch.distributed as dist
from _machine import arguments, log, paired_ratio, report, spread
from torch import nn
from torchrl.weight_update import DistributedWeightSyncScheme

from torchrl_dvla.testing import EmulatedNetwork, Remote
from torchrl_dvla.weight_update import LinkModel, WeightBroadcast, WeightRelay, WeightStore
from torchrl_dvla.weight_update.broadcast.tree import choose_tree

NUM_NODES = 8
LINK = LinkModel(latency_s=0.002, bytes_per_s=25e6, overhead_s=200e-6)
#: Over loopback there is no link to model; a message costs the cores that all nodes share.
LOOPBACK = LinkModel(latency_s=50e-6, bytes_per_s=2e9, overhead_s=1e-3)
SHAPES = ("chain", "binomial")
RIVALS = ("gloo", "torchrl")
SMALL_BYTES = 65_536
TIMEOUT = datetime.timedelta(seconds=60)


class Case(NamedTuple):
    """A version of a size, brought to some nodes in one of the ways."""

    size: str
    num_nodes: int
    way: str


class Scheme(DistributedWeightSyncScheme):
    """TorchRL's scheme; its store would listen where the host's *name* leads: not when emulated."""

    def __init__(self, address: str, port: int) -> None:
        super().__init__(timeout=60.0)
        self._store_info = {"host": address, "port": port}

    def _make_store(self, is_master: bool, **kwargs: Any) -> dist.TCPStore:
        return tcp_store(self._store_info["host"], self._store_info["port"], is_master)


@dataclasses.dataclass
class Context:
    """What TorchRL's scheme asks for the policy that receives."""

    policy: nn.Module


class Host:
    """The learner's host is number 0. What is timed runs here, by the clock that all share."""

    def __init__(self, number: int, address: str, interface: str) -> None:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        self.number, self.address = number, address
        self.stores: dict[Case, WeightStore] = {}
        self.ends: dict[Case, Any] = {}  # a WeightBroadcast or a WeightRelay
        self.schemes: dict[str, tuple[Scheme, Context]] = {}

    def lead(self, case: Case, num_bytes: int, link: LinkModel, shape: str) -> str:
        store = self.stores[case] = WeightStore(nn.Linear(num_bytes // 4, 1, bias=False), 4)
        self.ends[case] = WeightBroadcast(
            store.reader("broadcast"), host=self.address, link=link, shapes=[shape]
        )
        return self.ends[case].address

    def follow(self, case: Case, num_bytes: int, address: str) -> None:
        policy = nn.Linear(num_bytes // 4, 1, bias=False, device="meta")
        self.ends[case] = WeightRelay(address, policy, name=f"node {self.number}")

    def publish(self, case: Case) -> tuple[int, float, float]:
        """A version; when the call began, and how long it took."""
        self.cpu_s, start_s = time.process_time(), time.monotonic()
        version = self.stores[case].publish()
        return version, start_s, time.monotonic() - start_s

    def arrival(self, case: Case, version: int) -> float:
        self.ends[case].wait(version)
        return time.monotonic()

    def settle(self, case: Case, version: int) -> tuple[float, float]:
        """CPU seconds since publish and all bytes sent, when nothing is on its way any more."""
        broadcast = self.ends[case]
        broadcast.wait(version, num_nodes=case.num_nodes)
        with broadcast._changed:
            assert broadcast._changed.wait_for(lambda: broadcast._slot is None, timeout=60.0)
        sent_bytes = broadcast.stats()["broadcast/learner_sent_bytes"]
        return time.process_time() - self.cpu_s, sent_bytes

    def close(self) -> None:
        for part in (*self.ends.values(), *self.stores.values()):
            part.close()

    def join_groups(self, address: str, port: int, many_nodes: list[int], num_hosts: int) -> None:
        """One Gloo group of the learner and the first n others, for each n."""
        store = tcp_store(address, port, self.number == 0)
        dist.init_process_group(
            "gloo", store=store, rank=self.number, world_size=num_hosts, timeout=TIMEOUT
        )
        self.groups = {n: dist.new_group(list(range(n + 1))) for n in many_nodes}

    def join_scheme(self, size: str, address: str, port: int, num_bytes: int) -> None:
        """Set TorchRL's scheme up at this end; it sends what the learner has."""
        scheme, num_workers = Scheme(address, port), dist.get_world_size() - 1
        model = nn.Linear(num_bytes // 4, 1, bias=False)
        context = Context(model)
        if self.number == 0:
            scheme.init_on_sender(model_id="policy", num_workers=num_workers, model=model)
        else:
            scheme._num_workers = num_workers
            scheme.init_on_receiver(model_id="policy", context=context, worker_idx=self.number)
        scheme.connect(worker_idx=None if self.number == 0 else self.number)
        self.schemes[size] = (scheme, context)  # it keeps weak references alone

    def rival(self, case: Case, num_bytes: int) -> tuple[float, float, float]:
        """Begin, end and CPU seconds of a rival's call; TorchRL's waits for all nodes' answers."""
        cpu_s, start_s = time.process_time(), time.monotonic()
        if case.way == "gloo":
            dist.broadcast(torch.ones(num_bytes // 4), 0, group=self.groups[case.num_nodes])
        else:
            scheme, context = self.schemes[case.size]
            scheme.send(context.policy, worker_ids=list(range(case.num_nodes)))
        return start_s, time.monotonic(), time.process_time() - cpu_s


def tcp_store(address: str, port: int, is_master: bool) -> dist.TCPStore:
    return dist.TCPStore(
        address, port, is_master=is_master, wait_for_workers=False, timeout=TIMEOUT
    )


def at_once(hosts: Sequence[Remote], method: str, *args: Any) -> list[Any]:
    for host in hosts:
        host.start(method, *args)
    return [host.result() for host in hosts]


class Hosts:
    """The learner's host and others, over an emulated network or (None) the loopback device."""

    def __init__(self, stack: contextlib.ExitStack, link: LinkModel | None) -> None:
        network, interface = None, "lo"
        self.address = "127.0.0.1"
        if link is not None:
            network = stack.enter_context(
                EmulatedNetwork(1 + NUM_NODES, bytes_per_s=link.bytes_per_s, delay_s=link.latency_s)
            )
            self.address, interface = network.address(0), "eth0"
        self.all = []
        for number in range(1 + NUM_NODES):
            address = self.address if network is None else network.address(number)
            enter = None if network is None else lambda host=number: network.enter(host)
            host = stack.enter_context(Remote(Host, number, address, interface, before=enter))
            self.all.append(host)
        self.learner, self.others = self.all[0], self.all[1:]
        self._sent_bytes: dict[Case, float] = {}

    def join_rivals(self, many_nodes: list[int], sizes: dict[str, int]) -> None:
        """Gloo groups of each number of nodes, and TorchRL's scheme for every size."""
        port = 20_000 + os.getpid() % 10_000
        at_once(self.all, "join_groups", self.address, port, many_nodes, len(self.all))
        for offset, (size, num_bytes) in enumerate(sizes.items(), start=1):
            at_once(self.all, "join_scheme", size, self.address, port + offset, num_bytes)

    def start(self, case: Case, num_bytes: int, link: LinkModel) -> None:
        """Begin a broadcast of ours; every node has its first version."""
        shape = "chain" if case.way == "whole" else case.way
        if case.way == "whole":  # where a message costs so much, one bucket is the best
            link = dataclasses.replace(link, overhead_s=1e6)
        address = self.learner.call("lead", case, num_bytes, link, shape)
        at_once(self.others[: case.num_nodes], "follow", case, num_bytes, address)
        at_once(self.others[: case.num_nodes], "arrival", case, 0)

    def bring(self, case: Case, num_bytes: int) -> dict[str, float]:
        """A version: seconds until all have it, and the learner's stall, CPU seconds and bytes."""
        nodes = self.others[: case.num_nodes]
        if case.way in RIVALS:
            callers = [self.learner, *(nodes if case.way == "gloo" else [])]
            calls = at_once(callers, "rival", case, num_bytes)
            start_s, end_s, cpu_s = calls[0]
            seconds = max(end for _, end, _ in calls) - start_s
            return {"seconds": seconds, "stall_s": end_s - start_s, "cpu_s": cpu_s}
        version, start_s, stall_s = self.learner.call("publish", case)
        seconds = max(at_once(nodes, "arrival", case, version)) - start_s
        cpu_s, total_bytes = self.learner.call("settle", case, version)
        sent_bytes = total_bytes - self._sent_bytes.get(case, 0.0)
        self._sent_bytes[case] = total_bytes
        return {"seconds": seconds, "stall_s": stall_s, "cpu_s": cpu_s, "bytes": sent_bytes}


def measure(
    link: LinkModel | None, sizes: dict[str, int], many_nodes: list[int], num_repeats: int
) -> dict[str, Any]:
    """Everything over one network."""
    model = LOOPBACK if link is None else link
    cases = [
        Case(size, num_nodes, way)
        for size in sizes
        for num_nodes in many_nodes
        for way in (*SHAPES, *RIVALS)
    ] + [Case("large", NUM_NODES, "whole")]
    generator = random.Random(0)
    samples: dict[Case, dict[str, list[float]]] = {case: defaultdict(list) for case in cases}
    with contextlib.ExitStack() as stack:
        hosts = Hosts(stack, link)
        hosts.join_rivals(many_nodes, sizes)
        for case in cases:
            if case.way not in RIVALS:
                hosts.start(case, sizes[case.size], model)
        for repeat in range(num_repeats + 1):
            for case in generator.sample(cases, len(cases)):
                for what, value in hosts.bring(case, sizes[case.size]).items():
                    if repeat:  # the first one opens connections
                        samples[case][what].append(value)
            log(f"repeat {repeat} of {num_repeats}")
        at_once(hosts.all, "close")
    return figures(samples, sizes, many_nodes, model)


def figures(
    samples: dict[Case, dict[str, list[float]]],
    sizes: dict[str, int],
    many_nodes: list[int],
    model: LinkModel,
) -> dict[str, Any]:
    predicted, pick_over_best = [], []
    for size, num_bytes in sizes.items():
        for num_nodes in many_nodes:
            medians = {
                shape: statistics.median(samples[Case(size, num_nodes, shape)]["seconds"])
                for shape in SHAPES
            }
            pick = choose_tree(num_nodes, num_bytes, model).shape
            pick_over_best.append(medians[pick] / min(medians.values()))
            for shape in SHAPES:
                plan = choose_tree(num_nodes, num_bytes, model, [shape])
                predicted.append(
                    {
                        "size": size,
                        "nodes": num_nodes,
                        "shape": shape,
                        "buckets": plan.num_buckets,
                        "predicted_s": round(plan.predicted_s, 4),
                        "measured_s": round(medians[shape], 4),
                        "is_pick": shape == pick,
                    }
                )

    def large(way: str, what: str, num_nodes: int = NUM_NODES) -> list[float]:
        if way == "pick":
            way = choose_tree(num_nodes, sizes["large"], model).shape
        return samples[Case("large", num_nodes, way)][what]

    def eight_over_one(way: str, what: str) -> dict[str, float]:
        return paired_ratio(large(way, what), large(way, what, 1))

    def ratio(way: str, other: str) -> dict[str, float]:
        return paired_ratio(large(way, "seconds"), large(other, "seconds"))

    return {
        "learner_cost_8_over_1": eight_over_one("pick", "cpu_s"),
        "learner_bytes_8_over_1": eight_over_one("pick", "bytes"),
        "ratio_vs_gloo_broadcast": ratio("gloo", "pick"),
        "ratio_vs_torchrl": ratio("torchrl", "pick"),
        "pipelining_gain": ratio("whole", "chain"),
        "model_pick_over_best": round(max(pick_over_best), 2),
        "predicted": predicted,
        "seconds": {
            f"{case.size}, {case.num_nodes} nodes, {case.way}": spread(found["seconds"], 4)
            for case, found in samples.items()
        },
    }


def main() -> None:
    args = arguments(__doc__, "1 and 8 nodes, 2 MB")
    torch.set_num_threads(1)
    megabytes, num_repeats = 2 if args.quick else 4, 5
    many_nodes = [1, NUM_NODES] if args.quick else [1, 2, 4, NUM_NODES]
    sizes = {"large": megabytes << 20, "small": SMALL_BYTES}
    obstacle = EmulatedNetwork.obstacle()
    results = {}
    for network, link in (("emulated", LINK), ("loopback", None)):
        if network == "loopback" or not obstacle:
            log(network)
            results[network] = measure(link, sizes, many_nodes, num_repeats)
    first = next(iter(results))
    result = {
        "network": first,
        "network_obstacle": obstacle,
        **results.pop(first),
        **results,
        "workload": {
            "bytes": sizes,
            "nodes": many_nodes,
            "repeats": num_repeats,
            "emulated_bytes_per_s": LINK.bytes_per_s,
            "emulated_latency_s": LINK.latency_s,
        },
    }
    report("weight_broadcast", result, args.quick)


if __name__ == "__main__":
    main()
