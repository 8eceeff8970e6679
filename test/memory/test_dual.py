# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
import torch

from torchrl_dvla.memory import DualPool, EnvironmentPool, RowLayout, limits

from .sizes import LAYOUT, SIZES


def test_a_planned_pool_can_be_built_and_holds_what_was_planned():
    found = DualPool.plan(**SIZES, param_bytes=1000, batch_size=16)
    with DualPool(found.model_bytes, found.env_bytes) as pools:
        pool = pools.environment(LAYOUT, found.rows_per_page)
        assert pool.num_pages == found.num_pages
        assert pools.environment() is pool
        other = RowLayout({"image": ((3, 16, 16), torch.uint8)})
        with pytest.raises(ValueError, match="'state' is missing"):
            pools.environment(other)
        assert pools.stats()["environment/pages_free"] == 72
        for _ in range(2):  # as planned
            pools.model.rows(LAYOUT, 16, "staging")
        assert pools.model.used_by_name() == {"staging": found.staging_bytes}


def test_layout_is_needed_once():
    with DualPool(0, "1MB") as pools:
        with pytest.raises(ValueError, match="layout must be given"):
            pools.environment()


def test_the_report_tells_what_each_pool_holds():
    with DualPool(4096, EnvironmentPool.nbytes_for(LAYOUT, 6, 4)) as pools:
        assert pools.report() == (
            "model pool        4.0 KiB reserved, 0 B used, 0 B at most\n  internal waste  0%"
        )
        pool = pools.environment(LAYOUT)
        pool.reserve(1)
        rollout = [pool.lease("w", 0, reserved=False) for _ in range(3)]
        pages = pool.seal(rollout[:2], num_rows=5)  # 5 of 8 rows
        pool.store(pages)
        pool.free([rollout[2]])
        pool.seal([pool.lease("w", 1, reserved=False)], num_rows=3)  # 3 of 4
        pool.lease("w", 2, reserved=False)
        assert not pool.reserve(6)  # from here on someone waits
        pools.model.empty((100,), torch.uint8, "weight slots")
        stats = pools.stats()
        # Pages of 4 rows of 800 B; at most four were owned at once.
        assert (stats["environment/used_bytes"], stats["environment/peak_bytes"]) == (12800, 12800)
        assert stats["environment/internal_waste"] == 1 - 8 / 12
        assert stats["environment/page_wait_s"] > 0
        assert stats["model/internal_waste"] == 1 - 100 / 256
        report = pools.report().splitlines()
        assert report[0].split("  ")[0] == "environment pool"
        assert report[0].endswith("12.5 KiB used, 12.5 KiB at most")
        assert report[1:3] == [
            "  pages           2 free, 1 leased, 1 sealed, 2 stored (1 promised)",
            "  internal waste  33% of the pages of finished rollouts",
        ]
        assert report[3].startswith("  page wait       0.")
        assert report[4:] == [
            "model pool        4.0 KiB reserved, 256 B used, 256 B at most",
            "  weight slots    256 B",
            "  internal waste  61%",
        ]


def test_a_budget_beyond_the_machine_is_refused_and_the_other_pool_stays(monkeypatch):
    with DualPool(1024, "1MB") as pools:
        monkeypatch.setattr(limits, "available_bytes", lambda: 64 << 10)
        with pytest.raises(RuntimeError, match="only 64.0 KiB are free"):
            pools.environment(LAYOUT)
        assert pools.model.empty((2,)).numel() == 2
        monkeypatch.undo()
        assert pools.environment(LAYOUT).num_pages > 0


def test_the_memory_node_is_handed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "torchrl_dvla.memory.pool.pool_node", lambda node: asked.append(node) or None
    )
    with DualPool(0, "1MB") as pools:
        assert pools.environment(LAYOUT, numa_node=1).numa_node is None
    assert asked == [1]
