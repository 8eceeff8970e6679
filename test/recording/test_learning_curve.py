# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Learning curves of runs whose success is known."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from torchrl_dvla.__main__ import main
from torchrl_dvla.recording import (
    RunRecorder,
    TensorBoardRecorder,
    draw_learning_curve,
    read_scalars,
)

NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.fixture(params=[TensorBoardRecorder, RunRecorder])
def run(request, tmp_path):
    """A run of two updates, evaluated before and after: 0 % to 100 %, with wide intervals."""
    folder = tmp_path / "runs" / "a run"
    with request.param(folder) as recorder:
        for step, rate in ((0, 0.0), (2, 1.0)):
            interval = {"eval/success_low": rate / 2, "eval/success_high": (1 + rate) / 2}
            recorder.scalars({"eval/success_rate": rate, **interval}, step=step)
        recorder.scalars({"eval_subset/success_rate": 0.5}, step=1)
        for step in (1, 2):
            totals = {"collector/env_steps": 100 * step, "train/minutes": step**2}
            recorder.scalars({"collector/success_rate": step / 4, **totals}, step=step)
    return folder


def _drawn(svg):
    """Polylines, and centres of the filled and of the hollow circles; without the legend."""
    (group,) = ElementTree.fromstring(svg).iter(f"{NAMESPACE}g")
    lines = [line.get("points") for line in group.iter(f"{NAMESPACE}polyline")]
    circles = list(group.iter(f"{NAMESPACE}circle"))
    filled, hollow = (
        [(float(c.get("cx")), float(c.get("cy"))) for c in circles if (c.get("r") == r)]
        for r in ("5", "4")
    )
    return lines, filled, hollow


def test_success_is_drawn_over_env_steps(run):
    # 710 pixels for 200 env steps, from pixel 70 on; 100 % is at 46, 0 % 314 pixels below.
    lines, filled, hollow = _drawn(draw_learning_curve([run]))
    assert lines[0] == "425,281.5 780,203"
    assert filled == [(70.0, 360.0), (780.0, 46.0)]
    assert hollow == [(425.0, 203.0)]


def test_success_is_drawn_over_minutes(run):
    lines, _, hollow = _drawn(draw_learning_curve([run], over="minutes"))
    assert lines[0] == "247.5,281.5 780,203"
    assert hollow == [(247.5, 203.0)]


def test_the_command_draws_several_runs_each_in_its_colour(run, tmp_path, capsys):
    picture = tmp_path / "a curve.svg"
    assert main(["curve", str(run), str(run), str(picture), "--over", "minutes"]) == 0
    groups = list(ElementTree.fromstring(picture.read_text()).iter(f"{NAMESPACE}g"))
    colours = [group.find(f"{NAMESPACE}polyline").get("stroke") for group in groups]
    assert len(set(colours)) == 2
    assert picture.read_text().count(">a run</text>") == 2
    assert main(["curve", str(tmp_path), str(picture)]) == 1
    assert "A run must be a folder with TensorBoard or CSV files" in capsys.readouterr().err


def test_a_run_without_success_or_minutes_is_refused(tmp_path):
    with RunRecorder(tmp_path / "lr") as recorder:
        recorder.scalars({"optim/lr": 1.0}, step=1)
    with pytest.raises(ValueError, match="must have its success recorded"):
        draw_learning_curve([tmp_path / "lr"])
    with RunRecorder(tmp_path / "old") as recorder:
        recorder.scalars({"collector/success_rate": 1.0, "collector/env_steps": 8}, step=1)
    with pytest.raises(ValueError, match="must have train/minutes recorded to be drawn over"):
        draw_learning_curve([tmp_path / "old"], over="minutes")
    assert read_scalars(tmp_path / "old")["collector/env_steps"] == {1: 8.0}
