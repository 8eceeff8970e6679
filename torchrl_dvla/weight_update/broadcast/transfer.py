# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One node's part in a round: bytes come in from its parent and go out to its children.

**Pipelining.** All receives of a version are posted at once, so the next bucket arrives while this
one is passed on, and the latency of the link is paid once, not once per bucket. A bucket is sent on
from the very memory it was received into, a slot of this node's store.

**Readers see whole versions only** (invariant 3). The store makes the slot visible when everything
has arrived, and never if anything is raised before (``WeightStore.receive``). Children may still be
fed from the slot at that time. Its memory does not change under them: this thread is the store's
only writer, and it begins no other version before every send has ended.

**Nothing waits for ever** (invariant 7). Each wait is for one bucket and ends after the edge's
time-out; a child that is slow to take its buckets holds nobody up before the end of the round. A
node that loses its parent closes all its edges, so its children know at once and not one time-out
after the other.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from torchrl_dvla.weight_update.broadcast.edge import Edge, EdgeError, Rendezvous
from torchrl_dvla.weight_update.broadcast.rounds import RoundPlan, RoundResult
from torchrl_dvla.weight_update.broadcast.tree import bucket_bounds
from torchrl_dvla.weight_update.lora import LoraUpdate
from torchrl_dvla.weight_update.reader import PinnedSlot
from torchrl_dvla.weight_update.store import WeightStore
from torchrl_dvla.weight_update.weight_layout import WeightLayout

__all__ = ["NodeTransfer", "PinnedSource", "StoreTarget", "describe_layout", "restore_layout"]

_log = logging.getLogger("torchrl_dvla")


class PinnedSource:
    """The learner's version, pinned for the whole round; members as in :class:`StoreTarget`.

    Args:
        slot (PinnedSlot): the version.
    """

    has_frozen = True

    def __init__(self, slot: PinnedSlot) -> None:
        self.version = slot.version
        self.frozen = slot.frozen
        self._live = slot.live

    def receive(self, fill: Callable[[torch.Tensor], None], version: int) -> None:
        """Raise: nobody sends to the learner."""
        raise RuntimeError("The learner's node receives nothing. This is an error in the plan.")

    def live(self, version: int) -> torch.Tensor:
        """The bytes of the version."""
        return self._live


class StoreTarget:
    """The store of a relay's node, of which the relay is the only writer.

    Args:
        store (WeightStore): the node's.
        on_version (callable): called when a version has come, before the node's children all have
            it.
    """

    def __init__(self, store: WeightStore, on_version: Callable[[], None]) -> None:
        self._store = store
        self._on_version = on_version
        self._newest: torch.Tensor | None = None
        self.has_frozen = not store.layout.frozen_bytes

    @property
    def version(self) -> int:
        """The newest whole version here, visible or not; -1 for none."""
        return self._store.version

    @property
    def frozen(self) -> torch.Tensor:
        """Weights that travel once, uint8 ``[frozen_bytes]``."""
        return self._store.frozen_memory

    def receive(self, fill: Callable[[torch.Tensor], None], version: int) -> None:
        """Have ``fill`` write a version; it counts only if that returns."""
        newest = None

        def fill_and_keep(memory: torch.Tensor) -> None:
            nonlocal newest
            fill(memory)
            newest = memory

        self._newest = None
        self._store.receive(fill_and_keep, version=version)
        self._newest = newest
        self._on_version()

    def live(self, version: int) -> torch.Tensor:
        """The bytes of ``version``, which came before; they do not change during this round.

        No pin is needed: only the next :meth:`receive` may write the memory that the newest version
        came into. It is the visible slot, or the memory of a version that waits for a slot.
        """
        if self._newest is None or version != self.version:
            raise RuntimeError(
                f"Version {version} was planned from a node that has {self.version}. This is an "
                "error in the plan."
            )
        return self._newest


VersionSource: TypeAlias = PinnedSource | StoreTarget


class NodeTransfer:
    """The edges of one node, and what passes through them.

    Args:
        rendezvous (Rendezvous): how the two ends of an edge connect.

    Keyword Args:
        host (str): address of this machine at which the other nodes reach it.
        timeout_s (float): how long nothing may move on an edge.
        is_ending (callable): checked between buckets; True ends the round.
    """

    def __init__(
        self, rendezvous: Rendezvous, *, host: str, timeout_s: float, is_ending: Callable[[], bool]
    ) -> None:
        self._rendezvous = rendezvous
        self._host = host
        self._timeout_s = timeout_s
        self._is_ending = is_ending
        self._epoch = -1
        self._parent: Edge | None = None
        self._children: dict[int, Edge] = {}
        self._sent_bytes = 0

    def transfer(self, plan: RoundPlan, source: VersionSource) -> RoundResult:
        """Do this node's part in a round.

        Args:
            plan (RoundPlan): the part.
            source (VersionSource): what this node has, and where what comes is written.

        Returns:
            the result, also if edges broke.
        """
        if plan.epoch != self._epoch:
            self.close()
            self._epoch = plan.epoch
            self._rendezvous.drop_before(plan.epoch)
        self._sent_bytes = 0
        try:
            self._open(plan)
            if plan.receives.frozen or any(payload.frozen for payload in plan.sends.values()):
                self._move(plan, "frozen", source.frozen)
                source.has_frozen = True
            if plan.receives.live:
                source.receive(lambda live: self._move(plan, "live", live), plan.version)
            elif any(payload.live for payload in plan.sends.values()):
                self._move(plan, "live", source.live(plan.version))
        except EdgeError as error:  # the parent's: a child's is caught where it occurs
            self.close()
            _log.info("Node %d lost node %d: %s", plan.node, plan.parent, error)
            return RoundResult(
                source.version, source.has_frozen, lost_parent=True, sent_bytes=self._sent_bytes
            )
        received_s = time.monotonic()
        for child, edge in list(self._children.items()):  # until each has taken everything
            try:
                edge.wait_all()
            except EdgeError:
                self._drop(child)
        return RoundResult(
            source.version,
            source.has_frozen,
            lost_children=tuple(child for child in plan.sends if child not in self._children),
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

    def _open(self, plan: RoundPlan) -> None:
        """Open the edges that this round needs and that are not there yet, side by side."""
        missing = [child for child in plan.sends if child not in self._children]
        lacks_parent = bool(plan.receives) and self._parent is None
        if missing or lacks_parent:
            with concurrent.futures.ThreadPoolExecutor(max_workers=len(missing) + 1) as pool:
                opening = {child: pool.submit(self._edge, plan.node, child) for child in missing}
                if lacks_parent:
                    self._parent = self._edge(plan.parent, plan.node, is_parent=False)
            for child, future in opening.items():
                with contextlib.suppress(EdgeError):
                    self._children[child] = future.result()
        for child in plan.sends.keys() & self._children.keys():
            self._children[child].begin_round(plan.round)
        if self._parent is not None:
            self._parent.begin_round(plan.round)

    def _edge(self, parent: int, child: int, *, is_parent: bool = True) -> Edge:
        edge = (self._epoch, parent, child)
        store = self._rendezvous.open(edge, peer=child if is_parent else parent)
        store.patience_s = self._timeout_s
        return Edge(store, is_parent=is_parent, host=self._host, timeout_s=self._timeout_s)

    def _move(self, plan: RoundPlan, kind: str, memory: torch.Tensor) -> None:
        """Receive ``memory``, if it is lacking, and send it to the children that lack it."""
        parent = self._parent if getattr(plan.receives, kind) else None
        children = [child for child, payload in plan.sends.items() if getattr(payload, kind)]
        buckets = [memory[a:b] for a, b in bucket_bounds(len(memory), plan.num_buckets)]
        if parent is not None:
            for bucket in buckets:
                parent.post(bucket)
        for index, bucket in enumerate(buckets):
            if self._is_ending():
                raise EdgeError("This node ends its part.")
            if parent is not None:
                parent.wait()
            self._forward(kind, index, bucket, children)

    def _forward(self, kind: str, index: int, bucket: torch.Tensor, children: list[int]) -> None:
        """Send a bucket, the ``index``-th of the frozen or live weights, to the children."""
        for child in children:
            if child in self._children:
                self._sent_bytes += bucket.nbytes
                try:
                    self._children[child].post(bucket)
                except EdgeError:
                    self._drop(child)

    def _drop(self, child: int) -> None:
        self._children.pop(child).close()


def describe_layout(layout: WeightLayout) -> dict[str, Any]:
    """A layout as plain JSON data, from which :func:`restore_layout` makes it at another node."""
    names = ("names", "shape", "stride", "is_frozen", "offset_bytes")
    description = {
        "entries": [
            {name: getattr(entry, name) for name in names}
            | {"dtype": str(entry.dtype).removeprefix("torch.")}
            for entry in layout.entries
        ],
        "slot_bytes": layout.slot_bytes,
        "frozen_bytes": layout.frozen_bytes,
        "lora": {name: vars(update) for name, update in layout.lora_updates.items()},
    }
    return json.loads(json.dumps(description))  # with lists in place of tuples


def restore_layout(description: Mapping[str, Any]) -> WeightLayout:
    """A layout whose stores hold the same bytes at the same offsets.

    Weights are stored there as they arrive: what ``transport_dtype`` narrowed is narrow from the
    start.

    Args:
        description (mapping): made by :func:`describe_layout`.

    Returns:
        the layout.

    Raises:
        RuntimeError: if this version of the package lays the same weights out differently.

    Examples:
        >>> layout = WeightLayout(nn.Linear(3, 2), transport_dtype=torch.bfloat16)
        >>> copy = restore_layout(describe_layout(layout))
        >>> copy.slot_bytes == layout.slot_bytes, copy.entries[0].dtype
        (True, torch.bfloat16)
    """
    weights: dict[str, torch.Tensor] = {}
    for entry in description["entries"]:
        dtype = getattr(torch, entry["dtype"])
        tensor = torch.empty_strided(entry["shape"], entry["stride"], dtype=dtype, device="meta")
        if entry["is_frozen"]:
            tensor = nn.Parameter(tensor, requires_grad=False)
        weights.update(dict.fromkeys(entry["names"], tensor))  # tied: one tensor, several names
    layout = WeightLayout(weights, trainable_only=True)
    layout.lora_updates = {
        name: LoraUpdate(**{**update, "factors": tuple(map(tuple, update["factors"]))})
        for name, update in description["lora"].items()
    }
    if describe_layout(layout) != description:
        raise RuntimeError(
            "The learner's node lays weights out differently than this one. Install the same "
            "version of torchrl_dvla on both."
        )
    return layout
