# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from multiprocessing.connection import wait as wait_for
from typing import Any

import pytest

from torchrl_dvla.weight_update.broadcast.channel import Channel, ChannelError
from torchrl_dvla.weight_update.broadcast.peers import Peer, Peers


@pytest.fixture
def peers() -> Iterator[Peers]:
    made = Peers("127.0.0.1", 0, timeout_s=10.0, welcome={"run": "r"})
    yield made
    made.close()


def connect(peers: Peers) -> Channel:
    return Channel.connect("127.0.0.1", peers.port, timeout_s=10.0)


def take(peers: Peers, num_messages: int) -> list[tuple[Peer, dict[str, Any]]]:
    taken: list[tuple[Peer, dict[str, Any]]] = []
    while len(taken) < num_messages:
        taken += peers.receive(10.0)
    return taken


def hear(channel: Channel, kind: str) -> dict[str, Any]:
    """The next message of a kind; raises ChannelError at the end."""
    while True:
        assert wait_for([channel.socket], 10.0)
        for message in channel.receive():
            if message["kind"] == kind:
                return message


def join(peers: Peers, node: int) -> Channel:
    channel = connect(peers)
    channel.send("join", name=str(node))
    ((peer, _),) = take(peers, 1)
    peers.admit(peer, node)
    return channel


def test_the_others_are_told_who_is_gone(peers: Peers) -> None:
    first, second = join(peers, 1), join(peers, 2)
    assert hear(first, "welcome")["run"] == "r"
    peers.say(2, "order", number=7)
    assert hear(second, "order")["number"] == 7
    second.close()
    left: list[int] = []
    while not left:
        list(peers.receive(10.0))
        left = peers.take_left()
    assert left == [2]
    assert peers.take_left() == []
    assert hear(first, "gone")["node"] == 2
    peers.say(2, "order")  # nobody is there: nothing happens
    first.close()


def test_a_silent_peer_is_dropped(peers: Peers) -> None:
    channel = join(peers, 1)
    peers._timeout_s = 0.0
    peers._next_beat_s = 0.0
    list(peers.receive(0.0))
    assert peers.take_left() == [1]
    with pytest.raises(ChannelError):
        hear(channel, "never")
    channel.close()


def test_nothing_is_heard_of_a_peer_after_it_was_dropped(peers: Peers) -> None:
    channel = connect(peers)
    channel.send("join")
    channel.send("join")
    heard = 0
    with contextlib.suppress(ChannelError):
        while True:
            for peer, _ in peers.receive(0.05):
                heard += 1
                peers.drop(peer, "it is not wanted")
            hear(channel, "never") if heard else None
    assert heard == 1
    assert peers.take_left() == []  # it was no member
    channel.close()


def test_waking_ends_a_wait_at_once(peers: Peers) -> None:
    list(peers.receive(0.0))  # the first signs of life; the next are due after two seconds
    for _ in range(100_000):  # more than a socket's buffer holds: nobody is blocked
        peers.wake()
    start_s = time.monotonic()
    assert list(peers.receive(60.0)) == []
    assert time.monotonic() - start_s < 1.0


def test_a_long_wait_ends_when_signs_of_life_are_due() -> None:
    peers = Peers("127.0.0.1", 0, timeout_s=0.1, welcome={})
    list(peers.receive(0.0))
    start_s = time.monotonic()
    assert list(peers.receive(60.0)) == []
    assert 0.02 <= time.monotonic() - start_s + 0.001 < 30.0  # a fifth of the time-out
    peers.close()
