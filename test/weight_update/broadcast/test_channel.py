# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from torchrl_dvla.weight_update.broadcast.channel import (
    Channel,
    ChannelError,
    Peers,
    format_address,
    parse_address,
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close(), theirs.close()


@pytest.fixture
def peers() -> Iterator[Peers]:
    made = Peers("127.0.0.1", 0, timeout_s=300.0, welcome={"run": "r"})
    yield made
    made.close()


def connect(peers: Peers) -> Channel:
    return Channel.connect("127.0.0.1", peers.port, timeout_s=30.0)


def wait_for(channel: Channel, kind: str) -> dict[str, Any]:
    return channel.wait_for(kind, time.monotonic() + 30.0)


def join(peers: Peers, node: int) -> Channel:
    channel = connect(peers)
    channel.send("join", name=str(node))
    while not (messages := list(peers.receive(30.0))):
        pass
    ((peer, _),) = messages
    peers.register(peer, node)
    return channel


def test_messages_come_whole_however_they_are_cut(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    stream = b'{"kind": "a"}\n{"kind": "b", "x": 1}\n'
    seen = []
    for position in range(len(stream)):
        other.send(stream[position : position + 1])
        seen += channel.receive()
    assert seen == [{"kind": "a"}, {"kind": "b", "x": 1}]


def test_a_reader_that_does_not_read_blocks_nobody(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    text = "x" * 100_000
    for index in range(50):  # five megabytes: far more than a socket takes
        channel.send("much", index=index, text=text)
    reader = Channel(other)
    seen: list[int] = []
    for _ in range(1000):
        seen += [message["index"] for message in reader.receive()]
        channel.flush()
    assert seen == list(range(50))


def test_what_came_before_the_end_is_returned(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    other.send(b'{"kind": "last"}\n')
    other.close()
    assert channel.receive() == [{"kind": "last"}]
    with pytest.raises(ChannelError, match="closed the connection"):
        channel.receive()
    with pytest.raises(ChannelError, match="The connection broke"):
        channel.send("too late")
        channel.send("too late")


@pytest.mark.parametrize(
    "line", [b"GET / HTTP/1.1\r\n", b"no json\n", b"[1]\n", b'{"no": "kind"}\n']
)
def test_another_protocol(ends: tuple[Channel, socket.socket], line: bytes) -> None:
    channel, other = ends
    other.send(line)
    with pytest.raises(ChannelError, match="does not speak this protocol"):
        channel.receive()


def test_a_message_that_does_not_come(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    other.send(b'{"kind": "heartbeat"}\n')
    with pytest.raises(ChannelError, match="no welcome came"):
        channel.wait_for("welcome", time.monotonic() + 0.01)


def test_addresses() -> None:
    for address in ("10.0.0.1:5", "[fe80::1]:29500", "learner.cluster:80"):
        assert format_address(*parse_address(address)) == address
    for wrong in ("", "host", "host:", ":80", "host:http"):
        with pytest.raises(ValueError, match="address must be 'host:port'"):
            parse_address(wrong)


def test_a_departure_is_sent_to_the_others(peers: Peers) -> None:
    first, second = join(peers, 1), join(peers, 2)
    assert wait_for(first, "welcome")["run"] == "r"
    peers.send(2, "plan", number=7)
    assert wait_for(second, "plan")["number"] == 7
    second.close()
    departed: list[int] = []
    while not departed:
        list(peers.receive(30.0))
        departed = peers.pop_departed()
    assert departed == [2]
    assert peers.pop_departed() == []
    assert wait_for(first, "departed")["node"] == 2
    peers.send(2, "plan")  # nobody is there: nothing happens
    first.close()


@pytest.mark.parametrize("how", ["silent", "evicted"])
def test_a_member_that_is_dropped(peers: Peers, how: str) -> None:
    channel = join(peers, 1)
    if how == "silent":
        peers._timeout_s = peers._next_heartbeat_s = 0.0
        list(peers.receive(0.0))
    else:
        peers.evict([1, 2])  # the second is not there any more
    assert peers.pop_departed() == [1]
    with pytest.raises(ChannelError):
        wait_for(channel, "never")
    channel.close()


def test_nothing_is_received_from_a_peer_after_it_was_dropped(peers: Peers) -> None:
    channel = connect(peers)
    channel.send("join")
    channel.send("join")
    num_received = 0
    with contextlib.suppress(ChannelError):
        while True:
            for peer, _ in peers.receive(0.05):
                num_received += 1
                peers.drop(peer, "it is not wanted")
            if num_received:
                wait_for(channel, "never")
    assert num_received == 1
    assert peers.pop_departed() == []  # it was no member
    channel.close()


def test_notifying_ends_a_wait_at_once(peers: Peers) -> None:
    list(peers.receive(0.0))  # the first heartbeats; the next are due after a minute
    for _ in range(100_000):  # more than a socket's buffer holds: nobody is blocked
        peers.notify()
    start_s = time.monotonic()
    assert list(peers.receive(60.0)) == []
    assert time.monotonic() - start_s < 30.0


def test_a_long_wait_ends_when_heartbeats_are_due(peers: Peers) -> None:
    peers._timeout_s = 0.1
    list(peers.receive(0.0))
    start_s = time.monotonic()
    assert list(peers.receive(60.0)) == []
    assert 0.02 <= time.monotonic() - start_s + 0.001 < 30.0  # a fifth of the time-out
