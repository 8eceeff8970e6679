# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Who gets which version from whom, round by round: the decisions, without any input or output.

**A round** brings one version, the newest when it begins, to every member that lacks it. The
members stand in a list; the list and the size of a version decide the tree
(:mod:`~torchrl_dvla.weight_update.broadcast.cost`). *An edge carries exactly what its child lacks.*
So one rule serves every case: a new version (all lack it), a member that joins late (it alone lacks
it, and its neighbour has it), and what is left after a failure (some have it, the others do not).
Frozen weights are a second thing that can be lacking; they travel once.

**A round is over** when each member with an order has reported, or has left. Every wait of a member
has a deadline, so it reports in bounded time; one that cannot report stops sending beats and is
taken for gone. So every round ends. The next one begins after that: at most one version is on its
way, and the members' order of versions is the learner's.

**Failures.** A member that is gone is no longer in the list, so the next tree is without it: those
behind it are re-parented and get the newest version whole. An edge that broke between two members
that are both still there is nobody's fault that could be told from here: either might have lost its
network. Both get a strike and go to the end of the list, the sender last, where it has nobody to
send to; with three strikes and no success between them, a member is cut. Failures below a broken
edge are its consequence and count for nothing: a member that lost its parent lets its children go.

After any change or failure the *epoch* grows, and every edge is opened anew: bytes of an earlier
attempt cannot be taken for those of a later one.

A worked trace, as a chain (``*`` = has the newest version; the learner is L)::

    L*  A   B   C     round 1, version 7: L > A > B > C
    L*  A*  x   C     B dies: A reports that it lost B, C that it lost its parent; B has left
    L*  A*  C         round 2, version 7, epoch 2: L > A carries nothing, A > C carries 7
    L*  A*  C*
    L*  A*  C*  B     B is back, as a new member: round 3, version 7, epoch 3: C > B carries 7
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torchrl_dvla.weight_update.broadcast.cost import Plan

__all__ = ["LEARNER", "MAX_STRIKES", "Cargo", "Member", "Order", "Report", "Rounds"]

#: The learner's node, which is in every tree and lacks nothing.
LEARNER = 0
MAX_STRIKES = 3


@dataclasses.dataclass(frozen=True)
class Cargo:
    """What an edge carries in one round.

    Args:
        frozen (bool): the weights that travel once.
        live (bool): those that every version brings.
    """

    frozen: bool = False
    live: bool = False

    def __bool__(self) -> bool:
        return self.frozen or self.live


@dataclasses.dataclass(frozen=True)
class Order:
    """One member's part in a round.

    Args:
        round (int): its number.
        epoch (int): which generation of edges it uses.
        version (int): the version it is about.
        num_buckets (int): pieces that frozen and live weights are cut into.
        node (int): the member it is for.
        parent (int): who it receives from.
        receives (Cargo): what comes from there; nothing if it lacks nothing.
        sends (dict of int to Cargo): what goes to each child that lacks something.
    """

    round: int
    epoch: int
    version: int
    num_buckets: int
    node: int
    parent: int
    receives: Cargo
    sends: Mapping[int, Cargo]

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        # asdict() copies deeply, which took half of the time of the thread that decides.
        sends = {child: vars(cargo) for child, cargo in self.sends.items()}
        return {**vars(self), "receives": vars(self.receives), "sends": sends}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Order:
        """The order that :meth:`to_json` wrote.

        Examples:
            >>> order = Order(1, 1, 5, 4, 2, 0, Cargo(live=True), {3: Cargo(frozen=True)})
            >>> import json
            >>> Order.from_json(json.loads(json.dumps(order.to_json()))) == order
            True
        """
        fields = dict(data)
        fields["receives"] = Cargo(**fields["receives"])
        fields["sends"] = {int(child): Cargo(**cargo) for child, cargo in fields["sends"].items()}
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a member tells at the end of its part.

    Args:
        version (int): the newest whole version it has now.
        has_frozen (bool): whether it has the weights that travel once.
        lost_parent (bool): the edge to its parent broke.
        lost_children (tuple of int): the children to whom the edge broke.
        sent_bytes (dict of int to int): what went to each child.
        tail_s (float): seconds since it had the whole version; 0 if it received none.
        problem (str): what broke the edge to the parent, for people.
    """

    version: int
    has_frozen: bool
    lost_parent: bool = False
    lost_children: tuple[int, ...] = ()
    sent_bytes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    tail_s: float = 0.0
    problem: str = ""

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_json` wrote.

        Examples:
            >>> report = Report(3, True, lost_children=(4,), sent_bytes={4: 10})
            >>> import json
            >>> Report.from_json(json.loads(json.dumps(report.to_json()))) == report
            True
        """
        fields = dict(data)
        fields["lost_children"] = tuple(fields["lost_children"])
        fields["sent_bytes"] = {int(child): n for child, n in fields["sent_bytes"].items()}
        return cls(**fields)


@dataclasses.dataclass
class Member:
    """What the learner's node knows of another one.

    Args:
        name (str): how it calls itself.
        version (int): the newest whole version it has; -1 for none.
        has_frozen (bool): whether it has the weights that travel once.
        num_strikes (int): rounds in a row with a broken edge at this member.
    """

    name: str
    version: int
    has_frozen: bool
    num_strikes: int = 0


class Rounds:
    """The members, and the round that is running.

    Args:
        plan (callable): the plan for a number of members.

    Examples:
        >>> from torchrl_dvla.weight_update.broadcast.cost import choose_plan
        >>> rounds = Rounds(lambda num_nodes: choose_plan(num_nodes, 1_000_000))
        >>> a = rounds.join("a", version=-1, has_frozen=True)
        >>> orders = rounds.begin(version=4)
        >>> orders[LEARNER].sends == {a: Cargo(live=True)}, orders[a].receives
        (True, Cargo(frozen=False, live=True))
        >>> rounds.report(LEARNER, Report(4, True)) + rounds.report(a, Report(4, True))
        []
        >>> rounds.is_running, rounds.somebody_lacks(4)
        (False, False)
    """

    def __init__(self, plan: Callable[[int], Plan]) -> None:
        self._choose = plan
        self.plan = plan(0)
        self.members: dict[int, Member] = {}  # their order is their place in the tree
        self.round = 0
        self.epoch = 0
        self.num_failed = 0
        self._num_joined = 0
        self._is_new_epoch = True
        self._orders: dict[int, Order] = {}
        self._reports: dict[int, Report] = {}
        self._pending: set[int] = set()

    @property
    def is_running(self) -> bool:
        """Whether somebody's report is still missing."""
        return bool(self._pending)

    def waits_for(self, node: int) -> bool:
        """Whether this member's report is still missing."""
        return node in self._pending

    def join(self, name: str, *, version: int, has_frozen: bool) -> int:
        """Take a member in, from the next round on; returns its number, never used before.

        If another member has this name, its own gets the number: ``"name #7"``.
        """
        self._num_joined += 1
        node = self._num_joined
        if any(member.name == name for member in self.members.values()):
            name = f"{name} #{node}"
        self.members[node] = Member(name, version, has_frozen)
        self._is_new_epoch = True
        return node

    def leave(self, node: int) -> list[int]:
        """A member is gone. Returns members to be cut, see :meth:`report`."""
        self.members.pop(node, None)
        self._is_new_epoch = True
        return self._settle(node)

    def somebody_lacks(self, version: int) -> bool:
        """Whether there is work for a round."""
        return any(
            member.version < version or not member.has_frozen for member in self.members.values()
        )

    def begin(self, version: int) -> dict[int, Order]:
        """Begin a round.

        Args:
            version (int): the newest one.

        Returns:
            the orders of those who have a part in it; nobody else need report.

        Raises:
            RuntimeError: while a round is running.
        """
        if self._pending:
            raise RuntimeError(
                f"A round must end before the next one begins, got version {version} while "
                f"{sorted(self._pending)} have not reported. Wait for their reports."
            )
        if self._is_new_epoch:
            self.plan = self._choose(len(self.members))
            self.epoch += 1
            self._is_new_epoch = False
        self.round += 1
        nodes = [LEARNER, *self.members]
        lacks = [Cargo()] + [
            Cargo(frozen=not member.has_frozen, live=member.version < version)
            for member in self.members.values()
        ]
        orders = {}
        for place, children in enumerate(self.plan.tree.children()):
            sends = {nodes[child]: lacks[child] for child in children if lacks[child]}
            if sends or lacks[place]:
                parent = self.plan.tree.parents[place]
                orders[nodes[place]] = Order(
                    self.round,
                    self.epoch,
                    version,
                    self.plan.num_buckets,
                    nodes[place],
                    nodes[max(parent, 0)],
                    lacks[place],
                    sends,
                )
        self._orders, self._reports, self._pending = orders, {}, set(orders)
        return orders

    def report(self, node: int, report: Report) -> list[int]:
        """Take a member's report.

        Returns:
            members to be cut: the caller ends their connections, and they have left.
        """
        if node in self.members:
            self.members[node].version = report.version
            self.members[node].has_frozen = report.has_frozen
        if node in self._pending:
            self._reports[node] = report
        return self._settle(node)

    def _settle(self, node: int) -> list[int]:
        if node not in self._pending:
            return []
        self._pending.remove(node)
        return [] if self._pending else self._end()

    def _end(self) -> list[int]:
        """Judge the round when its last report is in."""
        broken: set[tuple[int, int]] = set()
        for node, report in self._reports.items():
            order = self._orders[node]
            broken.update((node, child) for child in report.lost_children)
            if report.lost_parent:
                broken.add((order.parent, node))
        if broken or self._orders.keys() - self._reports.keys():
            self.num_failed += 1
            self._is_new_epoch = True
        there = {LEARNER, *self.members} & self._reports.keys()
        culprits: list[int] = []  # in the order in which they go to the end of the list
        for parent, child in sorted(broken):
            if parent in there and child in there and not self._reports[parent].lost_parent:
                culprits = [n for n in culprits if n not in (parent, child)] + [child, parent]
        for node in there - {LEARNER, *culprits}:
            if not self._reports[node].lost_parent:
                self.members[node].num_strikes = 0
        cut = []
        for node in culprits:
            if node != LEARNER:
                member = self.members.pop(node)
                member.num_strikes += 1
                if member.num_strikes < MAX_STRIKES:
                    self.members[node] = member
                else:
                    cut.append(node)
        return cut
