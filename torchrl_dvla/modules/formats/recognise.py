# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which project a folder is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchrl_dvla.modules.flow_vla import FlowVLA
from torchrl_dvla.modules.formats.lerobot import read_lerobot
from torchrl_dvla.modules.formats.openpi import norm_stats_files, read_openpi
from torchrl_dvla.modules.formats.openvla import L1_HEAD, read_openvla
from torchrl_dvla.modules.formats.policy_folder import PolicyFolder, Stated
from torchrl_dvla.modules.regression_vla import RegressionVLA
from torchrl_dvla.modules.transformers_vla import TransformersVLA

__all__ = ["foreign_class", "is_foreign", "read_foreign"]


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


def foreign_class(folder: Path) -> type[FlowVLA] | type[TransformersVLA]:
    """Class of the policy in a folder of another project."""
    if _config(folder).get("model_type") != "openvla":
        return FlowVLA
    return RegressionVLA if any(folder.glob(L1_HEAD)) else TransformersVLA


def read_foreign(folder: Path, stated: Stated | None = None) -> PolicyFolder:
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
        return read_openvla(folder, stated)
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"the policy in {str(folder)!r} must be one of PyTorch, got openpi's JAX parameters. "
            "Convert them by openpi's examples/convert_jax_model_to_pytorch.py, which leaves the "
            "statistics beside them: copy assets/ too."
        )
    return read_openpi(folder, stated)
