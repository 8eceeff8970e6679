# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torchrl.data.replay_buffers.samplers import prioritized

from torchrl_dvla.data import (
    Admission,
    GroupAssembler,
    InstructionTable,
    PooledReplayBuffer,
    RolloutRecord,
)
from torchrl_dvla.memory import EnvironmentPool, RowLayout

LAYOUT = RowLayout(
    {
        "x": ((1,), torch.int64),
        "instruction_id": ((1,), torch.int64),
        "advantage": ((1,), torch.float32),
        "group_id": ((1,), torch.int64),
    }
)


class Plane:
    """A collector without environments: groups of two rollouts, written and finished on demand."""

    def __init__(self, num_pages=32, groups=2, lag=1, **options):
        self.pool = EnvironmentPool(LAYOUT, num_pages, rows_per_page=2)
        self.admission = Admission(groups, lag)
        self.assembler = GroupAssembler(self.pool, group_size=2, normalise_std=False)
        self.table = InstructionTable(["open", "close"])
        self.buffer = PooledReplayBuffer(
            pool=self.pool,
            admission=self.admission,
            instructions=self.table,
            **{"batch_size": 4, "timeout_s": 0.0, **options},
        )
        self.count = 0
        self.x = 0

    def group(self, group_id, sizes=(3, 2), returns=(1.0, 0.0)):
        """Sample one group; row ``x`` counts all rows ever written."""
        for size, value in zip(sizes, returns):
            pages = [self.pool.lease("w", self.count) for _ in range(-(-size // 2))]
            pages = self.pool.seal(pages, size)
            rows = self.pool.row_index(pages, size)
            self.pool.rows["x"][rows] = torch.arange(self.x, self.x + size).unsqueeze(-1)
            self.pool.rows["group_id"][rows] = group_id
            self.pool.rows["instruction_id"][rows] = group_id % 2
            self.x += size
            record = RolloutRecord(self.count, group_id, pages, size, value, value > 0, 8 * size)
            self.count += 1
            group = self.assembler.add(record)
        return group

    def admit_and_extend(self, *group_ids, **options):
        for group_id in group_ids:
            assert self.admission.admit(group_id)
            self.buffer.extend(self.group(group_id, **options))

    def update(self):
        """One learner update: rows of each minibatch, by value."""
        return [batch["x"].flatten().tolist() for batch in self.buffer]


@pytest.fixture
def plane():
    planes = []

    def make(**options):
        planes.append(Plane(**options))
        return planes[-1]

    yield make
    for made in planes:
        made.pool.check()
        made.pool.close()


class SegmentTree:
    """What a PrioritizedSampler asks of TorchRL's compiled trees, on a NumPy array."""

    def __init__(self, capacity, neutral, reduce):
        self.values = np.full(capacity, neutral, np.float32)
        self.reduce = reduce

    def __getitem__(self, index):
        return torch.from_numpy(self.values[np.asarray(index)])

    def __setitem__(self, index, value):
        self.values[np.asarray(index)] = np.asarray(value)

    def query(self, start, stop):
        return float(self.reduce(self.values[start:stop]))

    def scan_lower_bound(self, mass):
        return np.searchsorted(np.cumsum(self.values), np.asarray(mass), side="left")


@pytest.fixture(params=["compiled", "stand-in"])
def segment_trees(request, monkeypatch):
    """TorchRL's segment trees; where its extension does not load, only the stand-in is tested."""
    if request.param == "compiled":
        if prioritized.SumSegmentTreeFp32 is None:
            try:
                importlib.import_module("torchrl._torchrl")
            except ImportError as error:
                reason = str(error).rpartition("/")[2][:90]
                pytest.skip(f"TorchRL's compiled extension does not load: {reason}")
        return
    monkeypatch.setattr(
        prioritized, "SumSegmentTreeFp32", lambda size: SegmentTree(size, 0.0, np.sum)
    )
    monkeypatch.setattr(
        prioritized, "MinSegmentTreeFp32", lambda size: SegmentTree(size, np.inf, np.min)
    )
    for name in ("SumSegmentTreeFp64", "MinSegmentTreeFp64"):
        monkeypatch.setattr(prioritized, name, lambda size: None)
