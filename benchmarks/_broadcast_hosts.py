# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The learner's host and others, each a process, for ``weight_broadcast.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrl.weight_update import DistributedWeightSyncScheme

from torchrl_dvla.testing import EmulatedNetwork, Remote
from torchrl_dvla.weight_update import (
    LinkModel,
    WeightBroadcast,
    WeightReader,
    WeightRelay,
    WeightStore,
)

__all__ = ["Hosts"]

_TIMEOUT = datetime.timedelta(seconds=60)


class Scheme(DistributedWeightSyncScheme):
    """TorchRL's scheme; its store would listen where the host's *name* leads: not when emulated."""

    def __init__(self, address: str, port: int) -> None:
        super().__init__(timeout=60.0)
        self._store_info = {"host": address, "port": port}

    def _make_store(self, is_master: bool, **kwargs: Any) -> dist.TCPStore:
        host, port = self._store_info["host"], self._store_info["port"]
        return dist.TCPStore(
            host, port, is_master=is_master, wait_for_workers=False, timeout=_TIMEOUT
        )


class Context:
    """What TorchRL's scheme asks for the policy that receives."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy


class Host:
    """The learner's host is number 0. What is timed runs here, by the clock that all share."""

    def __init__(self, number: int, address: str, interface: str) -> None:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        self.number, self.address = number, address
        self.parts: dict[str, list[Any]] = {}  # what a way of ours has here, to be closed in order
        self.stores: dict[str, WeightStore] = {}
        self.broadcasts: dict[str, WeightBroadcast] = {}
        self.schemes: dict[str, tuple[Scheme, Context]] = {}
        self.cpu_s = 0.0

    # -- ours ----------------------------------------------------------------------------------

    def store(self, way: str, num_bytes: int) -> WeightReader:
        """What the learner publishes into, and the broadcast's place in it."""
        store = self.stores[way] = WeightStore(nn.Linear(num_bytes // 4, 1, bias=False), 4)
        self.parts[way] = [store]
        return store.reader("broadcast")

    def lead(
        self,
        way: str,
        place: WeightReader | int,
        shapes: Sequence[str],
        link: LinkModel,
        num_buckets: int | None,
    ) -> str:
        """Begin a broadcast from a store that is elsewhere, or made here; its address."""
        reader = self.store(way, place) if isinstance(place, int) else place
        broadcast = WeightBroadcast(reader, host=self.address, link=link, shapes=shapes)
        choose = broadcast._rounds._choose
        if num_buckets is not None:
            broadcast._rounds._choose = lambda num_nodes: dataclasses.replace(
                choose(num_nodes), num_buckets=num_buckets
            )
        self.broadcasts[way] = broadcast
        self.parts.setdefault(way, []).insert(0, broadcast)
        return broadcast.address

    def follow(self, way: str, address: str, num_bytes: int) -> None:
        policy = nn.Linear(num_bytes // 4, 1, bias=False, device="meta")
        self.parts[way] = [WeightRelay(address, policy, name=f"node {self.number}")]

    def publish(self, way: str) -> tuple[int, float, float]:
        """A version; when the call began, and how long it took."""
        self.note_cpu()
        start_s = time.monotonic()
        version = self.stores[way].publish()
        return version, start_s, time.monotonic() - start_s

    def note_cpu(self) -> None:
        self.cpu_s = time.process_time()

    def spent_cpu(self) -> float:
        """CPU seconds of this process since they were noted."""
        return time.process_time() - self.cpu_s

    def arrival(self, way: str, version: int) -> float:
        self.parts[way][0].wait(version)
        return time.monotonic()

    def settle(self, way: str, version: int, num_nodes: int) -> None:
        """Wait until all have the version and nothing is on its way."""
        broadcast = self.broadcasts[way]
        broadcast.wait(version, num_nodes=num_nodes)
        with broadcast._changed:
            assert broadcast._changed.wait_for(lambda: broadcast._slot is None, timeout=60.0)

    def sent_bytes(self, way: str) -> float:
        return self.broadcasts[way].stats()["broadcast/learner_sent_bytes"]

    def leave(self, way: str) -> None:
        for part in self.parts.pop(way, []):
            part.close()

    # -- the rivals ----------------------------------------------------------------------------

    def join_groups(self, address: str, port: int, num_nodes: list[int], num_hosts: int) -> None:
        """One Gloo group of the learner and the first n others, for each n."""
        store = dist.TCPStore(
            address, port, is_master=self.number == 0, wait_for_workers=False, timeout=_TIMEOUT
        )
        dist.init_process_group(
            "gloo", store=store, rank=self.number, world_size=num_hosts, timeout=_TIMEOUT
        )
        self.groups = {n: dist.new_group(list(range(n + 1))) for n in num_nodes}

    def gloo(self, num_bytes: int, num_nodes: int) -> tuple[float, float, float]:
        """Begin, end and CPU seconds of one ``torch.distributed.broadcast``."""
        tensor = torch.ones(num_bytes // 4)
        cpu_s, start_s = time.process_time(), time.monotonic()
        dist.broadcast(tensor, 0, group=self.groups[num_nodes])
        return start_s, time.monotonic(), time.process_time() - cpu_s

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

    def send(self, size: str, num_nodes: int) -> tuple[float, float, float]:
        """Begin, end and CPU seconds of ``send``, which waits until all nodes have the weights."""
        cpu_s, start_s = time.process_time(), time.monotonic()
        scheme, context = self.schemes[size]
        scheme.send(context.policy, worker_ids=list(range(num_nodes)))
        return start_s, time.monotonic(), time.process_time() - cpu_s


class Hosts:
    """The learner's host and ``num_nodes`` others.

    Args:
        stack (contextlib.ExitStack): ends all of it.
        num_nodes (int): hosts beside the learner's.
        link (LinkModel, optional): what lies between them, emulated; None for the loopback device.
    """

    def __init__(self, stack: contextlib.ExitStack, num_nodes: int, link: LinkModel | None) -> None:
        network = None
        if link is not None:
            network = stack.enter_context(
                EmulatedNetwork(1 + num_nodes, bytes_per_s=link.bytes_per_s, delay_s=link.latency_s)
            )
        self._stack, self._network = stack, network
        self.all = [self._process_on(number) for number in range(1 + num_nodes)]
        self.leaders: dict[str, Remote] = {}  # who broadcasts, by way
        self.address = "127.0.0.1" if network is None else network.address(0)
        self.learner, self.others = self.all[0], self.all[1:]
        self._port = 20_000 + os.getpid() % 10_000

    def _process_on(self, number: int) -> Remote:
        network = self._network
        address = "127.0.0.1" if network is None else network.address(number)
        enter = None if network is None else lambda: network.enter(number)
        interface = "lo" if network is None else "eth0"
        return self._stack.enter_context(Remote(Host, number, address, interface, before=enter))

    def each(self, method: str, *args: Any, num_nodes: int | None = None) -> list[Any]:
        """Call a method on all hosts, or the learner's and the first few others, at once."""
        hosts = self.all if num_nodes is None else self.all[: 1 + num_nodes]
        return _at_once(hosts, method, *args)

    def start(
        self,
        way: str,
        num_bytes: int,
        num_nodes: int,
        link: LinkModel,
        *,
        shapes: Sequence[str] = ("chain", "binomial"),
        num_buckets: int | None = None,
        apart: bool = False,
    ) -> None:
        """Begin a broadcast of ours; every node has its first version.

        ``num_buckets`` are what the model chooses if they are not given; ``apart`` has the
        broadcast in a process of its own on the learner's host.
        """
        leader = self.leaders[way] = self._process_on(0) if apart else self.learner
        place = self.learner.call("store", way, num_bytes) if apart else num_bytes
        address = leader.call("lead", way, place, shapes, link, num_buckets)
        _at_once(self.others[:num_nodes], "follow", way, address, num_bytes)
        leader.call("settle", way, 0, num_nodes)

    def stop(self, way: str, num_nodes: int) -> None:
        _at_once(self.others[:num_nodes], "leave", way)
        for host in {self.leaders[way], self.learner}:
            host.call("leave", way)

    def bring(self, way: str, num_nodes: int) -> tuple[float, float, float, float]:
        """A version of ours: seconds until all have it, and of the publish; CPU seconds.

        Those of the learner's process, and of the one that broadcasts, which may be the same.
        """
        leader = self.leaders[way]
        leader.call("note_cpu")
        version, start_s, stall_s = self.learner.call("publish", way)
        nodes = self.others[:num_nodes]
        for host in nodes:
            host.start("arrival", way, version)
        seconds = max(host.result() for host in nodes) - start_s
        leader.call("settle", way, version, num_nodes)
        return seconds, stall_s, self.learner.call("spent_cpu"), leader.call("spent_cpu")

    def sent_bytes(self, way: str) -> float:
        """Bytes that the learner's node has sent."""
        return self.leaders[way].call("sent_bytes", way)

    def join_rivals(self, num_nodes: list[int], sizes: dict[str, int]) -> None:
        """Gloo groups of each number of nodes, and TorchRL's scheme for every size."""
        self.each("join_groups", self.address, self._port, num_nodes, len(self.all))
        for port, (size, num_bytes) in enumerate(sizes.items(), start=self._port + 1):
            self.each("join_scheme", size, self.address, port, num_bytes)

    def gloo(self, num_bytes: int, num_nodes: int) -> tuple[float, float, float]:
        """As :meth:`bring`; the learner is held up for as long as its call takes."""
        told = self.each("gloo", num_bytes, num_nodes, num_nodes=num_nodes)
        (start_s, end_s, cpu_s), *_ = told
        return max(end for _, end, _ in told) - start_s, end_s - start_s, cpu_s

    def torchrl(self, size: str, num_nodes: int) -> tuple[float, float, float]:
        """As :meth:`bring`; the learner is held up until all nodes have answered."""
        start_s, end_s, cpu_s = self.learner.call("send", size, num_nodes)
        return end_s - start_s, end_s - start_s, cpu_s


def _at_once(hosts: Sequence[Remote], method: str, *args: Any) -> list[Any]:
    for host in hosts:
        host.start(method, *args)
    return [host.result() for host in hosts]
