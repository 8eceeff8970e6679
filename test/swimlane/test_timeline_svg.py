# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The drawing of a timeline, on known spans."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from torchrl_dvla.__main__ import main
from torchrl_dvla.swimlane import Span, Timeline, draw_timeline

SPANS = [
    Span("sampling", "worker 0", "step", 0.0, 2.0),
    Span("sampling", "worker 0", "step", 3.0, 4.0, "no_decision"),
    Span("inference", "main", "infer <b>", 1.0, 3.0),
    Span("distribution", "learner", "publish", 2.0, 2.0001),
]
NAMESPACE = "{http://www.w3.org/2000/svg}"


def boxes(svg: str) -> dict[str, list[tuple[float, float]]]:
    """Left end and width of the rectangles, by their titles' first words."""
    out: dict[str, list[tuple[float, float]]] = {}
    for rect in ElementTree.fromstring(svg).iter(f"{NAMESPACE}rect"):
        title = rect.find(f"{NAMESPACE}title")
        if title is not None:
            name = title.text.split(",")[0]
            out.setdefault(name, []).append((float(rect.get("x")), float(rect.get("width"))))
    return out


def test_busy_and_idle_time_are_drawn_where_they_were():
    drawn = boxes(draw_timeline(SPANS))
    # 840 pixels for 4 seconds, from pixel 150 on.
    assert drawn["step"] == [(150.0, 419.6), (780.0, 209.6)]
    assert drawn["no_decision"] == [(570.0, 210.0)]
    assert drawn["infer <b>"] == [(360.0, 419.6)]
    assert drawn["publish"] == [(570.0, 2.0)], "a publication is drawn wide enough to be seen"


def test_text_can_be_read_where_a_page_shows_the_picture_at_three_quarters_of_its_width():
    svg = ElementTree.fromstring(draw_timeline(SPANS))
    sizes = [int(text.get("font-size")) for text in svg.iter(f"{NAMESPACE}text")]
    assert min(sizes) >= 14
    # A lane's name stands above its tracks, so that the two never overlap.
    heights = {text.text: float(text.get("y")) for text in svg.iter(f"{NAMESPACE}text")}
    assert heights["worker 0"] - heights["sampling"] >= 16


def test_work_is_drawn_above_the_idle_time_that_it_reaches_into():
    later = Span("distribution", "learner", "publish", 3.0, 3.0001, "no_version")
    assert list(boxes(draw_timeline([*SPANS, later])))[-2:] == ["no_version", "publish"]


def test_a_stretch_is_cut_out():
    drawn = boxes(draw_timeline(SPANS, start_s=2.5, end_s=3.5))
    assert drawn["step"] == [(570.0, 419.6)]
    assert drawn["no_decision"] == [(150.0, 420.0)]
    assert "publish" not in drawn


def test_a_stretch_without_work_is_refused():
    with pytest.raises(ValueError, match="must enclose work"):
        draw_timeline(SPANS, start_s=8.0, end_s=9.0)


def test_the_command_draws_an_exported_trace(tmp_path, capsys):
    timeline = Timeline()
    timeline.start(now=1.0)
    timeline.add("gradient", 2.0, 3.0, track="learner", name="learn")
    timeline.export_chrome_trace(tmp_path / "run.json")
    command = ["timeline", str(tmp_path / "run.json"), str(tmp_path / "run.svg")]
    assert main([*command, "--start", "0.5", "--end", "2"]) == 0
    assert boxes((tmp_path / "run.svg").read_text())["learn"][0][0] == pytest.approx(430.0)
    assert main(["timeline", str(tmp_path / "none.json"), "x.svg"]) == 1
    assert "path must name a trace" in capsys.readouterr().err
