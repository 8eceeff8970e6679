# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command line: ``python -m torchrl_dvla doctor``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchrl_dvla import doctor
from torchrl_dvla._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv (sequence of str, optional): the arguments. Those of the process by default.

    Returns:
        0 when all is well, 1 when a check failed. A command line that makes no sense exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m torchrl_dvla",
        description="Asynchronous GRPO for vision-language-action policies.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor.add_parser(commands)
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
