# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Write a trained policy in the format of the checkpoint that it came from.

PATH is a run of `train` that began with a pi0, pi0.5 or SmolVLA of LeRobot or openpi, or with an
OpenVLA-OFT, one of its checkpoints (update-*), or a policy that `sft` has trained further. OUT
becomes a copy of the folder that it began with, with the trained weights: whatever read the one
reads the other. What was not trained is the same bit for bit. The policy knows where it came from,
through any number of runs.
Adapters are merged into the weights that they are on; those on a policy of this project give one
that save_pretrained writes.

  torchrl-dvla export runs/libero_pi0/2026-01-31_12-00-00_seed0 my/pi0_trained
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from torchrl_dvla.commands.saved_policy import SavedPolicy
from torchrl_dvla.modules import FlowVLA, load_policy
from torchrl_dvla.modules.formats import (
    Stated,
    export_policy,
    is_foreign,
    read_foreign,
    write_fingerprint,
)
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recording import TrainingScenes
from torchrl_dvla.validation import from_mapping


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    parser.add_argument("path", metavar="PATH", help="folder of a run or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not be in use")
    parser.add_argument("--base", metavar="FOLDER", help="the checkpoint, if it has been moved")


def run(args: argparse.Namespace) -> int:
    """Writes it."""
    saved = SavedPolicy.find(args.path)
    settings = saved.manifest.get("metadata", {}).get("config", {}).get("policy", {})
    policy = load_policy(saved.folder) if saved.is_pretrained and not saved.is_foreign else None
    origin = None if policy is None else policy.origin
    if origin is not None:
        settings = {"path": origin.path, "stated": origin.stated}
    given = args.base or settings.get("path")
    if origin is not None and not utils.find_policy(given).exists():
        raise FileNotFoundError(
            f"the checkpoint that {args.path!r} came from must be there, got {given!r}, where "
            "nothing is. If it has been moved, name its folder by --base."
        )
    of_ours = given is None or not is_foreign(utils.find_policy(given))
    if policy is not None and policy.config.lora is not None and of_ours:
        if Path(args.out).exists():
            raise ValueError(
                f"OUT must not be there, got {args.out!r}, which is in use. Choose another one."
            )
        policy.merged().save_pretrained(args.out)
        TrainingScenes.load(saved.folder).save(args.out)
        print(f"{type(policy).__name__}, with its adapters merged: {args.out}")
        return 0
    if given is None:
        raise ValueError(
            f"--base must be given for {args.path!r}, which does not say what it came from, got "
            "nothing. Name the folder of the checkpoint that training began with."
        )
    base = utils.find_policy(given)
    if saved.is_foreign or not is_foreign(base):
        raise ValueError(
            f"the policy must have come from a checkpoint of another project, got "
            f"{str(saved.folder)!r}, from {str(base)!r}. That folder is all that is needed to load "
            "it: copy it."
        )
    stated = from_mapping(Stated, settings.get("stated") or {}, "policy.stated")
    assert policy is not None
    found = read_foreign(base, stated)
    if origin is not None:
        origin.check_same(found.file.path)
    export_policy(policy, found, args.out)
    if isinstance(policy, FlowVLA) and policy.config.sampler == "noise":
        print("left out: the head of the learned deviation, which the format has no place for")
    stated = dataclasses.replace(stated, tokenizer=str(saved.folder / "tokenizer"))
    write_fingerprint(read_foreign(Path(args.out), stated).load(), args.out)
    TrainingScenes.load(saved.folder).save(args.out)
    print(f"{found.format}: {args.out}")
    return 0
