# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command simulate: what it prints, draws and refuses."""

from __future__ import annotations

import json
import re

import pytest

from torchrl_dvla.topology import LaneCosts

pytest.importorskip("simpy", reason="of the extra 'simulate'")


@pytest.fixture
def costs_file(tmp_path):
    path = tmp_path / "costs.json"
    LaneCosts(
        "by hand", 0.04, 1, 5, call_s=0.01, call_row_s=1e-12, learn_row_s=1e-12, row_bytes=1,
        version_bytes=1,
    ).save(path)  # fmt: skip
    return path


@pytest.fixture
def cluster_file(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes:\n- {host: a, num_cores: 64, memory_bytes: 8GB}\n")
    return path


def test_known_costs_on_more_nodes(call, costs_file, cluster_file, tmp_path):
    picture = tmp_path / "x.svg"
    options = ("--costs", costs_file, "--cluster", cluster_file, "--group-size", 2)
    code, out, err = call("simulate", *options, "--nodes", 1, 2, "--picture", picture)
    assert code == 0, err
    _, one, two, *rest = out.splitlines()
    # two workers of 50 ms a turn on each node
    assert one.split()[:5] == ["by", "hand", "1", "0", "40"] and " rollouts " in one
    assert two.split()[:5] == ["by", "hand", "2", "0", "80"] and " 1.00 " in two
    assert "Predicted, not measured. Assumptions:" in rest
    assert f"lane costs of 'by hand', {costs_file}" in rest[-1]
    assert "Predicted, not measured" in picture.read_text()


def test_policies_by_assumptions(call):
    options = ("--nodes", 4, "--parameters", "3e9", "1e12", "--max-policy-lag", 1)
    code, out, err = call("simulate", *options, "--json", "--tokens", 100)
    assert code == 0, err
    found = json.loads(out)
    small, large = found["predicted"]
    assert small["policy"] == "3 B" and small["run"]["decisions_per_s"] > 0
    assert small["bounded_by"] and small["efficiency"] == 1.0 and small["max_policy_lag"] == 1
    assert large["run"] is None and large["problem"].startswith("inference: 1.8 TiB")
    assert any(line.split()[:2] == ["100", "tokens"] for line in found["assumptions"])
    code, out, err = call("simulate", "--nodes", 4, "--parameters", "1e12")
    assert code == 0, err
    assert "no room: inference: 1.8 TiB" in out and "gpus_per_node" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--costs or --parameters must be given, and not both, got neither"),
        (("--costs", "x", "--parameters", "1e9"), "--costs or --parameters must be .* got both"),
        (("--costs", "x", "--tokens", "5"), "--tokens must go with --parameters, got --costs"),
        (("--costs", "missing.json"), "The costs must be a JSON file, got 'missing.json'"),
        (("--parameters", "1e9", "--tokens", "0"), "tokens must be at least 1, got 0"),
        (("--parameters", "1e9", "--nodes", "1"), "num_nodes must be at least 2, got 1"),
        (("--parameters", "1e9", "--max-policy-lag", "-1"), "max_policy_lag must be at least 0"),
        (("--parameters", "-3"), "num_parameters must be positive, got -3.0"),
    ],
)
def test_what_is_refused(call, arguments, message):
    code, out, err = call("simulate", *arguments)
    assert (code, out) == (1, "")
    assert re.match(f"error: {message}", err), err


def test_no_nodes(call, costs_file, cluster_file):
    options = ("--costs", costs_file, "--cluster", cluster_file, "--nodes", 0)
    assert call("simulate", *options)[2].startswith("error: --nodes must be at least 1, got 0")
