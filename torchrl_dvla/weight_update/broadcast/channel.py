# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Orders and reports between the learner's node and the others: JSON over one socket each.

The connection is the membership: a node is a member for as long as its channel is open and not
silent. A killed process closes it at once; a machine that is cut off or stopped falls silent.
Weights never pass here.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["BEATS_PER_TIMEOUT", "Channel", "ChannelError", "format_address", "parse_address"]

#: Signs of life that each side sends within the time after which silence means death.
BEATS_PER_TIMEOUT = 5
_HEADER = struct.Struct("!I")
#: Far above a layout of some ten thousand tensors; a length beyond it is no message of ours.
_MAX_MESSAGE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 16
_MAX_CHUNKS = 64


class ChannelError(ConnectionError):
    """The other side is gone, or it does not speak this protocol."""


class Channel:
    """One connected socket that carries JSON messages and never blocks.

    Any thread may send; one receives.

    Args:
        sock (socket.socket): connected; the channel owns it, and has it as ``socket`` to wait for.

    Examples:
        >>> ours, theirs = (Channel(end) for end in socket.socketpair())
        >>> ours.send("beat")
        >>> theirs.receive()
        [{'kind': 'beat'}]
        >>> theirs.receive()
        []
        >>> ours.close(); theirs.close()
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._sending = threading.Lock()
        self._heard_s = time.monotonic()

    @classmethod
    def connect(cls, host: str, port: int, timeout_s: float) -> Channel:
        """Connect to the learner's node; raises :class:`OSError` if that fails."""
        return cls(socket.create_connection((host, port), timeout=timeout_s))

    @property
    def local_host(self) -> str:
        """The address of this machine that the other side sees."""
        return str(self.socket.getsockname()[0])

    @property
    def silence_s(self) -> float:
        """Seconds since something was received."""
        return time.monotonic() - self._heard_s

    def send(self, kind: str, **fields: Any) -> None:
        """Queue a message and send what the socket takes.

        Raises:
            ChannelError: if the connection is gone.
        """
        data = json.dumps({"kind": kind, **fields}).encode()
        with self._sending:
            self._outgoing += _HEADER.pack(len(data)) + data
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it.

        Raises:
            ChannelError: if the connection is gone.
        """
        try:
            with self._sending:
                while self._outgoing:
                    del self._outgoing[: self.socket.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelError(f"The connection broke: {error}") from None

    def receive(self) -> list[dict[str, Any]]:
        """The whole messages that are there.

        Raises:
            ChannelError: if the other side has closed, or sent something else.
        """
        is_closed = False
        try:
            for _ in range(_MAX_CHUNKS):  # nobody can keep the caller here
                chunk = self.socket.recv(_CHUNK_BYTES)
                if not chunk:
                    is_closed = True
                    break
                self._incoming += chunk
                self._heard_s = time.monotonic()
                if len(chunk) < _CHUNK_BYTES:
                    break  # that was all; to hear so from the kernel is a call more
        except BlockingIOError:
            pass
        except OSError as error:
            raise ChannelError(f"The connection broke: {error}") from None
        messages = self._messages()
        if is_closed and not messages:
            raise ChannelError("The other side closed the connection.")
        return messages  # what came before the end is given out first

    def _messages(self) -> list[dict[str, Any]]:
        messages = []
        while len(self._incoming) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._incoming)
            if length > _MAX_MESSAGE_BYTES:
                raise ChannelError("The other side does not speak this protocol.")
            end = _HEADER.size + length
            if len(self._incoming) < end:
                break
            try:
                message = json.loads(self._incoming[_HEADER.size : end])
            except ValueError:
                raise ChannelError("The other side does not speak this protocol.") from None
            if not isinstance(message, Mapping) or "kind" not in message:
                raise ChannelError("The other side does not speak this protocol.")
            del self._incoming[:end]
            messages.append(dict(message))
        return messages

    def close(self) -> None:
        """Close the socket; the other side finds out at once."""
        self.socket.close()


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``"host:port"``.

    Raises:
        ValueError: for anything else.

    Examples:
        >>> parse_address("10.0.0.1:29500"), parse_address("[::1]:80")
        (('10.0.0.1', 29500), ('::1', 80))
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"address must be 'host:port', got {address!r}. Use WeightBroadcast.address."
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def format_address(host: str, port: int) -> str:
    """The reverse of :func:`parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
