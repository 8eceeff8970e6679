# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""When a batch begins, against a lane that only keeps what it is sent."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from torchrl_dvla.collectors.batcher import DecisionBatcher
from torchrl_dvla.collectors.counters import CollectionCounters
from torchrl_dvla.collectors.fleet import Fleet
from torchrl_dvla.collectors.rollout import Rollout
from torchrl_dvla.collectors.schedule import EpisodeSpec
from torchrl_dvla.data import InstructionTable, decision_layout
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import Timeline
from torchrl_dvla.swimlane.messages import Infer, Inferred


class Lane:
    """Answers every request with version 7 when it is asked for the answer."""

    def __init__(self) -> None:
        self.sent: list[Infer] = []
        self.connection = SimpleNamespace(
            send=self.sent.append, recv=lambda: Inferred(7, 0.0, 0.0), fileno=lambda: 0
        )


@pytest.fixture
def bench():
    layout = decision_layout(
        {("observation", "state"): ((2,), torch.float32)}, chunk_size=2, action_dim=1
    )
    with EnvironmentPool(layout, num_pages=4, rows_per_page=2) as pool:
        lane, fleet = Lane(), Fleet(num_workers=1, envs_per_worker=4)
        fleet.admit(0)
        batcher = DecisionBatcher(
            lambda: lane,
            pool,
            InstructionTable(["go"]),
            fleet=fleet,
            max_batch_size=3,
            max_wait_s=1e6,
            seed=None,
            timeline=Timeline(),
            counters=CollectionCounters(),
        )

        def begin(number: int):
            slot = fleet.begin(Rollout(EpisodeSpec("t", 0), group_id=9, rollout_id=number))
            slot.occupant.place, slot.occupant.instruction_id = (number, 0), 0
            return slot

        yield batcher, lane, pool, begin


def test_a_row_waits_for_what_is_being_simulated(bench):
    batcher, lane, _, begin = bench
    slots = [begin(number) for number in range(2)]
    assert batcher.time_to_dispatch() == math.inf
    batcher.add(slots[0])
    assert 0.0 < batcher.time_to_dispatch() <= 1e6
    batcher.dispatch()
    assert lane.sent == []
    batcher.add(slots[1])  # nothing more can come
    batcher.dispatch()
    assert lane.sent[0].rows == [0, 1]
    assert batcher.time_to_dispatch() == math.inf, "one batch at a time"


def test_a_row_waits_no_longer_than_it_may(bench):
    batcher, lane, _, begin = bench
    begin(0)
    batcher.add(begin(1))
    batcher.max_wait_s = 0.0
    batcher.dispatch()
    assert lane.sent[0].rows == [1]


def test_the_wait_begins_when_the_policy_is_free(bench):
    batcher, lane, _, begin = bench
    slots = [begin(number) for number in range(4)]
    for slot in slots[:3]:
        batcher.add(slot)
    batcher.dispatch()
    batcher.add(slots[3])
    slots[3].since_s -= 2e6  # twice max_wait_s, all of it during the call
    batcher.receive()  # the other three are being simulated now
    assert 0.0 < batcher.time_to_dispatch() <= 1e6
    batcher.dispatch()
    assert len(lane.sent) == 1


def test_a_full_batch_waits_for_nobody(bench):
    batcher, lane, _, begin = bench
    slots = [begin(number) for number in range(4)]
    for slot in slots[:3]:
        batcher.add(slot)
    batcher.dispatch()
    assert lane.sent[0].rows == [0, 1, 2]
    batcher.add(slots[3])
    assert [slot for slot, _ in batcher.receive()] == slots[:3]
    assert slots[0].occupant.last_policy_version == 7


def test_rows_say_whose_they_are(bench):
    batcher, _, pool, begin = bench
    slots = [begin(number) for number in (5, 2)]
    slots[1].occupant.num_decisions = 3
    for slot in slots:
        batcher.add(slot)
    batcher.dispatch()
    rows = pool.rows[torch.tensor([5, 2])]
    assert rows["rollout_id"].flatten().tolist() == [5, 2]
    assert rows["group_id"].flatten().tolist() == [9, 9]
    assert rows["decision_index"].flatten().tolist() == [0, 3]
