# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from torchrl_dvla.testing import Remote
from torchrl_dvla.weight_update.broadcast.edge import Edge, EdgeError, EdgeStore, Rendezvous

SOON = datetime.timedelta(seconds=30)


def lost(**message: Any) -> None:
    """A network that loses everything."""


def make_store(send: Callable[[str, bytes], None]) -> EdgeStore:
    store = EdgeStore()
    store.send, store.patience_s = send, 30.0
    return store


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Edge, Edge]]:
    """Both ends of an edge, which may have another time-out than 30 s."""
    timeout_s = getattr(request, "param", 30.0)
    stores = [make_store(lambda key, value: stores[1].receive(key, value))]
    stores.append(make_store(lambda key, value: stores[0].receive(key, value)))

    def end(is_parent: bool) -> Edge:
        store = stores[is_parent]
        return Edge(store, is_parent=is_parent, host="127.0.0.1", timeout_s=timeout_s)

    with ThreadPoolExecutor() as pool:
        parent, child = pool.map(end, (True, False))
    yield parent, child
    parent.close(), child.close()


def test_buckets_arrive_where_they_were_posted(pair: tuple[Edge, Edge]) -> None:
    parent, child = pair
    for value, round_ in enumerate((1, 2, 5, (1 << 40) + 7)):
        for edge in pair:
            edge.begin_round(round_)
        into = [torch.zeros(2), torch.zeros(3)]
        for memory in into:
            child.post(memory)
        parent.post(torch.full((2,), 10.0 + value))
        parent.post(torch.full((3,), 20.0 + value))
        child.wait_all(), parent.wait_all()
        assert into[0].tolist() == [10.0 + value] * 2
        assert into[1].tolist() == [20.0 + value] * 3


@pytest.mark.parametrize("pair", [1.0], indirect=True)
def test_nothing_arrives_from_another_round(pair: tuple[Edge, Edge]) -> None:
    parent, child = pair
    parent.begin_round(2), child.begin_round(3)
    memory = torch.zeros(2)
    child.post(memory)
    parent.post(torch.ones(2))
    with pytest.raises(EdgeError, match="The edge broke"):
        child.wait()
    assert memory.tolist() == [0.0, 0.0]


class StoppedEnd:
    """An end that sends its address and is stopped before it can connect."""

    def open(self, connection: Connection, is_parent: bool) -> None:
        def send(key: str, value: bytes) -> None:
            connection.send((key, value))
            os.kill(os.getpid(), signal.SIGSTOP)

        Edge(make_store(send), is_parent=is_parent, host="127.0.0.1", timeout_s=1.0)


# Which end connects and which one waits is decided by their addresses, so by chance.
@pytest.mark.parametrize("attempt", range(4))
def test_opening_ends_in_time_though_the_other_end_is_stopped(attempt: int) -> None:
    is_parent = bool(attempt % 2)
    here, there = get_context("fork").Pipe()
    with Remote(StoppedEnd) as other:
        other.start("open", there, not is_parent)
        store = make_store(lambda key, value: None)
        assert here.poll(30.0)
        store.receive(*here.recv())
        start_s = time.monotonic()
        try:
            Edge(store, is_parent=is_parent, host="127.0.0.1", timeout_s=1.0).close()
        except EdgeError as error:
            assert "The edge was not opened" in str(error)
        assert time.monotonic() - start_s < 4.0  # Gloo alone would wait for five time-outs


def test_what_comes_early_is_kept_for_the_edge() -> None:
    sent: list[dict[str, Any]] = []
    here, there = Rendezvous(lambda **message: sent.append(message)), Rendezvous(lost)
    edge = (4, 0, 7)
    here.open(edge, peer=7).set("0/0", b"\x00\xffaddress")
    (message,) = sent
    assert message.pop("node") == 7
    there.receive(**message)  # before the other end has opened it
    store = there.open(edge, peer=0)
    store.wait(["0/0"], SOON)
    assert store.get("0/0") == b"\x00\xffaddress"


def test_a_wait_ends_when_the_other_end_is_gone() -> None:
    rendezvous = Rendezvous(lost)
    store = rendezvous.open((1, 0, 3), peer=3)
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        store.wait(["0/1"], SOON)

    with ThreadPoolExecutor() as pool:
        future = pool.submit(wait)
        assert waiting.wait(30.0)
        rendezvous.fail_peer(2)  # another node
        rendezvous.fail_peer(3)
        with pytest.raises(RuntimeError, match="the other end is gone"):  # not: in time
            future.result()
    with pytest.raises(RuntimeError, match="the other end is gone"):
        rendezvous.open((1, 3, 4), peer=3).wait(["0/0"], SOON)  # it does not come back


def test_deadlines_and_the_end() -> None:
    rendezvous = Rendezvous(lost)
    store = rendezvous.open((1, 0, 3), peer=3)
    with pytest.raises(RuntimeError, match="did not come in time"):
        store.wait(["0/1"], datetime.timedelta(seconds=0.01))
    rendezvous.close()
    for edge in ((1, 0, 3), (2, 0, 3)):
        with pytest.raises(RuntimeError, match="this node leaves"):
            rendezvous.open(edge, peer=3).wait(["0/1"], SOON)


def test_old_edges_leave_nothing() -> None:
    rendezvous = Rendezvous(lost)
    for epoch in range(1, 6):
        rendezvous.receive([epoch, 0, 1], "key", "")
        rendezvous.open((epoch, 1, 2), peer=2)
    rendezvous.drop_before(5)
    assert set(rendezvous._stores) == {(5, 0, 1), (5, 1, 2)}
