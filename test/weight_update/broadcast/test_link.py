# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest

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
