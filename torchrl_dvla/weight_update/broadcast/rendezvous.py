# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where the two ends of an edge find each other.

A process group learns the addresses of its members from a store. Here each edge has a store of its
own, on both ends, and what one end puts there travels to the other over the channels that carry
orders and reports. So there is no second server that every node has to reach, nothing that grows
with the number of edges opened so far, and a wait ends at once when the other end is gone.
"""

from __future__ import annotations

import base64
import datetime
import threading
from collections.abc import Callable, Sequence

from torch.distributed import Store

__all__ = ["EdgeStore", "Rendezvous", "edge_name", "epoch_of"]

_GONE = "the other end is gone"


def edge_name(epoch: int, parent: int, child: int) -> str:
    """What both ends call an edge.

    Examples:
        >>> edge_name(3, 0, 7), epoch_of("3/0-7")
        ('3/0-7', 3)
    """
    return f"{epoch}/{parent}-{child}"


def epoch_of(edge: str) -> int:
    """The epoch in an edge's name."""
    return int(edge.partition("/")[0])


class EdgeStore(Store):
    """One end's view of what both ends of an edge have put.

    Args:
        tell (callable): sends a key and its value to the other end.
    """

    def __init__(self, tell: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._tell = tell
        self._values: dict[str, bytes] = {}
        self._problem = ""
        self._changed = threading.Condition()
        #: What c10d asks to wait for is the time-out of connecting; the other end may come later.
        self.patience_s = 0.0

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # so c10d calls it
        """Put a value, here and at the other end."""
        self.hear(key, value)
        self._tell(key, value)

    def hear(self, key: str, value: bytes) -> None:
        """Take a value from the other end."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def fail(self, problem: str) -> None:
        """End every wait, those to come included."""
        with self._changed:
            self._problem = problem
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """A value that is there; c10d waits for it first."""
        with self._changed:
            return self._values[key]

    def wait(
        self, keys: Sequence[str], timeout: datetime.timedelta = datetime.timedelta(seconds=10)
    ) -> None:
        """Wait until all of ``keys`` are there.

        Raises:
            RuntimeError: after the longer of ``timeout`` and ``patience_s``, or when the other end
                is known to be gone.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._problem or self._values.keys() >= set(keys),
                max(timeout.total_seconds(), self.patience_s),
            )
            if not self._values.keys() >= set(keys):
                raise RuntimeError(self._problem or "the other end did not come in time")


class Rendezvous:
    """The stores of one node's edges.

    Args:
        send (callable): ``send(node, edge, key, text)`` has :meth:`hear` called with the last three
            at another node.

    Examples:
        >>> here = Rendezvous(lambda node, *rest: there.hear(*rest))
        >>> there = Rendezvous(lambda node, *rest: here.hear(*rest))
        >>> here.store("1/0-7", peer=7).set("address", b"10.0.0.1")
        >>> there.store("1/0-7", peer=0).get("address")
        b'10.0.0.1'
    """

    def __init__(self, send: Callable[[int, str, str, str], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._stores: dict[str, EdgeStore] = {}
        self._peers: dict[str, int] = {}
        self._gone: set[int] = set()
        self._problem = ""

    def store(self, edge: str, peer: int) -> EdgeStore:
        """The store of an edge to ``peer``; its values may have come already."""
        store = self._store(edge)

        def tell(key: str, value: bytes) -> None:
            self._send(peer, edge, key, base64.b64encode(value).decode())

        store._tell = tell
        with self._lock:
            self._peers[edge] = peer
            is_gone = peer in self._gone
        if is_gone:
            store.fail(_GONE)
        return store

    def hear(self, edge: str, key: str, text: str) -> None:
        """The other end of ``edge`` has put a value, perhaps before this end opens it."""
        self._store(edge).hear(key, base64.b64decode(text))

    def forget_before(self, epoch: int) -> None:
        """Drop what belongs to edges of earlier epochs."""
        with self._lock:
            for edge in [edge for edge in self._stores if epoch_of(edge) < epoch]:
                del self._stores[edge]
                self._peers.pop(edge, None)

    def gone(self, node: int) -> None:
        """End the waits for ``node``, those to come included: numbers are not used again."""
        with self._lock:
            self._gone.add(node)
            stores = [self._stores[edge] for edge, peer in self._peers.items() if peer == node]
        for store in stores:
            store.fail(_GONE)

    def close(self) -> None:
        """End all waits."""
        with self._lock:
            self._problem = "this node leaves"
            stores = list(self._stores.values())
        for store in stores:
            store.fail(self._problem)

    def _store(self, edge: str) -> EdgeStore:
        with self._lock:
            store = self._stores.get(edge)
            if store is None:
                store = self._stores[edge] = EdgeStore(_untold)
                if self._problem:
                    store.fail(self._problem)
            return store


def _untold(key: str, value: bytes) -> None:
    raise AssertionError("An edge is opened before anything is put in its store.")
