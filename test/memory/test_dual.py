# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import contextlib

import pytest
import torch

from torchrl_dvla.memory import DualPool, EnvironmentPool, ModelPool, RowLayout, plan

LAYOUT = RowLayout({"image": ((3, 16, 16), torch.uint8), "state": ((8,), torch.float32)})
SIZES = {
    "layout": LAYOUT,
    "group_size": 4,
    "groups_per_update": 3,
    "max_policy_lag": 1,
    "max_decisions": 10,
    "rows_per_page": 4,
}


def test_plan_by_hand():
    found = DualPool.plan(**SIZES, num_env=8, param_bytes=1000, batch_size=16)
    assert found.row_bytes == 768 + 32
    # ceil(10 / 4) = 3 pages a rollout, 4 rollouts a group, (1 + 1) * 3 groups
    assert found.pages_per_group == 12
    assert found.num_groups == found.num_groups_fit == 6
    assert found.num_pages == 72
    assert found.env_bytes == found.full_env_bytes == EnvironmentPool.nbytes_for(LAYOUT, 72, 4)
    assert found.min_env_bytes == EnvironmentPool.nbytes_for(LAYOUT, 36, 4)
    assert found.weight_bytes == 3000
    assert found.staging_bytes == 2 * 16 * 800
    assert found.model_bytes == 3000 + 25600
    assert found.num_rollouts == 24
    assert found.notes == []
    assert "'image' 96%" in str(found)


def test_candidates_take_pages_too():
    assert DualPool.plan(**SIZES, candidate_group_size=6).pages_per_group == 18


def test_a_planned_pool_can_be_built_and_holds_what_was_planned():
    found = DualPool.plan(**SIZES)
    with DualPool(found.model_bytes, found.env_bytes) as pools:
        pool = pools.environment(LAYOUT)
        assert pool.num_pages == found.num_pages
        assert pools.environment() is pool
        other = RowLayout({"image": ((3, 16, 16), torch.uint8)})
        with pytest.raises(ValueError, match="'state' is missing"):
            pools.environment(other)
        assert pools.stats()["environment/pages_free"] == 72


def test_layout_is_needed_once():
    with DualPool(0, "1MB") as pools:
        with pytest.raises(ValueError, match="layout must be given"):
            pools.environment()


def test_a_budget_between_need_and_use_is_a_note():
    budget = EnvironmentPool.nbytes_for(LAYOUT, 50, 4)
    found = DualPool.plan(**SIZES, env_bytes=budget, num_env=20)
    assert (found.num_groups_fit, found.num_pages) == (4, 50)
    first, second = found.notes
    assert first.startswith("4 of the 6 groups that max_policy_lag allows fit")
    assert second.startswith("4 of the 20 environments can never be busy")
    assert "note: 4 of the 6" in str(found)


def test_a_budget_that_would_dead_lock_says_which_number_to_change():
    least = EnvironmentPool.nbytes_for(LAYOUT, 36, 4)
    with pytest.raises(ValueError, match=rf"env_bytes must be at least {least} .* 2 fit.*to 2"):
        DualPool.plan(**SIZES, env_bytes=least - 1)
    assert DualPool.plan(**SIZES, env_bytes=least).num_groups_fit == 3


def test_too_little_memory_on_the_machine(monkeypatch):
    monkeypatch.setattr(plan, "available_bytes", lambda: 10_000)
    with pytest.raises(ValueError, match=r"must fit in memory, got .* with 9\.8 KiB available"):
        DualPool.plan(**SIZES)


def test_model_budget_and_bad_counts():
    with pytest.raises(ValueError, match="model_bytes must be at least 3000"):
        DualPool.plan(**SIZES, param_bytes=1000, model_bytes=2999)
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        DualPool.plan(**{**SIZES, "group_size": 1})
    with pytest.raises(ValueError, match="candidate_group_size must be at least 4, got 3"):
        DualPool.plan(**SIZES, candidate_group_size=3)


def test_model_pool_cuts_one_block():
    pool = ModelPool(1024)
    a = pool.empty((4,), torch.float32)
    b = pool.empty((100,), torch.uint8, name="staging")
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert b.data_ptr() - a.data_ptr() == 256
    assert pool.stats() == {"reserved_bytes": 1024, "used_bytes": 512, "peak_bytes": 512}
    with pytest.raises(RuntimeError, match=r"must hold weights of 1\.0 KiB .* to at least 1536"):
        pool.empty((256,), name="weights")
    pool.close()
    with pytest.raises(RuntimeError, match="Raise model_bytes"):
        pool.empty((1,))


def test_model_pool_on_cuda_allocates_inside_its_mem_pool(monkeypatch):
    entered = []

    class FakeMemPool:
        pass

    @contextlib.contextmanager
    def use_mem_pool(mem_pool):
        entered.append(mem_pool)
        yield

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "MemPool", FakeMemPool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use_mem_pool)
    monkeypatch.setattr(torch, "empty", lambda *args, device=None, **kwargs: empty(*args, **kwargs))
    pool = ModelPool(1024, device="cuda")
    pool.empty((2, 2))
    assert isinstance(entered[0], FakeMemPool)
    assert pool.stats()["used_bytes"] == 256
