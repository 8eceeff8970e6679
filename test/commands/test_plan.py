# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command plan: bytes and processes worked out by hand."""

from __future__ import annotations

import re

import pytest


def test_the_toy_configuration(call):
    code, out, err = call("plan", "--config-name", "toy")
    assert code == 0, err
    # 8 groups an update, of two versions, and one for an evaluation; each of 8 rollouts, whose 4
    # decisions are one page.
    assert re.search(r"^environment pool +136 pages, 1.7 MiB$", out, re.MULTILINE)
    # weights, as much again of gradients, and two moments: 4 * 117344 * 4 bytes = 1.79 MiB
    assert re.search(
        r"^learner +1.8 MiB on cpu: weights 458.4 KiB, gr.*AdamW 916.8 KiB$", out, re.M
    )
    assert re.search(r"^processes +4: the learner, 1 of inference, 2 of environments$", out, re.M)
    assert re.search(r"^rollouts at once +16$", out, re.M)


def test_what_a_gpu_holds(call):
    code, out, err = call("plan", "--config-name", "toy")
    assert code == 0, err
    table = out.partition("learner and inference on one GPU, in float32:\n")[2].splitlines()
    assert table[0].split() == [
        "training", "trained", "weights", "all", "states", "a", "decision", "24", "GB", "48", "GB",
        "80", "GB",
    ]  # fmt: skip
    assert re.match(r"full +0.1 M +458.4 KiB +1.8 MiB ", table[1])
    assert re.match(r"full, checkpointed +0.1 M ", table[2])
    assert all(int(a) < int(b) < int(c) for *_, a, b, c in map(str.split, table[1:]))
    # A policy without transformers has no such table.
    code, out, err = call("plan", "--config-name", "toy", "policy.kind=tiny_vla")
    assert code == 0 and "one GPU" not in out


def test_settings_change_the_plan(call):
    more = ("workers.num_workers=3", "group.groups_per_update=4", "loss.kl_to_ref_coeff=0.1")
    code, out, err = call("plan", "--config-name", "toy", *more)
    assert code == 0, err
    assert re.search(r"^environment pool +72 pages", out, re.MULTILINE)  # (2 * 4 + 1) * 8
    assert "reference policy 458.4 KiB" in out and "processes         5: " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("memory.env_bytes=64KB",), "memory.env_bytes must be at least 838208"),
        (("memory.model_bytes=1MB",), "memory.model_bytes must be at least"),
        (("device=cuda:7",), "device must be one that torch sees"),
        (
            ("env=factory", "env._target_=no.where", "policy=factory", "policy._target_=x"),
            "env._target_ must be",
        ),
        (("env.chunk_size=4.5",), "env.chunk_size must be a whole number"),
        (("env.task_ids=[1",), "The settings must be a configuration and overrides"),
    ],
)
def test_what_a_run_would_refuse(call, arguments, message):
    code, out, err = call("plan", "--config-name", "toy", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}") and "Traceback" not in err


def test_a_configuration_of_ones_own(call, tmp_path):
    folder = tmp_path / "my configurations"
    folder.mkdir()
    text = "defaults: [toy, _self_]\nname: mine\ngroup: {groups_per_update: 1}\n"
    (folder / "mine.yaml").write_text(text)
    code, out, err = call("plan", "--config-dir", folder, "--config-name", "mine")
    assert code == 0, err
    assert out.startswith("mine: fits.") and "24 pages" in out  # (2 * 1 + 1) * 8
