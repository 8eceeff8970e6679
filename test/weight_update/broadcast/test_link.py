# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
import torch

from torchrl_dvla.testing import Remote
from torchrl_dvla.weight_update.broadcast.link import Edge, EdgeError
from torchrl_dvla.weight_update.broadcast.rendezvous import EdgeStore

TIMEOUT_S = 0.5


class Stopping:
    """An end that tells its address and is stopped before it can connect."""

    def open(self, told: Connection, is_parent: bool) -> None:
        def tell(key: str, value: bytes) -> None:
            told.send((key, value))
            os.kill(os.getpid(), signal.SIGSTOP)

        Edge(EdgeStore(tell), is_parent=is_parent, host="127.0.0.1", timeout_s=TIMEOUT_S)


def make_pair() -> tuple[Edge, Edge]:
    stores = [EdgeStore(lambda key, value: stores[1].hear(key, value))]
    stores.append(EdgeStore(lambda key, value: stores[0].hear(key, value)))

    def end(is_parent: bool) -> Edge:
        store = stores[is_parent]
        store.patience_s = 10.0
        return Edge(store, is_parent=is_parent, host="127.0.0.1", timeout_s=TIMEOUT_S)

    with ThreadPoolExecutor() as pool:
        parent, child = pool.map(end, (True, False))
    return parent, child


def test_buckets_arrive_where_they_were_posted() -> None:
    parent, child = make_pair()
    for value, round_ in enumerate((1, 2, 5, (1 << 40) + 7)):
        for edge in (parent, child):
            edge.begin(round_)
        into = [torch.zeros(2), torch.zeros(3)]
        for memory in into:
            child.post(memory)
        parent.post(torch.full((2,), 10.0 + value))
        parent.post(torch.full((3,), 20.0 + value))
        child.wait_all(), parent.wait_all()
        assert into[0].tolist() == [10.0 + value] * 2
        assert into[1].tolist() == [20.0 + value] * 3
    parent.close(), child.close()


def test_nothing_arrives_from_another_round() -> None:
    parent, child = make_pair()
    parent.begin(2), child.begin(3)
    memory = torch.zeros(2)
    child.post(memory)
    parent.post(torch.ones(2))
    with pytest.raises(EdgeError, match="The edge broke"):
        child.wait()
    assert memory.tolist() == [0.0, 0.0]
    parent.close(), child.close()


# Which end connects and which one waits is decided by their addresses, so by chance.
@pytest.mark.parametrize("attempt", range(4))
def test_opening_ends_in_time_though_the_other_end_is_stopped(attempt: int) -> None:
    is_parent = bool(attempt % 2)
    here, there = get_context("fork").Pipe()
    with Remote(Stopping) as other:
        other.start("open", there, not is_parent)
        store = EdgeStore(lambda key, value: None)
        assert here.poll(30.0)
        store.hear(*here.recv())
        start_s = time.monotonic()
        try:
            Edge(store, is_parent=is_parent, host="127.0.0.1", timeout_s=TIMEOUT_S).close()
        except EdgeError as error:
            assert "The edge was not opened" in str(error)
        assert time.monotonic() - start_s < 2 * TIMEOUT_S
