# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Check what usually breaks, and name the remedies. Exits with 1 if a check fails."""

from __future__ import annotations

import argparse
import sys

from torchrl_dvla import doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--log-dir", default="runs", help="folder that runs write to")
    parser.add_argument("--no-libero", action="store_true", help="leave the simulator out")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 1 if a check fails."""
    findings = doctor.diagnose(args.log_dir, libero=not args.no_libero)
    sys.stdout.write(doctor.report(findings, as_json=args.json) + "\n")
    return int(any(finding.status is doctor.Status.FAIL for finding in findings))
