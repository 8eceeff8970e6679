# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Groups without anything to learn from: it is said, and goes on as it was asked to."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from torchrl_dvla.collectors import GroupConfig
from torchrl_dvla.data.schema import ADVANTAGE_KEY
from torchrl_dvla.testing import CountingChunkEnv

from .counting_task import ENV_KWARGS

#: Nobody guesses twelve right steps in a row.
hopeless = functools.partial(
    CountingChunkEnv, **{**ENV_KWARGS, "length": "fixed"}, required_fraction=1.0
)


def group(**kwargs):
    return GroupConfig(group_size=2, groups_per_update=2, max_drought=3, **kwargs)


def test_warn_samples_on_and_says_so_again_and_again(make_collector, caplog):
    collector = make_collector(hopeless, group=group(on_drought="warn"))
    collector.replay_buffer.timeout_s = 0.05
    with caplog.at_level(logging.WARNING, "torchrl_dvla"):
        collector.start()
        while collector.stats().get("collector/drought", 0) < 7:
            with pytest.raises(TimeoutError, match=r"dropped since the last update|in flight"):
                next(iter(collector.replay_buffer))
    assert "3 groups in a row had nothing to learn from" in caplog.text
    assert "6 groups in a row" in caplog.text and "Sampling goes on" in caplog.text
    drops = collector.replay_buffer.drop_counts()["no contrast: all rollouts returned 0"]
    assert drops["count"] >= 7
    assert drops["mean_length"] == 12.0


def test_keep_lets_the_learners_clock_go_on(make_collector, caplog):
    collector = make_collector(hopeless, group=group(on_drought="keep"))
    with caplog.at_level(logging.WARNING, "torchrl_dvla"):
        collector.start()
        for _ in range(3):
            rows = torch.cat([batch.clone() for batch in collector.replay_buffer])
            assert (rows[ADVANTAGE_KEY] == 0).all()
            collector.update_policy_weights_()
    stats = collector.stats()
    assert collector.policy_version == 3
    assert stats["collector/groups_dropped"] == 3, "as many as make a drought"
    assert stats["collector/groups_kept_in_drought"] >= 6
    assert "Groups are kept as they come" in caplog.text


def test_keep_ends_with_the_first_group_that_has_contrast(make_collector):
    def make():
        class Awakening(CountingChunkEnv):
            """Hopeless in its first ten episodes."""

            def _reset(self, tensordict=None, **kwargs):
                self.num_episodes = getattr(self, "num_episodes", 0) + 1
                self.required_fraction = 1.0 if self.num_episodes <= 10 else 0.5
                return super()._reset(tensordict, **kwargs)

        return Awakening(**{**ENV_KWARGS, "length": "fixed"})

    collector = make_collector(make, group=group(on_drought="keep", max_policy_lag=0))
    collector.start()
    seen = []
    for _ in range(5):
        for _ in collector.replay_buffer:
            pass
        seen += [bool(g.advantages.any()) for g in collector.replay_buffer.cohort]
        collector.update_policy_weights_()
    # Ten episodes are five groups: three make the drought, two are kept in it.
    assert seen[:2] == [False, False] and seen[3:] == [True] * len(seen[3:])


def test_raise_ends_the_run(make_collector):
    collector = make_collector(hopeless, group=group(on_drought="raise"))
    collector.start()
    with pytest.raises(RuntimeError, match="3 groups in a row .* The run ends here"):
        for _ in collector.replay_buffer:
            pass
    assert collector.stats()["collector/groups_dropped"] == 3


def test_candidates_rescue_a_group_and_bounds_drop_one(make_collector):
    rescued = GroupConfig(
        group_size=2, candidate_group_size=6, groups_per_update=2, return_bounds=(0.01, 0.7)
    )
    collector = make_collector(group=rescued)
    collector.start()
    for _ in range(4):
        for _ in collector.replay_buffer:
            pass
        for kept in collector.replay_buffer.cohort:
            returns = [rollout.episode_return for rollout in kept.rollouts]
            assert sorted(returns) == [0.0, 1.0], "of six candidates the two that differ"
            assert len(kept.candidates) == 6 and 0.01 < kept.mean_return < 0.7
        collector.update_policy_weights_()
    reasons = set(collector.replay_buffer.drop_counts())
    assert reasons <= {
        "mean return outside (0.01, 0.7)",
        "no contrast: all rollouts returned 0",
        "no contrast: all rollouts returned 1",
    }
    stats = collector.stats()
    for reason in reasons:
        assert stats[f"buffer/dropped/{reason}/mean_length"] > 0, "it reaches the statistics"
