# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrl_dvla.weight_update import WeightLayout, WeightStore
from torchrl_dvla.weight_update.broadcast.hold import SlotHold, StoreHold


def test_who_waits_is_told_when_a_version_is_offered_and_not_of_a_part() -> None:
    with WeightStore(WeightLayout(nn.Linear(2, 1))) as store:
        told: list[int] = []
        hold = StoreHold(store, lambda: told.append(store.visible_version))
        assert hold.has_frozen  # there are none to wait for

        def half(memory: torch.Tensor) -> None:
            memory[:8] = 1
            raise ConnectionError("the parent is gone")

        with pytest.raises(ConnectionError):
            hold.receive(half, 3)
        assert (told, hold.version) == ([], -1)
        with pytest.raises(RuntimeError, match="Version 3 was ordered from a node that has -1"):
            hold.held(3)
        hold.receive(lambda memory: memory.fill_(2), 3)
        assert (told, hold.version) == ([3], 3)
        assert hold.held(3).unique().tolist() == [2]


def test_the_learner_receives_nothing() -> None:
    with WeightStore(nn.Linear(2, 1)) as store, torch.no_grad():
        reader = store.reader("broadcast")
        hold = SlotHold(reader.pin_slot())
        assert (hold.version, len(hold.held(0))) == (0, store.layout.slot_bytes)
        with pytest.raises(RuntimeError, match="receives nothing"):
            hold.receive(lambda memory: None, 1)
        reader.close()
