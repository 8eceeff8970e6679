# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One edge of the tree: a process group of two.

A group of all nodes would end with its first dead member: the process groups of
:mod:`torch.distributed` have a fixed membership. An edge is a Gloo group of its own, so what breaks
is exactly what lies between two nodes, and the rest goes on.
"""

from __future__ import annotations

import collections
import datetime
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store

__all__ = ["Edge", "EdgeError"]

_PARENT, _CHILD = 0, 1
#: A group waits so many times its own time-out for the other end to connect (measured, torch 2.13).
_CONNECT_TIMEOUTS = 5
#: A tag has 31 bits: room for more operations than a round has, and for the rounds of a long time.
_MAX_POSTS, _NUM_ROUNDS = 1 << 12, 1 << 19


class EdgeError(ConnectionError):
    """The other end is gone, or nothing moved for the time-out: the edge cannot be used again."""


class Edge:
    """One end of an edge. Bytes go from the parent to the child, in the order they are posted.

    Every operation has its own tag, made of the round and a number that counts up on both sides. So
    a bucket can only arrive in the memory that was posted for it, and never in another round: if
    the ends do not mean the same one, nothing arrives. A group cannot be interrupted from another
    thread; every wait ends by itself after ``timeout_s``, and ends the edge.

    Args:
        store (Store): where the two ends find each other, see
            :mod:`~torchrl_dvla.weight_update.broadcast.rendezvous`.

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

    def begin(self, round_: int) -> None:
        """What is posted from now on belongs to this round; both ends say so."""
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
        """Leave; the other end finds out at once. Memory that was posted is not touched again."""
        self._pending.clear()
        self._group = None  # the group closes its sockets when it goes; abort() does not


def _edge_error(what: str, error: RuntimeError) -> EdgeError:
    """c10d's errors derive from RuntimeError; the first line of one says what happened."""
    return EdgeError(f"{what}: {str(error).splitlines()[0]}")
