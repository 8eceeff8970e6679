# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoint folders that are either whole or refused.

A folder holds ``config.json``, one safetensors file and the instruction tokenizer::

    config.json                 architecture; name, size and checksum of the weights
    weights-<crc32>.safetensors parameters and buffers
    tokenizer/                  the instruction tokenizer's own files

``config.json`` names the weights and is replaced last, by one atomic rename. Whenever a writer
dies, and whenever a reader comes, the folder therefore holds the old checkpoint or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["read_config", "read_tokenizer", "read_weights", "write_checkpoint"]

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer"
FORMAT_VERSION = 1


def write_checkpoint(
    folder: str | os.PathLike[str],
    *,
    architecture: str,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint, replacing the one that may be there.

    Args:
        folder (path): the checkpoint folder; created where missing.

    Keyword Args:
        architecture (str): name of the policy class.
        config (dict): the policy's config, plain JSON types.
        weights (dict): state dict.
        tokenizer (PreTrainedTokenizerBase): the instruction tokenizer.
        dtype (torch.dtype, optional): storage dtype of float32 weights; ``torch.bfloat16`` halves
            the file and rounds. Defaults to keeping each tensor's own.

    Raises:
        RuntimeError: if the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    except OSError as error:
        raise RuntimeError(
            f"folder must be writable, got {str(folder)!r} ({error.strerror}). Choose another "
            "output folder or mend its permissions."
        ) from error
    try:
        tensors = {}
        for name, tensor in weights.items():
            tensor = tensor.detach().cpu()
            if dtype is not None and tensor.dtype == torch.float32:
                tensor = tensor.to(dtype)
            # Parameters may be views on shared memory: the file must own its bytes.
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        draft = scratch / "weights"
        save_file(tensors, str(draft), metadata={"format": "pt"})
        checksum = _checksum(draft)
        weights_name = f"weights-{checksum}.safetensors"
        data = {
            "architecture": architecture,
            "format_version": FORMAT_VERSION,
            "config": config,
            "weights": {
                "file": weights_name,
                "num_bytes": draft.stat().st_size,
                "crc32": checksum,
            },
        }
        (scratch / CONFIG_NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(str(scratch / TOKENIZER_NAME))

        (folder / TOKENIZER_NAME).mkdir(exist_ok=True)
        for file in sorted((scratch / TOKENIZER_NAME).iterdir()):
            _move(file, folder / TOKENIZER_NAME / file.name)
        _move(draft, folder / weights_name)
        _move(scratch / CONFIG_NAME, folder / CONFIG_NAME)
        for old in folder.glob("weights-*.safetensors"):
            if old.name != weights_name:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"the checkpoint could not be written to {str(folder)!r} ({error}). Free some disk "
            "space or choose another folder; the previous checkpoint there is untouched."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Rename once the bytes are on disk: a power cut must leave no empty file of that name."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.replace(target)


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def read_config(folder: str | os.PathLike[str], *, architecture: str) -> dict[str, Any]:
    """Read and check ``config.json``.

    Args:
        folder (path): the checkpoint folder.

    Keyword Args:
        architecture (str): the policy class the caller wants.

    Returns:
        The whole content: ``"architecture"``, ``"config"`` and ``"weights"``.

    Raises:
        FileNotFoundError: if the folder or the file is missing.
        ValueError: if the file is not a checkpoint of this architecture.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder must be an existing checkpoint folder, got {str(folder)!r}. Check the path."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"folder must contain {CONFIG_NAME}, got {str(folder)!r} with "
            f"{sorted(entry.name for entry in folder.iterdir())[:8]}. Copy the checkpoint again, "
            "with all its files."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} must be valid JSON, got an error: {error}. The file is damaged: copy the "
            "checkpoint again."
        ) from error
    found = data.get("architecture") if isinstance(data, dict) else None
    if found != architecture:
        hint = "a torchrl_dvla checkpoint"
        if isinstance(data, dict) and "model_type" in data:
            hint = (
                f"a transformers checkpoint of type {data['model_type']!r}: pass it to "
                f"{architecture}.from_backbone"
            )
        raise ValueError(
            f"the architecture in {path} must be {architecture!r}, got {found!r}. Point to {hint}."
            if found is None
            else f"the architecture in {path} must be {architecture!r}, got {found!r}. Load it "
            f"with {found}.from_pretrained."
        )
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version in {path} must be {FORMAT_VERSION}, got {version!r}. Use the version "
            "of torchrl_dvla that wrote the checkpoint."
        )
    return data


def read_weights(
    folder: str | os.PathLike[str], entry: dict[str, Any], *, verify: bool = True
) -> dict[str, torch.Tensor]:
    """Read the weights that ``config.json`` names.

    Args:
        folder (path): the checkpoint folder.
        entry (dict): the ``"weights"`` part of the config.

    Keyword Args:
        verify (bool): whether to compare the checksum. About a second per gigabyte.

    Returns:
        The tensors by name, in storage dtype.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is truncated or corrupt.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / entry["file"]
    if not path.is_file():
        raise FileNotFoundError(
            f"folder must contain the weights file {entry['file']!r}, got "
            f"{str(folder)!r} without it. Copy the checkpoint again, with all its files."
        )
    num_bytes = path.stat().st_size
    if num_bytes != entry["num_bytes"]:
        kind = "truncated" if num_bytes < entry["num_bytes"] else "damaged"
        raise ValueError(
            f"{path} must have {entry['num_bytes']} bytes, got {num_bytes}. The file is {kind} (or "
            "a Git LFS pointer): copy the checkpoint again."
        )
    if verify and (found := _checksum(path)) != entry["crc32"]:
        raise ValueError(
            f"{path} must have checksum {entry['crc32']}, got {found}. The file is corrupt: copy "
            "the checkpoint again."
        )
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a safetensors file, got an error: {error}. The file is corrupt: copy "
            "the checkpoint again."
        ) from error


def read_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Read the instruction tokenizer of a checkpoint.

    Args:
        folder (path): the checkpoint folder.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: if its files are missing.
    """
    from transformers import AutoTokenizer

    path = Path(folder) / TOKENIZER_NAME
    if not (path / "tokenizer_config.json").is_file():
        raise FileNotFoundError(
            f"folder must contain {TOKENIZER_NAME}/tokenizer_config.json, got {str(folder)!r} "
            "without it. Copy the checkpoint again, with all its files."
        )
    return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
