# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The exploration type of a lane that is a thread."""

from __future__ import annotations

import threading

from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type

from torchrl_dvla.swimlane.exploration import own_exploration_type


class Lane(threading.Thread):
    """Enters an exploration context, and goes from gate to gate."""

    def __init__(self, own: bool) -> None:
        super().__init__(daemon=True)
        self.own = own
        self.entered, self.look, self.looked, self.leave = (threading.Event() for _ in range(4))
        self.seen = None
        self.start()

    def run(self) -> None:
        if self.own:
            own_exploration_type()
        with set_exploration_type(ExplorationType.RANDOM):
            self.entered.set()
            self.look.wait(20)
            self.seen = exploration_type()
            self.looked.set()
            self.leave.wait(20)


def interleave(own: bool):
    """The loss enters and leaves after the lane: what the lane saw, and what is left."""
    lane = Lane(own)
    assert lane.entered.wait(20)
    loss = set_exploration_type(ExplorationType.DETERMINISTIC)
    loss.__enter__()
    lane.look.set()
    assert lane.looked.wait(20)
    lane.leave.set()
    lane.join(20)
    loss.__exit__(None, None, None)
    left = exploration_type()
    set_exploration_type(None).__enter__()
    return lane.seen, left


def test_a_lane_of_its_own_sees_its_own_and_leaves_nothing():
    assert interleave(own=True) == (ExplorationType.RANDOM, None)


def test_without_it_both_go_wrong():
    """What the module is for; if this fails, TorchRL has mended it and the module can go."""
    assert interleave(own=False) == (ExplorationType.DETERMINISTIC, ExplorationType.RANDOM)


def test_a_lane_does_not_change_what_others_see():
    lane = Lane(own=True)
    assert lane.entered.wait(20)
    assert exploration_type() is None
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert exploration_type() is ExplorationType.DETERMINISTIC
    lane.look.set()
    lane.leave.set()
    lane.join(20)
