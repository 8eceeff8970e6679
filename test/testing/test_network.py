# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from torchrl_dvla.testing import EmulatedNetwork, Remote

PORT = 5000


class Host:
    """Listens, connects, sends."""

    def __init__(self, address: str) -> None:
        self.server = socket.create_server((address, PORT))

    def is_listening(self) -> bool:
        return True

    def receive(self) -> int:
        connection, _ = self.server.accept()
        num_bytes = 0
        with connection:
            while chunk := connection.recv(1 << 16):
                num_bytes += len(chunk)
        return num_bytes

    def connect_s(self, address: str) -> float:
        start_s = time.monotonic()
        socket.create_connection((address, PORT), timeout=30.0).close()
        return time.monotonic() - start_s

    def send_s(self, address: str, num_bytes: int) -> float:
        connection = socket.create_connection((address, PORT), timeout=30.0)
        start_s = time.monotonic()
        connection.sendall(bytes(num_bytes))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        return time.monotonic() - start_s


@pytest.fixture
def network() -> Iterator[EmulatedNetwork]:
    obstacle = EmulatedNetwork.obstacle()
    if obstacle:
        pytest.skip(f"no hosts can be emulated: {obstacle}")
    with EmulatedNetwork(2, bytes_per_s=10e6, delay_s=0.02) as network:
        yield network


def test_delay_bandwidth_and_walls(network: EmulatedNetwork) -> None:
    addresses = [network.address(host) for host in (0, 1)]
    with (
        Remote(Host, addresses[0], before=lambda: network.enter(0)) as here,
        Remote(Host, addresses[1], before=lambda: network.enter(1)) as there,
    ):
        assert there.call("is_listening")
        # Bounds are one-sided: on a busy machine everything takes longer, and nothing less.
        assert here.call("connect_s", addresses[1]) >= 0.04  # there and back
        assert there.call("receive") == 0
        there.start("receive")
        sent_s = here.call("send_s", addresses[1], 3_000_000)
        assert there.result() == 3_000_000
        assert sent_s > 0.25  # 0.3 s, and a part of it may be let through at once
    # This process is not on that network. Never connect from here: that would leave the machine.
    with pytest.raises(OSError, match="Cannot assign requested address"):
        socket.create_server((addresses[0], PORT))


def test_hosts_that_cannot_be_had_are_refused() -> None:
    if not EmulatedNetwork.obstacle():
        with pytest.raises(RuntimeError, match="No network can be emulated here"):
            EmulatedNetwork(1, bytes_per_s=0.0, delay_s=0.0)
