# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_dvla.weight_update import WeightLayout, WeightStore
from torchrl_dvla.weight_update.broadcast.transfer import (
    PinnedSource,
    StoreTarget,
    describe_layout,
    restore_layout,
)


class Mixed(nn.Module):
    """Everything that makes a layout: ties, strides, types, buffers, frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.narrow = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.head = nn.Linear(4, 4, bias=False)
        self.tied = self.head


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 3, bias=False)
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.scaling = 0.5


def entries_of(layout: WeightLayout) -> list[tuple[Any, ...]]:
    return [
        (e.names, e.shape, e.stride, e.dtype, e.offset_bytes, e.is_frozen) for e in layout.entries
    ]


@pytest.mark.parametrize(
    "layout",
    [
        WeightLayout(Mixed()),
        WeightLayout(Mixed(), trainable_only=True),
        WeightLayout(Mixed(), transport_dtype=torch.bfloat16),
        WeightLayout(nn.Sequential(LowRank()), lora_only=True),
    ],
    ids=["all", "trainable", "narrow", "lora"],
)
def test_the_same_bytes_in_the_same_entries_of(layout: WeightLayout) -> None:
    copy = restore_layout(json.loads(json.dumps(describe_layout(layout))))
    assert entries_of(copy) == entries_of(layout)
    assert (copy.slot_bytes, copy.frozen_bytes) == (layout.slot_bytes, layout.frozen_bytes)
    assert copy.buckets == layout.buckets
    assert copy.index_of == layout.index_of
    assert copy.lora_updates == layout.lora_updates


def test_readers_may_lack_the_adapters_as_on_the_learners_node() -> None:
    layout = WeightLayout(nn.Sequential(LowRank()), lora_only=True)
    copy = restore_layout(describe_layout(layout))
    assert copy.lora_updates
    assert copy.differences(nn.Sequential(nn.Linear(4, 3, bias=False)), as_reader=True) == []


def test_another_version_lays_out_differently() -> None:
    description = describe_layout(WeightLayout(nn.Linear(2, 2)))
    description["entries"][1]["offset_bytes"] += 64
    with pytest.raises(RuntimeError, match="lays weights out differently"):
        restore_layout(description)


def test_a_target_notifies_when_a_version_is_visible_and_not_of_a_part() -> None:
    with WeightStore(WeightLayout(nn.Linear(2, 1))) as store:
        seen: list[int] = []
        target = StoreTarget(store, lambda: seen.append(store.visible_version))
        assert target.has_frozen  # there are none to wait for

        def half(memory: torch.Tensor) -> None:
            memory[:8] = 1
            raise ConnectionError("the parent is gone")

        with pytest.raises(ConnectionError):
            target.receive(half, 3)
        assert (seen, target.version) == ([], -1)
        with pytest.raises(RuntimeError, match="Version 3 was planned from a node that has -1"):
            target.live(3)
        target.receive(lambda memory: memory.fill_(2), 3)
        assert (seen, target.version) == ([3], 3)
        assert target.live(3).unique().tolist() == [2]


def test_the_learner_receives_nothing() -> None:
    with WeightStore(nn.Linear(2, 1)) as store, torch.no_grad():
        reader = store.reader("broadcast")
        source = PinnedSource(reader.pin_slot())
        assert (source.version, len(source.live(0))) == (0, store.layout.slot_bytes)
        with pytest.raises(RuntimeError, match="receives nothing"):
            source.receive(lambda memory: None, 1)
        reader.close()
