# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The groups of a node: begun in order, with their version, gone once they are complete."""

from __future__ import annotations

import pytest

from torchrl_dvla.collectors import EpisodeSpec
from torchrl_dvla.data import InstructionTable
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.topology.granted_groups import GrantedGroups
from torchrl_dvla.topology.node_messages import Grant, GroupDone, GroupDropped, TaskQuarantined

from .fake_cluster import LAYOUT


class Node:
    """Granted groups without a loop."""

    def __init__(self) -> None:
        self.pool = EnvironmentPool(LAYOUT, 8, rows_per_page=2)
        self.version, self.sent, self.num_notified = 0, [], 0
        self.groups = GrantedGroups(
            self.pool,
            InstructionTable(["push it"]),
            pages_per_rollout=2,
            num_candidates=2,
            version=lambda: self.version,
            send=self.sent.append,
        )
        self.groups.add_listener(self.notify)

    def notify(self) -> None:
        self.num_notified += 1

    def play(self, group, num_rows=3):
        """Finish the rollouts of a group."""
        for rollout in group.rollouts:
            rollout.instruction_id = 0
            for row in range(num_rows):
                if row % 2 == 0:
                    rollout.pages.append(self.pool.lease(rollout.rollout_id))
                rollout.record(policy_version=0, reward=1.0, success=False, num_env_steps=2)
            self.groups.finish(rollout)


def grant(number, task="a", min_version=0):
    return Grant(number, EpisodeSpec(task, number), 2 * number, 1, min_version)


@pytest.fixture
def node():
    node = Node()
    yield node
    node.pool.check()
    node.pool.close()


def test_nothing_begins_that_was_not_granted(node):
    assert node.groups.admit() == "no_admission"
    node.groups.grant([grant(3)])
    assert node.num_notified == 1
    group = node.groups.admit()
    assert (group.group_id, [r.rollout_id for r in group.rollouts]) == (3, [6, 7])
    assert node.groups.running == [group]
    assert node.groups.admit() == "no_admission"


def test_a_complete_group_is_sent_and_leaves_no_page(node):
    node.groups.grant([grant(0)])
    group = node.groups.admit()
    node.play(group)
    node.groups.complete(group)
    (done,) = node.sent
    assert isinstance(done, GroupDone) and done.instructions == {0: "push it"}
    assert done.rows.shape == (LAYOUT.nbytes(6),)
    assert all(rollout.pages == [] for rollout in done.rollouts)
    assert node.groups.running == [] and node.pool.num_free_pages == 8


def test_a_group_of_a_lost_node_goes_before_younger_ones(node):
    node.groups.grant([grant(5), grant(6)])
    node.groups.grant([grant(2)])
    assert [node.groups.admit().group_id for _ in range(2)] == [2, 5]
    assert node.groups.admit() == "no_page", "two groups fill the node"


def test_a_group_waits_for_the_version_of_its_admission(node):
    node.groups.grant([grant(0, min_version=2)])
    node.version = 1
    assert node.groups.admit() == "no_version"
    node.version = 2
    assert node.groups.admit().group_id == 0


def test_a_group_that_is_dropped_leaves_no_page(node):
    node.groups.grant([grant(0)])
    group = node.groups.admit()
    first, second = group.rollouts
    first.pages.append(node.pool.lease(first.rollout_id))
    first.record(policy_version=0, reward=1.0, success=False, num_env_steps=2)
    node.groups.finish(first)
    second.pages.append(node.pool.lease(second.rollout_id))
    node.groups.drop(group, "why")
    assert node.sent == [GroupDropped(0, "why")]
    assert node.pool.num_free_pages == 8


def test_a_quarantined_task_begins_no_more(node):
    node.groups.grant([grant(0), grant(1, task="b")])
    node.groups.quarantine("a", RuntimeError("it broke"))
    assert node.groups.admit().group_id == 1
    assert node.sent == [
        TaskQuarantined("a", "it broke"),
        GroupDropped(0, "the environment kept failing"),
    ]
    node.groups.quarantine("b")  # the learner said so, and knows
    assert len(node.sent) == 2
