# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pickle
import types
from typing import Any

import pytest
import torch

from torchrl_dvla.memory import DualPool, EnvironmentPool, RowLayout, SharedArena, available_memory
from torchrl_dvla.memory.dual_pool import ModelPool, expected_waste, recommended_rows_per_page

LAYOUT = RowLayout({"image": ((3, 16, 16), torch.uint8), "state": ((8,), torch.float32)})
SIZES: dict[str, Any] = {
    "layout": LAYOUT,
    "group_size": 4,
    "groups_per_update": 3,
    "max_policy_lag": 1,
    "max_decisions": 10,
    "rows_per_page": 4,
}


def pool_bytes(num_pages):
    return EnvironmentPool.nbytes_for(LAYOUT, num_pages, 4)


def lines(plan):
    return [" ".join(line.split()) for line in str(plan).splitlines()]


# -- the plan -----------------------------------------------------------------------------------
def test_plan_by_hand():
    plan = DualPool().plan(**SIZES, num_env=8, weight_bytes=3000, batch_size=16)
    assert plan.row_bytes == 768 + 32
    # ceil(10 / 4) = 3 pages a rollout, 4 rollouts a group, (1 + 1) * 3 groups
    assert (plan.pages_per_group, plan.num_pages) == (12, 72)
    assert (plan.env_bytes, plan.min_env_bytes) == (pool_bytes(72), pool_bytes(36))
    assert (plan.weight_bytes, plan.staging_bytes) == (3000, 2 * 16 * 800)  # multiples of 64
    assert plan.model_bytes == 3000 + 25600
    assert plan.notes == ()
    text = lines(plan)
    assert text[0] == "row 800 B ('image' [3, 16, 16] 96%)"
    assert text[2] == "group, at most 12 pages: 4 rollouts of 10 decisions"
    assert text[3] == "groups at once 6 of 6: 3 an update, lag 1"
    assert text[4:6] == ["environment pool 72 pages, 225.7 KiB", "at least 112.9 KiB"]
    assert text[6] == "at most useful 225.7 KiB"
    assert DualPool().plan(**SIZES, candidate_group_size=6).pages_per_group == 18


def test_a_budget_between_need_and_use_is_a_note():
    plan = DualPool(pool_bytes(50)).plan(**SIZES, num_env=20)
    assert plan.num_pages == 50
    first, second = plan.notes
    assert first.startswith("4 of the 6 groups that max_policy_lag allows fit")
    assert second.startswith("4 of the 20 environments can never be busy")
    assert "note: 4 of the 6" in str(plan)


def test_a_budget_that_would_dead_lock_says_which_number_to_change():
    least = pool_bytes(36)
    with pytest.raises(ValueError, match=rf"env_bytes must be at least {least} .* 2 fit.*to 2"):
        DualPool(least - 1).plan(**SIZES)
    assert "3 of 6: 3 an update" in lines(DualPool(least).plan(**SIZES))[3]
    one = {**SIZES, "groups_per_update": 1}
    with pytest.raises(ValueError, match=r"1 whole groups of 12 pages, 0 fit\. .*bytes, or low"):
        DualPool("8KB").plan(**one)  # too small for one group


def test_too_little_memory_on_the_machine(monkeypatch):
    least, full = pool_bytes(36), pool_bytes(72)
    monkeypatch.setattr(available_memory, "available_bytes", lambda: full + 2999)
    assert DualPool().plan(**SIZES, weight_bytes=2997).num_pages == 72
    # Both pools share the machine's memory.
    message = rf"besides 2.9 KiB of model_bytes with .* Set env_bytes to at most {full - 1},"
    with pytest.raises(ValueError, match=message):
        DualPool().plan(**SIZES, weight_bytes=3000)
    DualPool(full - 1).plan(**SIZES, weight_bytes=3000)  # the advice works
    monkeypatch.setattr(available_memory, "available_bytes", lambda: least - 1)
    with pytest.raises(ValueError, match=r"An update needs at least 112\.9 KiB: lower groups_per"):
        DualPool().plan(**SIZES)


def test_a_small_dev_shm_is_named_where_it_matters(monkeypatch):
    status = types.SimpleNamespace(f_bavail=16, f_frsize=4096)
    monkeypatch.setattr(available_memory.os, "statvfs", lambda folder: status)
    DualPool().plan(**SIZES)
    monkeypatch.setattr(available_memory, "shared_folder", lambda: "/dev/shm")
    with pytest.raises(ValueError, match=r"with 64\.0 KiB free in /dev/shm\. An update needs"):
        DualPool().plan(**SIZES)


def test_the_waste_of_the_last_page():
    # Lengths 1..8 on pages of 4: rows left empty are 3 2 1 0 3 2 1 0, 12 of 8 * 1.5 + 36 = 48.
    assert expected_waste(4, 36 / 8) == 12 / 48
    assert expected_waste(1, 7.0) == 0.0
    for mean in (3.0, 18.5, 64.0):
        rows = recommended_rows_per_page(mean)
        assert expected_waste(rows, mean) <= 0.05 < expected_waste(rows + 1, mean)


def test_page_size_follows_the_expected_length():
    sizes = {name: value for name, value in SIZES.items() if name != "rows_per_page"}
    plan = DualPool().plan(**sizes)
    assert plan.rows_per_page == 4
    assert "wasted" not in str(plan)
    plan = DualPool().plan(**{**sizes, "max_decisions": 100}, expected_decisions=60)
    # 1 + 2 * 60 * 0.05 / 0.95 = 7.3
    assert plan.rows_per_page == 7
    assert "7 rows, 5.5 KiB, 5% wasted at 60 decisions" in str(plan)
    (note,) = DualPool().plan(**SIZES, expected_decisions=9).notes
    assert note == (
        "pages of 4 rows waste 14% of the memory of rollouts of 9 decisions: lower rows_per_page "
        "to 1."
    )
    for wrong in (0.5, 10.5):
        with pytest.raises(ValueError, match=r"between 1 and max_decisions \(10\), got"):
            DualPool().plan(**SIZES, expected_decisions=wrong)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"weight_bytes": 3000}, "model_bytes must be at least 3000"),
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"candidate_group_size": 3}, "candidate_group_size must be at least 4, got 3"),
        ({"num_staging": 0}, "num_staging must be at least 1, got 0"),
    ],
)
def test_model_budget_and_bad_counts(sizes, message):
    with pytest.raises(ValueError, match=message):
        DualPool(model_bytes=2999).plan(**{**SIZES, **sizes})


# -- both pools ---------------------------------------------------------------------------------
def test_planned_pools_hold_what_was_planned_and_no_more():
    pools = DualPool(model_bytes="64KB")
    assert pools.plan(**SIZES).num_pages == 72
    plan = pools.plan(**SIZES, num_spare_groups=1, weight_bytes=3000, batch_size=16)
    for use in (pools.stats, pools.report, lambda: pools.environment):
        with pytest.raises(RuntimeError, match=r"Call allocate\(plan\) first"):
            use()
    with pools:
        pools.allocate(plan)
        assert pools.environment.num_pages == plan.num_pages == 72 + plan.pages_per_group
        assert pools.stats()["environment/pages_free"] == plan.num_pages
        assert pools.stats()["model/reserved_bytes"] == 64 << 10
        pools.model.arena(3000, "weight slots")
        for _ in range(2):
            pools.model.rows(LAYOUT, 16, "staging")
        used = {"weight slots": 3000, "staging": plan.staging_bytes}
        assert pools.model.used_by_name() == used
        with pytest.raises(RuntimeError, match="model_bytes must hold more"):
            pools.model.arena(64 << 10, "more")
        with pytest.raises(RuntimeError, match="exist already"):
            pools.allocate(plan)
    pools.close()
    assert DualPool(pool_bytes(50)).plan(**SIZES, num_spare_groups=1).num_pages == 50


def test_the_report_tells_what_each_pool_holds():
    sizes = {**SIZES, "group_size": 2, "max_decisions": 1, "max_policy_lag": 0}
    with DualPool(model_bytes=4096) as pools:
        pools.allocate(pools.plan(**sizes))  # six pages
        pool = pools.environment
        pool.reserve(1)
        rollout = [pool.lease("w", 0, reserved=False) for _ in range(3)]
        pages = pool.seal(rollout[:2], num_rows=5)  # 5 of 8 rows
        pool.store(pages)
        pool.free([rollout[2]])
        pool.seal([pool.lease("w", 1, reserved=False)], num_rows=3)  # 3 of 4
        pool.lease("w", 2, reserved=False)
        assert not pool.reserve(6)  # from here on someone waits
        pools.model.empty((256,), torch.uint8, "weight slots")
        pools.model.rows(RowLayout({"x": ((1,), torch.uint8)}), 192, "staging").zero_()
        stats = pools.stats()
        # Pages of 4 rows of 800 B; at most four were owned at once.
        assert (stats["environment/used_bytes"], stats["environment/peak_bytes"]) == (12800, 12800)
        assert stats["environment/internal_waste"] == 1 - 8 / 12
        assert stats["environment/page_wait_s"] > 0
        report = pools.report().splitlines()
        assert report[0].split("  ")[0] == "environment pool"
        assert report[0].endswith("12.5 KiB used, 12.5 KiB at most")
        assert report[1:3] == [
            "  pages           2 free (1 reserved), 1 leased, 1 sealed, 2 stored of 6",
            "  internal waste  33% of the pages of finished rollouts",
        ]
        assert report[3].startswith("  page wait       0.")
        assert report[4:] == [
            "model pool        4.0 KiB reserved, 448 B used, 448 B at most",
            "  weight slots    256 B",
            "  staging         192 B",
            "  internal waste  0%",
        ]


def test_pools_that_the_machine_cannot_hold_any_more_are_not_made(monkeypatch):
    with DualPool() as pools:
        plan = pools.plan(**SIZES)
        monkeypatch.setattr(available_memory, "available_bytes", lambda: 64 << 10)
        with pytest.raises(RuntimeError, match="only 64.0 KiB are free"):
            pools.allocate(plan)
        monkeypatch.undo()
        pools.allocate(plan)
        assert pools.environment.num_pages == 72


# -- the model pool -----------------------------------------------------------------------------
def test_use_and_peak_follow_what_is_alive():
    layout = RowLayout({"image": ((3, 4, 4), torch.uint8), "state": ((2,), torch.float32)})
    # 5 rows: 240 -> 256 and 40 -> 64
    assert ModelPool.nbytes_for(layout, 5) == 320
    pool = ModelPool(1024)
    rows = pool.rows(layout, 5, "staging")
    assert (rows.batch_size, rows["image"].shape) == ((5,), (5, 3, 4, 4))
    slots = pool.arena(640, "weights")
    other = pickle.loads(pickle.dumps(slots))  # as a reader in another process maps them
    slots.tensor(0, (2,))[1] = 7
    assert other.tensor(0, (2,)).tolist() == [0, 7]
    assert pool.used_by_name() == {"staging": 320, "weights": 640}
    with pytest.raises(RuntimeError, match=r"must hold batch of 128 B .* to at least 1088"):
        pool.empty((32,), name="batch")
    slots.close()
    pool.empty((32,), name="batch").fill_(1.0)
    assert pool.stats() == {
        "reserved_bytes": 1024,
        "used_bytes": 448,
        "peak_bytes": 960,
        "internal_waste": 40 / 448,
    }
    pool.close()
    pool.close()
    assert (pool.stats()["used_bytes"], pool.stats()["peak_bytes"]) == (0, 960)
    with pytest.raises(RuntimeError, match="was closed by its owner"):
        pool.empty((1,))


def test_an_empty_budget_holds_nothing_and_a_large_one_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="to at least 4"):
        ModelPool(0).empty((1,))
    monkeypatch.setattr(available_memory, "available_bytes", lambda: 1000)
    pool = ModelPool(2000)
    with pytest.raises(RuntimeError, match="only 1000 B are free"):
        pool.arena(1001)
    assert pool.stats()["peak_bytes"] == 0


def test_both_pools_are_page_locked_where_cuda_is(monkeypatch):
    pinned = []
    monkeypatch.setattr(SharedArena, "pin", lambda arena: pinned.append(arena.nbytes))
    with DualPool() as pools:
        plan = pools.plan(**SIZES, weight_bytes=4096)
        pools.allocate(plan)
        pools.model.arena(4096)
    assert pinned == [plan.env_bytes, 4096]
