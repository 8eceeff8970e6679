# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Bytes that go from node to node, over real sockets."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from torchrl_dvla.weight_update import ChainReceiver, chain, new_key, send_along_chain

LIMIT_S = 60.0
PARTS = [np.arange(5000, dtype=np.uint16).view(np.uint8), np.full(3, 9, np.uint8)]


@pytest.fixture
def threads():
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def receivers(monkeypatch):
    monkeypatch.setattr(chain, "BUCKET_BYTES", 1024)
    receivers = [ChainReceiver() for _ in range(4)]
    yield receivers
    for receiver in receivers:
        receiver.close()


def take(receiver, key, following=None, timeout_s=LIMIT_S):
    """What a node gets: its arrays, and what it was told of them bucket by bucket."""
    found = [np.zeros_like(part) for part in PARTS]
    seen = []
    with receiver.receive(key, following, timeout_s) as fill:
        fill(found, lambda bucket: seen.append(bytes(bucket)))
    return found, seen


def assert_arrived(result):
    found, seen = result
    assert all(np.array_equal(a, b) for a, b in zip(found, PARTS, strict=True))
    assert [len(bucket) for bucket in seen] == [1024] * 9 + [784, 3]
    assert b"".join(seen) == b"".join(part.tobytes() for part in PARTS)


def test_every_node_gets_every_byte_and_the_sender_sends_them_once(receivers, threads):
    key = new_key()
    nexts = [*(receiver.address for receiver in receivers[1:]), None]
    taking = [threads.submit(take, r, key, n) for r, n in zip(receivers, nexts)]
    send_along_chain(PARTS, receivers[0].address, key, LIMIT_S)
    for future in taking:
        assert_arrived(future.result(LIMIT_S))


def test_whoever_does_not_know_the_key_is_sent_away_and_the_sender_is_waited_for(
    receivers, threads, monkeypatch
):
    monkeypatch.setattr(chain, "_HANDSHAKE_S", 0.1)
    key = new_key()
    taking = threads.submit(take, receivers[0], key)
    with socket.create_connection(receivers[0].address, LIMIT_S) as silent:
        with pytest.raises(OSError):
            send_along_chain(PARTS, receivers[0].address, new_key(), LIMIT_S)
        assert len(silent.recv(64)) == 32, "a nonce, and nothing that was sent here"
    send_along_chain(PARTS, receivers[0].address, key, LIMIT_S)
    assert_arrived(taking.result(LIMIT_S))


def test_a_receiver_that_does_not_know_the_key_is_sent_nothing(threads):
    def impostor(server):
        connection = server.accept()[0]
        with connection:
            connection.sendall(bytes(32))
            nonce = connection.recv(32)
            answer = connection.recv(32)
            connection.sendall(answer)  # what it was asked itself is no answer
            return nonce, connection.recv(64)

    with socket.create_server(("127.0.0.1", 0)) as server:
        asking = threads.submit(impostor, server)
        with pytest.raises(ConnectionError, match="does not know the key"):
            send_along_chain(PARTS, server.getsockname(), new_key(), LIMIT_S)
        assert asking.result(LIMIT_S)[1] == b""


def test_that_the_next_node_is_gone_is_no_error(receivers, threads):
    gone = ChainReceiver()
    address = gone.address
    gone.close()
    key = new_key()
    taking = threads.submit(take, receivers[0], key, address)
    send_along_chain(PARTS, receivers[0].address, key, LIMIT_S)
    assert_arrived(taking.result(LIMIT_S))


def test_a_node_behind_one_that_breaks_off_says_so(receivers, threads):
    key = new_key()

    def break_off():
        with receivers[0].receive(key, receivers[1].address, LIMIT_S) as fill:
            fill([np.zeros(2048, np.uint8)])
            raise ZeroDivisionError

    taking = [threads.submit(break_off), threads.submit(take, receivers[1], key)]
    with pytest.raises(OSError):  # at once, or when the buffers of the connection are full
        send_along_chain([np.zeros(64 << 20, np.uint8)], receivers[0].address, key, LIMIT_S)
    with pytest.raises(ZeroDivisionError):
        taking[0].result(LIMIT_S)
    with pytest.raises(ConnectionError, match="broke off, 1024 bytes of a bucket early"):
        taking[1].result(LIMIT_S)


def test_a_transfer_that_nobody_begins_ends_by_its_limit(receivers):
    with pytest.raises(TimeoutError):
        take(receivers[0], new_key(), timeout_s=0.05)


def test_closing_ends_a_transfer_and_the_wait_for_one(receivers, threads):
    waiting = threads.submit(take, receivers[0], new_key())
    key = new_key()
    broken = threads.submit(take, receivers[1], key)
    with socket.create_connection(receivers[1].address) as connection:
        chain._prove(connection, key, b"sender", b"receiver")
        connection.sendall(bytes(100))
        for receiver, future in ((receivers[0], waiting), (receivers[1], broken)):
            while not future.done():  # a wait that has not begun is ended once it does
                receiver.close()
            assert isinstance(future.exception(), OSError)
