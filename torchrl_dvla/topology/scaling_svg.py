# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Predictions as an SVG picture: a row a policy, a column a number of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from torchrl_dvla.swimlane.timeline_svg import svg_text
from torchrl_dvla.topology.plan_svg import load_colour
from torchrl_dvla.topology.scaling import Prediction

__all__ = ["draw_scaling"]

_LEFT, _TOP, _WIDTH, _HEIGHT, _LEGEND = 110, 90, 130, 74, 34
_INFEASIBLE = "#dddddd"


def draw_scaling(predictions: Sequence[Prediction], title: str) -> str:
    """Draw predictions; the colour of a cell says what bounds it.

    Args:
        predictions (sequence of Prediction): in any order.
        title (str): a line above them, after the word "Predicted".

    Returns:
        str: an SVG file.

    Examples:
        >>> from torchrl_dvla.topology.scaling import Prediction
        >>> svg = draw_scaling([Prediction("1 T", 8, problem="learner: 1 TiB")], "on paper")
        >>> svg.startswith("<svg"), "Predicted, not measured" in svg, "no room:" in svg
        (True, True, True)
    """
    policies = list(dict.fromkeys(each.policy for each in predictions))
    counts = sorted({each.num_nodes for each in predictions})
    body = [
        svg_text(8, 26, f"Predicted, not measured: {title}", weight="bold"),
        svg_text(8, 50, "decisions/s; scaling efficiency; max_policy_lag needed", size=14),
    ]
    body += [
        svg_text(_LEFT + (k + 0.5) * _WIDTH, _TOP - 10, f"{count:,} nodes", anchor="middle")
        for k, count in enumerate(counts)
    ]
    for row, policy in enumerate(policies):
        y = _TOP + row * _HEIGHT
        body.append(svg_text(_LEFT - 8, y + 42, policy, anchor="end", weight="bold"))
        for each in predictions:
            if each.policy == policy:
                body += _cell(each, _LEFT + counts.index(each.num_nodes) * _WIDTH, y)
    y, x = _TOP + len(policies) * _HEIGHT + 12, 8.0
    bounds = list(dict.fromkeys(each.run.bounded_by.what for each in predictions if each.run))
    for what in [f"bounded by: {bounds[0]}", *bounds[1:]] if bounds else []:
        body.append(
            f'<rect x="{x:g}" y="{y:g}" width="14" height="14" fill="{load_colour(what)}" '
            'opacity="0.75"/>'
        )
        body.append(svg_text(x + 20, y + 13, what, size=14))
        x += 44 + 7.5 * len(what)
    width, height = max(700, _LEFT + len(counts) * _WIDTH + 8, int(x)), y + _LEGEND
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" '
        f'font-family="sans-serif"><rect width="{width}" height="{height:g}" fill="white"/>'
    )
    return "\n".join([head, *body, "</svg>", ""])


def _cell(each: Prediction, x: float, y: float) -> list[str]:
    colour = load_colour(each.run.bounded_by.what) if each.run else _INFEASIBLE
    tip = escape(each.problem or (f"bounded by {each.run.bounded_by.what}" if each.run else ""))
    lines = ["no room:", each.problem.partition(":")[0]]
    if each.run:
        efficiency = "" if each.efficiency is None else f"{each.efficiency:.2f}; "
        lines = [each.rate, f"{efficiency}lag {each.max_policy_lag}"]
    return [
        f'<rect x="{x + 2:g}" y="{y + 2:g}" width="{_WIDTH - 4}" height="{_HEIGHT - 4}" '
        f'fill="{colour}" opacity="0.75"><title>{tip}</title></rect>',
        *(
            svg_text(x + _WIDTH / 2, y + 33 + 22 * k, line, anchor="middle", size=15 - k)
            for k, line in enumerate(lines)
        ),
    ]
