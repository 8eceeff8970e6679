# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Record of the init states that a policy was trained from, in the policy's folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torchrl_dvla.data import Group
from torchrl_dvla.data.schema import NO_HASH
from torchrl_dvla.saved_state import require_form

__all__ = ["SceneOverlap", "TrainingScenes"]

_FORMAT = "torchrl_dvla.training_scenes.v1"
_FORM = {"format": _FORMAT, "weights": {str: str}, "tasks": {str: [str]}, "gaps": [str]}
#: Files of weights, and those whose name says what is in them.
_WEIGHTS, _BY_CONTENT = {".safetensors", ".pt", ".bin"}, re.compile(r"weights-[0-9a-f]{8}")


@dataclass(frozen=True)
class SceneOverlap:
    """Whether evaluated init states are among those that a policy was trained from.

    Args:
        found (sequence of int): positions, among the evaluated ones, of those that are.
        num_evaluated (int): init states that were looked for.
        num_known (int): init states that are on record.
        gaps (sequence of str): what is not on record; empty if all is.
    """

    found: tuple[int, ...]
    num_evaluated: int
    num_known: int
    gaps: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """``"some"`` of them are; ``"none"`` is; or ``"unknown"``."""
        if self.found:
            return "some"
        return "unknown" if self.gaps else "none"

    def __str__(self) -> str:
        of = f"the {self.num_evaluated} evaluated init states"
        known = f"the {self.num_known} on record that the policy was trained from"
        gaps = f" Not on record: {'; '.join(self.gaps)}." if self.gaps else ""
        if self.found:
            return f"{len(self.found)} of {of} are among {known}, by their hashes.{gaps}"
        if not self.gaps:
            return f"None of {of} is among {known}, by their hashes."
        if self.num_known:
            return f"None of {of} is among {known}, by their hashes; unknown for the rest.{gaps}"
        return f"Unknown whether any of {of} is among those that the policy was trained from.{gaps}"


@dataclass
class TrainingScenes:
    """Init states that a policy was trained from, each by its hash.

    The hash is an environment's own, as :func:`~torchrl_dvla.envs.libero_setup.hash_init_state`: it
    finds the same state again, not a similar one. What is not known is a gap, and said. The file
    names the weights that it belongs to: beside others it counts for nothing.

    Args:
        tasks (dict): hashes by task.
        gaps (list of str): what is not on record, such as a checkpoint that came without one.

    Examples:
        >>> scenes = TrainingScenes()
        >>> scenes.add("libero_object/3", 11)
        >>> scenes.add("libero_object/3", 12)
        >>> print(scenes.overlap([12, 13]))
        1 of the 2 evaluated init states are among the 2 on record that the policy was trained \
from, by their hashes.
        >>> scenes.add("toy", -1)  # an environment that does not say
        >>> print(scenes.overlap([13]))
        None of the 1 evaluated init states is among the 2 on record that the policy was trained \
from, by their hashes; unknown for the rest. Not on record: init states of toy.
    """

    #: The file in the policy's folder.
    FILE = "training_scenes.json"

    tasks: dict[str, set[int]] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)

    def add(self, task: str, init_state_hash: int) -> None:
        """Add the init state of a rollout or a demonstration; -1 is one that is not known."""
        if init_state_hash == NO_HASH:
            self.add_gap(f"init states of {task}")
        else:
            self.tasks.setdefault(task, set()).add(init_state_hash)

    def add_groups(self, groups: Iterable[Group]) -> None:
        """Add the init states of groups that are learned from."""
        for group in groups:
            self.add(group.spec.task, group.init_state_hash)

    def add_gap(self, what: str) -> None:
        """Note, once, what is not on record."""
        if what not in self.gaps:
            self.gaps.append(what)

    @property
    def num_known(self) -> int:
        """Init states on record."""
        return len(set().union(*self.tasks.values()))

    def overlap(self, hashes: Iterable[int]) -> SceneOverlap:
        """Compare with evaluated init states, whatever their task."""
        known, evaluated = set().union(*self.tasks.values()), list(hashes)
        found = tuple(k for k, number in enumerate(evaluated) if number in known)
        return SceneOverlap(found, len(evaluated), len(known), tuple(self.gaps))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a policy's folder, in which the weights are already."""
        data = {
            "format": _FORMAT,
            "weights": _weights_in(Path(folder)),
            "tasks": {
                task: [f"{number:016x}" for number in sorted(found)]
                for task, found in sorted(self.tasks.items())
            },
            "gaps": list(self.gaps),
        }
        (Path(folder) / self.FILE).write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TrainingScenes:
        """That of a policy's folder; without one, a record that says so.

        Raises:
            ValueError: if the file is damaged.
        """
        path = Path(folder) / cls.FILE
        if not path.is_file():
            return cls(gaps=[f"what the policy in {str(folder)!r} was trained from"])
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            require_form(_FORM, data, "training_scenes")
            tasks = {task: {int(text, 16) for text in of} for task, of in data["tasks"].items()}
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} must be the record of a policy's training scenes, got {error} "
                "Copy it again, or delete it: the init states count as unknown then."
            ) from error
        if data["weights"] != _weights_in(Path(folder)):
            gap = "what the policy in {!r} was trained from, for its record is of other weights"
            return cls(gaps=[gap.format(str(folder))])
        return cls(tasks, list(data["gaps"]))


def _weights_in(folder: Path) -> dict[str, str]:
    """The files of weights of a policy's folder, with what tells them from others."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in _WEIGHTS:
            continue
        if _BY_CONTENT.fullmatch(path.stem):
            found[path.name] = f"{path.stat().st_size} bytes"
        else:
            found[path.name] = sha256_of_file(path)
    return found


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
