# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Edges of the tree: process groups of two, and the stores through which their ends connect.

A group of all nodes would end with its first dead member: the process groups of
:mod:`torch.distributed` have a fixed membership. An edge is a Gloo group of its own, so what breaks
is exactly what lies between two nodes, and the rest goes on.

A process group learns the addresses of its members from a store. Here each edge has a store of its
own, on both ends, and what one end puts there travels to the other over the control channels. So
there is no second server that every node has to reach, nothing that grows with the number of edges
opened so far, and a wait ends at once when the other end is gone.
"""

from __future__ import annotations

import collections
import datetime
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store

__all__ = ["Edge", "EdgeError", "EdgeStore", "Rendezvous"]

_PARENT, _CHILD = 0, 1
#: A group waits so many times its own time-out for the other end to connect (measured, torch 2.13).
_CONNECT_TIMEOUTS = 5
#: A tag has 31 bits: room for more operations than a round has, and for the rounds of a long time.
_MAX_POSTS, _NUM_ROUNDS = 1 << 12, 1 << 19
_GONE, _CLOSED = "the other end is gone", "this node leaves"


class EdgeError(ConnectionError):
    """The other end is gone, or nothing moved for the time-out: the edge cannot be used again."""


class Edge:
    """One end of an edge. Bytes go from the parent to the child, in the order of the posts.

    Every operation has its own tag, made of the round and a number that counts up on both sides. So
    a bucket can only arrive in the memory that was posted for it, and never in another round: if
    the ends differ in the round, nothing arrives. A group cannot be interrupted from another
    thread; every wait ends by itself after ``timeout_s``, and ends the edge.

    Args:
        store (Store): how the two ends connect, see :class:`Rendezvous`.

    Keyword Args:
        is_parent (bool): which end this is.
        host (str): address of this machine at which the other end reaches it.
        timeout_s (float): how long to wait for the other end, here and in every :meth:`wait`.

    Raises:
        EdgeError: if the other end does not come.
    """

    def __init__(self, store: Store, *, is_parent: bool, host: str, timeout_s: float) -> None:
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._is_parent = is_parent
        self._pending: collections.deque[Any] = collections.deque()  # of Work
        self._tag = 0
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = self._timeout / _CONNECT_TIMEOUTS
        options._threads = 1
        rank = _PARENT if is_parent else _CHILD
        self._group: Any = None  # a ProcessGroupGloo
        self._store = store  # the group has no reference that keeps a store of Python alive
        try:
            self._group = ProcessGroupGloo(store, rank, 2, options)
        except RuntimeError as error:
            raise _edge_error("The edge was not opened", error) from None

    def begin_round(self, round_: int) -> None:
        """Make what is posted from now on belong to this round; both ends do so."""
        self._tag = round_ % _NUM_ROUNDS * _MAX_POSTS

    def post(self, memory: torch.Tensor) -> None:
        """Begin to send ``memory``, or to receive into it; it is not copied.

        Raises:
            EdgeError: if the edge is broken.
        """
        if self._group is None:
            raise EdgeError("The edge is closed.")
        self._tag += 1
        try:
            if self._is_parent:
                work = self._group.send([memory], _CHILD, self._tag)
            else:
                work = self._group.recv([memory], _PARENT, self._tag)
        except RuntimeError as error:
            raise _edge_error("The edge broke", error) from None
        self._pending.append(work)

    def wait(self) -> None:
        """Wait for the oldest operation that was posted and not waited for.

        What was sent may still be on its way; what was received is there.

        Raises:
            EdgeError: if the edge broke, or nothing came or went for ``timeout_s``.
        """
        try:
            self._pending.popleft().wait(self._timeout)
        except RuntimeError as error:
            raise _edge_error("The edge broke", error) from None

    def wait_all(self) -> None:
        """Wait for everything that was posted."""
        while self._pending:
            self.wait()

    def close(self) -> None:
        """Close; the other end finds out at once. Memory that was posted is not touched again."""
        self._pending.clear()
        self._group = None  # the group closes its sockets when it goes; abort() does not


def _edge_error(what: str, error: RuntimeError) -> EdgeError:
    """c10d's errors derive from RuntimeError; the first line of one says what happened."""
    return EdgeError(f"{what}: {str(error).splitlines()[0]}")


class EdgeStore(Store):
    """One end's view of the values that both ends of an edge have put."""

    def __init__(self) -> None:
        super().__init__()
        #: Sends a key and its value to the other end; set when this end opens the edge.
        self.send: Callable[[str, bytes], None] = _not_opened
        #: The node at the other end; -1 before this end opens the edge.
        self.peer = -1
        #: What c10d asks to wait for is the time-out of connecting; the other end may come later.
        self.patience_s = 0.0
        self._values: dict[str, bytes] = {}
        self._problem = ""
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # so c10d calls it
        """Put a value, here and at the other end."""
        self.receive(key, value)
        self.send(key, value)

    def receive(self, key: str, value: bytes) -> None:
        """Put a value that comes from the other end."""
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
        send (callable): ``send(node=, edge=, key=, text=)`` has :meth:`receive` called with the
            last three at another node. An edge is ``(epoch, parent, child)``.

    Examples:
        >>> here = Rendezvous(lambda node, **rest: there.receive(**rest))
        >>> there = Rendezvous(lambda node, **rest: here.receive(**rest))
        >>> here.open((1, 0, 7), peer=7).set("address", b"10.0.0.1")
        >>> there.open((1, 0, 7), peer=0).get("address")
        b'10.0.0.1'
    """

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._stores: dict[tuple[int, ...], EdgeStore] = {}
        self._departed: set[int] = set()
        self._is_closed = False

    def open(self, edge: Sequence[int], peer: int) -> EdgeStore:
        """The store of an edge to ``peer``; its values may have come already."""
        store = self._store(edge)
        store.send = lambda key, value: self._send(
            node=peer, edge=edge, key=key, text=value.decode("latin-1")
        )
        with self._lock:
            store.peer = peer
            is_gone = peer in self._departed
        if is_gone:
            store.fail(_GONE)
        return store

    def receive(self, edge: Sequence[int], key: str, text: str) -> None:
        """Put a value that the other end of ``edge`` has sent, perhaps before this end opens it."""
        self._store(edge).receive(key, text.encode("latin-1"))

    def drop_before(self, epoch: int) -> None:
        """Drop what belongs to edges of earlier epochs."""
        with self._lock:
            for edge in [edge for edge in self._stores if edge[0] < epoch]:
                del self._stores[edge]

    def fail_peer(self, node: int) -> None:
        """End the waits for ``node``, those to come included: numbers are not used again."""
        with self._lock:
            self._departed.add(node)
            stores = [store for store in self._stores.values() if store.peer == node]
        for store in stores:
            store.fail(_GONE)

    def close(self) -> None:
        """End all waits."""
        with self._lock:
            self._is_closed = True
            stores = list(self._stores.values())
        for store in stores:
            store.fail(_CLOSED)

    def _store(self, edge: Sequence[int]) -> EdgeStore:
        with self._lock:
            store = self._stores.get(tuple(edge))
            if store is None:
                store = self._stores[tuple(edge)] = EdgeStore()
                if self._is_closed:
                    store.fail(_CLOSED)
            return store


def _not_opened(key: str, value: bytes) -> None:
    raise AssertionError("An edge is opened before anything is put in its store.")
