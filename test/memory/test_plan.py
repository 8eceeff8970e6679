# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import types

import pytest
from torch import nn

from torchrl_dvla.memory import DualPool, EnvironmentPool, limits
from torchrl_dvla.memory.plan import expected_waste, recommended_rows_per_page

from .sizes import LAYOUT, SIZES


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
    assert found.staging_bytes == 2 * 16 * 800  # multiples of 256
    assert found.model_bytes == 3000 + 25600
    assert found.num_rollouts == 24
    assert found.notes == []
    lines = [" ".join(line.split()) for line in str(found).splitlines()]
    assert lines[0] == "row 800 B ('image' [3, 16, 16] 96%)"
    assert lines[2] == "group, at most 12 pages: 4 rollouts of 10 decisions"
    assert lines[3] == "groups at once 6 of 6: 3 an update, lag 1"


def test_candidates_take_pages_too():
    assert DualPool.plan(**SIZES, candidate_group_size=6).pages_per_group == 18


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
    one = {**SIZES, "groups_per_update": 1}
    with pytest.raises(ValueError, match=r"1 whole groups of 12 pages, 0 fit\. .*bytes, or low"):
        DualPool.plan(**one, env_bytes="8KB")  # too small for one group


def test_too_little_memory_on_the_machine(monkeypatch):
    least, full = (EnvironmentPool.nbytes_for(LAYOUT, pages, 4) for pages in (36, 72))
    monkeypatch.setattr(limits, "available_bytes", lambda: full + 2999)
    assert DualPool.plan(**SIZES, param_bytes=999).num_groups_fit == 6
    # Both pools share the machine's memory, unless the model pool is elsewhere.
    message = rf"besides 2.9 KiB of model_bytes with .* Set env_bytes to at most {full - 1},"
    with pytest.raises(ValueError, match=message):
        DualPool.plan(**SIZES, param_bytes=1000)
    assert DualPool.plan(**SIZES, param_bytes=1000, device="cuda").weight_bytes == 3000
    DualPool.plan(**SIZES, param_bytes=1000, env_bytes=full - 1)  # the advice works
    monkeypatch.setattr(limits, "available_bytes", lambda: least - 1)
    with pytest.raises(ValueError, match=r"An update needs at least 112\.\d KiB: lower groups_per"):
        DualPool.plan(**SIZES)


def test_a_small_dev_shm_is_named_where_it_matters(monkeypatch):
    status = types.SimpleNamespace(f_bavail=16, f_frsize=4096)
    monkeypatch.setattr(limits.os, "statvfs", lambda folder: status)
    DualPool.plan(**SIZES)
    monkeypatch.setattr(limits, "shared_folder", lambda: "/dev/shm")
    with pytest.raises(ValueError, match=r"with 64\.0 KiB free in /dev/shm\. An update needs"):
        DualPool.plan(**SIZES)


def test_the_waste_of_the_last_page():
    # Lengths 1..8 on pages of 4: rows left empty are 3 2 1 0 3 2 1 0, 12 of 8 * 1.5 + 36 = 48.
    assert expected_waste(4, 36 / 8) == 12 / 48
    assert expected_waste(1, 7.0) == 0.0
    for mean in (3.0, 18.5, 64.0):
        rows = recommended_rows_per_page(mean)
        assert expected_waste(rows, mean) <= 0.05 < expected_waste(rows + 1, mean)


def test_page_size_follows_the_expected_length():
    sizes = {name: value for name, value in SIZES.items() if name != "rows_per_page"}
    assert DualPool.plan(**sizes).rows_per_page == 4
    assert DualPool.plan(**sizes).internal_waste is None
    found = DualPool.plan(**{**sizes, "max_decisions": 100}, expected_decisions=60)
    # 1 + 2 * 60 * 0.05 / 0.95 = 7.3
    assert found.rows_per_page == 7
    assert found.internal_waste == 3 / 63
    assert "7 rows, 5.5 KiB, 5% wasted at 60 decisions" in str(found)
    (note,) = DualPool.plan(**SIZES, expected_decisions=9).notes
    assert note == (
        "pages of 4 rows waste 14% of the memory of rollouts of 9 decisions: lower rows_per_page "
        "to 1."
    )
    for wrong in (0.5, 10.5):
        with pytest.raises(ValueError, match=r"between 1 and max_decisions \(10\), got"):
            DualPool.plan(**SIZES, expected_decisions=wrong)


def test_a_policy_is_weighed():
    policy = nn.BatchNorm1d(10)  # weight, bias, mean, variance of 40 B, and a counter of 8 B
    assert DualPool.plan(**SIZES, policy=policy, param_bytes=1).weight_bytes == 3 * 169


def test_model_budget_and_bad_counts():
    with pytest.raises(ValueError, match="model_bytes must be at least 3000"):
        DualPool.plan(**SIZES, param_bytes=1000, model_bytes=2999)
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        DualPool.plan(**{**SIZES, "group_size": 1})
    with pytest.raises(ValueError, match="candidate_group_size must be at least 4, got 3"):
        DualPool.plan(**SIZES, candidate_group_size=3)
    with pytest.raises(ValueError, match="num_weight_slots must be at least 3, got 2"):
        DualPool.plan(**SIZES, num_weight_slots=2)
