# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Who receives which version from whom, round by round: the decisions, without input or output.

**A round** brings one version, the newest when it begins, to every member that lacks it. The
members stand in a list; the list and the size of a version decide the tree
(:mod:`~torchrl_dvla.weight_update.broadcast.tree`). *An edge carries exactly what its child lacks.*
So one rule serves every case: a new version (all lack it), a member that joins late (it alone lacks
it, and its neighbour has it), and what is left after a failure (some have it, the others do not).
Frozen weights are a second thing that can be lacking; they travel once.

**A round is over** when each member with a part in it has sent its result, or has left. Every wait
of a member has a deadline, so the result comes in bounded time; a member that cannot send it stops
sending heartbeats and is dropped. So every round ends. The next one begins after that: at most one
version is on its way, and the members' order of versions is the learner's.

**Failures.** A member that has left is no longer in the list, so the next tree is without it: those
behind it get a new parent and the newest version whole. When an edge broke between two members that
are both still there, either might have lost its network, so both are suspects: the failure count of
both grows, and they go to the end of the list, the sender last, where it has nobody to send to.
After three failures without a success between them, a member is evicted. Failures below a broken
edge are its consequence and are not counted: a member that lost its parent drops its children.

After any change or failure the *epoch* grows, and every edge is opened anew: bytes of an earlier
attempt cannot be taken for those of a later one.

A worked trace, as a chain (``*`` = has the newest version; the learner is L)::

    L*  A   B   C     round 1, version 7: L > A > B > C
    L*  A*  x   C     B dies: A has lost B, C has lost its parent, B has left
    L*  A*  C         round 2, version 7, epoch 2: L > A carries nothing, A > C carries 7
    L*  A*  C*
    L*  A*  C*  B     B is back, as a new member: round 3, version 7, epoch 3: C > B carries 7
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torchrl_dvla.weight_update.broadcast.tree import TreePlan

__all__ = ["LEARNER", "MAX_FAILURES", "Member", "Payload", "RoundPlan", "RoundResult", "Rounds"]

#: The learner's node, which is in every tree and lacks nothing.
LEARNER = 0
#: Failures without a success between them, after which a member is evicted.
MAX_FAILURES = 3


@dataclasses.dataclass(frozen=True)
class Payload:
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
class RoundPlan:
    """One member's part in a round.

    Args:
        round (int): its number.
        epoch (int): which generation of edges it uses.
        version (int): the version it is about.
        num_buckets (int): pieces that frozen and live weights are cut into.
        node (int): the member it is for.
        parent (int): the member it receives from.
        receives (Payload): what comes from there; nothing if it lacks nothing.
        sends (dict of int to Payload): what goes to each child that lacks something.
    """

    round: int
    epoch: int
    version: int
    num_buckets: int
    node: int
    parent: int
    receives: Payload
    sends: Mapping[int, Payload]

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        # asdict() copies deeply, which took half of the time of the thread that decides.
        sends = {child: vars(payload) for child, payload in self.sends.items()}
        return {**vars(self), "receives": vars(self.receives), "sends": sends}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RoundPlan:
        """The plan that :meth:`to_json` wrote.

        Examples:
            >>> plan = RoundPlan(1, 1, 5, 4, 2, 0, Payload(live=True), {3: Payload(frozen=True)})
            >>> import json
            >>> RoundPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
            True
        """
        sends = {int(child): Payload(**payload) for child, payload in data["sends"].items()}
        return cls(**{**data, "receives": Payload(**data["receives"]), "sends": sends})


@dataclasses.dataclass(frozen=True)
class RoundResult:
    """What a member sends at the end of its part.

    Args:
        version (int): the newest whole version it has now.
        has_frozen (bool): whether it has the weights that travel once.
        lost_parent (bool): the edge to its parent broke.
        lost_children (tuple of int): the children to whom the edge broke.
        sent_bytes (int): what went to the children.
        tail_s (float): seconds since it had the whole version; 0 if it received none.
    """

    version: int
    has_frozen: bool
    lost_parent: bool = False
    lost_children: tuple[int, ...] = ()
    sent_bytes: int = 0
    tail_s: float = 0.0

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RoundResult:
        """The result that :meth:`to_json` wrote.

        Examples:
            >>> result = RoundResult(3, True, lost_children=(4,), sent_bytes=10)
            >>> import json
            >>> RoundResult.from_json(json.loads(json.dumps(result.to_json()))) == result
            True
        """
        return cls(**{**data, "lost_children": tuple(data["lost_children"])})


@dataclasses.dataclass
class Member:
    """What the learner's node knows of another one.

    Args:
        name (str): its name.
        version (int): the newest whole version it has; -1 for none.
        has_frozen (bool): whether it has the weights that travel once.
        num_failures (int): rounds in a row with a broken edge at this member.
    """

    name: str
    version: int
    has_frozen: bool
    num_failures: int = 0


class Rounds:
    """The members, and the round that is running.

    Args:
        choose_tree (callable): the tree for a number of members.

    Examples:
        >>> from torchrl_dvla.weight_update.broadcast.tree import choose_tree
        >>> rounds = Rounds(lambda num_nodes: choose_tree(num_nodes, 1_000_000))
        >>> a = rounds.join("a", version=-1, has_frozen=True)
        >>> plans = rounds.begin(version=4)
        >>> plans[LEARNER].sends == {a: Payload(live=True)}, plans[a].receives
        (True, Payload(frozen=False, live=True))
        >>> done = RoundResult(4, True)
        >>> rounds.record_result(LEARNER, done) + rounds.record_result(a, done)
        []
        >>> rounds.is_running, rounds.is_behind(4)
        (False, False)
    """

    def __init__(self, choose_tree: Callable[[int], TreePlan]) -> None:
        self._choose_tree = choose_tree
        self.tree_plan = choose_tree(0)
        self.members: dict[int, Member] = {}  # their order is their position in the tree
        self.round = 0
        self.epoch = 0
        self.num_failed = 0
        self._num_joined = 0
        self._is_new_epoch = True
        self._plans: dict[int, RoundPlan] = {}
        self._results: dict[int, RoundResult] = {}
        self._pending: set[int] = set()

    @property
    def is_running(self) -> bool:
        """Whether a result is still missing."""
        return bool(self._pending)

    def waits_for(self, node: int) -> bool:
        """Whether this member's result is still missing."""
        return node in self._pending

    def is_behind(self, version: int) -> bool:
        """Whether a member lacks something: there is work for a round."""
        return any(
            member.version < version or not member.has_frozen for member in self.members.values()
        )

    def join(self, name: str, *, version: int, has_frozen: bool) -> int:
        """Add a member, from the next round on; returns its number, never used before.

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
        """Remove a member. Returns members to be evicted, see :meth:`record_result`."""
        self.members.pop(node, None)
        self._is_new_epoch = True
        return self._settle(node)

    def begin(self, version: int) -> dict[int, RoundPlan]:
        """Begin a round.

        Args:
            version (int): the newest one.

        Returns:
            the plans of those who have a part in it; nobody else need send a result.

        Raises:
            RuntimeError: while a round is running.
        """
        if self._pending:
            raise RuntimeError(
                f"A round must end before the next one begins, got version {version} while "
                f"{sorted(self._pending)} have not sent their results. Wait for them."
            )
        if self._is_new_epoch:
            self.tree_plan = self._choose_tree(len(self.members))
            self.epoch += 1
            self._is_new_epoch = False
        self.round += 1
        nodes = [LEARNER, *self.members]
        lacks = [Payload()] + [
            Payload(frozen=not member.has_frozen, live=member.version < version)
            for member in self.members.values()
        ]
        tree = self.tree_plan.tree
        plans = {}
        for index, children in enumerate(tree.children):
            sends = {nodes[child]: lacks[child] for child in children if lacks[child]}
            if sends or lacks[index]:
                plans[nodes[index]] = RoundPlan(
                    self.round,
                    self.epoch,
                    version,
                    self.tree_plan.num_buckets,
                    nodes[index],
                    nodes[max(tree.parents[index], 0)],
                    lacks[index],
                    sends,
                )
        self._plans, self._results, self._pending = plans, {}, set(plans)
        return plans

    def record_result(self, node: int, result: RoundResult) -> list[int]:
        """Record a member's result.

        Returns:
            members to be evicted: the caller ends their connections, and they have left.
        """
        if node in self.members:
            self.members[node].version = result.version
            self.members[node].has_frozen = result.has_frozen
        if node in self._pending:
            self._results[node] = result
        return self._settle(node)

    def _settle(self, node: int) -> list[int]:
        if node not in self._pending:
            return []
        self._pending.remove(node)
        return [] if self._pending else self._end()

    def _end(self) -> list[int]:
        """End the round with its last result: count failures, move suspects, evict."""
        broken: set[tuple[int, int]] = set()
        for node, result in self._results.items():
            plan = self._plans[node]
            broken.update((node, child) for child in result.lost_children)
            if result.lost_parent:
                broken.add((plan.parent, node))
        if broken or self._plans.keys() - self._results.keys():
            self.num_failed += 1
            self._is_new_epoch = True
        present = {LEARNER, *self.members} & self._results.keys()
        suspects: list[int] = []  # in the order in which they go to the end of the list
        for parent, child in sorted(broken):
            if {parent, child} <= present and not self._results[parent].lost_parent:
                suspects = [n for n in suspects if n not in (parent, child)] + [child, parent]
        for node in present - {LEARNER, *suspects}:
            if not self._results[node].lost_parent:
                self.members[node].num_failures = 0
        evicted = []
        for node in suspects:
            if node != LEARNER:
                member = self.members.pop(node)
                member.num_failures += 1
                if member.num_failures < MAX_FAILURES:
                    self.members[node] = member
                else:
                    evicted.append(node)
        return evicted
