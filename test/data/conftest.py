# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
import torch

from torchrl_dvla import GroupConfig, PooledReplayBuffer
from torchrl_dvla.data import Group, GroupQueue, InitStateSchedule, InstructionTable
from torchrl_dvla.memory import EnvironmentPool, RowLayout

LAYOUT = RowLayout(
    {
        "x": ((1,), torch.int64),
        "image": ((3, 8, 8), torch.uint8),
        "instruction_id": ((1,), torch.int64),
        "advantage": ((1,), torch.float32),
        "group_id": ((1,), torch.int64),
        "policy_version": ((1,), torch.int64),
    }
)
ROWS_PER_PAGE = 2
PAGES_PER_ROLLOUT = 2


class Plane:
    """A collector without environments: groups of two rollouts, sampled on demand."""

    def __init__(
        self,
        num_pages=40,
        groups=2,
        lag=1,
        config=None,
        tasks=("task",),
        model_pool=None,
        layout=LAYOUT,
        **options,
    ):
        config = {"group_size": 2, "advantage": "mean", **(config or {})}
        self.config = GroupConfig(groups_per_update=groups, max_policy_lag=lag, **config)
        self.pool = EnvironmentPool(layout, num_pages, ROWS_PER_PAGE)
        self.groups = GroupQueue(
            self.config, self.pool, InitStateSchedule(tasks), pages_per_rollout=PAGES_PER_ROLLOUT
        )
        self.groups.set_paused(False)
        self.table = InstructionTable(["open", "close"])
        self.buffer = PooledReplayBuffer(**{"batch_size": 4, "timeout_s": 1e-3, **options})
        self.buffer.bind(self.groups, self.table, model_pool=model_pool)
        self.x = 0

    def admit(self) -> Group:
        group = self.groups.admit()
        assert isinstance(group, Group), group
        return group

    def play(self, rollout, size=3, episode_return=1.0):
        """Sample and finish one rollout; row ``x`` counts all rows ever written."""
        for number in range(size):
            if number % ROWS_PER_PAGE == 0:
                rollout.pages.append(self.pool.lease(rollout.rollout_id, rollout.rollout_id))
            row = rollout.pages[-1] * ROWS_PER_PAGE + number % ROWS_PER_PAGE
            self.pool.rows["x"][row] = self.x
            self.pool.rows["image"][row] = self.x % 256
            self.pool.rows["group_id"][row] = rollout.group_id
            self.pool.rows["instruction_id"][row] = rollout.group_id % 2
            self.pool.rows["policy_version"][row] = self.groups.version
            self.x += 1
            rollout.record(
                policy_version=self.groups.version,
                reward=episode_return / size,
                success=number == size - 1 and episode_return > 0,
                num_env_steps=8,
            )
        rollout.episode_return = episode_return
        self.groups.finish(rollout)

    def sample(self, group, sizes=(3, 2), returns=(1.0, 0.0)):
        for rollout, size, episode_return in zip(group.rollouts, sizes, returns, strict=True):
            self.play(rollout, size, episode_return)
        self.groups.complete(group)
        return group

    def add(self, num_groups=1, **options):
        """Admit and sample groups."""
        return [self.sample(self.admit(), **options) for _ in range(num_groups)]

    def publish(self):
        with self.groups.publishing():
            pass
        return self.groups.version

    def update(self):
        """Rows of each minibatch of one update, by value."""
        return [batch["x"].flatten().tolist() for batch in self.buffer]


@pytest.fixture
def make_plane():
    planes = []

    def make(**options):
        planes.append(Plane(**options))
        return planes[-1]

    yield make
    for made in planes:
        made.pool.check()
        made.pool.close()


@pytest.fixture
def plane(make_plane):
    return make_plane()
