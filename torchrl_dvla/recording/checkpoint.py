# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints of a training run: TorchRL's folders, with digests and rotation by update."""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import logging
import os
import random
import shutil
import uuid
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves, tree_map_only
from torchrl.checkpoint import Checkpoint, CheckpointAdapter, CheckpointError, GlobalRNGState

from torchrl_dvla._version import __version__
from torchrl_dvla.differences import differences, join_some
from torchrl_dvla.recording.distributed_state import is_distributed, read_whole
from torchrl_dvla.recording.training_scenes import TrainingScenes, sha256_of_file
from torchrl_dvla.saved_state import COUNT, Number, form_of, form_problems, read_state, types_of

__all__ = ["RunCheckpoints", "find_latest_checkpoint"]

_PREFIX = "update"
_STATE = "state.pt"
_MANIFEST = {
    "metadata": {
        "update": COUNT,
        "torchrl_dvla": str,
        "config": {str: object},
        "sha256": {str: str},
    },
    "container": "directory",
    "checkpoint_id": str,
    "created_at": str,
}
_REMEDY = (
    "Resume from an older checkpoint of the run, with the settings it was made with, or start anew "
    "from its policy alone."
)
#: Entries of an optimizer's state that are counts or sums of squares.
_NON_NEGATIVE = {"step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}

_log = logging.getLogger("torchrl_dvla")


class RunCheckpoints:
    """Checkpoints of one run by number of learner updates, the newest ones kept.

    A checkpoint is a folder ``update-00000042`` in the format of :mod:`torchrl.checkpoint`::

        manifest.json                update, configuration, versions, SHA-256 of each file
        components/<n>-policy/       the policy by its own save_pretrained, or state.pt; and
                                     training_scenes.json, which init states it was trained from
        components/<n>-<component>/  state.pt, read with weights_only=True
        components/<n>-optimizer/    of several processes: torch.distributed.checkpoint's files

    It is written under another name and renamed when complete: a process killed at any instant
    leaves every earlier checkpoint, and at worst a hidden partial folder, which the next save
    removes.

    Args:
        directory (str or os.PathLike): where the run keeps its checkpoints; made by :meth:`save`.

    Keyword Args:
        keep_last (int): how many checkpoints stay. Defaults to ``2``.
        **components: what has ``state_dict`` and ``load_state_dict``: policy, optimizer, learning
            rate schedule, collector, ``torchrl.checkpoint.GlobalRNGState()``. An optimizer of
            several processes has ``save_distributed`` and ``load_distributed`` instead, of a path;
            one of a single process reads what that has written, and the reverse, by the names of
            the parameters of *policy*.

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
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}. Keep the newest one.")
        self.directory = Path(directory).expanduser().absolute()
        self.keep_last = keep_last
        self._checkpoint = Checkpoint()
        self._adapters: dict[str, _DigestedAdapter] = {}
        self._digests: dict[str, str] = {}
        self._verified: Path | None = None
        for name, component in components.items():
            self.register(name, component)

    def register(self, name: str, component: Any) -> None:
        """Add a component that is made later than the others, such as the collector."""
        kind: type[_DigestedAdapter] = _StateFile
        if hasattr(component, "save_pretrained") and hasattr(component, "read_weights"):
            kind = _PretrainedFolder
        elif hasattr(component, "save_distributed"):
            kind = _SharedFolder
        adapter = kind(name, self._digests)
        adapter.policy = lambda: self._checkpoint.components.get("policy")
        self._checkpoint.register(name, component, adapter=adapter)
        self._adapters[name] = adapter

    def latest(self) -> Path | None:
        """The complete checkpoint of the most updates, or ``None``."""
        return next(reversed(self._complete()), None)

    def _complete(self) -> list[Path]:
        """The complete checkpoints, that of the most updates last."""
        found = []
        for update, num_digits, path in self._folders():
            # A folder whose manifest is damaged counts for nothing; TorchRL's own rotation raises.
            with contextlib.suppress(CheckpointError, OSError):
                _manifest(path)
                found.append((update, num_digits, path))
        return [path for *_, path in sorted(found)]

    def _folders(self) -> list[tuple[int, int, Path]]:
        """Update and number of digits of each checkpoint, complete or not, with its folder."""
        paths = self.directory.glob(f"{_PREFIX}-*")
        named = [(path.name.removeprefix(f"{_PREFIX}-"), path) for path in paths]
        return [(int(text), len(text), path) for text, path in named if text.isdecimal()]

    def save(
        self,
        update: int,
        *,
        config: Mapping[str, Any] | None = None,
        training_scenes: TrainingScenes | None = None,
        on_disk_error: Literal["raise", "warn"] = "raise",
    ) -> Path | None:
        """Write a checkpoint, then remove what it replaces.

        That is: one of the same update, those of more updates (they belong to a run that was
        abandoned when an older checkpoint was resumed), and all but the newest ``keep_last``.

        Args:
            update (int): learner updates done.

        Keyword Args:
            config (Mapping, optional): configuration of the run, as plain data.
            training_scenes (TrainingScenes, optional): record for the policy's folder.
            on_disk_error (str): ``"warn"`` for a save that is followed by others: a disk that is
                full or not writable is warned about, and training goes on. Defaults to ``"raise"``.

        Returns:
            The folder written, or ``None`` after a warning.

        Raises:
            TypeError: if a component's state holds something else than data.
            ValueError: if a lazy layer of the policy was never initialised.
            OSError: if the disk is full or not writable. Earlier checkpoints are whole, and no
                partial folder stays.
        """
        if "policy" in self._adapters:
            self._adapters["policy"].scenes = training_scenes
        try:
            with self._lock():
                return self._save(update, dict(config or {}))
        except OSError as error:
            message = self._explain(update, error)
            if on_disk_error == "raise":
                raise OSError(error.errno or errno.EIO, message) from error
            _log.warning("%s Training goes on, and the next save tries again.", message)
            return None

    def _save(self, update: int, config: dict[str, Any]) -> Path:
        self._digests.clear()
        metadata = {
            "update": update,
            "torchrl_dvla": __version__,
            "config": config,
            # Filled in by the adapters: the manifest is written after the components.
            "sha256": self._digests,
        }
        # TorchRL replaces a folder by two renames, and a process killed between them would leave
        # none. With one more zero than any other of the same update, the name replaces nothing and
        # is that of the newest.
        longest = max((length for of, length, _ in self._folders() if of == update), default=0)
        path = self.directory / f"{_PREFIX}-{update:0{max(8, longest + 1)}d}"
        self._checkpoint.save(path, metadata=metadata)
        for written in (path / "manifest.json", path, self.directory):
            _flush_to_disk(written)
        # Those of more updates first: the one just written may not be the highest.
        for of, _, other in self._folders():
            if other != path and of >= update:
                _remove(other)
        for other in self._complete()[: -self.keep_last]:
            _remove(other)
        return path

    def _explain(self, update: int, error: OSError) -> str:
        components = self._checkpoint.components.values()
        states = [dict(c.state_dict()) for c in components if hasattr(c, "state_dict")]
        leaves = tree_leaves(states)
        num_bytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        folder = next(path for path in (self.directory, *self.directory.parents) if path.exists())
        return (
            f"The checkpoint of update {update} must be written to {str(self.directory)!r}, got "
            f"{error.strerror or error}: it needs {num_bytes} bytes, and "
            f"{shutil.disk_usage(folder).free} are free. Free some space, lower keep_last, or mend "
            "the folder's permissions. Earlier checkpoints are whole."
        )

    def load(
        self, path: str | os.PathLike[str], components: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Check a whole checkpoint, then load components in the order of registration.

        The digest of every file is compared, and the states of policy, optimizer, schedule and
        random generators with the live objects: keys, types, shapes, finite values, ranges. Nothing
        is loaded before all of them have passed. Others check their own in ``load_state_dict``.
        Switches of an optimizer that the PyTorch of the save did not know have their defaults.

        Args:
            path (str or os.PathLike): a folder that :meth:`save` wrote.
            components (collection of str, optional): names. Defaults to all that are registered.

        Returns:
            The metadata: ``"update"``, ``"config"``, ``"torchrl_dvla"``, ``"sha256"``.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            torchrl.checkpoint.CheckpointError: if a file is missing, truncated or changed, or a
                component does not fit; it names the file or the entry.
        """
        path = Path(path)
        manifest = _manifest(path)
        metadata: dict[str, Any] = manifest["metadata"]
        if path != self._verified:
            _verify(path, metadata["sha256"])
            self._verified = path
        names = [name for name in self._adapters if components is None or name in components]
        try:
            for name in names:
                self._check(path, name, manifest["components"].get(name))
            for name in names:
                self._checkpoint.load(path, components=[name])
        finally:
            for adapter in self._adapters.values():
                adapter.state = None
        return metadata

    def _check(self, path: Path, name: str, record: Mapping[str, Any] | None) -> None:
        """Have a component's adapter read and check its files."""
        adapter, component = self._adapters[name], self._checkpoint.components[name]
        own = {"adapter": adapter.adapter_id, "adapter_version": adapter.format_version}
        if record is None or any(record[key] != value for key, value in own.items()):
            problems = [f"none, or one written for another class than {type(component).__name__}"]
        else:
            try:
                problems = adapter.read(component, path / record["path"])
            except Exception as error:  # whatever a damaged file leads to
                raise CheckpointError(f"{name!r} of {str(path)!r}: {error} {_REMEDY}") from error
        if problems:
            raise CheckpointError(
                f"{str(path)!r} must hold the state of this {type(component).__name__} as "
                f"{name!r}, got: {join_some(problems)}. {_REMEDY}"
            )

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


def find_latest_checkpoint(runs: str | os.PathLike[str], seed: int | None = None) -> Path | None:
    """The checkpoint of the most updates in the newest run that has one.

    Args:
        runs (str or os.PathLike): folder of runs, each ``<time>_*/checkpoints/update-*``. The
            newest is the last by name: copying a run or setting the clock changes file times.
        seed (int, optional): that of the runs that count, if their configuration has one.

    Returns:
        The checkpoint's folder, or ``None``.
    """
    for run in sorted(Path(runs).glob("*/"), reverse=True):
        latest = RunCheckpoints(run / "checkpoints").latest()
        if latest is not None:
            config = _manifest(latest)["metadata"]["config"]
            if seed is None or config.get("seed", seed) == seed:
                return latest
    return None


class _DigestedAdapter(CheckpointAdapter):
    """Adapter whose files are on disk, with their SHA-256 in ``digests``, when it has saved."""

    def __init__(self, name: str, digests: dict[str, str]) -> None:
        self._name, self._digests = name, digests
        #: What :meth:`read` has found, until it is loaded.
        self.state: Any = None
        #: Which init states a policy was trained from.
        self.scenes: TrainingScenes | None = None
        #: The component whose parameters an optimizer has.
        self.policy: Callable[[], Any] = lambda: None

    def save(self, component: Any, path: Path, *, args: Any, kwargs: Any) -> None:
        path.mkdir(parents=True)
        self._write(component, path)
        if self.scenes is not None:
            self.scenes.save(path)
        for file in sorted(path.rglob("*")):
            if file.is_file():
                _flush_to_disk(file)
                self._digests[file.relative_to(path.parents[1]).as_posix()] = sha256_of_file(file)

    @abstractmethod
    def _write(self, component: Any, path: Path) -> None: ...

    @abstractmethod
    def read(self, component: Any, path: Path) -> list[str]:
        """Read the files; what does not fit ``component``."""

    def load(self, component: Any, path: Path, **kwargs: Any) -> None:
        state, self.state = self.state, None  # the next one's must not come on top of it
        if isinstance(component, Optimizer):
            # It keeps what it is given, which would go on being a part of the checkpoint's file.
            state = tree_map_only(torch.Tensor, torch.clone, state)
        component.load_state_dict(state)


class _PretrainedFolder(_DigestedAdapter):
    """A policy by its own ``save_pretrained`` and ``read_weights``."""

    adapter_id = "torchrl_dvla.pretrained"

    def _write(self, component: Any, path: Path) -> None:
        component.save_pretrained(path)

    def read(self, component: Any, path: Path) -> list[str]:
        self.state = component.read_weights(path)  # compares them with its own
        return []


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
        try:
            with (path / _STATE).open("wb") as file:
                torch.save(tree_map_only(torch.Tensor, _without_rest, state), file)
        except RuntimeError as error:  # PyTorch's, which hides what the disk said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        try:
            read_state(path / _STATE, mmap=True)
        except ValueError as error:
            cause = str(error).partition("something else: ")[2].partition(" It is")[0]
            raise TypeError(
                f"{type(component).__name__}.state_dict() must return tensors, numbers, strings "
                f"and containers of them, got something else: {cause}"
            ) from error

    def read(self, component: Any, path: Path) -> list[str]:
        policy = self.policy()
        if isinstance(component, Optimizer) and policy is not None and is_distributed(path):
            self.state = read_whole(policy, component, path)
        else:
            self.state = read_state(path / _STATE, mmap=True)
        if isinstance(component, Optimizer):
            return _optimizer_problems(component, self.state, self._name)
        if isinstance(component, GlobalRNGState):
            return _rng_problems(component.state_dict(), self.state, self._name)
        if isinstance(component, LRScheduler):
            own = component.state_dict()
            rates = {key: own[key] for key in ("base_lrs", "_last_lr") if key in own}
            form = types_of(own) | form_of(rates, whole=False)
            form |= {key: COUNT for key in ("last_epoch", "_step_count") if key in own}
        elif isinstance(component, torch.nn.Module):
            state = component.state_dict()
            form = {
                key: object if key.endswith("_extra_state") else form_of(value)
                for key, value in state.items()
            }
        else:
            form = {object: object}  # its load_state_dict is to check the rest
        return form_problems(form, self.state, self._name)


class _SharedFolder(_StateFile):
    """A state that several processes write into one folder and read from it, each its part."""

    def _write(self, component: Any, path: Path) -> None:
        component.save_distributed(path)

    def read(self, component: Any, path: Path) -> list[str]:
        self.state = path
        return []

    def load(self, component: Any, path: Path, **kwargs: Any) -> None:
        component.load_distributed(path)


def _optimizer_problems(optimizer: Optimizer, state: Any, name: str) -> list[str]:
    """Hyper-parameters as this optimizer has them, and the state that its next step expects."""
    form: Any = {"state": {int: {str: object}}, "param_groups": [{str: object}]}
    if problems := form_problems(form, state, name):
        return problems
    twin = copy.copy(optimizer)  # fills in what the PyTorch that wrote the state did not know
    twin.__setstate__(
        {"param_groups": [{**group, "params": []} for group in state["param_groups"]]}
    )
    saved_groups = [{**new, **old} for new, old in zip(twin.param_groups, state["param_groups"])]
    groups = []
    for group in optimizer.state_dict()["param_groups"]:
        form = form_of(group, whole=False)
        form.pop("param_names", None)  # load_state_dict leaves out those that are not there
        form["params"] = tuple(Number(index, index, whole=True) for index in group["params"])
        if "betas" in group:
            form["betas"] = (Number(0, 1 - 1e-12),) * len(group["betas"])
        groups.append(form)
    keys = set().union(*groups)  # others have no effect
    known = [{key: group[key] for key in keys & group.keys()} for group in saved_groups]
    if problems := form_problems(tuple(groups), known, f"{name}.param_groups"):
        return problems
    left = dict(state["state"])
    for own, saved in zip(optimizer.param_groups, saved_groups):
        for index, parameter in zip(saved["params"], own["params"]):
            if not (entry := left.pop(index, None)):
                continue  # it had no gradient yet
            expected = _state_after_a_step(optimizer, saved, parameter)
            form = {object: object} if expected is None else form_of(expected)
            found = form_problems(form, entry, f"{name}.state.{index}")
            problems += found or [
                f"'{name}.state.{index}.{key}' must be at least 0, got a negative value"
                for key in _NON_NEGATIVE.intersection(entry)
                if isinstance(entry[key], torch.Tensor) and (entry[key].double() < 0).any()
            ]
    return problems + [f"'{name}.state.{index}' is unknown" for index in left]


def _state_after_a_step(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: torch.Tensor
) -> Any:
    """What the optimizer keeps for a parameter like this one; ``None`` if it cannot be tried."""
    twin, zeros = copy.copy(optimizer), torch.zeros_like(parameter, requires_grad=True)
    zeros.grad = torch.zeros_like(parameter)
    twin.state, twin.param_groups = defaultdict(dict), [{**group, "params": [zeros]}]
    try:
        twin.step()
    except Exception:  # LBFGS, which steps with a closure
        return None
    return dict(twin.state[zeros])


def _rng_problems(own: Mapping[str, Any], state: Any, name: str) -> list[str]:
    """Whether the generators take their states: tried on generators of its own."""
    word, bit = Number(0, 2**32 - 1, whole=True), Number(0, 1, whole=True)
    position = Number(0, 624, whole=True)
    form = {
        "python": (Number(3, 3, whole=True), (*[word] * 624, position), Number(optional=True)),
        "numpy": (own["numpy"][0], own["numpy"][1], position, bit, Number()),
        "torch_cpu": own["torch_cpu"],
    }
    devices = ("torch_cuda", "torch_xpu", "torch_mps")  # those of the machine it was made on
    form |= {key: object for key in devices if isinstance(state, Mapping) and key in state}
    if problems := form_problems(form, state, name):
        return problems
    algorithm, words, *rest = state["numpy"]
    if words.min() < 0 or words.max() >= 2**32:
        return [f"'{name}.numpy.1' must hold words of 32 bits, got others"]
    try:
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state((algorithm, words.numpy().astype(np.uint32), *rest))
        torch.Generator().set_state(state["torch_cpu"])
        for key in state.keys() & set(devices):
            states = state[key] if isinstance(state[key], list) else [state[key]]
            kind = key.removeprefix("torch_")
            if (here := getattr(torch, kind).device_count()) == len(states):
                for index, saved in enumerate(states):
                    torch.Generator(f"{kind}:{index}").set_state(saved)
            else:  # TorchRL's would raise, after the policy was loaded
                del state[key]
                text = "The states of %d %s generators are not loaded, got a machine with %d."
                _log.warning(text, len(states), kind, here)
    except Exception as error:  # each says it in its own way
        return [f"'{name}', which a generator refuses: {error}"]
    return []


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is damaged.
    """
    try:
        manifest = Checkpoint.manifest(path)
        known = {key: manifest.get(key) for key in _MANIFEST}
        problems = form_problems(_MANIFEST, known, "manifest")
    except OSError:
        raise
    except Exception as error:  # cut off, not text, or no mapping
        problems = [str(error).rstrip(".")]
    if problems:
        raise CheckpointError(
            f"{str(path / 'manifest.json')!r} must be the manifest of a whole checkpoint, got: "
            f"{join_some(problems)}. {_REMEDY}"
        )
    return manifest


def _verify(path: Path, digests: Mapping[str, str]) -> None:
    files = (file for file in (path / "components").rglob("*") if file.is_file())
    found = {file.relative_to(path).as_posix(): sha256_of_file(file) for file in files}
    problems = differences(digests, found)
    if problems:
        raise CheckpointError(
            f"{str(path)!r} must hold the files whose SHA-256 is in its manifest.json, got "
            f"{join_some(problems)}: truncated, or changed after it was written. {_REMEDY}"
        )


def _without_rest(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where ``tensor`` is a view: saving one would write the whole storage behind it."""
    tensor = tensor.detach()
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_view else tensor


def _flush_to_disk(path: Path) -> None:
    # A power cut after the rename must leave no file of zeros.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    # Renamed first: a process killed meanwhile leaves no half of it under its name. It takes no
    # space, which a full disk would not have.
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(hidden)
    except OSError as error:  # the new one is in place all the same
        _log.warning("%s must be removed, got %s. The next save tries again.", path, error)
    shutil.rmtree(hidden, ignore_errors=True)
