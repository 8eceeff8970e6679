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

from torchrl_dvla.data import EpisodeSpec, Group, GroupConfig, GroupState, Rollout
from torchrl_dvla.data.group import judge, max_variance_subset
from torchrl_dvla.saved_state import require_form

SPEC = EpisodeSpec("lift", seed=3, init_state_id=1)


def make_group(*returns, sizes=None):
    """A group whose rollouts have ended, the last one first."""
    rollouts = []
    for number, (episode_return, size) in enumerate(zip(returns, sizes or [3] * len(returns))):
        rollout = Rollout(SPEC, 0, number, num_rows=size, num_env_steps=8 * size)
        rollout.episode_return, rollout.success = episode_return, episode_return > 0
        rollout.first_policy_version, rollout.last_policy_version = 9 - number, 9 + number
        rollouts.append(rollout)
    return Group(0, SPEC, deadline=1, rollouts=rollouts[::-1])


def judged(*returns, keep_all=False, **config):
    group = make_group(*returns)
    config.setdefault("group_size", len(returns))
    return group, judge(group, GroupConfig(advantage="mean", **config), keep_all=keep_all)


def test_a_rollout_is_the_record_of_its_decisions_and_can_begin_anew():
    rollout = Rollout(SPEC, 5, 7, num_failures=1, instruction_id=2)
    rollout.pages.append(3)
    rollout.record(policy_version=4, reward=0.5, success=True, num_env_steps=8)
    rollout.record(policy_version=6, reward=1.0, success=False, num_env_steps=3)
    assert (rollout.num_rows, rollout.num_env_steps, rollout.episode_return) == (2, 11, 1.5)
    assert (rollout.first_policy_version, rollout.last_policy_version) == (4, 6)
    assert rollout.success, "it was solved once"
    rollout.restart()
    fresh = Rollout(SPEC, 5, 7, num_failures=1)
    assert vars(rollout) == vars(fresh)
    assert rollout.pages is not fresh.pages


def test_a_group_is_kept_with_its_advantages_in_the_order_of_its_rollouts():
    group = make_group(3.0, 0.0, 0.0, sizes=(4, 3, 1))
    assert judge(group, GroupConfig(group_size=3, advantage="mean")) is None
    assert [member.rollout_id for member in group.rollouts] == [0, 1, 2]  # by id, not by finish
    assert group.advantages.tolist() == [2.0, -1.0, -1.0]
    assert group.num_rows == 8
    assert (group.mean_return, group.success_rate, group.mean_length) == (1.0, 1 / 3, 64 / 3)
    assert (group.first_policy_version, group.last_policy_version) == (7, 11)


def test_advantages_are_those_of_the_functional():
    group = make_group(1.0, 0.0, 0.0, 1.0)
    judge(group, GroupConfig(group_size=4))
    expected = torch.tensor([0.8660, -0.8660, -0.8660, 0.8660])
    torch.testing.assert_close(group.advantages, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("mean", [0.75, -0.25, -0.25, -0.25]),
        ("mean_std", [1.5, -0.5, -0.5, -0.5]),
        ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        (lambda returns: returns - 0.5, [0.5, -0.5, -0.5, -0.5]),
    ],
)
def test_the_advantage_estimator_is_an_argument(advantage, expected):
    group = make_group(1.0, 0.0, 0.0, 0.0)
    assert judge(group, GroupConfig(group_size=4, advantage=advantage)) is None
    torch.testing.assert_close(group.advantages, torch.tensor(expected))


def test_an_estimator_that_gives_no_advantages_is_refused_before_a_run_and_in_it():
    for wrong in (torch.mean, lambda returns: returns.log()):  # the log of zero is not finite
        with pytest.raises(ValueError, match="advantage must give one finite number for each"):
            GroupConfig(group_size=4, advantage=wrong)
    config = GroupConfig(group_size=2, advantage=lambda returns: (returns + 1).log())
    with pytest.raises(ValueError, match=r"for each of the returns \[-1.0, 0.0\], got \[-inf"):
        judge(make_group(-1.0, 0.0), config)


@pytest.mark.parametrize(
    ("returns", "reason"),
    [
        ((0.0, 0.0), "no contrast"),  # whatever the value: metrics are named after the reason
        ((1.0, 1.0), "no contrast"),
        ((0.1 + 0.2, 0.3), "no contrast"),  # 5.6e-17 apart
        ((1.0, 1.0 + 9e-6), "no contrast"),
        ((-4e6, -4e6 - 39.0), "no contrast"),  # relative to 4e6
        ((1.0, 1.0 + 2e-5), None),
        ((0.0, 2e-5), None),
        ((4e6, 4e6 + 41.0), None),
        ((float("nan"), 1.0), "a return is not finite"),
        ((float("inf"), 0.0), "a return is not finite"),
        ((float("-inf"), float("-inf")), "a return is not finite"),
    ],
)
def test_groups_with_nothing_to_learn_from(returns, reason):
    group, drop_reason = judged(*returns)
    assert drop_reason == reason
    assert len(group.candidates) == 2  # for the metrics
    assert bool(group.advantages.any()) == (reason is None)


def test_a_group_without_contrast_is_kept_with_advantages_of_zero_if_it_is_asked_for():
    for returns in ((1.0, 1.0), (-40.00003, -39.99998)):  # no rounding noise is blown up
        group = make_group(*returns)
        assert judge(group, GroupConfig(group_size=2), keep_all=True) is None
        assert group.advantages.tolist() == [0.0, 0.0]
    assert judged(float("nan"), 1.0, keep_all=True)[1] == "a return is not finite"


def test_return_bounds_are_open():
    assert judged(1.0, 0.0, return_bounds=(0.5, 2))[1] == "mean return outside (0.5, 2)"
    assert judged(2.0, 0.0, return_bounds=(0.5, 2))[1] is None
    assert judged(1.0, 0.0, return_bounds=(0.5, 2), keep_all=True)[1] is None


def test_a_rare_success_is_rescued_from_the_candidates():
    group, reason = judged(0.0, 0.0, 1.0, 0.0, group_size=2, candidate_group_size=4)
    assert reason is None
    assert [member.rollout_id for member in group.rollouts] == [0, 2]
    assert group.advantages.tolist() == [-0.5, 0.5]
    assert (len(group.candidates), group.success_rate) == (4, 0.25)  # metrics see all candidates


def test_a_group_survives_json():
    group, _ = judged(0.0, 0.0, 1.0, 0.0, group_size=2, candidate_group_size=4)
    group.state = GroupState.IN_HAND
    for rollout in group.candidates:
        rollout.init_state_hash, rollout.duration_s = 2**63 - 1, 0.5
    state = json.loads(json.dumps(group.state_dict()))
    require_form(Group.state_form(), state, "group")
    again = Group.from_state_dict(state)
    assert again.state_dict() == group.state_dict() == state
    assert (again.spec, again.state) == (SPEC, GroupState.IN_HAND)
    assert torch.equal(again.advantages, group.advantages)
    assert all(rollout in again.candidates and not rollout.pages for rollout in again.rollouts)
    assert again.init_state_hash == 2**63 - 1
    for rollout in state["candidates"]:
        del rollout["init_state_hash"]  # as versions wrote it that did not know any
    require_form(Group.state_form(), state, "group")
    assert Group.from_state_dict(state).init_state_hash == -1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=2, max_size=7), st.data())
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
