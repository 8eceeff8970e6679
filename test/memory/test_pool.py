# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pickle

import pytest
import torch

from torchrl_dvla.memory import EnvironmentPool, RowLayout

LAYOUT = RowLayout(
    {"image": ((3, 4, 4), torch.uint8), "state": ((2,), torch.float32), "done": ((1,), torch.bool)}
)


@pytest.fixture
def pool():
    with EnvironmentPool(LAYOUT, num_pages=5, rows_per_page=3) as pool:
        yield pool
        pool.check()


def test_rows_and_pages(pool):
    assert pool.rows.batch_size == (15,)
    first, second = pool.lease("worker"), pool.lease("worker")
    assert pool.row_index([second, first], num_rows=4).tolist() == [3, 4, 5, 0]
    assert pool.row_index([second]).tolist() == [3, 4, 5]
    assert pool.row_index([]).tolist() == []
    rows = pool.row_index_of([[second, first], [], [first]], [4, 0, 2])
    assert rows.tolist() == [3, 4, 5, 0, 0, 1]
    assert pool.stats()["used_bytes"] == 6 * LAYOUT.row_bytes
    assert pool.stats()["reserved_bytes"] == pool.nbytes == EnvironmentPool.nbytes_for(LAYOUT, 5, 3)


def test_a_view_elsewhere_sees_every_write(pool):
    view = pickle.loads(pickle.dumps(pool.worker_view()))
    page = pool.lease("worker")
    view.rows["state"][view.row(page, 2)] = torch.tensor([1.0, 2.0])
    assert pool.rows["state"][2].tolist() == [1.0, 2.0]
    pool.rows["image"][14] = 255
    assert view.rows["image"][14].min() == 255
    view.close()
    assert pool.rows["state"][2].tolist() == [1.0, 2.0]


def test_a_view_refuses_rows_that_are_no_longer_leased(pool):
    view = pickle.loads(pickle.dumps(pool.worker_view()))
    page = pool.lease("worker")
    assert view.row(page, 1) == 1
    with pytest.raises(ValueError, match="offset must be between 0 and 2, got 3"):
        view.row(page, 3)
    pool.seal([page], 1)
    with pytest.raises(RuntimeError, match="page 0, which is sealed"):
        view.row(page, 1)
    pool.free([page])
    again = pool.lease("other")
    assert int(again) == int(page)
    with pytest.raises(RuntimeError, match="page 0, which is leased anew"):
        view.row(page, 1)
    with EnvironmentPool(LAYOUT, 5, 3) as other:
        with pytest.raises(RuntimeError, match="another pool"):
            view.row(other.lease("worker"), 0)


@pytest.mark.parametrize("rows_per_page", [1, 3, 4, 16])
def test_a_budget_is_used_to_the_last_page_and_never_exceeded(rows_per_page):
    budget = 10_000
    with EnvironmentPool.from_budget(LAYOUT, budget, rows_per_page) as pool:
        assert pool.nbytes <= budget
        assert EnvironmentPool.nbytes_for(LAYOUT, pool.num_pages + 1, rows_per_page) > budget


def test_a_budget_below_one_page_says_what_one_needs():
    need = EnvironmentPool.nbytes_for(LAYOUT, 1, 4)
    with pytest.raises(ValueError, match=f"env_bytes must be at least {need} .* got {need - 1}"):
        EnvironmentPool.from_budget(LAYOUT, need - 1)
    EnvironmentPool.from_budget(LAYOUT, need).close()


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 3"):
        EnvironmentPool(LAYOUT, 0, 3)


def test_only_the_view_travels(pool):
    with pytest.raises(TypeError, match=r"Send pool\.worker_view\(\)"):
        pickle.dumps(pool)


def test_the_ledger_outlives_the_memory():
    pool = EnvironmentPool(LAYOUT, 2, 2)
    page = pool.lease("worker")
    pool.close()
    pool.close()
    assert pool.closed
    pool.free([page])  # a late clean-up is no crash
    pool.check()


def test_a_cuda_machine_pins_unless_told_otherwise(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torchrl_dvla.memory.arena.SharedArena.pin", lambda self: calls.append(1))
    EnvironmentPool(LAYOUT, 1, 1, pin_memory=False).close()
    assert calls == []
    EnvironmentPool(LAYOUT, 1, 1).close()
    assert calls == [1]
