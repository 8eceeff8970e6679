# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Control connections between the learner's node and the others: JSON over one socket each.

The connection is the membership: a node is a member for as long as its channel is open and not
silent. A killed process closes it at once; a machine that is disconnected or stopped falls silent.
Weights never pass here.
"""

from __future__ import annotations

import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

__all__ = ["Channel", "ChannelError", "Peers", "format_address", "parse_address"]

_log = logging.getLogger("torchrl_dvla")
#: Heartbeats that each side sends within the time-out after which a silent one is dropped.
HEARTBEATS_PER_TIMEOUT = 5
#: Far above a layout of some ten thousand tensors; a longer line is no message of ours.
_MAX_MESSAGE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 16
_MAX_CHUNKS = 64


class ChannelError(ConnectionError):
    """The other side is gone, or it does not speak this protocol."""


class Channel:
    """A connected socket that carries JSON messages, one a line, and never blocks.

    Any thread may send; one receives.

    Args:
        sock (socket.socket): connected; the channel owns it, and has it as ``socket`` to wait for.

    Examples:
        >>> ours, theirs = (Channel(end) for end in socket.socketpair())
        >>> ours.send("heartbeat")
        >>> theirs.receive()
        [{'kind': 'heartbeat'}]
        >>> theirs.receive()
        []
        >>> ours.close(); theirs.close()
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        #: Number of the member that joined over it; None before.
        self.node: int | None = None
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._sending = threading.Lock()
        self._received_s = time.monotonic()

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
        return time.monotonic() - self._received_s

    def send(self, kind: str, **fields: Any) -> None:
        """Queue a message and send what the socket takes.

        Raises:
            ChannelError: if the connection is gone.
        """
        with self._sending:
            self._outgoing += json.dumps({"kind": kind, **fields}).encode() + b"\n"
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
                self._received_s = time.monotonic()
                if len(chunk) < _CHUNK_BYTES:
                    break  # that was all; to learn it from the kernel is a call more
        except BlockingIOError:
            pass
        except OSError as error:
            raise ChannelError(f"The connection broke: {error}") from None
        messages = self._messages()
        if is_closed and not messages:
            raise ChannelError("The other side closed the connection.")
        return messages  # what came before the end is returned first

    def wait_for(self, kind: str, deadline_s: float) -> dict[str, Any]:
        """The first message of a kind; those before it, and those that came with it, are dropped.

        Raises:
            ChannelError: if it has not come by ``deadline_s`` of the monotonic clock.
        """
        while (left_s := deadline_s - time.monotonic()) > 0:
            wait([self.socket], left_s)
            for message in self.receive():
                if message["kind"] == kind:
                    return message
        raise ChannelError(f"Connected, but no {kind} came.")

    def _messages(self) -> list[dict[str, Any]]:
        *lines, self._incoming = self._incoming.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise ChannelError("The other side does not speak this protocol.") from None
        is_known = all(isinstance(message, dict) and "kind" in message for message in messages)
        if not is_known or len(self._incoming) > _MAX_MESSAGE_BYTES:
            raise ChannelError("The other side does not speak this protocol.")
        return messages

    def close(self) -> None:
        """Close the socket; the other side finds out at once."""
        self.socket.close()


class Peers:
    """All connections to one listening socket.

    One thread receives what comes and drops who is gone; any thread may :meth:`send` something or
    :meth:`notify` it. Nothing here grows with the number of peers but what they send: the
    kernel selects the sockets that can be read.

    Args:
        host (str): address of this machine.
        port (int): where to listen; 0 takes a free one, which :attr:`port` has.

    Keyword Args:
        timeout_s (float): a peer that is silent for so long is dropped.
        welcome (dict): fields of the first message to each of them.

    Examples:
        >>> peers = Peers("127.0.0.1", 0, timeout_s=10.0, welcome={"run": "a"})
        >>> channel = Channel.connect("127.0.0.1", peers.port, timeout_s=10.0)
        >>> channel.send("join", name="n")
        >>> while not (messages := list(peers.receive(timeout_s=1.0))):
        ...     pass
        >>> [message["kind"] for _, message in messages]
        ['join']
        >>> channel.close(); peers.close()
    """

    def __init__(self, host: str, port: int, *, timeout_s: float, welcome: dict[str, Any]) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._timeout_s = timeout_s
        self._welcome = welcome
        self._next_heartbeat_s = 0.0
        self._peers: set[Channel] = set()
        self._members: dict[int, Channel] = {}
        self._departed: list[int] = []
        self._wakeup, self._wakeup_end = socket.socketpair()
        for end in (self._wakeup, self._wakeup_end):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup_end, selectors.EVENT_READ)

    def receive(self, timeout_s: float) -> Iterator[tuple[Channel, dict[str, Any]]]:
        """Messages that come within ``timeout_s``; accepts new peers, drops lost ones.

        It returns when the next heartbeats are due, too.
        """
        heartbeat_s = max(self._next_heartbeat_s - time.monotonic(), 0.0)
        for key, _ in self._selector.select(min(timeout_s, heartbeat_s)):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wakeup_end:
                self._wakeup_end.recv(4096)
            else:
                peer: Channel = key.data
                try:
                    for message in peer.receive():
                        if peer in self._peers:  # the message before may have been its last
                            yield peer, message
                except ChannelError as error:
                    self.drop(peer, str(error))
        self._send_heartbeats()

    def register(self, peer: Channel, node: int) -> None:
        """Make ``node`` the member at the other end."""
        peer.node = node
        self._members[node] = peer

    def send(self, node: int, kind: str, **fields: Any) -> None:
        """Send to a member, if it is still there: :meth:`receive` finds out that it is not."""
        peer = self._members.get(node)
        if peer is not None:
            _send(peer, kind, fields)

    def drop(self, peer: Channel, reason: str) -> None:
        """End a connection."""
        if peer not in self._peers:
            return
        self._peers.remove(peer)
        self._selector.unregister(peer.socket)
        peer.close()
        if peer.node is not None:
            _log.info("Node %d left the broadcast of weights: %s", peer.node, reason)
            del self._members[peer.node]
            self._departed.append(peer.node)
            for other in self._peers:
                _send(other, "departed", {"node": peer.node})

    def evict(self, nodes: list[int]) -> None:
        """End the connections of members whose edges kept breaking, if they are still there."""
        for node in self._members.keys() & nodes:
            self.drop(self._members[node], "its edges kept breaking")

    def pop_departed(self) -> list[int]:
        """Members that were dropped since the last call."""
        departed, self._departed = self._departed, []
        return departed

    def notify(self) -> None:
        """Make :meth:`receive` return at once; from any thread."""
        try:
            self._wakeup.send(b"!")
        except OSError:
            pass  # closed, or notified often enough

    def close(self) -> None:
        """End all connections."""
        for peer in self._peers:
            peer.close()
        for end in (self._selector, self._listener, self._wakeup, self._wakeup_end):
            end.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it was gone again
        peer = Channel(sock)
        self._peers.add(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        _send(peer, "welcome", self._welcome)

    def _send_heartbeats(self) -> None:
        """Send heartbeats to all, drop the silent: a few times within the time-out."""
        if time.monotonic() < self._next_heartbeat_s:
            return
        self._next_heartbeat_s = time.monotonic() + self._timeout_s / HEARTBEATS_PER_TIMEOUT
        for peer in list(self._peers):
            silence_s = peer.silence_s
            if silence_s > self._timeout_s:
                self.drop(peer, f"silent for {silence_s:.1f} s")
            else:
                _send(peer, "heartbeat", {})


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
    """The inverse of :func:`parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _send(peer: Channel, kind: str, fields: dict[str, Any]) -> None:
    try:
        peer.send(kind, **fields)
    except ChannelError:
        pass  # its socket can be read from now on, and reading finds that out
