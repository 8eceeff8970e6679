# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Parameters of any policy on disk, and back into a policy of the same architecture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

__all__ = ["load_policy", "save_policy"]

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_NUM_SHOWN = 3


def save_policy(policy: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a policy into a folder: by its ``save_pretrained``, else as safetensors.

    Args:
        policy (torch.nn.Module): the policy.
        path (str or os.PathLike): folder; made if missing.

    Raises:
        ValueError: if a lazy layer was never initialised.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_pretrained = getattr(policy, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(path)
        return
    tensors = {}
    for name, tensor in policy.state_dict().items():
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"policy must be initialised before it is saved, got a lazy {name!r}. Call the "
                "policy on one batch first."
            )
        tensors[name] = tensor.detach().cpu().contiguous()
    safetensors.torch.save_file(tensors, path / _WEIGHTS)
    (path / _CONFIG).write_text(json.dumps({"class": type(policy).__name__}, indent=2) + "\n")


def load_policy(policy: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy saved parameters into ``policy``, or refuse and say where the two differ.

    Nothing is copied unless everything fits. A policy that loads its own files by ``load_weights``
    is asked to.

    Args:
        policy (torch.nn.Module): the policy, built and initialised.
        path (str or os.PathLike): folder written by :func:`save_policy`.

    Raises:
        FileNotFoundError: if there are no parameters in ``path``.
        ValueError: if the file is corrupt, or belongs to another architecture.
    """
    load_weights = getattr(policy, "load_weights", None)
    if callable(load_weights):
        load_weights(path)
        return
    file = Path(path) / _WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(
            f"policy.checkpoint must be a folder with {_WEIGHTS}, got {str(path)!r}. Make one with "
            "the dvla_sft recipe, or set policy.checkpoint=null to start from random parameters."
        )
    try:
        saved = safetensors.torch.load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{file} must be a whole safetensors file, got {error}. It is corrupt or truncated: "
            "copy or download it again (git lfs pull, if it is tracked there)."
        ) from error
    own = policy.state_dict()
    differences = _differences(own, saved)
    if differences:
        raise ValueError(
            f"{file} must hold the parameters of this {type(policy).__name__}, got another "
            f"architecture: {'; '.join(differences)}. Use the policy settings it was made with "
            f"(see {_CONFIG} beside it), or another checkpoint."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            # A tied parameter is saved once under one of its names.
            if name in saved:
                tensor.copy_(saved[name])


def _differences(own: dict[str, Any], saved: dict[str, torch.Tensor]) -> list[str]:
    kept = {tensor.data_ptr() for name, tensor in own.items() if name in saved}
    missing = [n for n, tensor in own.items() if n not in saved and tensor.data_ptr() not in kept]
    unknown = [name for name in saved if name not in own]
    shapes = [
        f"{name} is {list(saved[name].shape)}, not {list(own[name].shape)}"
        for name in saved
        if name in own and saved[name].shape != own[name].shape
    ]
    differences = [_some("missing", missing), _some("unknown", unknown), _some("", shapes)]
    return [text for text in differences if text]


def _some(label: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_NUM_SHOWN])
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return f"{label} {shown}{more}".strip()
