# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command line: ``torchrl-dvla COMMAND``, or ``python -m torchrl_dvla COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from torchrl_dvla._version import __version__
from torchrl_dvla.streams import drop_unwritable_output
from torchrl_dvla.validation import is_refusal

#: Recipes by command: Hydra parses what follows.
RECIPES = {"train": "dvla_grpo", "sft": "dvla_sft"}
#: What each command does.
COMMANDS = {
    "train": "asynchronous GRPO; settings follow, e.g. --config-name toy seed=1",
    "sft": "record demonstrations and clone them; settings follow",
    "evaluate": "play held-out episodes with a policy, a run or a checkpoint",
    "inspect": "say what a checkpoint is, and whether it fits an environment",
    "export": "write a trained policy in the format of the checkpoint that it came from",
    "topology": "print what a cluster consists of: this machine, Ray's nodes, or a file's",
    "calibrate": "measure the lane costs of a configuration on this machine",
    "plan": "memory, processes and speed of a configuration, before anything is started",
    "simulate": "predict a run on clusters and with policies that are not there",
    "info": "say what the folder of a run holds, and how to go on",
    "timeline": "draw a stretch of a run's timeline.json as an SVG picture",
    "curve": "draw the learning curve of runs as an SVG picture",
    "doctor": "check what usually breaks, and name the remedies",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv (sequence of str, optional): the arguments. Those of the process by default.

    Returns:
        0 when all is well, 1 after an error or a check that failed. A command line that makes no
        sense exits with 2.
    """
    drop_unwritable_output()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        parser = argparse.ArgumentParser(
            prog="torchrl-dvla",
            description="Asynchronous GRPO for vision-language-action policies.",
            epilog="torchrl-dvla COMMAND --help says more.",
        )
        parser.add_argument("--version", action="version", version=__version__)
        commands = parser.add_subparsers(required=True, metavar="COMMAND")
        for name, summary in COMMANDS.items():
            commands.add_parser(name, help=summary)
        parser.parse_args(argv)  # ends the process: there is no such command
    name, *rest = argv
    if "" not in sys.path:
        # As `python -m` does: what a _target_ names may be in the working directory.
        sys.path.insert(0, "")
    if name in RECIPES:
        recipe = importlib.import_module(f"torchrl_dvla.recipes.{RECIPES[name]}.train")
        sys.argv = [f"torchrl_dvla {name}", *rest]
        recipe.main()
        return 0
    command = importlib.import_module(f"torchrl_dvla.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"torchrl-dvla {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    args = parser.parse_intermixed_args(rest)
    try:
        return int(command.run(args))
    except Exception as error:
        # A check's message names cause and remedy: a traceback around it would hide it.
        if not (isinstance(error, OSError) or is_refusal(error)):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
