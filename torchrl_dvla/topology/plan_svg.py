# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The plan of a run as an SVG picture: a group of bars a node, and one of the learner."""

from __future__ import annotations

from xml.sax.saxutils import escape

from torchrl_dvla.swimlane.timeline_svg import svg_text
from torchrl_dvla.topology.planning import NodePlan, RunPlan

__all__ = ["draw_plan", "load_colour"]

_COLOURS = {"sampling": "#3b7dd8", "inference": "#e08a1e", "gradient": "#2e9e5b"}
_COLOURS |= {"network": "#c23b5a", "FSDP": "#c23b5a"}
_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 280, 70, 66
_ROW, _LABEL, _GAP = 22, 26, 10
#: Nodes that are drawn; further ones are counted.
_MAX_NODES = 8


def draw_plan(plan: RunPlan) -> str:
    """Draw how busy a plan keeps every lane and device; what bounds the run fills its row.

    Args:
        plan (RunPlan): of :func:`~torchrl_dvla.topology.plan_run`.

    Returns:
        str: an SVG file.

    Examples:
        >>> from torchrl_dvla.topology import ClusterSpec, LaneCosts, NodeSpec, plan_run
        >>> costs = LaneCosts("x", 0.1, 1, 10, call_row_s=0.01, learn_row_s=0.02, row_bytes=1,
        ...     version_bytes=1)
        >>> svg = draw_plan(plan_run(ClusterSpec((NodeSpec("a", 4, 2**34),)), costs))
        >>> svg.startswith("<svg"), "bounded by" in svg
        (True, True)
    """
    bound, y = plan.bounded_by, float(_TOP)
    lag = f"lag {plan.max_policy_lag} hides a transfer of {plan.transfer_s:.2g} s"
    gains = [f"one more {name}: x {gain:.2f}" for name, gain in plan.gains.items()]
    title = f"{plan.decisions_per_s:.4g} decisions/s, bounded by: {bound}"
    body = [
        svg_text(8, 24, title, weight="bold"),
        svg_text(8, 48, "; ".join([lag, *gains]), size=14),
    ]
    groups = [(node.host, _carries(node)) for node in plan.nodes[:_MAX_NODES]]
    groups.append(("", f"ranks {plan.num_ranks}, efficiency {plan.learner_efficiency:.0%}"))
    for where, carries in groups:
        body.append(svg_text(8, y + 18, where or "learner and network", weight="bold"))
        body.append(svg_text(_LEFT, y + 18, carries, size=14))
        y += _LABEL
        for load in (load for load in plan.loads if load.where == where):
            colour = load_colour(load.what)
            width = min(1.0, load.share) * (_WIDTH - _LEFT - _RIGHT)
            body += [
                svg_text(_LEFT - 8, y + 16, load.what, anchor="end"),
                f'<rect x="{_LEFT}" y="{y + 2:g}" width="{_WIDTH - _LEFT - _RIGHT}" '
                f'height="{_ROW - 4}" fill="#eeeeee"/>',
                f'<rect x="{_LEFT}" y="{y + 2:g}" width="{width:.1f}" height="{_ROW - 4}" '
                f'fill="{colour}"><title>{escape(load.what)}: {load.share:.1%}</title></rect>',
                svg_text(_WIDTH - _RIGHT + 8, y + 16, f"{load.share:.0%}"),
            ]
            y += _ROW
        y += _GAP
    if len(plan.nodes) > _MAX_NODES:
        body.append(svg_text(8, y + 14, f"and {len(plan.nodes) - _MAX_NODES} more nodes"))
        y += _LABEL
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y:g}" '
        f'font-family="sans-serif"><rect width="{_WIDTH}" height="{y:g}" fill="white"/>'
    )
    return "\n".join([head, *body, "</svg>", ""])


def load_colour(what: str) -> str:
    """Colour of a lane or device, by its name."""
    return next((colour for word, colour in _COLOURS.items() if word in what), "#7a7a7a")


def _carries(node: NodePlan) -> str:
    parts = [f"workers {node.num_workers}, rollouts {node.rollouts}, batch {node.batch_size}"]
    if node.rollout_gpus or node.learner_gpus:
        parts.append(f"GPUs sampling {node.rollout_gpus}, learning {node.learner_gpus}")
    return "; ".join([*parts, f"{node.decisions_per_s:.4g} decisions/s"])
