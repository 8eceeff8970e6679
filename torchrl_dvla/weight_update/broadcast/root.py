# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The learner's end of the broadcast: it hands versions to the first node and keeps the tree."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from torchrl_dvla.weight_update.broadcast.carrier import Carrier
from torchrl_dvla.weight_update.broadcast.channel import format_address
from torchrl_dvla.weight_update.broadcast.cost import DEFAULT_LINK, LinkModel, choose_plan
from torchrl_dvla.weight_update.broadcast.description import describe_layout
from torchrl_dvla.weight_update.broadcast.hold import SlotHold
from torchrl_dvla.weight_update.broadcast.peers import Peer, Peers
from torchrl_dvla.weight_update.broadcast.rendezvous import Rendezvous
from torchrl_dvla.weight_update.broadcast.rounds import LEARNER, Order, Report, Rounds
from torchrl_dvla.weight_update.broadcast.telemetry import BroadcastTelemetry, Transfer
from torchrl_dvla.weight_update.reader import PinnedSlot, WeightReader

__all__ = ["WeightBroadcast"]

# How often the store is asked for a new version if it is in another process, which tells nobody:
# one read of shared memory, but to wake for it all the time takes 2 % of a core.
_TICK_S = 0.005
_log = logging.getLogger("torchrl_dvla")


class WeightBroadcast:
    """Brings the versions of a :class:`WeightStore` to the stores of other nodes.

    It is one more reader of the learner's store: it pins the newest version, streams it from the
    slot to one other node, from which it goes on along the tree, and lets it go. The learner
    publishes as without it and never waits, and its node sends each byte once, however many nodes
    there are. While a version is on its way further ones wait, and only the newest of them travels
    next. Give the store one slot more than readers need: the broadcast holds one for as long as a
    version takes.

    Threads of this process do the work, and are woken by ``publish``. Where the learner needs its
    process for itself, hand the reader to another process of the node and make the broadcast there;
    it then asks the store for new versions every 5 ms.

    Nodes that hold a :class:`WeightRelay` come and go as they like; see
    :mod:`~torchrl_dvla.weight_update.broadcast.rounds` for what happens then. Anybody who can reach
    ``host`` can read the weights: keep it inside the cluster's network.

    Args:
        reader (WeightReader): a place in the learner's store, ``store.reader("broadcast")`` or
            ``updater.reader("broadcast")``. It is closed with the broadcast.

    Keyword Args:
        host (str): address of this machine at which the other nodes reach it; no host name that
            stands for several. Default: ``"127.0.0.1"``.
        port (int): where nodes join; 0 takes a free one. Default: 0.
        link (LinkModel): what messages between nodes cost; decides the tree.
        shapes (sequence of str): trees to choose from. Default: ``("chain", "binomial")``.
        timeout_s (float): a node that is silent for so long is given up, and so is an edge on which
            nothing moves. Default: 10.
        checksum (bool): let each node compare a sum for every bucket, one more pass over the
            weights. Default: ``False``.

    Raises:
        ValueError: for a time-out that is not positive or shapes that are not known.
        OSError: if the port is taken or ``host`` is no address of this machine.

    Examples:
        >>> from torch import nn
        >>> from torchrl_dvla.weight_update import WeightStore
        >>> with WeightStore(nn.Linear(2, 1)) as store:
        ...     broadcast = WeightBroadcast(store.reader("broadcast"))
        ...     print(broadcast.nodes(), broadcast.address.startswith("127.0.0.1:"))
        ...     broadcast.close()
        {} True
    """

    def __init__(
        self,
        reader: WeightReader,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        link: LinkModel = DEFAULT_LINK,
        shapes: Sequence[str] = ("chain", "binomial"),
        timeout_s: float = 10.0,
        checksum: bool = False,
    ) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}. Leave the default, 10.")
        num_bytes = reader.layout.slot_bytes
        self._rounds = Rounds(
            lambda num_nodes: choose_plan(num_nodes, num_bytes, link=link, shapes=shapes)
        )
        self._reader = reader
        self._telemetry = BroadcastTelemetry()
        self._ending = threading.Event()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._slot: PinnedSlot | None = None
        self._version = -1
        self._gate: Callable[[str], None] = _open_gate  # tests stop a transfer here, see Carrier
        self._peers = Peers(
            host,
            port,
            timeout_s=timeout_s,
            welcome={
                "run": uuid.uuid4().hex,
                "layout": describe_layout(reader.layout),
                "timeout_s": timeout_s,
                "checksum": checksum,
            },
        )
        self.address = format_address(host, self._peers.port)
        self._tick_s = timeout_s if reader.on_publish(self._peers.wake) else _TICK_S
        self._peers.wake()  # a version may be there already
        self._rendezvous = Rendezvous(self._pass_on)
        self._carrier = Carrier(
            self._rendezvous,
            host=host,
            timeout_s=timeout_s,
            checksum=checksum,
            is_ending=self._ending.is_set,
            gate=lambda step: self._gate(step),
        )
        self._orders: queue.SimpleQueue[tuple[Order, PinnedSlot] | None] = queue.SimpleQueue()
        self._own_reports: queue.SimpleQueue[tuple[int, Report]] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="dvla-weight-sender", daemon=True)
        self._thread = threading.Thread(
            target=self._serve, name="dvla-weight-broadcast", daemon=True
        )
        self._sender.start()
        self._thread.start()

    def nodes(self) -> dict[str, int]:
        """The version each node has, -1 for none, in the order of the tree."""
        with self._changed:
            return {member.name: member.version for member in self._rounds.members.values()}

    def wait(self, version: int, timeout_s: float = 60.0, *, num_nodes: int = 0) -> None:
        """Wait until ``num_nodes`` or more nodes have joined and all of them have ``version``.

        Raises:
            TimeoutError: naming the nodes that are behind and their versions.
            RuntimeError: if the broadcast has ended, with the cause.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._failure is not None or self._ending.is_set():
                    raise RuntimeError(
                        "The broadcast has ended. Make a new one."
                    ) from self._failure
                nodes = self.nodes()
                late = {name: v for name, v in nodes.items() if v < version}
                if not late and len(nodes) >= num_nodes:
                    return
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"Version {version} was not everywhere within {timeout_s} s: of "
                        f"{len(nodes)} nodes (wanted: {num_nodes}) these have older ones: {late}. "
                        "Check those nodes, or wait longer."
                    )
                self._changed.wait(0.1)

    def stats(self) -> dict[str, float]:
        """Counters and times, listed in the guide's page on metrics."""
        with self._changed:
            return self._telemetry.scalars(self._rounds, self._version)

    def edge_bytes(self) -> dict[str, int]:
        """Bytes sent over each edge so far, as ``"sender > receiver"``."""
        with self._changed:
            return dict(self._telemetry.edge_bytes)

    def take_transfers(self) -> list[Transfer]:
        """Each node's part in the rounds since the last call, for a timeline.

        The last 4096 are kept; nothing waits for them to be taken.
        """
        with self._changed:
            return self._telemetry.take_transfers()

    def plan(self) -> tuple[str, int]:
        """Shape and number of buckets in use."""
        with self._changed:
            return self._rounds.plan.shape, self._rounds.plan.num_buckets

    def close(self) -> None:
        """End the broadcast and close the reader; the nodes keep what they have.

        Takes as long as one bucket on its way, at most ``timeout_s``.
        """
        self._ending.set()
        self._peers.wake()
        self._thread.join()

    # -- the thread that decides ---------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._ending.is_set():
                for peer, message in self._peers.receive(self._tick_s):
                    self._hear(peer, message)
                with self._changed:
                    self._take_own_reports()
                    self._take_leave()
                    self._begin_if_due()
        except BaseException as error:
            self._fail(error)
        finally:
            self._ending.set()
            self._rendezvous.close()
            self._orders.put(None)
            self._sender.join()
            self._reader.close()  # first: publish wakes the peers
            self._peers.close()
            with self._changed:
                self._changed.notify_all()

    def _hear(self, peer: Peer, message: dict[str, Any]) -> None:
        kind = message["kind"]
        try:
            with self._changed:
                if kind == "join" and peer.node is None:
                    self._join(peer, message)
                elif kind == "report" and peer.node is not None:
                    report = Report.from_json(message["report"])
                    self._take_report(peer.node, message["round"], report)
                elif kind == "address":
                    self._pass_on(*(message[key] for key in ("node", "edge", "key", "text")))
                elif kind == "refuse":
                    self._telemetry.num_refused += 1
                elif kind != "beat":
                    raise ValueError(f"a message of kind {kind!r} was not expected")
        except (KeyError, TypeError, ValueError) as error:  # one that is wrong harms nobody else
            self._peers.drop(peer, f"it does not speak this protocol ({error!r})")

    def _join(self, peer: Peer, message: dict[str, Any]) -> None:
        node = self._rounds.join(
            str(message["name"]),
            version=int(message["version"]),
            has_frozen=bool(message["has_frozen"]),
        )
        self._peers.admit(peer, node)
        self._telemetry.join(node, self._rounds.members[node].name)

    def _pass_on(self, node: int, edge: str, key: str, text: str) -> None:
        """Hand one end's address to the other end of an edge."""
        if node == LEARNER:
            self._rendezvous.hear(edge, key, text)
        else:
            self._peers.say(node, "address", edge=edge, key=key, text=text)

    def _take_leave(self) -> None:
        """Take those who are gone out of the tree; the next round is without them."""
        for node in self._peers.take_left():
            self._rendezvous.gone(node)
            self._telemetry.leave(node, self._rounds, self._version)
            self._cut(self._rounds.leave(node))
            self._changed.notify_all()

    def _cut(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            self._peers.drop_member(node, "its edges kept breaking")

    # -- rounds --------------------------------------------------------------------------------

    def _begin_if_due(self) -> None:
        if self._rounds.is_running:
            return
        if self._slot is not None:
            self._reader.unpin()  # every send from the slot has ended: the learner's was reported
            self._slot = None
            self._telemetry.end()
            self._changed.notify_all()
        # Without members, too: whoever waits for all readers of the store need not wait for nodes.
        if not (self._reader.has_update() or self._rounds.somebody_lacks(self._version)):
            return
        self._slot = self._reader.pin_slot()
        self._telemetry.begin(self._version, self._slot.version)
        self._version = self._slot.version
        for node, order in self._rounds.begin(self._version).items():
            if node == LEARNER:
                self._orders.put((order, self._slot))
            else:
                self._peers.say(node, "order", order=order.to_json())

    def _take_own_reports(self) -> None:
        while not self._own_reports.empty():
            round_, report = self._own_reports.get()
            self._take_report(LEARNER, round_, report)

    def _take_report(self, node: int, round_: int, report: Report) -> None:
        if round_ != self._rounds.round or self._slot is None:
            return
        self._telemetry.take(node, report, self._rounds, self._slot)
        self._cut(self._rounds.report(node, report))
        self._changed.notify_all()

    # -- the thread that sends -----------------------------------------------------------------

    def _send(self) -> None:
        try:
            while (item := self._orders.get()) is not None:
                order, slot = item
                report = self._carrier.carry(order, SlotHold(slot))
                self._own_reports.put((order.round, report))
                self._peers.wake()
        except BaseException as error:
            self._fail(error)
        finally:
            self._carrier.close()

    def _fail(self, error: BaseException) -> None:
        """End by an error of our own; the learner goes on, and may never ask."""
        self._failure = error
        self._ending.set()
        _log.error("The broadcast of weights has ended; nodes keep what they have", exc_info=error)


def _open_gate(step: str) -> None:
    """In production nobody watches the steps."""
