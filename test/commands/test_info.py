# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command info: what a run holds, and commands that can be pasted."""

from __future__ import annotations

import json
import re
import shlex
import shutil

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
    settings = (trained / "settings.yaml").read_text()
    (trained / "settings.yaml").write_text(f"# torchrl-dvla train --config-name toy\n{settings}")
    shown = call("info", trained)[1]
    (trained / "settings.yaml").write_text(settings)
    assert re.search(r"^started by +torchrl-dvla train --config-name toy$", shown, re.MULTILINE)


def test_its_commands_work(call, trained):
    lines = dict(line.split(maxsplit=1) for line in call("info", trained)[1].splitlines()[-3:])
    evaluate, resume = shlex.split(lines["evaluate"]), shlex.split(lines["resume"])
    assert evaluate[1:] == ["-m", "torchrl_dvla", "evaluate", str(trained)]
    watch = shlex.split(lines["watch"])
    assert watch[1:] == ["-m", "tensorboard.main", "--logdir", str(trained)]
    assert resume[1:5] == ["-m", "torchrl_dvla", "train", "--config-dir"]
    assert resume[6:8] == ["--config-name", "settings"]
    cfg = compose_settings(resume[7], resume[8:], config_dir=resume[5])
    assert cfg.checkpoint.resume == str(trained)
    manifest = json.loads((trained / "checkpoints/update-00000002/manifest.json").read_text())
    recorded = manifest["metadata"]["config"]
    assert to_dict(cfg) == recorded | {
        "checkpoint": recorded["checkpoint"] | {"resume": str(trained)}
    }


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
