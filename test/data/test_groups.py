# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_dvla.data import GroupAssembler, GroupRecord, RolloutRecord, max_variance_subset
from torchrl_dvla.memory import EnvironmentPool, PageState, RowLayout

LAYOUT = RowLayout({"advantage": ((1,), torch.float32), "rollout_id": ((1,), torch.int64)})


@pytest.fixture
def pool():
    with EnvironmentPool(LAYOUT, num_pages=16, rows_per_page=2) as pool:
        pool.rows["advantage"].fill_(-9)
        yield pool
        pool.check()


def rollout(pool, rollout_id, episode_return, num_rows=3, group_id=0, **fields):
    pages = [pool.lease(rollout_id, rollout_id) for _ in range(-(-num_rows // 2))]
    pages = pool.seal(pages, num_rows)
    fields = {"num_env_steps": 8 * num_rows, "success": episode_return > 0, **fields}
    return RolloutRecord(rollout_id, group_id, pages, num_rows, episode_return, **fields)


def test_a_complete_group_is_kept_with_its_advantages_in_every_row(pool):
    assembler = GroupAssembler(pool, group_size=3, normalise_std=False)
    assert assembler.add(rollout(pool, 2, 0.0, num_rows=1)) is None
    assert assembler.add(rollout(pool, 0, 3.0, num_rows=4)) is None
    assert assembler.pending == {0: 2}
    group = assembler.add(rollout(pool, 1, 0.0, num_rows=3))
    assert assembler.pending == {}
    assert group.kept
    assert [member.rollout_id for member in group.rollouts] == [0, 1, 2]  # by id, not by finish
    assert group.advantages.tolist() == [2.0, -1.0, -1.0]
    assert group.num_rows == 8
    # Pages 1-2 hold rollout 0, pages 3-4 rollout 1, page 0 rollout 2.
    assert group.row_index(pool).tolist() == [2, 3, 4, 5, 6, 7, 8, 0]
    column = pool.rows["advantage"].flatten().tolist()
    assert column[:10] == [-1, -9, 2, 2, 2, 2, -1, -1, -1, -9]
    assert pool.stats()["pages_sealed"] == 5
    assert (group.mean_return, group.success_rate, group.mean_length) == (1.0, 1 / 3, 64 / 3)


def test_advantages_are_those_of_the_functional(pool):
    assembler = GroupAssembler(pool, group_size=4)
    for number, value in enumerate((1.0, 0.0, 0.0)):
        assembler.add(rollout(pool, number, value))
    group = assembler.add(rollout(pool, 3, 1.0))
    expected = torch.tensor([0.8660, -0.8660, -0.8660, 0.8660])
    torch.testing.assert_close(group.advantages, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_no_contrast_is_dropped_and_its_pages_are_free(pool, value):
    assembler = GroupAssembler(pool, group_size=2)
    assembler.add(rollout(pool, 0, value))
    group = assembler.add(rollout(pool, 1, value))
    assert group.drop_reason == f"no contrast: all rollouts returned {value:g}"
    assert not group.kept
    assert group.rollouts == ()
    assert group.pages == []
    assert group.mean_length == 24.0
    assert pool.num_free_pages == 16


def test_no_contrast_can_be_kept(pool):
    assembler = GroupAssembler(pool, group_size=2, drop_no_contrast=False)
    assembler.add(rollout(pool, 0, 1.0))
    group = assembler.add(rollout(pool, 1, 1.0))
    assert group.kept
    assert group.advantages.tolist() == [0.0, 0.0]


def test_return_bounds_are_open(pool):
    assembler = GroupAssembler(pool, group_size=2, return_bounds=(0.5, 2))
    assembler.add(rollout(pool, 0, 1.0, group_id=1))
    group = assembler.add(rollout(pool, 1, 0.0, group_id=1))
    assert group.drop_reason == "mean return outside (0.5, 2)"
    assembler.add(rollout(pool, 2, 2.0, group_id=2))
    assert assembler.add(rollout(pool, 3, 0.0, group_id=2)).kept


def test_a_rare_success_is_rescued_from_the_candidates(pool):
    assembler = GroupAssembler(pool, group_size=2, candidate_group_size=4, normalise_std=False)
    for number, value in enumerate((0.0, 0.0, 1.0)):
        assert assembler.add(rollout(pool, number, value)) is None
    group = assembler.add(rollout(pool, 3, 0.0))
    assert [member.rollout_id for member in group.rollouts] == [0, 2]
    assert group.advantages.tolist() == [-0.5, 0.5]
    assert len(group.candidates) == 4
    assert group.success_rate == 0.25  # metrics see all candidates
    assert pool.stats()["pages_sealed"] == 4
    assert pool.num_free_pages == 12


def test_abandoned_groups_free_what_they_had(pool):
    assembler = GroupAssembler(pool, group_size=2)
    assembler.add(rollout(pool, 0, 1.0, group_id=5, task="lift"))
    group = assembler.abandon(5, "the environment failed")
    assert (group.task, group.drop_reason) == ("lift", "the environment failed")
    assert assembler.abandon(6, "never began").candidates == ()
    assembler.add(rollout(pool, 1, 1.0, group_id=7))
    assembler.clear()
    assert assembler.pending == {}
    assert pool.num_free_pages == 16


def test_surplus_pages_of_a_record_are_ignored(pool):
    pages = [pool.lease(0, 0), pool.lease(0, 0)]
    used = pool.seal(pages, num_rows=2)
    assembler = GroupAssembler(pool, group_size=2)
    assembler.add(RolloutRecord(0, 0, pages, 2, 1.0, True, 16))
    group = assembler.add(rollout(pool, 1, 0.0))
    assert list(group.rollouts[0].pages) == used


def test_bad_rollouts(pool):
    assembler = GroupAssembler(pool, group_size=2)
    page = pool.lease(0, 0)
    with pytest.raises(RuntimeError, match=r"Call pool\.seal"):
        assembler.add(RolloutRecord(0, 0, [page], 2, 1.0, True, 16))
    pool.free([page])
    first = rollout(pool, 0, 1.0, seed=3)
    assembler.add(first)
    with pytest.raises(ValueError, match="rollout_id must be new in group 0, got 0"):
        assembler.add(first)
    other = rollout(pool, 1, 1.0, seed=4)
    with pytest.raises(ValueError, match=r"must share one scene, got \('', 4, -1\)"):
        assembler.add(other)
    assert pool.state(other.pages[0]) is PageState.SEALED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"group_size": 4, "candidate_group_size": 3}, "candidate_group_size must be at least"),
        ({"group_size": 4, "return_bounds": (1, 0)}, "return_bounds must be increasing"),
    ],
)
def test_bad_arguments(pool, arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupAssembler(pool, **arguments)


def test_a_record_survives_json(pool):
    assembler = GroupAssembler(pool, group_size=2)
    assembler.add(rollout(pool, 0, 1.0, first_policy_version=3, last_policy_version=4))
    group = assembler.add(rollout(pool, 1, 0.0, first_policy_version=2, last_policy_version=5))
    assert (group.first_policy_version, group.last_policy_version) == (2, 5)
    state = json.loads(json.dumps(group.state_dict()))
    again = GroupRecord.from_state_dict(state, [[7], [8]])
    assert [list(member.pages) for member in again.rollouts] == [[7], [8]]
    assert torch.equal(again.advantages, group.advantages)
    assert again.state_dict() == group.state_dict()


@settings(max_examples=60, deadline=None)
@given(
    returns=st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=2, max_size=7),
    data=st.data(),
)
def test_subset_has_the_greatest_variance(returns, data):
    size = data.draw(st.integers(1, len(returns)))
    chosen = max_variance_subset(returns, size)
    assert len(set(chosen)) == size

    def variance(indices):
        values = torch.tensor([returns[index] for index in indices], dtype=torch.float64)
        return float(values.var(unbiased=False))

    best = max(variance(subset) for subset in itertools.combinations(range(len(returns)), size))
    assert variance(chosen) == pytest.approx(best)


def test_subset_size():
    with pytest.raises(ValueError, match="size must be between 1 and the 2 returns, got 3"):
        max_variance_subset([0.0, 1.0], 3)
