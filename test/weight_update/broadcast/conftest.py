# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

"""A learner and other nodes, each a process with its own store."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_dvla.testing import EmulatedNetwork, Remote
from torchrl_dvla.weight_update import Transfer, WeightBroadcast, WeightRelay, WeightStore


class Stamped(nn.Module):
    """Weights that all hold their version, beside frozen ones that hold -7."""

    def __init__(self, value: float, num_kib: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.full((num_kib * 256,), value) for _ in range(4))
        self.frozen = nn.Parameter(torch.full((num_kib * 256,), -7.0), requires_grad=False)

    def values(self) -> set[float]:
        return {float(v) for part in self.parts for v in torch.aminmax(part.detach())}


class Gate:
    """A place in a transfer where a node stops until it is let go, if that is ever."""

    def __init__(self, step: str) -> None:
        self.step = step
        context = get_context("fork")
        self.reached: Event = context.Event()
        self.open: Event = context.Event()

    def __call__(self, step: str) -> None:
        if step == self.step and not self.open.is_set():
            self.reached.set()
            assert self.open.wait(60.0)


class LearnerNode:
    def __init__(self, num_kib: int, gate: Gate | None, options: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.module = Stamped(0.0, num_kib)
        self.store = WeightStore(self.module, 4, trainable_only=True)
        self.broadcast = WeightBroadcast(self.store.reader("broadcast"), **options)
        if gate is not None:
            self.broadcast._gate = gate

    def address(self) -> str:
        return self.broadcast.address

    def publish(self) -> int:
        with torch.no_grad():
            torch._foreach_add_(list(self.module.parts), 1.0)
        return self.store.publish()

    def wait(self, version: int, num_nodes: int, timeout_s: float = 60.0) -> dict[str, int]:
        self.broadcast.wait(version, timeout_s, num_nodes=num_nodes)
        return self.broadcast.nodes()

    def wait_for_loss(self, num_left: int) -> dict[str, int]:
        with self.broadcast._changed:
            assert self.broadcast._changed.wait_for(
                lambda: self.broadcast._telemetry.num_left >= num_left, timeout=60.0
            )
        return self.broadcast.nodes()

    def wait_until_idle(self) -> None:
        with self.broadcast._changed:
            assert self.broadcast._changed.wait_for(
                lambda: self.broadcast._slot is None, timeout=60.0
            )

    def tell(self) -> tuple[dict[str, float], dict[str, int], tuple[str, int]]:
        return self.broadcast.stats(), self.broadcast.edge_bytes(), self.broadcast.plan()

    def transfers(self) -> list[Transfer]:
        return self.broadcast.take_transfers()

    def payload_bytes(self) -> tuple[int, int]:
        return self.store.layout.slot_bytes, self.store.layout.frozen_bytes

    def close(self) -> list[str]:
        self.broadcast.close()
        self.store.close()
        return [t.name for t in threading.enumerate() if t.name.startswith("dvla")]


class RelayNode:
    def __init__(self, address: str, name: str, num_kib: int, gate: Gate | None) -> None:
        torch.set_num_threads(1)
        with torch.device("meta"):
            policy = Stamped(0.0, num_kib)
        self.relay = WeightRelay(address, policy, name=name)
        if gate is not None:
            self.relay._gate = gate
        self.served = Stamped(-1.0, num_kib)
        self.reader = self.relay.store.reader("worker")

    def wait(self, version: int, timeout_s: float = 60.0) -> int:
        return self.relay.wait(version, timeout_s)

    def read(self) -> tuple[int, set[float], set[float]]:
        """The adopted version, what its weights hold, and what the frozen ones do."""
        version = self.reader.adopt_into(self.served)
        return version, self.served.values(), set(self.served.frozen.unique().tolist())

    def is_connected(self) -> bool:
        return self.relay.is_connected

    def wait_for_loss(self) -> None:
        with self.relay._changed:
            assert self.relay._changed.wait_for(lambda: not self.relay.is_connected, timeout=60.0)

    def close(self) -> list[str]:
        self.reader.close()
        self.relay.close()
        return [t.name for t in threading.enumerate() if t.name.startswith("dvla")]


class Cluster:
    """Processes of one test."""

    def __init__(self, stack: contextlib.ExitStack, num_kib: int) -> None:
        self._stack = stack
        self.num_kib = num_kib
        self.network: EmulatedNetwork | None = None
        self.address = ""

    def _on(self, host: int) -> Callable[[], None] | None:
        network = self.network
        return None if network is None else lambda: network.enter(host)

    def learner(self, gate: Gate | None = None, **options: Any) -> Remote:
        if self.network is not None:
            options["host"] = self.network.address(0)
        remote = Remote(LearnerNode, self.num_kib, gate, options, before=self._on(0))
        self._stack.callback(remote.close)
        self.address = remote.call("address")
        return remote

    def relay(self, name: str, gate: Gate | None = None, host: int = 0) -> Remote:
        remote = Remote(RelayNode, self.address, name, self.num_kib, gate, before=self._on(host))
        self._stack.callback(remote.close)
        return remote


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(stack, num_kib=256)  # 1 MiB of four live tensors: a handful of buckets


@pytest.fixture
def make_gate() -> type[Gate]:
    return Gate
