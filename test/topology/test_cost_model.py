# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Lane costs and their JSON file."""

from __future__ import annotations

import json

import pytest

from torchrl_dvla.topology import LaneCosts

COSTS = {
    "name": "toy",
    "env_step_s": 0.01,
    "env_steps_per_decision": 3.5,
    "decisions_per_rollout": 4.0,
    "call_row_s": 0.002,
    "learn_row_s": 0.003,
    "row_bytes": 3000,
    "version_bytes": 400_000,
}


def test_seconds_behind_a_decision():
    costs = LaneCosts(**COSTS, reset_s=0.02, call_s=0.008)
    assert costs.sample_s == pytest.approx(0.035 + 0.02 / 4)
    assert costs.call_seconds(4) == pytest.approx(0.008 / 4 + 0.002)
    assert costs.trained_bytes == 400_000


def test_a_file_is_read_as_it_was_written(tmp_path):
    costs = LaneCosts(**COSTS, settings={"env.cameras": ["a"], "optim.x": None}, machine={"c": 2})
    costs.save(tmp_path / "costs.json")
    assert LaneCosts.load(tmp_path / "costs.json") == costs
    assert list(json.loads((tmp_path / "costs.json").read_text()))[:2] == ["name", "env_step_s"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_step_s": 0}, "env_step_s must be positive, got 0"),
        ({"call_row_s": -1.0}, "call_row_s must be positive"),
        ({"learn_row_s": None}, "learn_row_s must be a finite number"),
        ({"loop_s": -1e-9}, "loop_s must be at least 0"),
        ({"learned_share": 1.5}, "learned_share must be at most 1"),
        ({"decisions_per_rollout": 0.5}, "decisions_per_rollout must be at least 1"),
        ({"row_byts": 1}, "row_byts must be a setting.*Did you mean row_bytes"),
        ({"env_device": "cuda"}, "env_device must be 'cpu' where policy_device is"),
        ({"policy_device": "tpu"}, "policy_device must be one of"),
    ],
)
def test_impossible_costs(tmp_path, changes, message):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({**COSTS, **changes}))
    with pytest.raises(ValueError, match=message):
        LaneCosts.load(path)


def test_files_that_hold_no_costs(tmp_path):
    path = tmp_path / "costs.json"
    with pytest.raises(FileNotFoundError, match="calibrate"):
        LaneCosts.load(path)
    for text, message in (("{", "must be JSON"), ("[]", "must be a JSON object"), ("{}", "name")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            LaneCosts.load(path)


def test_costs_of_another_configuration():
    costs = LaneCosts(**COSTS, settings={"env.chunk_size": 4, "device": "cpu"})
    costs.check_settings({"env.chunk_size": 4, "device": "cpu"})
    with pytest.raises(ValueError, match=r"got those of 'toy': 'env.chunk_size' is 4 instead of 8"):
        costs.check_settings({"env.chunk_size": 8, "device": "cpu"})
    LaneCosts(**COSTS).check_settings({"env.chunk_size": 8})  # written by hand
