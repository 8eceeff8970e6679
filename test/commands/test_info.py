# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command info: what a run holds, and commands that can be pasted."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil

import pytest

from torchrl_dvla.commands import info
from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings, to_dict
from torchrl_dvla.recording import RunLock


def test_a_run_that_has_ended(call, trained):
    code, out, err = call("info", trained)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].endswith(str(trained)) and re.fullmatch("now +not running", lines[1])
    assert re.fullmatch(r"updates +2 in \d\.\d min, ended by update budget", lines[2])
    assert all(re.fullmatch(rf"success {when} +\S+ %.*/4.*", out.splitlines()[k])
               for k, when in ((3, "before"), (4, "after")))  # fmt: skip
    assert re.search(r"^checkpoint +update-00000002, \d{4}-\d\d-\d\d .*, \S+ MiB$", out, re.M)
    assert re.search(r"^settings +--config-name toy, but$", out, re.MULTILINE)
    assert re.search(r"^ +group.group_size=4$", out, re.MULTILINE)
    assert "policy.backbone" not in out


def test_its_commands_work(call, trained):
    lines = dict(line.split(maxsplit=1) for line in call("info", trained)[1].splitlines()[-3:])
    evaluate, resume = shlex.split(lines["evaluate"]), shlex.split(lines["resume"])
    assert evaluate[1:] == ["-m", "torchrl_dvla", "evaluate", str(trained)]
    watch = shlex.split(lines["watch"])
    assert watch[1:] == ["-m", "tensorboard.main", "--logdir", str(trained)]
    assert resume[1:5] == ["-m", "torchrl_dvla", "train", "--config-name"]
    cfg = compose_settings(resume[5], resume[6:])
    assert cfg.checkpoint.resume == str(trained)
    again = dataclasses.replace(cfg.checkpoint, resume=None)
    recorded = info._settings(trained, [])
    assert to_dict(dataclasses.replace(cfg, checkpoint=again)) == recorded


@pytest.mark.parametrize(
    ("config", "overrides", "chosen"),
    [
        ("toy", [], ["--config-name", "toy"]),
        ("toy", ["policy.kind=tiny_vla", "name='with a space'"], ["--config-name", "toy"]),
        ("libero", ["env.task_ids=[1,2]"], ["--config-name", "libero"]),
        (
            "libero_openvla_oft",
            ["policy.checkpoint='/my/sft, final'"],
            ["--config-name", "libero_openvla_oft"],
        ),
        (
            "toy",
            ["env=factory", "env._target_=a.b",
             "+env.x=[1,'it\\'s \"so\"',null]", "+env.y={z:1e-5}",
             "policy=factory", "policy._target_=c.d"],
            ["--config-name", "toy", "env=factory", "policy=factory"],
        ),
    ],
    ids=["toy", "another kind", "libero", "without a checkpoint of its own", "factories"],
)  # fmt: skip
def test_settings_come_back_from_the_arguments_that_are_shown(config, overrides, chosen):
    settings = to_dict(compose_settings(config, overrides))
    found, changed = info._nearest(settings)
    assert found == chosen
    again = compose_settings(found[1], [*found[2:], *changed])
    assert to_dict(again) == settings


def test_a_run_under_way(call, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    lock = RunLock(copy)
    code, out, _ = call("info", copy)
    assert code == 0 and re.search(r"^now +running: process \d+ on ", out, re.MULTILINE)
    assert re.search(r"^success after +not evaluated$", out, re.M), "the checkpoint knows none yet"
    lock.release()
    shutil.rmtree(copy / "checkpoints")
    (copy / "report.json").unlink()
    code, out, _ = call("info", copy)
    assert code == 0 and "none saved yet" in out and "evaluate" not in out
    assert (copy / "owner").read_text().startswith("process ")


def test_what_is_no_run(call, trained, tmp_path):
    assert "which is none" in call("info", tmp_path / "nowhere")[2]
    code, _, err = call("info", trained.parent)
    assert code == 1 and f"a folder of runs. Pass one of them: {trained.name}" in err
