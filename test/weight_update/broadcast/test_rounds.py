# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_dvla.weight_update.broadcast.rounds import (
    LEARNER,
    MAX_FAILURES,
    Payload,
    RoundPlan,
    RoundResult,
    Rounds,
)
from torchrl_dvla.weight_update.broadcast.tree import LinkModel, choose_tree

LIVE, ALL = Payload(live=True), Payload(frozen=True, live=True)


def chained(*names: str, has_frozen: bool = True) -> Rounds:
    """Rounds over a chain of new members."""
    rounds = Rounds(lambda num_nodes: choose_tree(num_nodes, 1_000_000, shapes=["chain"]))
    for name in names:
        rounds.join(name, version=-1, has_frozen=has_frozen)
    return rounds


def succeed(rounds: Rounds, *nodes: int, version: int) -> None:
    for node in nodes:
        assert rounds.record_result(node, RoundResult(version, True)) == []


def lose_parent(rounds: Rounds, *nodes: int) -> list[int]:
    return [
        evicted
        for node in nodes
        for evicted in rounds.record_result(node, RoundResult(-1, True, lost_parent=True))
    ]


def lose_child(rounds: Rounds, node: int, child: int, *, version: int) -> None:
    assert rounds.record_result(node, RoundResult(version, True, lost_children=(child,))) == []


def failures(rounds: Rounds) -> list[tuple[str, int]]:
    return [(member.name, member.num_failures) for member in rounds.members.values()]


def payloads(plans: dict[int, RoundPlan]) -> dict[tuple[int, int], Payload]:
    """What travels where; both ends must agree on it."""
    sent = {(p.node, child): payload for p in plans.values() for child, payload in p.sends.items()}
    received = {(p.parent, p.node): p.receives for p in plans.values() if p.receives}
    assert sent == received
    return sent


def test_a_new_version_goes_down_the_chain() -> None:
    rounds = chained("a", "b", "c")
    plans = rounds.begin(5)
    assert payloads(plans) == {(0, 1): LIVE, (1, 2): LIVE, (2, 3): LIVE}
    assert {(p.round, p.epoch, p.version) for p in plans.values()} == {(1, 1, 5)}
    succeed(rounds, 3, 2, 1, version=5)
    assert rounds.is_running  # the learner still sends
    with pytest.raises(RuntimeError, match=r"got version 6 while \[0\] have not sent"):
        rounds.begin(6)
    succeed(rounds, LEARNER, version=5)
    assert not rounds.is_running
    assert not rounds.is_behind(5)
    assert {p.epoch for p in rounds.begin(6).values()} == {1}  # the same edges
    assert rounds.num_failed == 0


def test_frozen_weights_travel_once() -> None:
    rounds = chained("a", "b", has_frozen=False)
    assert payloads(rounds.begin(0)) == {(0, 1): ALL, (1, 2): ALL}
    succeed(rounds, 0, 1, 2, version=0)
    assert payloads(rounds.begin(1)) == {(0, 1): LIVE, (1, 2): LIVE}


def test_one_that_joins_late_gets_everything_from_its_neighbour() -> None:
    rounds = chained("a", "b", has_frozen=False)
    rounds.begin(4)
    assert rounds.join("late", version=-1, has_frozen=False) == 3  # during a round: from the next
    succeed(rounds, 0, 1, 2, version=4)
    assert rounds.is_behind(4)
    plans = rounds.begin(4)
    assert payloads(plans) == {(2, 3): ALL}
    assert set(plans) == {2, 3}  # neither the learner nor a has anything to do
    assert plans[3].epoch == 2


def test_the_trace_of_a_death() -> None:
    """The trace of the module's docstring."""
    rounds = chained("a", "b", "c")
    rounds.begin(7)
    assert lose_parent(rounds, 3) == []
    lose_child(rounds, 1, 2, version=7)
    succeed(rounds, LEARNER, version=7)
    assert rounds.is_running  # b has neither sent a result nor left
    assert rounds.leave(2) == []
    assert not rounds.is_running
    assert [member.version for member in rounds.members.values()] == [7, -1]
    assert failures(rounds) == [("a", 0), ("c", 0)]
    plans = rounds.begin(7)
    assert payloads(plans) == {(1, 3): LIVE}
    assert plans[1].epoch == 2
    succeed(rounds, 1, 3, version=7)
    assert rounds.join("b", version=-1, has_frozen=True) == 4  # a new number, so new edges
    plans = rounds.begin(7)
    assert payloads(plans) == {(3, 4): LIVE}
    assert plans[3].epoch == 3
    assert rounds.num_failed == 1


def test_a_broken_edge_between_two_that_live() -> None:
    rounds = chained("a", "b", "c", "d")
    rounds.begin(1)
    # a > b breaks; c and d only suffer from it.
    succeed(rounds, LEARNER, version=1)
    lose_child(rounds, 1, 2, version=1)
    assert lose_parent(rounds, 3, 4, 2) == []
    assert failures(rounds) == [("c", 0), ("d", 0), ("b", 1), ("a", 1)]
    assert payloads(rounds.begin(1)) == {(0, 3): LIVE, (3, 4): LIVE, (4, 2): LIVE}
    succeed(rounds, 0, 3, 4, 2, version=1)
    assert failures(rounds) == [("c", 0), ("d", 0), ("b", 0), ("a", 1)]


def test_three_failures_evict_a_member_but_never_the_learner() -> None:
    rounds = chained("a")
    for failure in range(1, MAX_FAILURES + 1):
        rounds.begin(1)
        lose_child(rounds, LEARNER, 1, version=1)
        assert lose_parent(rounds, 1) == ([1] if failure == MAX_FAILURES else [])
    assert rounds.members == {}
    assert rounds.begin(2) == {}
    assert not rounds.is_running


def test_a_child_may_be_the_only_one_to_notice() -> None:
    rounds = chained("a", "b")
    rounds.begin(1)
    succeed(rounds, LEARNER, 1, version=1)  # what a sent had left its machine
    assert lose_parent(rounds, 2) == []
    assert failures(rounds) == [("b", 1), ("a", 1)]


class World:
    """Members that follow their plans, links that break, nodes that die."""

    def __init__(self, shape: str) -> None:
        self.rounds = Rounds(lambda n: choose_tree(n, 1_000, LinkModel(), shapes=[shape]))
        self.has: dict[int, int] = {}

    def join(self) -> None:
        self.has[self.rounds.join("n", version=-1, has_frozen=True)] = -1

    def play(self, version: int, dying: set[int], broken: set[int]) -> None:
        """One round; ``dying`` fall silent during it, ``broken`` members' incoming edges break."""
        plans = self.rounds.begin(version)
        payloads(plans)
        evicted: list[int] = []
        lost: set[int] = set()
        has = {LEARNER: version, **self.has}
        for node in [LEARNER, *self.rounds.members]:  # parents come first in every tree
            if node not in plans:
                continue
            plan = plans[node]
            if plan.receives:
                assert self.has[node] < version  # nobody gets what it has, or something older
                is_cut_off = node in broken or plan.parent in dying or plan.parent in lost
                if node in dying or is_cut_off:
                    lost.add(node)
                else:
                    # Whoever sends a version has it, or gets it in this very round.
                    assert has[plan.parent] == version
                    has[node] = self.has[node] = version
        for node in dying:
            evicted += self.rounds.leave(node)
            del self.has[node]
        for node in plans.keys() - dying:
            gone = tuple(c for c in plans[node].sends if c in broken or c in dying)
            how = {"lost_parent": True} if node in lost else {"lost_children": gone}
            evicted += self.rounds.record_result(node, RoundResult(has[node], True, **how))
        assert not self.rounds.is_running  # every round ends
        for node in evicted:
            assert node not in self.rounds.members
            del self.has[node]
        assert {n: m.version for n, m in self.rounds.members.items()} == self.has


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(["chain", "binomial"]),
    num_nodes=st.integers(1, 7),
    script=st.lists(
        st.tuples(
            st.booleans(),  # is there a new version?
            st.booleans(),  # does a node join?
            st.sets(st.integers(1, 9), max_size=2),  # who dies
            st.sets(st.integers(1, 9), max_size=2),  # whose incoming edge breaks
        ),
        max_size=8,
    ),
)
def test_whatever_happens_all_that_live_get_the_newest(
    shape: str, num_nodes: int, script: list[tuple[bool, bool, set[int], set[int]]]
) -> None:
    world, version = World(shape), 0
    for _ in range(num_nodes):
        world.join()
    for is_new, joins, dying, broken in script:
        version += is_new
        if joins:
            world.join()
        living = set(world.has)
        world.play(version, dying & living, broken & living)
    world.play(version, set(), set())  # one undisturbed round is enough
    assert set(world.has.values()) <= {version}
    assert not world.rounds.is_behind(version)
