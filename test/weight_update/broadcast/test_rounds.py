# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_dvla.weight_update.broadcast.cost import LinkModel, Plan, choose_plan
from torchrl_dvla.weight_update.broadcast.rounds import (
    LEARNER,
    MAX_STRIKES,
    Cargo,
    Order,
    Report,
    Rounds,
)

LIVE, ALL, NOTHING = Cargo(live=True), Cargo(frozen=True, live=True), Cargo()


def chained(num_nodes: int) -> Plan:
    return choose_plan(num_nodes, 1_000_000, shapes=["chain"])


def rounds_with(*names: str, has_frozen: bool = True) -> Rounds:
    rounds = Rounds(chained)
    for name in names:
        rounds.join(name, version=-1, has_frozen=has_frozen)
    return rounds


def done(rounds: Rounds, *nodes: int, version: int) -> None:
    for node in nodes:
        assert rounds.report(node, Report(version, True)) == []


def edges(orders: dict[int, Order]) -> dict[tuple[int, int], Cargo]:
    """What travels where; both ends must agree on it."""
    sent = {(o.node, child): cargo for o in orders.values() for child, cargo in o.sends.items()}
    received = {(o.parent, o.node): o.receives for o in orders.values() if o.receives}
    assert sent == received
    return sent


def test_a_new_version_goes_down_the_chain() -> None:
    rounds = rounds_with("a", "b", "c")
    orders = rounds.begin(5)
    assert edges(orders) == {(0, 1): LIVE, (1, 2): LIVE, (2, 3): LIVE}
    assert {(o.round, o.epoch, o.version) for o in orders.values()} == {(1, 1, 5)}
    done(rounds, 3, 2, 1, version=5)
    assert rounds.is_running  # the learner still sends
    done(rounds, LEARNER, version=5)
    assert not rounds.is_running
    assert not rounds.somebody_lacks(5)
    assert {o.epoch for o in rounds.begin(6).values()} == {1}  # the same edges
    assert rounds.num_failed == 0


def test_frozen_weights_travel_once() -> None:
    rounds = rounds_with("a", "b", has_frozen=False)
    assert edges(rounds.begin(0)) == {(0, 1): ALL, (1, 2): ALL}
    done(rounds, 0, 1, 2, version=0)
    assert edges(rounds.begin(1)) == {(0, 1): LIVE, (1, 2): LIVE}


def test_one_that_joins_late_gets_everything_from_its_neighbour() -> None:
    rounds = rounds_with("a", "b", has_frozen=False)
    rounds.begin(4)
    assert rounds.join("late", version=-1, has_frozen=False) == 3  # during a round: from the next
    done(rounds, 0, 1, 2, version=4)
    assert rounds.somebody_lacks(4)
    orders = rounds.begin(4)
    assert edges(orders) == {(2, 3): ALL}
    assert set(orders) == {2, 3}  # neither the learner nor a has anything to do
    assert orders[3].epoch == 2


def test_the_trace_of_a_death() -> None:
    """The trace of the module's docstring."""
    rounds = rounds_with("a", "b", "c")
    rounds.begin(7)
    rounds.report(3, Report(-1, True, lost_parent=True))
    assert rounds.report(1, Report(7, True, lost_children=(2,))) == []
    assert rounds.report(LEARNER, Report(7, True)) == []
    assert rounds.is_running  # b has neither reported nor left
    assert rounds.leave(2) == []
    assert not rounds.is_running
    assert [(m.name, m.version, m.num_strikes) for m in rounds.members.values()] == [
        ("a", 7, 0),
        ("c", -1, 0),
    ]
    orders = rounds.begin(7)
    assert edges(orders) == {(1, 3): LIVE}
    assert orders[1].epoch == 2
    done(rounds, 1, 3, version=7)
    b = rounds.join("b", version=-1, has_frozen=True)
    assert b == 4  # a new number: no edge of before can be meant
    orders = rounds.begin(7)
    assert edges(orders) == {(3, 4): LIVE}
    assert orders[3].epoch == 3
    assert rounds.num_failed == 1


def test_a_broken_edge_between_two_that_live() -> None:
    rounds = rounds_with("a", "b", "c", "d")
    rounds.begin(1)
    # a > b breaks; c and d only suffer from it.
    rounds.report(LEARNER, Report(1, True))
    rounds.report(1, Report(1, True, lost_children=(2,)))
    rounds.report(3, Report(-1, True, lost_parent=True))
    rounds.report(4, Report(-1, True, lost_parent=True))
    assert rounds.report(2, Report(-1, True, lost_parent=True)) == []
    assert [(m.name, m.num_strikes) for m in rounds.members.values()] == [
        ("c", 0),
        ("d", 0),
        ("b", 1),
        ("a", 1),
    ]
    assert edges(rounds.begin(1)) == {(0, 3): LIVE, (3, 4): LIVE, (4, 2): LIVE}
    done(rounds, 0, 3, 4, 2, version=1)
    assert {m.num_strikes for m in rounds.members.values() if m.name != "a"} == {0}


def test_three_strikes_cut_a_member_but_never_the_learner() -> None:
    rounds = rounds_with("a")
    for strike in range(1, MAX_STRIKES + 1):
        rounds.begin(1)
        assert rounds.report(LEARNER, Report(1, True, lost_children=(1,))) == []
        cut = rounds.report(1, Report(-1, True, lost_parent=True))
        assert cut == ([1] if strike == MAX_STRIKES else [])
    assert rounds.members == {}
    assert rounds.begin(2) == {}
    assert not rounds.is_running


def test_a_child_may_be_the_only_one_to_notice() -> None:
    rounds = rounds_with("a", "b")
    rounds.begin(1)
    done(rounds, LEARNER, 1, version=1)  # what a sent had left its machine
    rounds.report(2, Report(-1, True, lost_parent=True))
    assert [(m.name, m.num_strikes) for m in rounds.members.values()] == [("b", 1), ("a", 1)]


def test_rounds_do_not_overlap() -> None:
    rounds = rounds_with("a")
    rounds.begin(1)
    with pytest.raises(RuntimeError, match=r"got version 2 while \[0, 1\] have not reported"):
        rounds.begin(2)


class World:
    """Members that do what they are ordered, links that break, nodes that die."""

    def __init__(self, shape: str) -> None:
        self.rounds = Rounds(lambda n: choose_plan(n, 1_000, LinkModel(), shapes=[shape]))
        self.has: dict[int, int] = {}
        self.epochs: dict[tuple[int, int], int] = {}

    def join(self) -> None:
        self.has[self.rounds.join("n", version=-1, has_frozen=True)] = -1

    def play(self, version: int, dying: set[int], broken: set[int]) -> None:
        """One round; ``dying`` fall silent during it, ``broken`` members' incoming edges break."""
        orders = self.rounds.begin(version)
        edges(orders)
        cut: list[int] = []
        lost: set[int] = set()
        has = {LEARNER: version, **self.has}
        for node in [LEARNER, *self.rounds.members]:  # parents come first in every tree
            if node not in orders:
                continue
            order = orders[node]
            if order.receives:
                assert self.has[node] < version  # nobody gets what it has, or something older
                is_cut_off = node in broken or order.parent in dying or order.parent in lost
                if node in dying or is_cut_off:
                    lost.add(node)
                else:
                    # Whoever sends a version has it, or gets it in this very round.
                    assert has[order.parent] == version
                    has[node] = self.has[node] = version
        for node in dying:
            cut += self.rounds.leave(node)
            del self.has[node]
        for node in orders.keys() - dying:
            gone = tuple(c for c in orders[node].sends if c in broken or c in dying)
            is_lost = node in lost
            cut += self.rounds.report(
                node,
                Report(has[node], True, lost_parent=is_lost, lost_children=() if is_lost else gone),
            )
        assert not self.rounds.is_running  # every round ends
        for node in cut:
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
    shape: str,
    num_nodes: int,
    script: list[tuple[bool, bool, set[int], set[int]]],
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
    assert not world.rounds.somebody_lacks(version)
