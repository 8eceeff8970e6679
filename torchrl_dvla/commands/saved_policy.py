# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A policy on disk, whatever the path names: its folder, a run, or one of the run's checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import Checkpoint, CheckpointError

from torchrl_dvla.modules.formats import Stated, is_foreign
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import (
    LoraSettings,
    PolicySettings,
    Settings,
    compose_settings,
)
from torchrl_dvla.recording import RunCheckpoints

#: Overrides behind these commands, for their help.
OVERRIDES = "settings, Hydra's way, e.g. env.task_ids=[1,2] workers.num_workers=2"


def add_settings(parser: argparse.ArgumentParser, default: str) -> None:
    """Arguments that choose the settings of a run.

    Args:
        parser (argparse.ArgumentParser): the command's.
        default (str): what is taken without ``--config-name``, for the help.
    """
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--config-name", metavar="NAME", help=f"configuration; default: {default}")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of configurations of your own")


@dataclass(frozen=True)
class SavedPolicy:
    """Where a policy is saved, and what is known about it.

    Args:
        folder (Path): of its files.
        checkpoint (Path, optional): the training checkpoint that it is part of.
        manifest (Mapping): the manifest of that; empty without one.
    """

    folder: Path
    checkpoint: Path | None
    manifest: Mapping[str, Any]

    @property
    def is_pretrained(self) -> bool:
        """Whether ``save_pretrained`` wrote it, or another project; not ``torch.save``."""
        return (self.folder / "config.json").is_file() or self.is_foreign

    @property
    def is_foreign(self) -> bool:
        """Whether another project wrote it."""
        return is_foreign(self.folder)

    @classmethod
    def find(cls, path: str) -> SavedPolicy:
        """The policy of a path.

        Raises:
            FileNotFoundError: if there is nothing, or no complete checkpoint.
            ValueError: if it is something else, with what it looks like.
        """
        given = utils.find_policy(path)
        if not given.exists():
            raise FileNotFoundError(
                f"The path must be that of a policy, a run or a checkpoint, got {str(given)!r}, "
                "where nothing is. Check it; paths are relative to the working directory."
            )
        checkpoint = given
        if (given / "checkpoints").is_dir():
            latest = RunCheckpoints(given / "checkpoints").latest()
            if latest is None:
                raise FileNotFoundError(
                    f"The run must have a complete checkpoint, got {str(given)!r} without one. It "
                    "writes the first after checkpoint.every_updates updates, and one at its end."
                )
            checkpoint = latest
        if (checkpoint / "manifest.json").is_file():
            try:
                manifest = Checkpoint.manifest(checkpoint)
            except CheckpointError as error:
                raise ValueError(
                    f"The checkpoint must have a manifest of TorchRL's, got {str(given)!r}: "
                    f"{error} It may be another program's."
                ) from error
            record = manifest.get("components", {}).get("policy")
            if record is None or "config" not in manifest.get("metadata", {}):
                raise ValueError(
                    f"The checkpoint must be one of a run of `train`, got {str(checkpoint)!r} with "
                    f"{sorted(manifest.get('components', {}))}. It was written by another program."
                )
            return cls(checkpoint / record["path"], checkpoint, manifest)
        if "architecture" in read_json(given / "config.json") or is_foreign(given):
            return cls(given, None, {})
        raise ValueError(
            f"The path must be that of a policy, of a run or of one of its checkpoints, got "
            f"{str(given)!r}: {describe_other(given)}"
        )

    def settings(self, args: argparse.Namespace) -> Settings:
        """The settings to play it with: those of its run, or of a configuration."""
        source: str | Mapping[str, Any] = args.config_name or "libero"
        if self.manifest and not (args.config_name or args.config_dir):
            source = self.manifest["metadata"]["config"]
        given: dict[str, Any] = {"kind": "checkpoint", "path": str(self.folder)}
        if not self.is_foreign:  # what is saved there holds all that was stated about its beginning
            given["stated"] = Stated()
        if self.manifest:
            given["lora"] = LoraSettings()
        overrides = args.overrides
        if self.is_pretrained:  # whatever else the configuration is for
            overrides = ["++policy.kind=checkpoint", "++policy.path=given", *overrides]
        cfg = compose_settings(source, overrides, config_dir=args.config_dir)
        if not self.is_pretrained:
            return cfg
        if isinstance(cfg.policy, PolicySettings):
            return dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, **given))
        return dataclasses.replace(cfg, policy=PolicySettings(**given))

    def load(self, cfg: Settings) -> TensorDictModuleBase:
        """The policy, built by its settings."""
        policy = utils.make_policy(cfg)
        if not self.is_pretrained:
            assert self.checkpoint is not None
            try:
                RunCheckpoints(self.checkpoint.parent, policy=policy).load(self.checkpoint)
            except CheckpointError as error:
                raise ValueError(str(error)) from error
        return policy


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping; empty if it is none, or not there."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def describe_other(path: Path) -> str:
    """What a file or folder looks like that is no policy of this package, in a sentence or two."""
    if path.is_file():
        return f"a file ({path.suffix or 'without a suffix'}). Pass the folder that it is in."
    names = sorted(entry.name for entry in path.iterdir())
    config = read_json(path / "config.json")
    if (path / "meta" / "info.json").is_file():
        return "a LeRobot data set, not a policy."
    if "adapter_config.json" in names:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return f"a PEFT adapter of {base!r}. Merge it into its base model, and pass that."
    if "model_type" in config:
        return (
            f"a Hugging Face model of type {config['model_type']!r}, without an action head. If "
            "its family is supported, TransformersVLA.from_backbone makes a policy of it."
        )
    if {"params", "_METADATA"} & set(names):
        return (
            "an openpi checkpoint (JAX). Convert it by openpi's "
            "examples/convert_jax_model_to_pytorch.py, and copy its assets/."
        )
    if any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) for name in names):
        return (
            f"weights without a config.json: {', '.join(names[:8])}. Copy the checkpoint again, "
            "with all its files: openpi's folders have statistics in assets/, LeRobot's processors."
        )
    if any((path / name / "checkpoints").is_dir() for name in names):
        return f"a folder of runs. Pass one of them: {', '.join(names[-4:])}."
    return f"a folder with {', '.join(names[:8]) or 'nothing'} in it."
