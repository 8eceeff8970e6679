# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""SVG drawings of a stretch of a run's timeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from xml.sax.saxutils import escape

from torchrl_dvla.swimlane.chrome_trace import LANES, Span

__all__ = ["draw_timeline", "svg_text", "tick_distance"]

_COLOURS = {
    "sampling": "#3b7dd8",
    "inference": "#e08a1e",
    "gradient": "#2e9e5b",
    "distribution": "#c23b5a",
}
_WIDTH, _LEFT, _RIGHT = 1000, 150, 10
_ROW, _LABEL, _GAP, _TOP, _COUNT = 22, 24, 10, 8, 60
#: From seconds to pixels.
_Scale = Callable[[float], float]
#: Work is drawn at least this wide, or a publication of a millisecond would not be seen.
_MIN_WIDTH = 2.0


def draw_timeline(
    spans: Iterable[Span], *, start_s: float | None = None, end_s: float | None = None
) -> str:
    """Draw one row a track, and below it how many lanes were busy at once.

    Args:
        spans (iterable of Span): of a timeline, or of :func:`~torchrl_dvla.swimlane.\
read_chrome_trace`.

    Keyword Args:
        start_s (float, optional): left end. Defaults to where the spans begin.
        end_s (float, optional): right end. Defaults to where they end.

    Returns:
        str: an SVG file. Idle time of a known reason is grey; the reason shows where there is
        room, and else when a viewer points at it.

    Raises:
        ValueError: if there is no work between the ends.

    Examples:
        >>> svg = draw_timeline([Span("sampling", "worker 0", "step", 0.0, 1.0)])
        >>> svg.startswith("<svg"), "worker 0" in svg
        (True, True)
    """
    spans = sorted(spans, key=lambda span: span.start_s)
    left_s = min((s.start_s for s in spans), default=0.0) if start_s is None else start_s
    right_s = max((s.end_s for s in spans), default=0.0) if end_s is None else end_s
    shown = [span for span in spans if span.start_s < right_s and span.end_s > left_s]
    if not shown:
        raise ValueError(
            f"start_s and end_s must enclose work, got {left_s:g} and {right_s:g}. Leave them out "
            "to see how far the spans reach."
        )
    scale = (_WIDTH - _LEFT - _RIGHT) / (right_s - left_s)

    def x(time_s: float) -> float:
        return round(_LEFT + (min(right_s, max(left_s, time_s)) - left_s) * scale, 2)

    body, y = [], float(_TOP)
    for lane in LANES:
        tracks = sorted({span.track for span in shown if span.lane == lane}, key=_natural)
        for number, track in enumerate(tracks):
            if number == 0:
                body.append(svg_text(8, y + 17, lane, weight="bold", fill=_COLOURS[lane]))
                y += _LABEL
            body.append(svg_text(_LEFT - 8, y + 16, track, anchor="end"))
            of_track = [span for span in spans if (span.lane, span.track) == (lane, track)]
            body += _draw_track(of_track, x, y, left_s, right_s)
            y += _ROW
        y += _GAP
    body += _draw_count(shown, x, y, left_s, right_s)
    y += _COUNT
    body += _draw_axis(x, y, left_s, right_s)
    height = y + 34
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" '
        f'font-family="sans-serif">'
        f'<rect width="{_WIDTH}" height="{height:g}" fill="white"/>'
    )
    return "\n".join([head, *body, "</svg>", ""])


def _draw_track(
    spans: Sequence[Span], x: _Scale, y: float, left_s: float, right_s: float
) -> list[str]:
    # Work is drawn above idle time: what is drawn wider than it is reaches into it.
    idle, work, until_s = [], [], None
    for span in spans:
        if until_s is not None and span.blocked_on is not None and span.start_s > until_s:
            start, end = x(until_s), x(span.start_s)
            if end - start > 1.0:
                reason = escape(span.blocked_on)
                idle.append(_box(start, y + 3, end - start, _ROW - 6, "#e3e3e3", reason))
                if end - start > 7.5 * len(reason):
                    middle = (start + end) / 2
                    idle.append(svg_text(middle, y + 16, reason, anchor="middle", size=14))
        until_s = span.end_s
        if span.end_s <= left_s or span.start_s >= right_s:
            continue
        width = max(_MIN_WIDTH, x(span.end_s) - x(span.start_s) - 0.4)
        title = f"{escape(span.name)}, {1e3 * (span.end_s - span.start_s):.2f} ms"
        opacity = 0.45 if span.name in ("reset", "gather") else 0.9
        colour = _COLOURS[span.lane]
        work.append(_box(x(span.start_s), y + 1, round(width, 2), _ROW - 2, colour, title, opacity))
    return idle + work


def _draw_count(
    spans: Sequence[Span], x: _Scale, y: float, left_s: float, right_s: float
) -> list[str]:
    """How many lanes were busy at once, as steps from 0 to 4."""
    edges = sorted(
        edge
        for span in spans
        for edge in ((span.start_s, 1, span.lane), (span.end_s, -1, span.lane))
    )
    active = dict.fromkeys(LANES, 0)
    bottom, step = y + _COUNT - 8, (_COUNT - 10) / len(LANES)
    points, count = [f"{x(left_s):g},{bottom:g}"], 0
    for time_s, change, lane in edges:
        points.append(f"{x(time_s):g},{bottom - count * step:g}")
        active[lane] += change
        count = sum(number > 0 for number in active.values())
        points.append(f"{x(time_s):g},{bottom - count * step:g}")
    points.append(f"{x(right_s):g},{bottom:g}")
    return [
        svg_text(8, y + 32, "busy lanes", weight="bold"),
        svg_text(_LEFT - 8, y + 14, "4", anchor="end", size=14),
        svg_text(_LEFT - 8, bottom + 4, "0", anchor="end", size=14),
        f'<polygon points="{" ".join(points)}" fill="#7a7a7a" opacity="0.6"/>',
    ]


def _draw_axis(x: _Scale, y: float, left_s: float, right_s: float) -> list[str]:
    tick_s = tick_distance(right_s - left_s, 10)
    out = [f'<path d="M{_LEFT} {y:g}H{_WIDTH - _RIGHT}" stroke="black"/>']
    number = -(-left_s // tick_s)
    while number * tick_s <= right_s:
        at = x(number * tick_s)
        out.append(f'<path d="M{at:g} {y:g}v4" stroke="black"/>')
        out.append(svg_text(at, y + 21, f"{number * tick_s:.6g} s", anchor="middle"))
        number += 1
    return out


def _box(
    x: float, y: float, width: float, height: float, fill: str, title: str, opacity: float = 1.0
) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:.2f}" height="{height:g}" fill="{fill}" '
        f'opacity="{opacity:g}"><title>{title}</title></rect>'
    )


def tick_distance(length: float, most: int) -> float:
    """Distance of at most ``most`` + 1 ticks on an axis: 1, 2 or 5 times a power of ten.

    Examples:
        >>> tick_distance(60.0, 10), tick_distance(0.7, 10)
        (10.0, 0.1)
    """
    power = 10.0 ** math.floor(math.log10(length / most))
    return next(base * power for base in (1, 2, 5, 10) if length / (base * power) <= most + 1e-9)


def svg_text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 16,
    weight: str = "normal",
    fill: str = "black",
) -> str:
    """A text element of an SVG picture, at its base line."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="{fill}">{escape(text)}</text>'
    )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key under which worker 10 comes after worker 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split()]
