# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Draw a stretch of a run's timeline.json as an SVG picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchrl_dvla.swimlane import draw_timeline, read_chrome_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    parser.add_argument("trace", help="what Timeline.export_chrome_trace() wrote")
    parser.add_argument("picture", help="the SVG file to write")
    parser.add_argument("--start", type=float, help="left end, in seconds of the trace")
    parser.add_argument("--end", type=float, help="right end")


def run(args: argparse.Namespace) -> int:
    """Draws it."""
    spans = read_chrome_trace(args.trace)
    Path(args.picture).write_text(draw_timeline(spans, start_s=args.start, end_s=args.end))
    return 0
