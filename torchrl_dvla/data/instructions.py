# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Strings by id: rows hold numbers only."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDictBase
from torchrl.envs.transforms import Transform

from torchrl_dvla.data.schema import INSTRUCTION_ID_KEY, INSTRUCTION_KEY
from torchrl_dvla.saved_state import require_form

__all__ = ["InstructionTable", "InstructionTransform"]


class InstructionTable:
    """An append-only, two-way table of instructions.

    One process owns it; others are sent the rows they lack (:meth:`since`). Ids count up from 0 and
    never change, so a reader that knows the first ``n`` strings knows them for good.

    Args:
        texts (iterable of str): the first strings.

    Examples:
        >>> table = InstructionTable()
        >>> table.id("open the drawer"), table.id("close it"), table.id("open the drawer")
        (0, 1, 0)
        >>> table.text(1)
        'close it'
        >>> table.since(1)
        {1: 'close it'}
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._texts: list[str] = []
        self._ids: dict[str, int] = {}
        self._lock = threading.Lock()
        for text in texts:
            self.id(text)

    def id(self, text: str) -> int:
        """The id of ``text``, which is added if it is new."""
        if not isinstance(text, str):
            raise TypeError(
                f"text must be a string, got {type(text).__name__}. Pass one instruction at a time."
            )
        with self._lock:
            number = self._ids.setdefault(text, len(self._texts))
            if number == len(self._texts):
                self._texts.append(text)
            return number

    def text(self, instruction_id: int) -> str:
        """The string of an id.

        Raises:
            KeyError: if the id was never given.
        """
        number = int(instruction_id)
        if not 0 <= number < len(self._texts):
            raise KeyError(
                f"instruction_id {number} is not among the {len(self._texts)} known instructions. "
                "The collector adds each string with InstructionTable.id() before rows name it."
            )
        return self._texts[number]

    def stack(self, instruction_ids: torch.Tensor, batch_size: torch.Size) -> NonTensorStack:
        """The strings of several ids, to be set in a tensordict.

        Rows of one id share one entry: making an entry costs ten times as much as stacking it. So
        give a row another string by setting a new stack, not by writing into the row.

        Args:
            instruction_ids (torch.Tensor): ids ``[*B]`` or ``[*B, 1]``.
            batch_size (torch.Size): ``[*B]``, at least one dimension.
        """
        numbers = instruction_ids.flatten().tolist()
        entries = {number: NonTensorData(self.text(number)) for number in set(numbers)}
        return _stacked([entries[number] for number in numbers], batch_size)

    def since(self, num_known: int) -> dict[int, str]:
        """Strings with an id of at least ``num_known``, by id."""
        with self._lock:
            return dict(enumerate(self._texts[num_known:], num_known))

    def state_dict(self) -> dict[str, Any]:
        """The strings in the order of their ids."""
        return {"texts": list(self._texts)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Add the strings of a checkpoint under their old ids.

        Raises:
            ValueError: if an id already stands for another string, or a string is none.
        """
        require_form({"texts": [str]}, state_dict, "instructions")
        texts = list(state_dict["texts"])
        with self._lock:
            for ours, theirs in zip(self._texts, texts):
                if ours != theirs:
                    raise ValueError(
                        f"The table must be empty or agree with the checkpoint, got {ours!r} where "
                        f"it has {theirs!r}. Load the checkpoint before the first instruction is "
                        "added."
                    )
            for text in texts[len(self._texts) :]:
                self._ids[text] = len(self._texts)
                self._texts.append(text)

    def __len__(self) -> int:
        return len(self._texts)

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["texts"])  # type: ignore[misc]


class InstructionTransform(Transform):
    """Replay-buffer transform: ids in rows, strings outside.

    Sampling rebuilds ``"language_instruction"`` from ``"instruction_id"``. Data without ids passes
    unchanged.

    Args:
        table (InstructionTable): the side table.
    """

    def __init__(self, table: InstructionTable) -> None:
        super().__init__(in_keys=[], out_keys=[])
        self.table = table

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the strings to a sampled batch."""
        ids = tensordict.get(INSTRUCTION_ID_KEY, None)
        if ids is None:
            return tensordict
        if tensordict.batch_dims == 0:
            tensordict.set_non_tensor(INSTRUCTION_KEY, self.table.text(int(ids)))
        else:
            tensordict.set(INSTRUCTION_KEY, self.table.stack(ids, tensordict.batch_size))
        return tensordict

    def get_extra_state(self) -> dict[str, Any]:
        """The table, for checkpoints of the buffer."""
        return self.table.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the strings of a checkpoint over."""
        self.table.load_state_dict(state)


def _stacked(entries: Sequence[NonTensorData], batch_size: torch.Size) -> NonTensorStack:
    if len(batch_size) == 1:
        return NonTensorStack(*entries)
    size = len(entries) // batch_size[0]
    parts = [entries[start : start + size] for start in range(0, len(entries), size)]
    return NonTensorStack(*[_stacked(part, batch_size[1:]) for part in parts])
