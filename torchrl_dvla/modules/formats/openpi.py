# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Folders of pi0 and pi0.5 that openpi's PyTorch code saves, or its converter from JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torchrl_dvla.modules.backbones import PixelStyle, PromptStyle
from torchrl_dvla.modules.config import FlowVLAConfig
from torchrl_dvla.modules.formats.flow_weights import (
    paligemma_sizes,
    pi_names,
    weights_dtype,
)
from torchrl_dvla.modules.formats.policy_folder import (
    PolicyFolder,
    Stated,
    read_json,
    settle,
    statistics_of,
)
from torchrl_dvla.modules.formats.tensor_file import TensorFile
from torchrl_dvla.modules.pi0 import Pi0
from torchrl_dvla.modules.pi05 import Pi05

__all__ = ["norm_stats_files", "read_openpi"]

#: PaliGemma's, whose files openpi downloads from elsewhere.
_TOKENIZER = "google/paligemma-3b-pt-224"
#: Longest prompt of the two networks, in tokens.
_MAX_TOKENS = {"pi0": 48, "pi05": 200}
#: Denoising steps of a decision.
_NUM_STEPS = 10
_EPS = 1e-6


def norm_stats_files(folder: Path) -> list[Path]:
    """Files of statistics below a folder, where openpi puts them."""
    return sorted({*folder.glob("assets/**/norm_stats.json"), *folder.glob("*/norm_stats.json")})


def read_openpi(folder: Path, stated: Stated) -> PolicyFolder:
    """What a folder of openpi's PyTorch code holds; its weights are not read yet.

    It has ``model.safetensors`` and ``assets/<data set>/norm_stats.json``. The converter also
    writes a ``config.json`` with the sizes; training writes none.

    Args:
        folder (Path): the folder.
        stated (Stated): what the files do not say: of a pi0.5 ``state_in_prompt``; without a
            ``config.json`` the ``chunk_size``; the dimensions, where the statistics are padded.

    Raises:
        FileNotFoundError: if there are no statistics.
        ValueError: if there are several, they are another robot's, or the weights another model's.

    Reference:
        https://github.com/Physical-Intelligence/openpi:
        ``src/openpi/models_pytorch/pi0_pytorch.py``,
        ``src/openpi/policies/policy_config.py``, ``src/openpi/transforms.py`` (normalisation),
        ``src/openpi/models/tokenizer.py`` (prompt), ``examples/convert_jax_model_to_pytorch.py``.
    """
    file = TensorFile(folder / "model.safetensors")
    kind = "pi05" if "time_mlp_in.weight" in file.shapes else "pi0"
    table = pi_names(file, "")
    sizes = paligemma_sizes(file, table)
    size = sizes["max_action_dim"]
    settings = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if settings.get("action_dim", size) != size:
        raise ValueError(
            f"action_dim in {folder / 'config.json'} must be {size}, as the weights have it, got "
            f"{settings['action_dim']}. The files are of two policies."
        )
    files = norm_stats_files(folder)
    if len(files) != 1:
        found = ", ".join(str(path.relative_to(folder)) for path in files) or "none"
        error = ValueError if files else FileNotFoundError
        raise error(
            f"{str(folder)!r} must contain one norm_stats.json, in assets/<data set>/, got "
            f"{found}. Copy that of the data set which the policy was trained on, and no other."
        )
    stats = _stats(files[0])
    in_prompt = settle(
        "state_in_prompt", None if kind == "pi05" else False, stated.state_in_prompt, folder
    )
    settle("padded_state", False, stated.padded_state, folder)
    action_dim = _size("action_dim", stats["actions"], size, stated.action_dim, folder)
    state_dim = 0  # pi0.5 has no other place for it than the prompt
    if kind == "pi0" or in_prompt:
        state_dim = _size("state_dim", stats["state"], size, stated.state_dim, folder)
    chunk_size = settle("chunk_size", settings.get("action_horizon"), stated.chunk_size, folder)
    cameras = ("base_0_rgb", "left_wrist_0_rgb")
    chosen = stated.cameras or cameras
    if chosen not in (cameras, cameras[:1]):
        raise ValueError(
            f"stated.cameras must be {list(cameras)} or the first of them, got {list(chosen)}. The "
            "third of openpi's cameras is masked on LIBERO."
        )
    mode, scaling = ("MEAN_STD", "standard") if kind == "pi0" else ("QUANTILES", "range")
    tower = sizes["vlm_config"]["vision_config"]["image_size"]
    config = FlowVLAConfig(
        backbone={**sizes, "max_state_dim": size, "chunk_size": chunk_size, "model_type": kind},
        action_dim=action_dim,
        state_dim=state_dim,
        image_size=stated.image_size or (tower, tower),
        num_cameras=len(chosen),
        prompt_style=PromptStyle(instruction=Pi05.template if in_prompt else Pi0.template),
        pixel_style=PixelStyle(interpolation="bilinear", padding="center"),
        dtype=weights_dtype(file, table),  # type: ignore[arg-type]
        num_steps=_NUM_STEPS,
        state_scaling=scaling,  # type: ignore[arg-type]
        action_scaling=scaling,  # type: ignore[arg-type]
        max_prompt_tokens=_MAX_TOKENS[kind],
    )
    statistics: dict[str, torch.Tensor] = {}
    for entry, key, length in (("state", "state", state_dim), ("action", "actions", action_dim)):
        source = str(files[0])
        statistics |= statistics_of(entry, mode, stats[key], length, source, added=_EPS)
    return PolicyFolder(
        format=f"openpi {kind}",
        file=file,
        table=table,
        config=config,
        statistics=statistics,
        tokenizer=stated.tokenizer or _TOKENIZER,
        cameras=chosen,
    )


def _stats(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics by entry and name; those that the file leaves null are absent."""
    found: Any = read_json(path).get("norm_stats")
    if not isinstance(found, dict) or not {"state", "actions"} <= set(found):
        keys = sorted(found) if isinstance(found, dict) else "no mapping"
        raise ValueError(
            f"norm_stats in {path} must hold 'state' and 'actions', got {keys}. Without them "
            "values would be left as they are: compute them, scripts/compute_norm_stats.py."
        )
    return {
        entry: {
            name: torch.tensor(values, dtype=torch.float64)
            for name, values in found[entry].items()
            if values is not None
        }
        for entry in ("state", "actions")
    }


def _size(
    name: str, stats: dict[str, torch.Tensor], padded: int, stated: int | None, folder: Path
) -> int:
    """Dimensions without padding: as many as statistics, if these are not padded too."""
    length = max((tensor.numel() for tensor in stats.values()), default=0)
    if length < padded or stated is None:
        return int(settle(name, length if length < padded else None, stated, folder))
    return stated
