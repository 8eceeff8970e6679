# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One node's part in a round: bytes come in from its parent and go out to its children.

**Pipelining.** All receives of a version are posted at once, so the next bucket arrives while this
one is passed on, and the latency of the link is paid once, not once per bucket. A bucket is sent on
from the very memory it was received into, a slot of this node's store.

**Readers see whole versions only** (invariant 3). The slot is the store's to offer: it does so when
everything has arrived, and never if anything is raised before (``WeightStore.receive``). Children
may still be fed from the slot at that time. Its memory does not change under them: this thread is
the store's only writer, and it begins no other version before every send has ended.

**Nothing waits for ever** (invariant 7). Each wait is for one bucket and ends after the edge's
time-out; a child that is slow to take its buckets holds nobody up before the end of the round. A
node that loses its parent closes all its edges, so its children know at once and not one time-out
after the other.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from torchrl_dvla.weight_update.broadcast.cost import bucket_bounds
from torchrl_dvla.weight_update.broadcast.hold import Hold
from torchrl_dvla.weight_update.broadcast.link import Edge, EdgeError
from torchrl_dvla.weight_update.broadcast.rendezvous import Rendezvous, edge_name
from torchrl_dvla.weight_update.broadcast.rounds import Order, Report

__all__ = ["Carrier"]


class ParentLost(Exception):
    """The rest of the round will not come."""


class Carrier:
    """The edges of one node, and what passes through them.

    Args:
        rendezvous (Rendezvous): where the two ends of an edge find each other.

    Keyword Args:
        host (str): address of this machine at which the other nodes reach it.
        timeout_s (float): how long nothing may move on an edge.
        checksum (bool): send sums along and compare them.
        is_ending (callable): looked at between buckets; True gives the round up.
        gate (callable): told of each bucket that is here, for tests; ``"live 3"`` is the fourth
            one of the live weights.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        *,
        host: str,
        timeout_s: float,
        checksum: bool,
        is_ending: Callable[[], bool],
        gate: Callable[[str], None],
    ) -> None:
        self._rendezvous = rendezvous
        self._host = host
        self._timeout_s = timeout_s
        self._checksum = checksum
        self._is_ending = is_ending
        self._epoch = -1
        self._parent: Edge | None = None
        self._children: dict[int, Edge] = {}
        self._sent_bytes: dict[int, int] = {}
        self._gate = gate

    def carry(self, order: Order, hold: Hold) -> Report:
        """Do this node's part in a round, and tell how it went.

        Args:
            order (Order): the part.
            hold (Hold): what this node has, and where what comes is to go.

        Returns:
            the report, also if edges broke.
        """
        if order.epoch != self._epoch:
            self.close()
            self._epoch = order.epoch
            self._rendezvous.forget_before(order.epoch)
        self._sent_bytes = dict.fromkeys(order.sends, 0)
        try:
            self._open(order)
            if order.receives.frozen or any(cargo.frozen for cargo in order.sends.values()):
                self._move(order, "frozen", hold.frozen)
                hold.has_frozen = True
            if order.receives.live:
                hold.receive(lambda live: self._move(order, "live", live), order.version)
            elif any(cargo.live for cargo in order.sends.values()):
                self._move(order, "live", hold.held(order.version))
            received_s = time.monotonic()
            self._finish()
        except ParentLost as error:
            self.close()
            return Report(
                hold.version,
                hold.has_frozen,
                lost_parent=True,
                sent_bytes=self._sent_bytes,
                problem=str(error),
            )
        return Report(
            hold.version,
            hold.has_frozen,
            lost_children=tuple(child for child in order.sends if child not in self._children),
            sent_bytes=self._sent_bytes,
            tail_s=time.monotonic() - received_s,
        )

    def close(self) -> None:
        """Close every edge; the other ends find out at once."""
        for edge in (self._parent, *self._children.values()):
            if edge is not None:
                edge.close()
        self._parent = None
        self._children.clear()

    def _open(self, order: Order) -> None:
        """Have the edges that this round needs; those it needs first are opened side by side."""
        missing = [child for child in order.sends if child not in self._children]
        lacks_parent = bool(order.receives) and self._parent is None
        if missing or lacks_parent:
            with concurrent.futures.ThreadPoolExecutor(max_workers=len(missing) + 1) as pool:
                opening = {child: pool.submit(self._edge, order.node, child) for child in missing}
                if lacks_parent:
                    with _parent_lost_if_broken():
                        self._parent = self._edge(order.parent, order.node, is_parent=False)
            for child, future in opening.items():
                with contextlib.suppress(EdgeError):
                    self._children[child] = future.result()
        in_use = [self._children[child] for child in order.sends if child in self._children]
        if order.receives:
            assert self._parent is not None
            in_use.append(self._parent)
        for edge in in_use:
            edge.begin(order.round)

    def _edge(self, parent: int, child: int, *, is_parent: bool = True) -> Edge:
        name = edge_name(self._epoch, parent, child)
        store = self._rendezvous.store(name, peer=child if is_parent else parent)
        store.patience_s = self._timeout_s
        return Edge(store, is_parent=is_parent, host=self._host, timeout_s=self._timeout_s)

    def _move(self, order: Order, kind: str, memory: torch.Tensor) -> None:
        """Bring ``memory`` here, if it is lacking, and on to the children that lack it."""
        source = self._parent if getattr(order.receives, kind) else None
        children = [child for child, cargo in order.sends.items() if getattr(cargo, kind)]
        buckets = [memory[a:b] for a, b in bucket_bounds(len(memory), order.num_buckets)]
        sums = torch.zeros(len(buckets), dtype=torch.int64)
        if source is not None:
            with _parent_lost_if_broken():
                for bucket in buckets:
                    source.post(bucket)
        for index, bucket in enumerate(buckets):
            if self._is_ending():
                raise ParentLost("This node ends its part")
            if source is not None:
                try:  # a context costs as much as the wait, and there is one for each bucket
                    source.wait()
                except EdgeError as error:
                    raise ParentLost(str(error)) from None
            self._gate(f"{kind} {index}")
            for child in children:
                self._send(child, bucket)
            if self._checksum:
                sums[index] = bucket.view(torch.int64).sum()
        if self._checksum:
            if source is not None:
                told = torch.zeros_like(sums)
                with _parent_lost_if_broken():
                    source.post(told)
                    source.wait()
                if not told.equal(sums):
                    wrong = (told != sums).nonzero().flatten().tolist()
                    raise ParentLost(
                        f"Buckets {wrong[:10]} have other checksums than at the learner"
                    )
            for child in children:
                self._send(child, sums)

    def _send(self, child: int, memory: torch.Tensor) -> None:
        edge = self._children.get(child)
        if edge is not None:
            self._sent_bytes[child] += memory.nbytes
            try:
                edge.post(memory)
            except EdgeError:
                self._lose(child)

    def _finish(self) -> None:
        """Wait until every child has taken everything, or is lost."""
        for child, edge in list(self._children.items()):
            try:
                edge.wait_all()
            except EdgeError:
                self._lose(child)

    def _lose(self, child: int) -> None:
        self._children.pop(child).close()


@contextlib.contextmanager
def _parent_lost_if_broken() -> Iterator[None]:
    try:
        yield
    except EdgeError as error:
        raise ParentLost(str(error)) from None
