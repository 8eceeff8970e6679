# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import json

import pytest

from torchrl_dvla.recording import RunReport, SuccessRate, wilson_interval


@pytest.mark.parametrize(
    ("num_successes", "num_trials", "low", "high"),
    # Worked by hand with z = 1.959964: n = 10, p = 0 gives (0, z^2 / (n + z^2)).
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0)],
)
def test_wilson_interval(num_successes, num_trials, low, high):
    assert wilson_interval(num_successes, num_trials) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(("num_successes", "num_trials"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_interval_wants_counts(num_successes, num_trials):
    with pytest.raises(ValueError, match=r"num_successes must lie in \[0, num_trials\]"):
        wilson_interval(num_successes, num_trials)


def test_success_rate_counts():
    rate = SuccessRate.of([True, False, True, True])
    assert (rate.num_successes, rate.num_episodes, rate.rate) == (3, 4, 0.75)


def test_the_table_says_what_was_and_was_not_measured(tmp_path):
    report = RunReport(
        name="toy, seed 0",
        before=SuccessRate(1, 10),
        after=None,
        lane_shares={"sampling": 0.914, "gradient": 0.5},
        env_steps_per_s=31.25,
        decisions_per_s=4.0,
        num_updates=12,
        num_episodes=96,
        num_env_steps=1000,
        mean_policy_lag=0.755,
        max_policy_lag=1,
        training_s=125.4,
        ended_by="SIGTERM",
        checkpoint="",
        tasks={"pick": {"before": SuccessRate(1, 5)}, "place": {}},
    )
    text = report.to_text()
    assert "greedy success before  10.0 % (1/10, 95 % interval 1.8-40.4)" in text
    assert "greedy success after   not evaluated" in text
    assert "  pick                 1/5 -> -" in text
    assert "  place                - -> -" in text
    assert "lanes busy             sampling 91 %, gradient 50 %" in text
    assert "policy lag             mean 0.76, max 1" in text
    assert "training time          2 min 05 s (ended by SIGTERM)" in text
    assert "checkpoint             none" in text
    report.save(tmp_path / "report.json")
    loaded = json.loads((tmp_path / "report.json").read_text())
    assert loaded["before"] == {"num_successes": 1, "num_episodes": 10}
    assert loaded["after"] is None
    assert loaded["tasks"]["pick"] == {"before": loaded["before"] | {"num_episodes": 5}}
    assert "| updates | 12 |" in report.to_markdown()
