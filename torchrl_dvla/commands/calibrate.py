# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Measure the lane costs of a configuration on this machine, for `plan --costs`.

A few updates in lockstep with one worker, with the configuration's own environments, policy and
learner; nothing is recorded. The machine should be idle otherwise: a line says its load.

  torchrl-dvla calibrate --config-name toy --costs costs.json
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from torchrl_dvla.commands.saved_policy import add_settings
from torchrl_dvla.recipes.dvla_grpo.calibration import calibrate
from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings
from torchrl_dvla.recording import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    add_settings(parser, "libero")
    parser.add_argument("--costs", required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--updates", type=int, default=3, help="updates that count")


def run(args: argparse.Namespace) -> int:
    """Measures and writes them."""
    if args.updates < 1:
        raise ValueError(f"--updates must be at least 1, got {args.updates}. 3 are enough.")
    path = Path(args.costs).expanduser()
    check_writable(path.absolute().parent)
    cfg = compose_settings(args.config_name or "libero", args.overrides, config_dir=args.config_dir)
    costs = calibrate(cfg, num_updates=args.updates)
    costs.save(path)
    found = {key: value for key, value in asdict(costs).items() if key not in ("settings", "name")}
    width = max(map(len, found))
    print(f"{cfg.name}: written to {path}\n")
    print("\n".join(f"{key:<{width}}  {_shown(value)}" for key, value in found.items()))
    return 0


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
