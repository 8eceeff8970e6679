# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints of a training run: TorchRL's folders, with digests and rotation by update."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pickle
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torchrl.checkpoint import Checkpoint, CheckpointAdapter, CheckpointRotation

from torchrl_dvla._version import __version__
from torchrl_dvla.differences import differences, join_some

__all__ = ["RunCheckpoints", "find_latest_checkpoint"]

_PREFIX = "update"
_STATE = "state.pt"


class RunCheckpoints:
    """Checkpoints of one run by number of learner updates, the newest ones kept.

    A checkpoint is a folder ``update-00000042`` in the format of :mod:`torchrl.checkpoint`::

        manifest.json                update, configuration, versions, SHA-256 of each file
        components/<n>-policy/       the policy by its own save_pretrained, or state.pt
        components/<n>-<component>/  state.pt, read with weights_only=True

    It is written under another name and renamed when complete: a process killed at any instant
    leaves every earlier checkpoint, and at worst a hidden partial folder, which the next save
    removes.

    Args:
        directory (str or os.PathLike): where the run keeps its checkpoints; made by :meth:`save`.

    Keyword Args:
        keep_last (int): how many checkpoints stay. Defaults to ``2``.
        **components: what has ``state_dict`` and ``load_state_dict``: policy, optimizer, learning
            rate schedule, collector, ``torchrl.checkpoint.GlobalRNGState()``.

    Raises:
        ValueError: if ``keep_last`` is smaller than 1.

    Examples:
        >>> import tempfile
        >>> policy = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = RunCheckpoints(folder, policy=policy)
        ...     path = checkpoints.save(7)
        ...     metadata = checkpoints.load(checkpoints.latest())
        >>> path.name, metadata["update"]
        ('update-00000007', 7)
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep_last: int = 2, **components: Any
    ) -> None:
        self.directory = Path(directory)
        self._rotation = CheckpointRotation(directory, keep_last=keep_last, prefix=_PREFIX)
        self._checkpoint = Checkpoint()
        self._digests: dict[str, str] = {}
        self._verified: Path | None = None
        for name, component in components.items():
            self.register(name, component)

    def register(self, name: str, component: Any) -> None:
        """Add a component that is made later than the others, such as the collector."""
        is_pretrained = hasattr(component, "save_pretrained") and hasattr(component, "load_weights")
        adapter = _PretrainedFolder if is_pretrained else _StateFile
        self._checkpoint.register(name, component, adapter=adapter(self._digests))

    def latest(self) -> Path | None:
        """The complete checkpoint of the most updates, or ``None``."""
        return self._rotation.latest()

    def save(self, update: int, *, config: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint, then remove what it replaces.

        That is: one of the same update, those of more updates (they belong to a run that was
        abandoned when an older checkpoint was resumed), and all but the newest ``keep_last``.

        Args:
            update (int): learner updates done.

        Keyword Args:
            config (Mapping, optional): configuration of the run, as plain data.

        Returns:
            The folder written.

        Raises:
            TypeError: if a component's state holds something else than data.
            ValueError: if a lazy layer of the policy was never initialised.
            OSError: if the disk is full or not writable; no partial folder stays.
        """
        self._digests.clear()
        metadata = {
            "update": update,
            "torchrl_dvla": __version__,
            "config": dict(config or {}),
            # Filled in by the adapters: the manifest is written after the components.
            "sha256": self._digests,
        }
        with self._lock():
            path = self.directory / f"{_PREFIX}-{update:08d}"
            # TorchRL replaces a folder by two renames, and a process killed between them would
            # leave none. With one more zero the name is of the same update and replaces nothing.
            while path.exists():
                path = path.with_name(path.name.replace("-", "-0"))
            self._checkpoint.save(path, metadata=metadata)
            for written in (path / "manifest.json", path, self.directory):
                _flush_to_disk(written)
            # TorchRL's rotation keeps the highest steps, whichever was written last.
            for other in self.directory.glob(f"{_PREFIX}-*"):
                step = other.name.removeprefix(f"{_PREFIX}-")
                if other != path and step.isdigit() and int(step) >= update:
                    _remove(other)
            self._rotation.prune()
        return path

    def load(
        self, path: str | os.PathLike[str], components: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Verify the digest of every file, then load components in the order of registration.

        Args:
            path (str or os.PathLike): a folder that :meth:`save` wrote.
            components (collection of str, optional): names. Defaults to all that are registered.

        Returns:
            The metadata: ``"update"``, ``"config"``, ``"torchrl_dvla"``, ``"sha256"``.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if a file is missing, truncated or changed.
            torchrl.checkpoint.CheckpointError: if the manifest is damaged, or a component cannot
                be loaded.
        """
        path = Path(path)
        metadata = Checkpoint.manifest(path)["metadata"]
        if path != self._verified:
            _verify(path, metadata.get("sha256", {}))
            self._verified = path
        for name in self._checkpoint.components:
            if components is None or name in components:
                self._checkpoint.load(path, components=[name], map_location="cpu")
        return metadata

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One save at a time in this folder, over all processes; removes partial folders."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("w") as file:
            with contextlib.suppress(OSError):  # a file system without locks: partial folders stay
                fcntl.flock(file, fcntl.LOCK_EX)
                for partial in self.directory.glob(f".{_PREFIX}-*"):
                    shutil.rmtree(partial, ignore_errors=True)
            yield


def find_latest_checkpoint(runs: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the most updates in the newest run that has one.

    Args:
        runs (str or os.PathLike): folder of runs, each ``<time>_*/checkpoints/update-*``. The
            newest is the last by name: copying a run or setting the clock changes file times.

    Returns:
        The checkpoint's folder, or ``None``.
    """
    for run in sorted(Path(runs).glob("*/"), reverse=True):
        latest = RunCheckpoints(run / "checkpoints").latest()
        if latest is not None:
            return latest
    return None


class _DigestedAdapter(CheckpointAdapter):
    """Adapter whose files are on disk, with their SHA-256 in ``digests``, when it has saved."""

    def __init__(self, digests: dict[str, str]) -> None:
        self._digests = digests

    def save(self, component: Any, path: Path, *, args: Any, kwargs: Any) -> None:
        path.mkdir(parents=True)
        self._write(component, path)
        for file in sorted(path.rglob("*")):
            if file.is_file():
                _flush_to_disk(file)
                self._digests[file.relative_to(path.parents[1]).as_posix()] = _sha256(file)

    @abstractmethod
    def _write(self, component: Any, path: Path) -> None: ...


class _PretrainedFolder(_DigestedAdapter):
    """A policy by its own ``save_pretrained`` and ``load_weights``."""

    adapter_id = "torchrl_dvla.pretrained"

    def _write(self, component: Any, path: Path) -> None:
        component.save_pretrained(path)

    def load(self, component: Any, path: Path, **kwargs: Any) -> None:
        component.load_weights(path)


class _StateFile(_DigestedAdapter):
    """A state dict as one file that is read with ``weights_only=True``.

    TorchRL's own adapter would find out at loading that a state holds objects, would write the
    whole storage behind a view, and its other format may load pickles.
    """

    adapter_id = "torchrl_dvla.state_file"

    def _write(self, component: Any, path: Path) -> None:
        state = component.state_dict()
        for name, value in state.items():
            if torch.nn.parameter.is_lazy(value):
                raise ValueError(
                    f"{type(component).__name__} must be initialised before it is saved, got a "
                    f"lazy {name!r}. Call the policy on one batch first."
                )
        torch.save(tree_map_only(torch.Tensor, _without_rest, state), path / _STATE)
        try:
            torch.load(path / _STATE, weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            cause = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0]
            raise TypeError(
                f"{type(component).__name__}.state_dict() must return tensors, numbers, strings "
                f"and containers of them, got something else: {cause}"
            ) from error

    def load(self, component: Any, path: Path, *, map_location: Any, **kwargs: Any) -> None:
        state = torch.load(path / _STATE, map_location=map_location, weights_only=True)
        if isinstance(component, torch.nn.Module):
            _require_same_shapes(component, state)
        component.load_state_dict(state)


def _require_same_shapes(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Raise before anything is copied; ``load_state_dict`` would have copied what fits."""
    own, saved = (
        {name: list(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (module.state_dict(), state)
    )
    problems = differences(own, saved)
    if problems:
        raise ValueError(
            f"the checkpoint must hold the parameters of this {type(module).__name__}, got another "
            f"architecture: {join_some(problems)}. Use the policy settings it was made with."
        )


def _verify(path: Path, digests: Mapping[str, str]) -> None:
    files = (file for file in (path / "components").rglob("*") if file.is_file())
    found = {file.relative_to(path).as_posix(): _sha256(file) for file in files}
    problems = differences(digests, found)
    if problems:
        raise ValueError(
            f"{str(path)!r} must hold the files whose SHA-256 is in its manifest.json, got "
            f"{join_some(problems)}: truncated, or changed after it was written. Resume from "
            "another checkpoint of the run, or start anew from its policy alone."
        )


def _without_rest(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where ``tensor`` is a view: saving one would write the whole storage behind it."""
    tensor = tensor.detach()
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_view else tensor


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    # A power cut after the rename must leave no file of zeros.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    # Renamed first: a process killed meanwhile leaves no half of it under its name.
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}-", dir=path.parent))
    path.rename(hidden / path.name)
    shutil.rmtree(hidden, ignore_errors=True)
