# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

"""A learner and other nodes, each a process with its own store."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_dvla.testing import EmulatedNetwork, Remote
from torchrl_dvla.weight_update import Transfer, WeightBroadcast, WeightRelay, WeightStore
from torchrl_dvla.weight_update.broadcast.transfer import NodeTransfer


class VersionModule(nn.Module):
    """Weights that all hold their version, beside frozen ones that hold -7."""

    def __init__(self, value: float, num_kib: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.full((num_kib * 256,), value) for _ in range(4))
        self.frozen = nn.Parameter(torch.full((num_kib * 256,), -7.0), requires_grad=False)

    def values(self) -> set[float]:
        return {float(v) for part in self.parts for v in torch.aminmax(part.detach())}


class Gate:
    """A bucket of the live weights that a node holds back while this is closed."""

    def __init__(self, index: int) -> None:
        self.index = index
        context = get_context("fork")
        self.reached, self._open = context.Event(), context.Event()
        self.open()

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def install(self) -> None:
        """Hold back what this process forwards."""
        forward = NodeTransfer._forward

        def gated(transfer: NodeTransfer, kind: str, index: int, *args: Any) -> None:
            if (kind, index) == ("live", self.index) and not self._open.is_set():
                self.reached.set()
                assert self._open.wait(60.0)
            forward(transfer, kind, index, *args)

        NodeTransfer._forward = gated


class Node:
    """What a learner's and another node have in common: gate, network and end."""

    def __init__(self, gate: Gate | None) -> None:
        torch.set_num_threads(1)
        if gate is not None:
            gate.install()

    def close(self) -> list[str]:
        """Close all of it; names of the threads that are left."""
        for part in self.parts:
            part.close()
        return [t.name for t in threading.enumerate() if t.name.startswith("dvla")]


class LearnerNode(Node):
    def __init__(self, num_kib: int, gate: Gate | None, options: dict[str, Any]) -> None:
        super().__init__(gate)
        self.module = VersionModule(0.0, num_kib)
        self.store = WeightStore(self.module, 4, trainable_only=True)
        self.broadcast = WeightBroadcast(self.store.reader("broadcast"), **options)
        self.parts = (self.broadcast, self.store)

    def address(self) -> str:
        return self.broadcast.address

    def publish(self) -> int:
        with torch.no_grad():
            torch._foreach_add_(list(self.module.parts), 1.0)
        return self.store.publish()

    def wait(self, version: int, num_nodes: int, timeout_s: float = 60.0) -> dict[str, int]:
        self.broadcast.wait(version, timeout_s, num_nodes=num_nodes)
        return self.broadcast.nodes()

    def wait_for_departures(self, num_left: int) -> dict[str, int]:
        with self.broadcast._changed:
            assert self.broadcast._changed.wait_for(
                lambda: self.broadcast.stats()["broadcast/nodes_left"] >= num_left, timeout=60.0
            )
        return self.broadcast.nodes()

    def wait_until_idle(self) -> None:
        with self.broadcast._changed:
            assert self.broadcast._changed.wait_for(
                lambda: self.broadcast._slot is None, timeout=60.0
            )

    def stats(self) -> dict[str, float]:
        return self.broadcast.stats()

    def plan(self) -> tuple[str, int]:
        plan = self.broadcast._rounds.tree_plan
        return plan.shape, plan.num_buckets

    def transfers(self) -> list[Transfer]:
        return self.broadcast.take_transfers()

    def payload_bytes(self) -> tuple[int, int]:
        return self.store.layout.slot_bytes, self.store.layout.frozen_bytes


class RelayNode(Node):
    def __init__(self, address: str, name: str, num_kib: int, gate: Gate | None) -> None:
        super().__init__(gate)
        with torch.device("meta"):
            policy = VersionModule(0.0, num_kib)
        self.relay = WeightRelay(address, policy, name=name)
        self.served = VersionModule(-1.0, num_kib)
        self.reader = self.relay.store.reader("worker")
        self.parts = (self.reader, self.relay)

    def wait(self, version: int, timeout_s: float = 60.0) -> int:
        return self.relay.wait(version, timeout_s)

    def read(self) -> tuple[int, set[float], set[float]]:
        """The adopted version, what its weights hold, and what the frozen ones do."""
        version = self.reader.adopt_into(self.served)
        return version, self.served.values(), set(self.served.frozen.unique().tolist())

    def is_connected(self) -> bool:
        return self.relay.is_connected

    def wait_for_disconnect(self) -> None:
        with self.relay._changed:
            assert self.relay._changed.wait_for(lambda: not self.relay.is_connected, timeout=60.0)


class Cluster:
    """Processes of one test."""

    def __init__(self, stack: contextlib.ExitStack, num_kib: int) -> None:
        self._stack = stack
        self.num_kib = num_kib
        self.network: EmulatedNetwork | None = None
        self.address = ""
        self.learner: Any = None

    def _start(self, host: int, factory: Callable[..., Any], *args: Any) -> Any:
        network = self.network
        enter = None if network is None else lambda: network.enter(host)
        return self._stack.enter_context(Remote(factory, *args, before=enter))

    def start_learner(self, gate: Gate | None = None, **options: Any) -> Any:
        if self.network is not None:
            options["host"] = self.network.address(0)
        self.learner = self._start(0, LearnerNode, self.num_kib, gate, options)
        self.address = self.learner.call("address")
        return self.learner

    def start_relays(self, *names: str, gates: Mapping[str, Gate | None] = {}) -> list[Any]:
        """One after the other, so that this is their order in the tree; on the hosts 1, 2, ..."""
        relays = []
        for host, name in enumerate(names, start=1):
            gate = gates.get(name)
            relays.append(self._start(host, RelayNode, self.address, name, self.num_kib, gate))
            relays[-1].call("wait", 0)
        return relays


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(stack, num_kib=256)  # 1 MiB of four live tensors: a handful of buckets


@pytest.fixture
def gate() -> Gate:
    """In the middle of a transfer."""
    return Gate(1)
