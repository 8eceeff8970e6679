# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Expert demonstrations at decision level: one file each, and the buffer they are learned from.

A demonstration holds what a supervised policy needs and no more: one image per labelled decision
(a transition with root and next images would be twice as large) and the chunk of expert actions
that follows it. Files are safetensors, written under a temporary name and renamed, so an
interrupted recording leaves no half file and goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.data.vla import ActionTokenizerBase
from torchrl.envs.transforms import Transform

from torchrl_dvla.data.instructions import InstructionTable, InstructionTransform
from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    ACTION_TOKENS_KEY,
    CAMERA_KEYS,
    IMAGE_KEY,
    INSTRUCTION_ID_KEY,
    NO_HASH,
    STATE_KEY,
)
from torchrl_dvla.saved_state import COUNT, MaybeAbsent, Number, require_form

__all__ = [
    "Demonstration",
    "DemonstrationInfo",
    "make_demonstration_buffer",
    "stack_demonstrations",
]

_FORMAT = "torchrl_dvla.demonstration.v1"
_ENTRIES = {
    "image": IMAGE_KEY,
    "state": STATE_KEY,
    "chunk": ACTION_CHUNK_KEY,
    "action_is_pad": ACTION_IS_PAD_KEY,
}
#: Of those recorded with a camera at the wrist.
_WRIST = {"wrist_image": CAMERA_KEYS[1]}


@dataclass(frozen=True)
class DemonstrationInfo:
    """Where a demonstration comes from.

    Attributes:
        instruction (str): the task in words.
        task_suite (str): name of the suite.
        task_id (int): index in the suite.
        seed (int): seed of the scene.
        success (bool): whether the episode reached the goal.
        num_env_steps (int): length of the episode.
        init_state_hash (int): that of the reset; -1 of an environment, or a version, without.
    """

    instruction: str
    task_suite: str
    task_id: int
    seed: int
    success: bool
    num_env_steps: int
    init_state_hash: int = NO_HASH


@dataclass(frozen=True, eq=False)  # tensors of unequal length do not compare
class Demonstration:
    """One episode of an expert.

    Attributes:
        rows (TensorDictBase): ``[T]`` decisions with ``("observation", "image")`` uint8
            ``[T, 3, H, W]``, ``("observation", "wrist_image")`` alike if there is a second camera,
            ``("observation", "state")`` ``[T, S]``, ``("vla_action", "chunk")``
            ``[T, chunk, A]`` and ``"action_is_pad"`` ``[T, chunk]`` (True = after the end).
        info (DemonstrationInfo): its origin.
    """

    rows: TensorDictBase
    info: DemonstrationInfo

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to *path* as safetensors, whole or not at all.

        Args:
            path (path): the file to write; its folder is made if missing.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {name: self.rows.get(key, None) for name, key in _WRIST.items()}
        found = {name: entry for name, entry in found.items() if entry is not None}
        found |= {name: self.rows.get(key) for name, key in _ENTRIES.items()}
        tensors = {name: entry.contiguous() for name, entry in found.items()}
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        metadata = {"format": _FORMAT, "info": json.dumps(asdict(self.info))}
        try:
            save_file(tensors, unfinished, metadata=metadata)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Demonstration:
        """Read a file written by :meth:`save`.

        Args:
            path (path): the file.

        Returns:
            The :class:`Demonstration`.

        Raises:
            ValueError: if the file is damaged or is not a demonstration.
        """
        form: dict[str, Any] = {"instruction": str, "task_suite": str, "task_id": COUNT}
        form |= {"seed": COUNT, "success": bool, "num_env_steps": COUNT}
        form["init_state_hash"] = MaybeAbsent(Number(NO_HASH, whole=True))
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(
                        f"path must be a demonstration file ({_FORMAT}), got {path} of format "
                        f"{metadata.get('format')!r}. Record it with Demonstration.save."
                    )
                info = json.loads(metadata["info"])
                require_form(form, info, "info")
                entries = _ENTRIES | (_WRIST if _WRIST.keys() <= set(file.keys()) else {})
                tensors = {name: file.get_tensor(name) for name in entries}
                _check(tensors)
        except (SafetensorError, ValueError, KeyError) as err:
            raise ValueError(
                f"path must be a whole demonstration file, got {path} ({err}). "
                "Delete it and record it again."
            ) from err
        rows = TensorDict({}, batch_size=[len(tensors["state"])])
        for name, key in entries.items():
            rows.set(key, tensors[name])
        return cls(rows, DemonstrationInfo(**info))


def _check(tensors: dict[str, torch.Tensor]) -> None:
    """Require that the entries of a file are those of one episode."""
    image, state, chunk, pad = (tensors[name] for name in _ENTRIES)
    rows = chunk.shape[:1]
    wrist = tensors.get("wrist_image", image)
    finite = all(t.is_floating_point() and bool(t.isfinite().all()) for t in (state, chunk))
    if not (
        (image.dtype, image.ndim, image.shape[:2]) == (torch.uint8, 4, (*rows, 3))
        and (wrist.dtype, wrist.ndim, wrist.shape[:2]) == (torch.uint8, 4, (*rows, 3))
        and (state.ndim, state.shape[:1], chunk.ndim, finite) == (2, rows, 3, True)
        and (pad.dtype, pad.shape) == (torch.bool, chunk.shape[:2])
    ):
        found = {name: (str(t.dtype), list(t.shape)) for name, t in tensors.items()}
        raise ValueError(f"its rows must be finite and belong together, got {found}")


def stack_demonstrations(
    demonstrations: Iterable[Demonstration], tokenizer: ActionTokenizerBase | None = None
) -> tuple[TensorDictBase, InstructionTable]:
    """Join demonstrations into one batch of labelled decisions.

    Args:
        demonstrations (iterable of Demonstration): at least one, all of the same shapes.
        tokenizer (ActionTokenizerBase, optional): encodes the chunks. Defaults to none, for
            policies of continuous actions.

    Returns:
        The rows ``[N]`` with ``"instruction_id"`` and, with a tokenizer, ``("vla_action",
        "tokens")``; and the side table of instructions that the ids point into.
    """
    instructions = InstructionTable()
    parts = []
    for demo in demonstrations:
        rows = demo.rows.copy()
        if tokenizer is not None:
            rows.set(ACTION_TOKENS_KEY, tokenizer.encode(rows.get(ACTION_CHUNK_KEY)))
        ids = torch.full((len(rows), 1), instructions.id(demo.info.instruction))
        rows.set(INSTRUCTION_ID_KEY, ids)
        parts.append(rows)
    return torch.cat(parts), instructions


def make_demonstration_buffer(
    rows: TensorDictBase,
    instructions: InstructionTable,
    *,
    batch_size: int,
    transforms: Iterable[Transform] = (),
) -> TensorDictReplayBuffer:
    """Replay buffer that goes through labelled decisions without replacement.

    Args:
        rows (TensorDictBase): decisions ``[N]`` of :func:`stack_demonstrations`.
        instructions (InstructionTable): their side table.

    Keyword Args:
        batch_size (int): decisions of a sampled batch.
        transforms (iterable of Transform): applied to each sampled batch, such as
            :class:`~torchrl_dvla.data.augmentation.RandomShift`.

    Returns:
        A filled :class:`~torchrl.data.TensorDictReplayBuffer`.

    Raises:
        ValueError: if there are fewer rows than a batch holds.
    """
    if not 0 < batch_size <= len(rows):
        raise ValueError(
            f"batch_size must be in [1, {len(rows)}], the number of decisions, got {batch_size}. "
            "Record more demonstrations or lower it."
        )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(len(rows)),
        sampler=SamplerWithoutReplacement(),
        batch_size=batch_size,
    )
    buffer.extend(rows)
    for transform in (InstructionTransform(instructions), *transforms):
        buffer.append_transform(transform)
    return buffer
