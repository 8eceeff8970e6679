# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The connections of the other nodes to the learner's: who is there, and what they say."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any

from torchrl_dvla.weight_update.broadcast.channel import BEATS_PER_TIMEOUT, Channel, ChannelError

__all__ = ["Peer", "Peers"]

_log = logging.getLogger("torchrl_dvla")


class Peer:
    """A connection, and the member that joined over it; None before it has."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.node: int | None = None


class Peers:
    """All connections to one listening socket.

    One thread takes what comes and drops who is gone; any thread may :meth:`say` something or
    :meth:`wake` it. Nothing here grows with the number of peers but what they say themselves: the
    kernel tells which of them did.

    Args:
        host (str): address of this machine.
        port (int): where to listen; 0 takes a free one, which :attr:`port` has.

    Keyword Args:
        timeout_s (float): a peer that is silent for so long is dropped.
        welcome (dict): what each of them is told first.

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
        self._next_beat_s = 0.0
        self._peers: set[Peer] = set()
        self._members: dict[int, Peer] = {}
        self._left: list[int] = []
        self._wake_up, self._woken = socket.socketpair()
        for end in (self._woken, self._wake_up):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def receive(self, timeout_s: float) -> Iterator[tuple[Peer, dict[str, Any]]]:
        """What has come, after at most ``timeout_s``; greets new peers, drops lost ones.

        It returns when the next signs of life are due, too.
        """
        until_beat_s = max(self._next_beat_s - time.monotonic(), 0.0)
        for key, _ in self._selector.select(min(timeout_s, until_beat_s)):
            if key.fileobj is self._listener:
                self._greet()
            elif key.fileobj is self._woken:
                self._woken.recv(4096)
            else:
                peer: Peer = key.data
                try:
                    for message in peer.channel.receive():
                        if peer in self._peers:  # the message before may have been its last
                            yield peer, message
                except ChannelError as error:
                    self.drop(peer, str(error))
        self._beat()

    def admit(self, peer: Peer, node: int) -> None:
        """From now on ``node`` is who is at the other end."""
        peer.node = node
        self._members[node] = peer

    def say(self, node: int, kind: str, **fields: Any) -> None:
        """Tell a member something. One that is gone is not told: :meth:`receive` finds it out."""
        peer = self._members.get(node)
        if peer is not None:
            _say(peer, kind, fields)

    def drop(self, peer: Peer, reason: str) -> None:
        """End a connection."""
        if peer not in self._peers:
            return
        self._peers.remove(peer)
        self._selector.unregister(peer.channel.socket)
        peer.channel.close()
        if peer.node is not None:
            _log.info("Node %d left the broadcast of weights: %s", peer.node, reason)
            del self._members[peer.node]
            self._left.append(peer.node)
            for other in self._peers:
                _say(other, "gone", {"node": peer.node})

    def drop_member(self, node: int, reason: str) -> None:
        """End the connection of a member, if it is still there."""
        peer = self._members.get(node)
        if peer is not None:
            self.drop(peer, reason)

    def take_left(self) -> list[int]:
        """Members that were dropped since the last call."""
        left, self._left = self._left, []
        return left

    def wake(self) -> None:
        """Have :meth:`receive` return at once; from any thread."""
        try:
            self._wake_up.send(b"!")
        except OSError:
            pass  # closed, or woken often enough

    def close(self) -> None:
        """End all connections."""
        for peer in self._peers:
            peer.channel.close()
        for end in (self._selector, self._listener, self._wake_up, self._woken):
            end.close()

    def _greet(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it was gone again
        peer = Peer(Channel(sock))
        self._peers.add(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        _say(peer, "welcome", self._welcome)

    def _beat(self) -> None:
        """Signs of life to all, and none from some: a few times within the time-out."""
        if time.monotonic() < self._next_beat_s:
            return
        self._next_beat_s = time.monotonic() + self._timeout_s / BEATS_PER_TIMEOUT
        for peer in list(self._peers):
            silence_s = peer.channel.silence_s
            if silence_s > self._timeout_s:
                self.drop(peer, f"nothing was heard of it for {silence_s:.1f} s")
            else:
                _say(peer, "beat", {})


def _say(peer: Peer, kind: str, fields: dict[str, Any]) -> None:
    try:
        peer.channel.send(kind, **fields)
    except ChannelError:
        pass  # its socket can be read from now on, and reading finds that out
