# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the recipes say in the terminal: the progress line, errors, and commands to go on with."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException

from torchrl_dvla.recipes import terminal
from torchrl_dvla.recipes.dvla_grpo import bookkeeping
from torchrl_dvla.recipes.dvla_grpo.bookkeeping import Meter, RunState, last_words
from torchrl_dvla.recipes.dvla_grpo.settings import CONFIG, compose_settings, settings_from, to_dict
from torchrl_dvla.recording import SuccessRate, check_writable


class _Collector:
    """Totals of a collector, and lanes that were never busy."""

    def __init__(self):
        self.totals = {"collector/env_steps": 0}
        usage = SimpleNamespace(busy_s={}, num_tracks={}, scalars=dict)
        usage.since = lambda before: usage
        self.timeline = SimpleNamespace(usage=lambda: usage)

    def stats(self):
        return dict(self.totals)


@pytest.fixture
def meter(settings, monkeypatch):
    """A meter by a clock that is set, with a run of 1000 updates."""
    now = [0.0]
    monkeypatch.setattr(bookkeeping.time, "monotonic", lambda: now[0])

    def build(*overrides):
        cfg = settings("toy", "train.num_updates=1000", "train.max_minutes=null", *overrides)
        return Meter(cfg, RunState(), _Collector()), now

    return build


def _update(meter, now, *, seconds, env_steps, success):
    now[0] += seconds
    meter._collector.totals["collector/env_steps"] += env_steps
    meter._collector.totals["collector/success_rate"] = success
    lags = {"staleness/policy_lag_mean": 1.0, "staleness/policy_lag_max": 1}
    return meter.after_update(lags, [SimpleNamespace(num_rows=4)])


def test_a_progress_line_begins_with_success_and_says_of_what(meter, capsys):
    meter, now = meter("log.line_every_s=15")
    with meter:
        logged = _update(meter, now, seconds=10, env_steps=7010, success=0.53)
        _update(meter, now, seconds=2, env_steps=100, success=0.6)  # comes too early for a line
    assert logged["train/minutes"] == pytest.approx(1 / 6)
    assert capsys.readouterr().out.splitlines() == [
        "sampled success 53%, 0% of the budget, 1/1000 [00:10<2:46:30] lag 1.0, 701 env steps/s",
        "sampled success 60%, 0% of the budget, 2/1000 [00:12<1:39:48] lag 1.0, 50 env steps/s",
    ]


def test_the_bar_of_a_long_run_has_room_in_80_columns(meter):
    meter, now = meter()
    with meter:
        for _ in range(999):
            _update(meter, now, seconds=5, env_steps=6000, success=1.0)
        line = meter._status("#")
    assert line == (
        "sampled success 100% |#|100% 999/1000 [1:23:15<00:05] lag 1.0, 1200 env steps/s"
    )
    assert len(line) <= 80


def test_before_the_first_update_there_is_nothing_to_show(meter):
    meter, _ = meter()
    with meter:
        assert meter._status("#") == (
            "sampled success - |#|  0% 0/1000 [00:00<?] lag -, - env steps/s"
        )


@pytest.mark.parametrize(
    ("cause", "is_short"),
    [
        (lambda: check_writable("/dev/null/runs"), True),
        (lambda: SuccessRate.of([]).interval, True),
        (lambda: settings_from({"seed": "x"}), True),
        (lambda: int("x"), False),
        (lambda: SuccessRate(1, 0).rate, False),  # Python's own error, in code of this package
        (lambda: RunState().progress(None), False),
    ],
)
def test_only_what_a_check_raises_is_shown_without_its_traceback(cause, is_short):
    with pytest.raises(Exception) as caught, terminal.messages_only():
        cause()
    assert isinstance(caught.value, CompactHydraException) == is_short


@pytest.fixture
def python_in_path(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


@pytest.fixture
def hydra_run(tmp_path, monkeypatch):
    """Working directory and settings of a run that Hydra composed."""

    def compose_run(*overrides, name="toy"):
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG)):
            HydraConfig.instance().set_config(
                compose(name, list(overrides), return_hydra_config=True)
            )
            return settings_from(compose(name, list(overrides)))

    monkeypatch.chdir(tmp_path)
    yield compose_run
    HydraConfig.instance().cfg = None


@pytest.mark.usefixtures("python_in_path")
def test_commands_go_on_with_the_settings_of_the_run(hydra_run, tmp_path):
    overrides = ["log.dir=my runs", "checkpoint.resume=auto", "+policy.hidden_dim=8", "seed=1"]
    cfg = hydra_run(*overrides)
    folder = "my runs/toy/time=1, seed1"
    run = tmp_path / folder
    run.mkdir(parents=True)
    terminal.write_settings(to_dict(cfg), run)
    state = RunState(num_updates=3, checkpoint=str(run / "checkpoints" / "update-3"))
    lines = dict(line.split(":", 1) for line in last_words(cfg, run, state).splitlines())
    resumed, evaluated, watched = (shlex.split(lines[k]) for k in ("resume", "evaluate", "watch"))
    assert resumed == [
        *["python", "-m", "torchrl_dvla", "train"],
        *["--config-dir", folder, "--config-name", "settings"],
        'checkpoint.resume="my runs/toy/time=1, seed1"',
    ]
    assert evaluated == ["python", "-m", "torchrl_dvla", "evaluate", folder]
    assert watched[-2:] == ["--logdir", folder]
    again = compose_settings("settings", resumed[8:], config_dir=folder)
    assert again.checkpoint.resume == folder
    checkpoint = dataclasses.replace(again.checkpoint, resume="auto")
    assert dataclasses.replace(again, checkpoint=checkpoint) == cfg
    state.num_updates = cfg.train.num_updates
    assert "  # and raise train.num_updates or train.max_minutes" in last_words(cfg, run, state)


def test_settings_of_a_run_begin_with_the_commands_that_started_it(hydra_run, tmp_path):
    for seed in (1, 2):
        terminal.write_settings(to_dict(hydra_run(f"seed={seed}", "name=my run")), tmp_path)
    lines = (tmp_path / "settings.yaml").read_text().splitlines()
    assert lines[:3] == [
        "# torchrl-dvla train --config-name toy seed=1 'name=my run'",
        "# torchrl-dvla train --config-name toy seed=2 'name=my run'",
        "defaults:",
    ]


@pytest.mark.usefixtures("python_in_path")
def test_a_run_without_a_checkpoint_can_only_be_watched(hydra_run, tmp_path):
    cfg = hydra_run("log.backend=csv", name="toy")
    run = tmp_path.parent / "elsewhere"
    assert last_words(cfg, run, RunState()) == (
        f"draw:     python -m torchrl_dvla curve {run} curve.svg"
    )
    assert last_words(hydra_run("log.backend=wandb"), run, RunState()) == ""


def test_an_interpreter_that_the_shell_does_not_find_is_named_by_its_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(terminal.command("info", "a b")) == [
        *[terminal.shortened(Path(sys.executable)), "-m", "torchrl_dvla", "info", "a b"]
    ]


@pytest.mark.parametrize("full", ["0", "1"])
def test_a_setting_that_is_refused_ends_the_command_with_its_message(tmp_path, full):
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]), HYDRA_FULL_ERROR=full)
    command = [sys.executable, "-m", "torchrl_dvla", "train", "--quick", "optim.lr=-1"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 1
    message = r"^(hydra.*: )?optim\.lr must be positive, got -1\. "
    assert re.search(message, run.stderr, re.MULTILINE)
    assert ("Traceback" in run.stderr) == (full == "1")
    assert list(tmp_path.iterdir()) == []
