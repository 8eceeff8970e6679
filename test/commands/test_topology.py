# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command topology: it prints what plan reads."""

from __future__ import annotations

from torchrl_dvla.topology import ClusterSpec


def test_this_machine_and_a_file(call, tmp_path):
    code, out, err = call("topology")
    assert (code, err) == (0, "")
    path = tmp_path / "cluster.yaml"
    path.write_text(out)
    assert ClusterSpec.from_yaml(path) == ClusterSpec.local()
    assert call("topology", "--file", path) == (0, out, "")


def test_a_wrong_file(call, tmp_path):
    code, out, err = call("topology", "--file", tmp_path / "no.yaml")
    assert (code, out) == (1, "") and err.startswith("error: The cluster must be declared in")
