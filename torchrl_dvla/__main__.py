# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command line: ``python -m torchrl_dvla`` with ``train``, ``sft``, ``doctor`` and drawings."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from torchrl_dvla import doctor
from torchrl_dvla._version import __version__

#: Recipes by command: Hydra parses what follows.
RECIPES = {
    "train": ("dvla_grpo", "asynchronous GRPO; settings follow, e.g. --config-name toy seed=1"),
    "sft": ("dvla_sft", "record demonstrations and clone them; settings follow"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv (sequence of str, optional): the arguments. Those of the process by default.

    Returns:
        0 when all is well, 1 when a check failed. A command line that makes no sense exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in RECIPES:
        # Here and below, so that the doctor also runs where torch cannot be imported.
        recipe = importlib.import_module(f"torchrl_dvla.recipes.{RECIPES[argv[0]][0]}.train")
        sys.argv = [f"torchrl_dvla {argv[0]}", *argv[1:]]
        recipe.main()
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m torchrl_dvla",
        description="Asynchronous GRPO for vision-language-action policies.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, summary) in RECIPES.items():
        commands.add_parser(name, help=summary, add_help=False)
    doctor.add_parser(commands)
    _add_timeline_parser(commands)
    _add_curve_parser(commands)
    args = parser.parse_args(argv)
    return int(args.run(args))


def _add_timeline_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "timeline", help="draw a stretch of a run's timeline.json as an SVG picture"
    )
    parser.add_argument("trace", help="what Timeline.export_chrome_trace() wrote")
    parser.add_argument("picture", help="the SVG file to write")
    parser.add_argument("--start", type=float, help="left end, in seconds of the trace")
    parser.add_argument("--end", type=float, help="right end")
    parser.set_defaults(run=_draw_timeline)


def _add_curve_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("curve", help="draw the learning curve of runs as an SVG picture")
    parser.add_argument("runs", nargs="+", metavar="run", help="the folder of a run")
    parser.add_argument("picture", help="the SVG file to write")
    parser.add_argument("--over", choices=("env_steps", "minutes"), default="env_steps")
    parser.set_defaults(run=_draw_curve)


def _draw_curve(args: argparse.Namespace) -> int:
    from torchrl_dvla.recording import draw_learning_curve

    try:
        Path(args.picture).write_text(draw_learning_curve(args.runs, over=args.over))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _draw_timeline(args: argparse.Namespace) -> int:
    from torchrl_dvla.swimlane import draw_timeline, read_chrome_trace

    try:
        spans = read_chrome_trace(args.trace)
        Path(args.picture).write_text(draw_timeline(spans, start_s=args.start, end_s=args.end))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
