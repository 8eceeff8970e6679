# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Fingerprints: what a saved policy did, and whether it still does."""

from __future__ import annotations

import json

import pytest
import torch

from torchrl_dvla.modules import FlowVLA, TransformersVLA
from torchrl_dvla.modules.fingerprint import check_fingerprint, take_fingerprint

from .policies import make_flow_policy, make_policy

POLICIES = {
    "tokens": make_policy,
    **{kind: lambda kind=kind: make_flow_policy(kind) for kind in ("pi0", "pi05", "smolvla")},
}


@pytest.mark.parametrize("name", POLICIES)
def test_it_is_written_and_compared(name, tmp_path):
    policy = POLICIES[name]()
    policy.train()
    policy.save_pretrained(tmp_path)
    assert policy.training
    kind = type(policy)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    stored = data["fingerprint"]
    assert len(stored["actions"]) == len(stored["log_probs"]) == 8
    assert any(stored["log_probs"])  # greedy ones of a flow policy are zero
    kind.from_pretrained(tmp_path)
    for entry in ("actions", "log_probs"):
        changed = [*stored[entry][:-1], stored[entry][-1] + 0.5 + abs(stored[entry][-1])]
        path.write_text(json.dumps(data | {"fingerprint": stored | {entry: changed}}))
        with pytest.raises(ValueError, match=f"got other {entry} differ by"):
            kind.from_pretrained(tmp_path)
    path.write_text(json.dumps(data | {"fingerprint": {"instruction": 3}}))
    with pytest.raises(ValueError, match="fingerprint.actions' is missing"):
        kind.from_pretrained(tmp_path)
    del data["fingerprint"]  # of an older version
    path.write_text(json.dumps(data))
    kind.from_pretrained(tmp_path)


def test_another_computation_is_found(tmp_path, monkeypatch):
    """As another version of transformers might compute: the file is as it was."""
    make_flow_policy().save_pretrained(tmp_path)
    from torchrl_dvla.modules.pi0 import Pi0

    own = Pi0.velocity
    monkeypatch.setattr(Pi0, "velocity", lambda *args: tuple(1.1 * each for each in own(*args)))
    with pytest.raises(ValueError, match="must do what it did when it was saved"):
        FlowVLA.from_pretrained(tmp_path)
    FlowVLA.from_pretrained(tmp_path, num_steps=2)  # another policy: nothing to compare


def test_what_belongs_to_a_run_does_not_count(tmp_path):
    policy = make_policy(temperature=0.3, output_mode="tokens", log_probs_mode="sequence")
    policy.save_pretrained(tmp_path)
    TransformersVLA.from_pretrained(tmp_path, temperature=2.0, output_mode="chunk")


def test_the_random_generator_is_left_alone():
    policy = make_flow_policy()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stored = take_fingerprint(policy)
    assert torch.equal(torch.get_rng_state(), before)
    check_fingerprint(policy, stored, "x")


def test_numbers_that_are_none_have_no_fingerprint():
    policy = make_flow_policy()
    policy.network.model.action_out_proj.bias.data.fill_(torch.nan)
    assert take_fingerprint(policy) is None
