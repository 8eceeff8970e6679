# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Learning curves of recorded runs as an SVG picture."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

from torchrl_dvla.recording.tensorboard import read_events
from torchrl_dvla.swimlane.timeline_svg import svg_text, tick_distance

__all__ = ["draw_learning_curve", "read_scalars"]

#: What an axis is labelled with, and the scalar that its values come from.
_AXES = {
    "env_steps": ("env steps of training", "collector/env_steps"),
    "minutes": ("minutes of training", "train/minutes"),
}
_COLOURS = ("#3b7dd8", "#e08a1e", "#2e9e5b", "#c23b5a", "#7a4fb5", "#4a4a4a")
_WIDTH, _HEIGHT = 800, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 46, 60

#: Values of a scalar by update, in order.
Scalar = dict[int, float]


def read_scalars(run: str | os.PathLike[str]) -> dict[str, Scalar]:
    """Scalars of a run by name, from its TensorBoard files or its CSV files.

    Args:
        run (str or os.PathLike): the run's folder.

    Raises:
        ValueError: if there are none in it.
    """
    folder = Path(run)
    found: dict[str, Scalar] = {}
    if any(folder.glob("events.out.tfevents.*")):
        events = read_events(folder)
        for name in events.Tags()["scalars"]:
            found[name] = {point.step: point.value for point in events.Scalars(name)}
    for path in (folder / "scalars").rglob("*.csv"):
        rows = (line.split(",") for line in path.read_text().splitlines())
        name = path.relative_to(folder / "scalars").with_suffix("").as_posix()
        found[name] = {int(step): float(value) for step, value in rows}
    if not found:
        raise ValueError(
            f"A run must be a folder with TensorBoard or CSV files, got {str(folder)!r}. Pass the "
            "folder of a run, as it is printed at its end."
        )
    return found


def draw_learning_curve(
    runs: Sequence[str | os.PathLike[str]], *, over: Literal["env_steps", "minutes"] = "env_steps"
) -> str:
    """Draw the success of runs while they learned: greedy with its interval, and sampled.

    Args:
        runs (sequence): their folders; each has a colour, so that seeds can be compared.

    Keyword Args:
        over (str): ``"env_steps"`` (default) or ``"minutes"`` of training.

    Returns:
        str: an SVG file. Points with a 95 % interval are greedy success over all held-out scenes,
        before and after training; hollow ones that over a few of them, during training; the line
        is the success of sampled training episodes.

    Raises:
        ValueError: if a run has no success recorded, or none over ``over``.
    """
    label, axis = _AXES[over]
    curves = []
    for run in runs:
        scalars = read_scalars(run)
        if not scalars.keys() & {"eval/success_rate", "collector/success_rate"}:
            raise ValueError(f"A run must have its success recorded, got {str(run)!r} without any.")
        if axis not in scalars and max(scalars.get("collector/success_rate", {0: 0.0})) > 0:
            raise ValueError(
                f"A run must have {axis} recorded to be drawn over {over}, got {str(run)!r} "
                "without. Draw it over the other one."
            )
        curves.append((Path(run).resolve().name, scalars, scalars.get(axis, {})))
    longest = max((value for *_, at in curves for value in at.values()), default=0.0) or 1.0

    def x(value: float) -> float:
        return round(_LEFT + value / longest * (_WIDTH - _LEFT - _RIGHT), 1)

    body = _draw_axes(x, longest, label) + _draw_legend([name for name, *_ in curves])
    for number, (name, scalars, at) in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        body.append(f"<g><title>{escape(name)}</title>")
        body += _draw_run(scalars, {step: x(value) for step, value in at.items()}, colour)
        body.append("</g>")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    )
    return "\n".join([head, *body, "</svg>", ""])


def _y(share: float) -> float:
    return round(_TOP + (1.0 - share) * (_HEIGHT - _TOP - _BOTTOM), 1)


def _draw_run(scalars: dict[str, Scalar], at: dict[int, float], colour: str) -> list[str]:
    steps = sorted(at)

    def points(name: str) -> list[tuple[float, float]]:
        """Of a scalar, on the picture: an evaluation belongs to the update before it."""
        out = []
        for step, value in sorted(scalars.get(name, {}).items()):
            index = bisect.bisect_right(steps, step) - 1
            out.append((at[steps[index]] if index >= 0 else float(_LEFT), _y(value)))
        return out

    out = []
    if sampled := points("collector/success_rate"):
        line = " ".join(f"{x:g},{y:g}" for x, y in sampled)
        out.append(_line(line, colour, 2.0))
    for x, y in points("eval_subset/success_rate"):
        out.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="white" stroke="{colour}" stroke-width="2"/>'
        )
    greedy = points("eval/success_rate")
    if greedy:
        out.append(_line(" ".join(f"{x:g},{y:g}" for x, y in greedy), colour, 1.5, dashes="6 6"))
    ends = zip(points("eval/success_low"), points("eval/success_high"), strict=True)
    for (x, low), (_, high) in ends:
        out.append(
            f'<path d="M{x - 6:g} {low:g}h12m-6 0V{high:g}m-6 0h12" fill="none" '
            f'stroke="{colour}" stroke-width="1.5"/>'
        )
    out += [f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{colour}"/>' for x, y in greedy]
    return out


def _draw_axes(x: Callable[[float], float], longest: float, label: str) -> list[str]:
    out = []
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        out.append(f'<path d="M{_LEFT} {y:g}H{_WIDTH - _RIGHT}" stroke="#e0e0e0"/>')
        out.append(svg_text(_LEFT - 8, y + 5, f"{percent} %", anchor="end"))
    tick, number = tick_distance(longest, 8), 0
    while number * tick <= longest:
        at = x(number * tick)
        out.append(f'<path d="M{at:g} {_y(0):g}v5" stroke="black"/>')
        anchor = "end" if at > _WIDTH - _RIGHT - 30 else "middle"
        out.append(svg_text(at, _y(0) + 22, f"{number * tick:,.6g}", anchor=anchor))
        number += 1
    out.append(f'<path d="M{_LEFT} {_y(0):g}H{_WIDTH - _RIGHT}" stroke="black"/>')
    out.append(svg_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, label, anchor="middle"))
    return out


def _draw_legend(names: Sequence[str]) -> list[str]:
    out = [
        _line(f"{_LEFT},22 {_LEFT + 30},22", "black", 1.5, dashes="6 6"),
        f'<circle cx="{_LEFT + 15}" cy="22" r="5"/>',
        svg_text(_LEFT + 38, 27, "greedy success, 95 % interval"),
        f'<circle cx="{_LEFT + 290}" cy="22" r="4" fill="white" stroke="black" stroke-width="2"/>',
        svg_text(_LEFT + 302, 27, "on a few scenes"),
        _line(f"{_LEFT + 450},22 {_LEFT + 480},22", "black", 2.0),
        svg_text(_LEFT + 488, 27, "sampled success"),
    ]
    for number, name in enumerate(names if len(names) > 1 else ()):
        y, colour = _y(0) - 12 - 20 * (len(names) - 1 - number), _COLOURS[number % len(_COLOURS)]
        out.append(svg_text(_WIDTH - _RIGHT - 8, y, name, anchor="end", fill=colour))
    return out


def _line(points: str, colour: str, width: float, *, dashes: str = "none") -> str:
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
        f'stroke-dasharray="{dashes}" opacity="0.7"/>'
    )
