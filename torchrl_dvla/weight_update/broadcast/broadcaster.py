# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The learner's end of the broadcast: it sends versions to the first node and decides the tree."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from torchrl_dvla.validation import Seconds, check
from torchrl_dvla.weight_update.broadcast.channel import Channel, Peers, format_address
from torchrl_dvla.weight_update.broadcast.edge import Rendezvous
from torchrl_dvla.weight_update.broadcast.rounds import LEARNER, RoundResult, Rounds
from torchrl_dvla.weight_update.broadcast.transfer import (
    NodeTransfer,
    PinnedSource,
    describe_layout,
)
from torchrl_dvla.weight_update.broadcast.tree import DEFAULT_LINK, LinkModel, choose_tree
from torchrl_dvla.weight_update.reader import PinnedSlot, WeightReader
from torchrl_dvla.weight_update.segment import quantile

__all__ = ["Transfer", "WeightBroadcast"]

# How often the store is asked for a new version if it is in another process, which notifies nobody:
# one read of shared memory, but to wake for it all the time takes 2 % of a core.
_POLL_S = 0.005
_NUM_LATENCIES = 256
_NUM_TRANSFERS = 4096
_log = logging.getLogger("torchrl_dvla")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One node's part in one round, by the clock of the learner's machine.

    Args:
        node (str): the node; ``"learner"`` is the learner's.
        what (str): ``"receive"`` a version whole, ``"send"`` one that it had already, or ``"lose"``
            it since an edge broke or the node left.
        version (int): which one.
        start_s (float): when the round began, in seconds of ``time.monotonic``.
        end_s (float): when it had the version, or its result came.
    """

    node: str
    what: str
    version: int
    start_s: float
    end_s: float


class _Telemetry:
    """Counters, latencies and transfers of a broadcast, written by the thread that decides."""

    def __init__(self) -> None:
        #: By the last part of their metrics' names.
        self.counts = collections.Counter(
            nodes_joined=0,
            nodes_left=0,
            nodes_refused=0,
            versions_coalesced=0,
            learner_sent_bytes=0,
            sent_bytes=0,
        )
        self.transfers: collections.deque[Transfer] = collections.deque(maxlen=_NUM_TRANSFERS)
        self._round_s = 0.0
        self._begun_s = 0.0
        self._names = {LEARNER: "learner"}
        self._latencies: collections.deque[float] = collections.deque(maxlen=_NUM_LATENCIES)

    def join(self, node: int, name: str) -> None:
        """Count a node that joins."""
        self._names[node] = name
        self.counts["nodes_joined"] += 1

    def leave(self, node: int, rounds: Rounds, version: int) -> None:
        """Count a node that leaves, before ``rounds`` does."""
        self.counts["nodes_left"] += 1
        if rounds.waits_for(node):
            self._record(node, "lose", version, time.monotonic())

    def begin(self, previous: int, version: int) -> None:
        """Begin a round after that of version ``previous``; -1 for none."""
        self._begun_s = time.monotonic()
        if previous >= 0:
            self.counts["versions_coalesced"] += max(version - previous - 1, 0)

    def record_result(
        self, node: int, result: RoundResult, rounds: Rounds, slot: PinnedSlot
    ) -> None:
        """Record a node's result, before ``rounds`` does."""
        self.counts["sent_bytes"] += result.sent_bytes
        if node == LEARNER:
            self.counts["learner_sent_bytes"] += result.sent_bytes
        # By this machine's clock alone: the time of the result's message is included, what the node
        # did after it had the version is not.
        now_s = time.monotonic()
        member = rounds.members.get(node)
        if member is not None and member.version < result.version == slot.version:
            self._latencies.append(now_s - result.tail_s - slot.published_ns / 1e9)
            self._record(node, "receive", slot.version, now_s - result.tail_s)
        else:
            self._record(node, "lose" if result.lost_parent else "send", slot.version, now_s)

    def end(self) -> None:
        """End the round."""
        self._round_s = time.monotonic() - self._begun_s

    def scalars(self, rounds: Rounds, version: int) -> dict[str, float]:
        """All figures, by the names of the guide's page on metrics."""
        scalars = {
            **self.counts,
            "version": version,
            "nodes": len(rounds.members),
            "rounds": rounds.round,
            "rounds_failed": rounds.num_failed,
            "publish_to_node_p50_s": quantile(self._latencies, 0.5),
            "publish_to_node_p99_s": quantile(self._latencies, 0.99),
            "round_s": self._round_s,
            "round_predicted_s": rounds.tree_plan.predicted_s,
        }
        return {f"broadcast/{name}": value for name, value in scalars.items()}

    def _record(self, node: int, what: str, version: int, end_s: float) -> None:
        self.transfers.append(Transfer(self._names[node], what, version, self._begun_s, end_s))


class WeightBroadcast:
    """Broadcast of a :class:`WeightStore`'s versions to the stores of other nodes.

    It is one more reader of the learner's store: it pins the newest version, streams it from the
    slot to one other node, from which it goes on along the tree, and unpins it. The learner
    publishes as without it and never waits, and its node sends each byte once, however many nodes
    there are. While a version is on its way further ones wait, and only the newest of them travels
    next. Give the store one slot more than readers need: the broadcast pins one for as long as a
    version takes.

    Threads of this process do the work, and are woken by ``publish``. Where the learner needs its
    process for itself, hand the reader to another process of the node and make the broadcast there;
    it then asks the store for new versions every 5 ms.

    Nodes that hold a :class:`WeightRelay` come and go as they like; see
    :mod:`~torchrl_dvla.weight_update.broadcast.rounds` for what happens then. Anybody who can reach
    ``host`` can read the weights: keep it inside the cluster's network.

    Args:
        reader (WeightReader): a reader of the learner's store, ``store.reader("broadcast")`` or
            ``updater.reader("broadcast")``. It is closed with the broadcast.

    Keyword Args:
        host (str): address of this machine at which the other nodes reach it; no host name that
            stands for several. Default: ``"127.0.0.1"``.
        port (int): where nodes join; 0 takes a free one. Default: 0.
        link (LinkModel): cost of a message between nodes; decides the tree.
        shapes (sequence of str): trees to choose from. Default: ``("chain", "binomial")``.
        timeout_s (float): a node that is silent for so long is dropped, and so is an edge on which
            nothing moves. Default: 10.

    Raises:
        ValueError: for a time-out that is not positive or an unknown shape.
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
    ) -> None:
        timeout_s = check("timeout_s", timeout_s, Seconds)
        num_bytes = reader.layout.slot_bytes
        self._rounds = Rounds(
            lambda num_nodes: choose_tree(num_nodes, num_bytes, link=link, shapes=shapes)
        )
        self._reader = reader
        self._telemetry = _Telemetry()
        self._ending = threading.Event()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._slot: PinnedSlot | None = None
        self._version = -1
        self._peers = Peers(
            host,
            port,
            timeout_s=timeout_s,
            welcome={
                "run": uuid.uuid4().hex,
                "layout": describe_layout(reader.layout),
                "timeout_s": timeout_s,
            },
        )
        self.address = format_address(host, self._peers.port)
        self._poll_s = timeout_s if reader.on_publish(self._peers.notify) else _POLL_S
        self._peers.notify()  # a version may be there already
        self._rendezvous = Rendezvous(self._route_address)
        self._transfer = NodeTransfer(
            self._rendezvous, host=host, timeout_s=timeout_s, is_ending=self._ending.is_set
        )
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "dvla-weight-sender")
        self._own_result: concurrent.futures.Future[RoundResult] | None = None
        self._thread = threading.Thread(
            target=self._serve, name="dvla-weight-broadcast", daemon=True
        )
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

    def take_transfers(self) -> list[Transfer]:
        """Each node's part in the rounds since the last call, for a timeline.

        The last 4096 are kept.
        """
        with self._changed:
            transfers = list(self._telemetry.transfers)
            self._telemetry.transfers.clear()
            return transfers

    def close(self) -> None:
        """End the broadcast and close the reader; the nodes keep what they have.

        Takes as long as one bucket on its way, at most ``timeout_s``.
        """
        self._ending.set()
        self._peers.notify()
        self._thread.join()

    # -- the thread that decides ---------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._ending.is_set():
                for peer, message in self._peers.receive(self._poll_s):
                    self._handle(peer, message)
                with self._changed:
                    if self._own_result is not None and self._own_result.done():
                        result, self._own_result = self._own_result.result(), None
                        self._handle_result(LEARNER, self._rounds.round, result)
                    self._handle_departures()
                    self._begin_if_due()
        except BaseException as error:
            self._failure = error  # the learner goes on, and may never ask
            _log.error(
                "The broadcast of weights has ended; nodes keep what they have", exc_info=error
            )
        finally:
            self._ending.set()
            self._rendezvous.close()
            self._executor.shutdown()
            self._transfer.close()
            self._reader.close()  # first: publish notifies the peers
            self._peers.close()
            with self._changed:
                self._changed.notify_all()

    def _handle(self, peer: Channel, message: dict[str, Any]) -> None:
        kind = message["kind"]
        try:
            with self._changed:
                if kind == "join" and peer.node is None:
                    self._join(peer, message)
                elif kind == "result" and peer.node is not None:
                    result = RoundResult.from_json(message["result"])
                    self._handle_result(peer.node, message["round"], result)
                elif kind == "address":
                    del message["kind"]
                    self._route_address(**message)
                elif kind == "refuse":
                    self._telemetry.counts["nodes_refused"] += 1
                elif kind != "heartbeat":
                    raise ValueError(f"a message of kind {kind!r} was not expected")
        except (KeyError, TypeError, ValueError) as error:  # one that is wrong harms nobody else
            self._peers.drop(peer, f"it does not speak this protocol ({error!r})")

    def _join(self, peer: Channel, message: dict[str, Any]) -> None:
        node = self._rounds.join(
            str(message["name"]),
            version=int(message["version"]),
            has_frozen=bool(message["has_frozen"]),
        )
        self._peers.register(peer, node)
        self._telemetry.join(node, self._rounds.members[node].name)

    def _route_address(self, node: int, edge: Sequence[int], key: str, text: str) -> None:
        """Send one end's address to the other end of an edge."""
        if node == LEARNER:
            self._rendezvous.receive(edge, key, text)
        else:
            self._peers.send(node, "address", edge=edge, key=key, text=text)

    def _handle_departures(self) -> None:
        """Remove departed members from the tree; the next round is without them."""
        for node in self._peers.pop_departed():
            self._rendezvous.fail_peer(node)
            self._telemetry.leave(node, self._rounds, self._version)
            self._peers.evict(self._rounds.leave(node))
            self._changed.notify_all()

    # -- rounds --------------------------------------------------------------------------------

    def _begin_if_due(self) -> None:
        if self._rounds.is_running:
            return
        if self._slot is not None:
            self._reader.unpin()  # every send from the slot has ended: the learner's result is here
            self._slot = None
            self._telemetry.end()
            self._changed.notify_all()
        # Without members, too: whoever waits for all readers of the store need not wait for nodes.
        if not (self._reader.has_update() or self._rounds.is_behind(self._version)):
            return
        self._slot = self._reader.pin_slot()
        self._telemetry.begin(self._version, self._slot.version)
        self._version = self._slot.version
        for node, plan in self._rounds.begin(self._version).items():
            if node == LEARNER:
                source = PinnedSource(self._slot)
                self._own_result = self._executor.submit(self._transfer.transfer, plan, source)
                self._own_result.add_done_callback(lambda _: self._peers.notify())
            else:
                self._peers.send(node, "plan", plan=plan.to_json())

    def _handle_result(self, node: int, round_: int, result: RoundResult) -> None:
        if round_ != self._rounds.round or self._slot is None:
            return
        self._telemetry.record_result(node, result, self._rounds, self._slot)
        self._peers.evict(self._rounds.record_result(node, result))
        self._changed.notify_all()
