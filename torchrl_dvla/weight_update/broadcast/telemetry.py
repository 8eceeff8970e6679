# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the broadcast tells about itself."""

from __future__ import annotations

import collections
import dataclasses
import time

from torchrl_dvla.weight_update.broadcast.rounds import LEARNER, Report, Rounds
from torchrl_dvla.weight_update.reader import PinnedSlot
from torchrl_dvla.weight_update.segment import quantile

__all__ = ["BroadcastTelemetry", "Transfer"]

_NUM_LATENCIES = 256
_NUM_TRANSFERS = 4096


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One node's part in one round, by the clock of the learner's machine.

    Args:
        node (str): the node; ``"learner"`` is the learner's.
        what (str): ``"receive"`` a version whole, ``"send"`` one that it had already, or ``"lose"``
            it since an edge broke or the node left.
        version (int): which one.
        start_s (float): when the round began, in seconds of ``time.monotonic``.
        end_s (float): when it had the version, or its report came.
    """

    node: str
    what: str
    version: int
    start_s: float
    end_s: float


@dataclasses.dataclass
class BroadcastTelemetry:
    """Counters of a broadcast, kept by the thread that decides.

    Args:
        num_joined (int): nodes that joined; one that comes back counts again.
        num_left (int): nodes that left, were cut or died.
        num_refused (int): nodes that had other weights than the learner.
        num_coalesced (int): versions that never travelled, since a newer one was there.
        edge_bytes (dict of str to int): bytes sent, by ``"sender > receiver"``.
        learner_bytes (int): those of them that the learner's node sent.
        round_s (float): duration of the last round, with its orders and reports.
    """

    num_joined: int = 0
    num_left: int = 0
    num_refused: int = 0
    num_coalesced: int = 0
    edge_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    learner_bytes: int = 0
    round_s: float = 0.0

    def __post_init__(self) -> None:
        self._begun_s = 0.0
        self._names = {LEARNER: "learner"}
        self._latencies: collections.deque[float] = collections.deque(maxlen=_NUM_LATENCIES)
        self._transfers: collections.deque[Transfer] = collections.deque(maxlen=_NUM_TRANSFERS)

    def join(self, node: int, name: str) -> None:
        """A node has come."""
        self._names[node] = name
        self.num_joined += 1

    def leave(self, node: int, rounds: Rounds, version: int) -> None:
        """A node has gone; ``rounds`` does not know it yet."""
        self.num_left += 1
        if rounds.waits_for(node):
            self._note(node, "lose", version, time.monotonic())

    def begin(self, previous: int, version: int) -> None:
        """A round begins, ``previous`` was the version of the last one; -1 for none."""
        self._begun_s = time.monotonic()
        if previous >= 0:
            self.num_coalesced += max(version - previous - 1, 0)

    def take(self, node: int, report: Report, rounds: Rounds, slot: PinnedSlot) -> None:
        """A report has come; ``rounds`` does not know it yet."""
        for child, num_bytes in report.sent_bytes.items():
            edge = f"{self._names[node]} > {self._names[child]}"
            self.edge_bytes[edge] = self.edge_bytes.get(edge, 0) + num_bytes
            if node == LEARNER:
                self.learner_bytes += num_bytes
        # By this machine's clock alone: the way of the report is included, what the node did after
        # it had the version is not.
        whole_s = time.monotonic() - report.tail_s
        member = rounds.members.get(node)
        if member is not None and member.version < report.version == slot.version:
            self._latencies.append(whole_s - slot.published_ns / 1e9)
            self._note(node, "receive", slot.version, whole_s)
        else:
            what = "lose" if report.lost_parent else "send"
            self._note(node, what, slot.version, time.monotonic())

    def end(self) -> None:
        """The round is over."""
        self.round_s = time.monotonic() - self._begun_s

    def take_transfers(self) -> list[Transfer]:
        """What was noted since the last call, as far as it was kept."""
        taken = list(self._transfers)
        self._transfers.clear()
        return taken

    def scalars(self, rounds: Rounds, version: int) -> dict[str, float]:
        """Everything by the names of the guide's page on metrics."""
        return {
            "broadcast/version": version,
            "broadcast/nodes": len(rounds.members),
            "broadcast/nodes_joined": self.num_joined,
            "broadcast/nodes_left": self.num_left,
            "broadcast/nodes_refused": self.num_refused,
            "broadcast/rounds": rounds.round,
            "broadcast/rounds_failed": rounds.num_failed,
            "broadcast/versions_coalesced": self.num_coalesced,
            "broadcast/learner_sent_bytes": self.learner_bytes,
            "broadcast/sent_bytes": sum(self.edge_bytes.values()),
            "broadcast/publish_to_node_p50_s": quantile(self._latencies, 0.5),
            "broadcast/publish_to_node_p99_s": quantile(self._latencies, 0.99),
            "broadcast/round_s": self.round_s,
            "broadcast/round_predicted_s": rounds.plan.predicted_s,
        }

    def _note(self, node: int, what: str, version: int, end_s: float) -> None:
        self._transfers.append(Transfer(self._names[node], what, version, self._begun_s, end_s))
