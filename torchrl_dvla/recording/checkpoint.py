# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Training checkpoints that are whole or absent, and that say so when they are not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from torchrl_dvla._version import __version__
from torchrl_dvla.recording.plain import from_plain, to_plain
from torchrl_dvla.recording.policy_files import load_policy, save_policy

__all__ = ["Checkpoint", "CheckpointDirectory"]

_FORMAT_VERSION = 1
_METADATA = "checkpoint.json"
_STATE = "training.pt"
_POLICY = "policy"
_PREFIX = "update_"
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole.

    Args:
        path (Path): its folder.
        state (dict): what was given to :meth:`CheckpointDirectory.save`.
        metadata (dict): update count, versions, configuration, time of writing.
    """

    path: Path
    state: dict[str, Any]
    metadata: dict[str, Any]

    @property
    def policy_path(self) -> Path:
        """Folder with the policy alone, ready for ``from_pretrained``."""
        return self.path / _POLICY

    @property
    def update(self) -> int:
        """Learner updates done when it was written."""
        return int(self.metadata["update"])

    def load_policy(self, policy: torch.nn.Module) -> None:
        """Copy the saved parameters into ``policy``; see :func:`load_policy` for the errors."""
        load_policy(policy, self.policy_path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a checkpoint after comparing every file with the digest noted at its writing.

        Args:
            path (str or os.PathLike): a folder ``update_*``.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if a file is missing, truncated or changed, or the format is unknown.
        """
        path = Path(path)
        if not (path / _METADATA).is_file():
            raise FileNotFoundError(
                f"checkpoint.resume must be the folder of a training checkpoint, got "
                f"{str(path)!r} without {_METADATA}. Pass a folder {_PREFIX}* of a run, 'auto' for "
                "the newest one, or null to start anew; a folder with nothing but a policy belongs "
                "into policy.checkpoint."
            )
        remedy = "Resume from another checkpoint of the run, or from its policy alone."
        try:
            metadata = json.loads((path / _METADATA).read_text())
            files, format_version = metadata["files"], metadata["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path / _METADATA} must be whole, got {error!r}. {remedy}"
            ) from error
        if format_version != _FORMAT_VERSION:
            raise ValueError(
                f"format_version must be {_FORMAT_VERSION}, got {format_version} in {path}. It was "
                f"written by torchrl_dvla {metadata.get('torchrl_dvla', '?')}; resume it with that."
            )
        for name, expected in files.items():
            _check_file(path / name, expected, remedy)
        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        return cls(path, from_plain(state), metadata)


class CheckpointDirectory:
    """The checkpoints of one run, newest kept.

    A checkpoint is a folder ``update_00000042``::

        policy/          the policy by its own save_pretrained, or model.safetensors + config.json
        training.pt      optimizer, learning-rate schedule, collector, replay buffer, generators
        checkpoint.json  update, configuration, versions; size and SHA-256 of every other file

    It is written under another name, flushed to disk, and renamed when complete: a process killed
    at any instant leaves the previous checkpoint and at worst a ``.partial-*`` folder, which the
    next run over the same directory removes.

    Args:
        path (str or os.PathLike): where the run keeps its checkpoints; made if missing.

    Keyword Args:
        keep (int): how many checkpoints stay. Defaults to ``2``.

    Raises:
        ValueError: if ``keep`` is smaller than 1.
        OSError: if the directory cannot be made.

    Examples:
        >>> import tempfile
        >>> policy = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = CheckpointDirectory(folder)
        ...     path = checkpoints.save(7, policy, {"optimizer": {"lr": 0.1}})
        ...     checkpoint = Checkpoint.load(checkpoints.latest())
        >>> path.name, checkpoint.update, checkpoint.state["optimizer"]
        ('update_00000007', 7, {'lr': 0.1})
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(
                f"keep must be at least 1, got {keep}. Each checkpoint replaces the oldest one."
            )
        self.path = Path(path)
        self.keep = keep
        self.path.mkdir(parents=True, exist_ok=True)
        for partial in self.path.glob(_PARTIAL + "*"):
            shutil.rmtree(partial, ignore_errors=True)

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.path.glob(_PREFIX + "*") if (path / _METADATA).exists())

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or ``None``."""
        return next(reversed(self.list()), None)

    def save(
        self,
        update: int,
        policy: torch.nn.Module,
        state: Mapping[str, Any],
        *,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint and forget the oldest.

        Args:
            update (int): learner updates done. A checkpoint of the same update is replaced.
            policy (torch.nn.Module): saved by its ``save_pretrained`` where it has one.
            state (Mapping): state dicts of everything else; plain data, see :func:`to_plain`.

        Keyword Args:
            config (Mapping, optional): configuration of the run, as plain data.
            metadata (Mapping, optional): further entries of ``checkpoint.json``.

        Returns:
            The folder written.

        Raises:
            TypeError: if ``state`` holds something else than data.
            OSError: if the disk is full or not writable; no partial folder stays.
        """
        target = self.path / f"{_PREFIX}{update:08d}"
        partial = self.path / f"{_PARTIAL}{os.getpid()}-{target.name}"
        try:
            partial.mkdir(parents=True)
            save_policy(policy, partial / _POLICY)
            torch.save(to_plain(dict(state)), partial / _STATE)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            described = {
                "format_version": _FORMAT_VERSION,
                "torchrl_dvla": __version__,
                "torch": torch.__version__,
                "update": update,
                "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "config": dict(config or {}),
                **(metadata or {}),
                "files": {path.relative_to(partial).as_posix(): _describe(path) for path in files},
            }
            (partial / _METADATA).write_text(json.dumps(described, indent=2) + "\n")
            for path in [*files, partial / _METADATA]:
                _flush_to_disk(path)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            _flush_to_disk(self.path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.list()[: -self.keep]:
            shutil.rmtree(old)
        return target


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"num_bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _check_file(path: Path, expected: Mapping[str, int | str], remedy: str) -> None:
    if not path.is_file():
        raise ValueError(f"The checkpoint must hold {path}, got no such file. {remedy}")
    num_bytes = path.stat().st_size
    if num_bytes != expected["num_bytes"]:
        raise ValueError(
            f"{path} must have {expected['num_bytes']} bytes, got {num_bytes}: it was truncated or "
            f"replaced. {remedy}"
        )
    if _describe(path)["sha256"] != expected["sha256"]:
        raise ValueError(
            f"{path} must have the SHA-256 noted in {_METADATA}, got another: its content changed "
            f"after it was written. {remedy}"
        )


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
