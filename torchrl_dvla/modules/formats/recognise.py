# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which project a folder is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchrl_dvla.modules.formats.flow_folder import FlowFolder, Stated
from torchrl_dvla.modules.formats.lerobot import read_lerobot
from torchrl_dvla.modules.formats.openpi import norm_stats_files, read_openpi

__all__ = ["is_foreign", "read_foreign"]

_OPENVLA = (
    "an OpenVLA checkpoint cannot be loaded: its network, two fused vision towers of timm before a "
    "Llama 2, is part of no version of transformers, and its own code runs on transformers 4.40 "
    "only"
)
#: Files of the head that OpenVLA-OFT regresses actions with, which has no distribution.
_L1_HEAD = "action_head--*_checkpoint.pt"


def _config(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def is_foreign(folder: Path) -> bool:
    """Whether a folder is one of another project that is known here, to be loaded or refused."""
    config = _config(folder)
    if "architecture" in config:
        return False
    return (
        "input_features" in config
        or config.get("model_type") == "openvla"
        or _is_openpi(folder, config)
    )


def _is_openpi(folder: Path, config: dict[str, Any]) -> bool:
    has_weights = (folder / "model.safetensors").is_file()
    is_jax = (folder / "params").is_dir()
    has_sizes = {"action_horizon", "paligemma_variant"} <= set(config)
    return (has_weights or is_jax) and (has_sizes or bool(norm_stats_files(folder)))


def read_foreign(folder: Path, stated: Stated | None = None) -> FlowFolder:
    """What a folder of another project holds, by the reader of its format.

    Args:
        folder (Path): a folder of which :func:`is_foreign` is ``True``.
        stated (Stated, optional): what its files do not say.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the format cannot be loaded, or its reader refuses it.
    """
    stated = stated or Stated()
    config = _config(folder)
    if "input_features" in config:
        return read_lerobot(folder, stated)
    if config.get("model_type") == "openvla":
        head = ""
        if any(folder.glob(_L1_HEAD)):
            head = " Its head regresses actions and has no probability to learn from, either."
        raise ValueError(
            f"the policy in {str(folder)!r} must be of a known network, got model_type 'openvla': "
            f"{_OPENVLA}.{head} Take a pi0, pi0.5 or SmolVLA, or clone demonstrations with "
            "TransformersVLA.from_backbone."
        )
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"the policy in {str(folder)!r} must be one of PyTorch, got openpi's JAX parameters. "
            "Convert them by openpi's examples/convert_jax_model_to_pytorch.py, which leaves the "
            "statistics beside them: copy assets/ too."
        )
    return read_openpi(folder, stated)
