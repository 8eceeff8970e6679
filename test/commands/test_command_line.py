# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What holds for every command: help, unknown paths, a machine without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from torchrl_dvla.__main__ import COMMANDS, RECIPES, main


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert [name for name in COMMANDS if f"\n    {name}" not in said] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["torchrl-dvla"])
    try:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
    finally:
        GlobalHydra.instance().clear()
    assert stop.value.code in (0, None)
    said = capsys.readouterr().out
    assert said.startswith(f"usage: torchrl-dvla {name} ")
    with_settings = {*RECIPES, "evaluate", "inspect", "calibrate", "plan"}
    assert ("KEY=VALUE" in said) == (name in with_settings)


def test_an_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "choose from 'train', 'sft'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["evaluate", "inspect", "info", "timeline {} x.svg"])
def test_a_path_where_nothing_is(call, tmp_path, arguments):
    name, *rest = arguments.split()
    path = tmp_path / "no such folder"
    code, out, err = call(name, *(text.format(path) for text in rest or ["{}"]))
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and str(path) in err and "Traceback" not in err


def test_the_doctor_and_the_list_of_commands_need_no_torch():
    program = "import sys; sys.modules['torch'] = None\nfrom torchrl_dvla.__main__ import main\n"
    doctor = f"{program}print(main(['doctor', '--no-libero']))"
    run = subprocess.run([sys.executable, "-c", doctor], capture_output=True, text=True)
    assert "fail  torch build" in run.stdout and run.stdout.endswith("\n1\n"), run.stderr
    listing = subprocess.run(
        [sys.executable, "-c", f"{program}main(['--help'])"], capture_output=True, text=True
    )
    assert listing.returncode == 0 and "evaluate" in listing.stdout
