# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Transfer of weights along a chain of nodes: each passes a bucket on while the next one arrives.

A version goes over every link once, so it reaches many nodes in about the time that it takes to
reach one. The bytes go from memory to memory: out of the learner's slot, into a slot of each node.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

__all__ = ["BUCKET_BYTES", "Address", "ChainReceiver", "new_key", "send_along_chain"]

_log = logging.getLogger("torchrl_dvla")

Address = tuple[str, int]
#: Larger ones delay each node of a chain more, smaller ones cost calls.
BUCKET_BYTES = 4 << 20
_NONCE_BYTES = 32
#: Seconds for whoever connects to show that it knows the key.
_HANDSHAKE_S = 5.0


def new_key() -> bytes:
    """Secret of one transfer, which those who take part in it get from the learner."""
    return secrets.token_bytes(_NONCE_BYTES)


def send_along_chain(
    parts: Sequence[np.ndarray], address: Address, key: bytes, timeout_s: float
) -> None:
    """Send bytes to the first node of a chain.

    Args:
        parts (sequence of np.ndarray): uint8, contiguous; sent one after the other.
        address (tuple): of its :class:`ChainReceiver`.
        key (bytes): from :func:`new_key`; the nodes have the same.
        timeout_s (float): limit of the connection, and of each bucket.

    Raises:
        OSError: if the node is gone, too slow, or does not know the key.
    """
    with _connect(address, key, timeout_s) as connection:
        for bucket in _buckets(parts):
            connection.sendall(bucket)


class ChainReceiver:
    """A node's place in a chain: takes what the one before it sends, and passes it on.

    It listens on one interface. Whoever connects has to know the key of the transfer that is
    waited for, and is shown that this end knows it, too; others are sent away. Neither says it.

    Args:
        host (str): address of the interface. Default: loopback.

    Examples:
        >>> first, second = ChainReceiver(), ChainReceiver()
        >>> weights, key = np.arange(6, dtype=np.uint8), new_key()
        >>> def take(receiver, following, found):
        ...     with receiver.receive(key, following, timeout_s=10.0) as fill:
        ...         fill([found])
        >>> found = [np.zeros(6, np.uint8) for _ in range(2)]
        >>> arguments = (first, second.address, found[0]), (second, None, found[1])
        >>> nodes = [threading.Thread(target=take, args=args) for args in arguments]
        >>> for node in nodes:
        ...     node.start()
        >>> send_along_chain([weights], first.address, key, timeout_s=10.0)
        >>> for node in nodes:
        ...     node.join()
        >>> [array.tolist() for array in found]
        [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
        >>> first.close(), second.close()
        (None, None)
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._listener = socket.create_server((host, 0))
        #: Host and port, for the one before.
        self.address: Address = self._listener.getsockname()[:2]
        self._turn = threading.Lock()
        self._source: socket.socket | None = None

    @contextlib.contextmanager
    def receive(
        self, key: bytes, following: Address | None, timeout_s: float
    ) -> Iterator[Callable[..., None]]:
        """One transfer. When the block is left, all of it has been passed on, or cannot be.

        That the next node is gone is no error here: it is for whoever watches the nodes.

        Args:
            key (bytes): of the transfer.
            following (tuple, optional): address of the next node's receiver.
            timeout_s (float): limit of each connection, and of each bucket.

        Returns:
            a function that fills arrays as they were sent, uint8, and calls ``on_bucket``, if
            given, with each bucket of them. They must stay as they are until the block is left.

        Raises:
            OSError: if the one before does not come, breaks off, or is too slow.
        """
        with self._turn, self._accept(key, timeout_s) as source:
            self._source = source
            forward = _Forward(following, key, timeout_s) if following else None

            def fill(
                parts: Sequence[np.ndarray],
                on_bucket: Callable[[memoryview], object] | None = None,
            ) -> None:
                for bucket in _buckets(parts):
                    _read_into(source, bucket)
                    if forward is not None:
                        forward.add(bucket)
                    if on_bucket is not None:
                        on_bucket(bucket)

            try:
                yield fill
            finally:
                self._source = None
                if forward is not None:
                    forward.finish()

    def _accept(self, key: bytes, timeout_s: float) -> socket.socket:
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._listener.settimeout(max(0.0, deadline_s - time.monotonic()))
            source, peer = self._listener.accept()
            try:
                source.settimeout(min(_HANDSHAKE_S, timeout_s))
                _prove(source, key, b"receiver", b"sender")
            except OSError as error:  # a stranger, or one that is late for an earlier transfer
                _log.debug("%s is not let in: %s", peer, error)
                source.close()
                continue
            source.settimeout(timeout_s)
            return source

    def close(self) -> None:
        """Break a transfer off, and stop listening."""
        for end in (self._listener, self._source):
            if end is not None:
                with contextlib.suppress(OSError):  # nobody is connected
                    end.shutdown(socket.SHUT_RDWR)
        with self._turn:
            self._listener.close()


class _Forward:
    """Thread that sends buckets to the next node as they come in."""

    def __init__(self, address: Address, key: bytes, timeout_s: float) -> None:
        self._address, self._key, self._timeout_s = address, key, timeout_s
        self._buckets: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self.add = self._buckets.put
        self._thread = threading.Thread(target=self._run, name="dvla-forward", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with _connect(self._address, self._key, self._timeout_s) as connection:
                for bucket in iter(self._buckets.get, None):
                    connection.sendall(bucket)
        except OSError as error:
            _log.debug("The weights could not be passed on to %s: %s", self._address, error)

    def finish(self) -> None:
        """Wait until everything is sent, or cannot be."""
        self._buckets.put(None)
        self._thread.join()


def _buckets(parts: Sequence[np.ndarray]) -> Iterator[memoryview]:
    for part in parts:
        for start in range(0, len(part), BUCKET_BYTES):
            yield part.data[start : start + BUCKET_BYTES]


def _connect(address: Address, key: bytes, timeout_s: float) -> socket.socket:
    connection = socket.create_connection(address, timeout_s)
    try:
        _prove(connection, key, b"sender", b"receiver")
    except BaseException:
        connection.close()
        raise
    return connection


def _prove(connection: socket.socket, key: bytes, own_role: bytes, other_role: bytes) -> None:
    """Show the other end that this one knows the key, and see that it does, without saying it.

    Raises:
        ConnectionError: if it does not.
    """
    own, other = secrets.token_bytes(_NONCE_BYTES), bytearray(_NONCE_BYTES)
    connection.sendall(own)
    _read_into(connection, memoryview(other))
    # With the roles in it, an answer cannot be one that was asked of this end.
    connection.sendall(hmac.digest(key, own_role + other + own, "sha256"))
    found = bytearray(_NONCE_BYTES)
    _read_into(connection, memoryview(found))
    expected = hmac.digest(key, other_role + own + other, "sha256")
    if not hmac.compare_digest(found, expected):
        raise ConnectionError("The other end does not know the key of this transfer.")


def _read_into(connection: socket.socket, data: memoryview) -> None:
    while data:
        count = connection.recv_into(data)
        if not count:
            raise ConnectionError(f"The other end broke off, {len(data)} bytes of a bucket early.")
        data = data[count:]
