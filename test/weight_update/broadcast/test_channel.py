# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from torchrl_dvla.weight_update.broadcast.channel import (
    Channel,
    ChannelError,
    format_address,
    parse_address,
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close(), theirs.close()


def frame(data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + data


def test_messages_come_whole_however_they_are_cut(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    stream = frame(b'{"kind": "a"}') + frame(b'{"kind": "b", "x": 1}')
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


def test_what_came_before_the_end_is_given_out(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    other.send(frame(b'{"kind": "last"}'))
    other.close()
    assert channel.receive() == [{"kind": "last"}]
    with pytest.raises(ChannelError, match="closed the connection"):
        channel.receive()
    with pytest.raises(ChannelError, match="The connection broke"):
        channel.send("too late")
        channel.send("too late")


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", frame(b"no json"), frame(b"[1]"), frame(b'{"no": "kind"}')]
)
def test_who_speaks_something_else(ends: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, other = ends
    other.send(data)
    with pytest.raises(ChannelError, match="does not speak this protocol"):
        channel.receive()


def test_addresses() -> None:
    for address in ("10.0.0.1:5", "[fe80::1]:29500", "learner.cluster:80"):
        assert format_address(*parse_address(address)) == address
    for wrong in ("", "host", "host:", ":80", "host:http"):
        with pytest.raises(ValueError, match="address must be 'host:port'"):
            parse_address(wrong)
