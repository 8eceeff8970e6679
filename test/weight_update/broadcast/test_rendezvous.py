# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import datetime
import threading
import time

import pytest

from torchrl_dvla.weight_update.broadcast.rendezvous import Rendezvous, edge_name

SOON = datetime.timedelta(seconds=30)


def silent(node: int, edge: str, key: str, text: str) -> None:
    """A network that loses everything."""


def test_what_comes_early_is_kept_for_the_edge() -> None:
    sent: list[tuple[int, str, str, str]] = []
    here, there = Rendezvous(lambda *args: sent.append(args)), Rendezvous(silent)
    edge = edge_name(4, 0, 7)
    here.store(edge, peer=7).set("0/0", b"\x00address")
    ((node, *rest),) = sent
    assert node == 7
    there.hear(*rest)  # before the other end has opened it
    store = there.store(edge, peer=0)
    store.wait(["0/0"], SOON)
    assert store.get("0/0") == b"\x00address"


def test_a_wait_ends_when_the_other_end_is_gone() -> None:
    rendezvous = Rendezvous(silent)
    store = rendezvous.store(edge_name(1, 0, 3), peer=3)
    problems: list[str] = []
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        try:
            store.wait(["0/1"], SOON)
        except RuntimeError as error:
            problems.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(30.0)
    start_s = time.monotonic()
    rendezvous.gone(2)  # somebody else
    rendezvous.gone(3)
    thread.join(30.0)
    assert problems == ["the other end is gone"]
    assert time.monotonic() - start_s < 20.0
    with pytest.raises(RuntimeError, match="the other end is gone"):
        rendezvous.store(edge_name(1, 3, 4), peer=3).wait(["0/0"], SOON)  # it does not come back


def test_deadlines_and_the_end() -> None:
    rendezvous = Rendezvous(silent)
    store = rendezvous.store(edge_name(1, 0, 3), peer=3)
    with pytest.raises(RuntimeError, match="did not come in time"):
        store.wait(["0/1"], datetime.timedelta(seconds=0.01))
    rendezvous.close()
    for edge in (edge_name(1, 0, 3), edge_name(2, 0, 3)):
        with pytest.raises(RuntimeError, match="this node leaves"):
            rendezvous.store(edge, peer=3).wait(["0/1"], SOON)


def test_old_edges_leave_nothing() -> None:
    rendezvous = Rendezvous(silent)
    for epoch in range(1, 6):
        rendezvous.hear(edge_name(epoch, 0, 1), "key", "")
        rendezvous.store(edge_name(epoch, 1, 2), peer=2)
    rendezvous.forget_before(5)
    assert set(rendezvous._stores) == {"5/0-1", "5/1-2"}
    assert set(rendezvous._peers) == {"5/1-2"}
