# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Draw the learning curve of runs as an SVG picture: success over env steps or minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchrl_dvla.recording import draw_learning_curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("picture", help="the SVG file to write")
    parser.add_argument("--over", choices=("env_steps", "minutes"), default="env_steps")


def run(args: argparse.Namespace) -> int:
    """Draws it."""
    Path(args.picture).write_text(draw_learning_curve(args.runs, over=args.over))
    return 0
