# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Commands calibrate and plan: measured costs of the toy task, and what is planned with them."""

from __future__ import annotations

import json
import re

import pytest

from torchrl_dvla.topology import LaneCosts

SMALL = ("group.group_size=4", "group.groups_per_update=2", "workers.envs_per_worker=4")
TOY = ("--config-name", "toy", *SMALL)
CLUSTER = "nodes:\n" + "".join(
    f"- {{host: {host}, num_cores: 4, memory_bytes: 64GB, network_bytes_per_s: 1e9}}\n"
    for host in "ab"
)


@pytest.fixture(scope="module")
def costs_file(tmp_path_factory):
    from torchrl_dvla.__main__ import main

    path = tmp_path_factory.mktemp("some costs") / "costs.json"
    assert main(["calibrate", *TOY, "--updates", "1", "--costs", str(path)]) == 0
    return path


def test_measured_costs(costs_file):
    costs = LaneCosts.load(costs_file)
    assert costs.name == "toy" and costs.settings["policy.kind"] == "tiny"
    assert 1.0 <= costs.decisions_per_rollout <= 4.0  # max_decisions
    assert 1.0 <= costs.env_steps_per_decision <= 4.0  # chunk_size
    # the row of test_plan.py: 136 pages of 4 rows are 1.7 MiB
    assert costs.row_bytes == pytest.approx(1.7 * 2**20 / 136 / 4, rel=0.05)
    assert costs.trained_bytes == 4 * 117_344  # test_plan.py
    assert costs.version_bytes >= costs.trained_bytes  # and a few whole numbers
    assert costs.optimizer_steps_per_row == 2 / 64
    assert 0.0 < costs.learned_share <= 1.0
    # None of these takes as long as a second, or no time, on whatever machine.
    for name in ("env_step_s", "call_row_s", "call_s", "learn_row_s", "reset_s", "loop_s"):
        assert 0.0 <= getattr(costs, name) < 1.0, name
    assert 2**24 < costs.env_bytes < 2**32


def test_plan_with_costs(call, costs_file, tmp_path):
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    picture = tmp_path / "plan.svg"
    options = ("--costs", costs_file, "--cluster", tmp_path / "cluster.yaml", "--picture", picture)
    code, out, err = call("plan", *TOY, *options)
    assert code == 0, err
    assert "toy: fits." in out and re.search(r"^bounded by +\S", out, re.M)
    assert re.search(r"^one more node +x \d\.\d\d$", out, re.M)
    assert re.search(r"^as configured +[\d.]+ decisions/s", out, re.M)
    assert re.search(r"^a +\d", out, re.M) and re.search(r"^b +\d", out, re.M)
    assert picture.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (None, ("env.chunk_size=2",), "The costs must be those of this configuration"),
        ({"env_step_s": 0.0}, (), "env_step_s must be positive"),
        ({"row_bytes": -1}, (), "row_bytes must be at least 1"),
        (None, ("--learner-gpus", "3"), "num_learner_gpus must be one of [0]"),
        (None, ("--cluster", "no.yaml"), "The cluster must be declared"),
    ],
)
def test_plans_that_are_refused(call, costs_file, tmp_path, changes, arguments, message):
    path = costs_file
    if changes:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps({**json.loads(costs_file.read_text()), **changes}))
    code, out, err = call("plan", *TOY, "--costs", path, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_a_cluster_needs_costs(call):
    code, _, err = call("plan", *TOY, "--cluster", "x.yaml", "--picture", "y.svg")
    assert code == 1 and "--costs must be given with --cluster, --picture" in err


def test_calibrate_refuses_what_a_run_would(call, tmp_path):
    path = tmp_path / "costs.json"
    code, _, err = call("calibrate", *TOY, "device=cuda:7", "--costs", path)
    assert code == 1 and "device must be one that torch sees" in err
    code, _, err = call("calibrate", *TOY, "--updates", "0", "--costs", path)
    assert code == 1 and "--updates must be at least 1" in err
    assert not path.exists()
