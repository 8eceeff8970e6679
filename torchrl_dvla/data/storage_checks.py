# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a pooled storage takes in: rows that fit its layout, and checkpoints that do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase

from torchrl_dvla.memory import EnvironmentPool, RowLayout

if TYPE_CHECKING:
    from torchrl_dvla.data.storage import PooledStorage

__all__ = ["PooledCheckpointer", "check_checkpoint", "check_fields"]

#: Keys that samples carry besides the row and that may come back with them.
_FOREIGN_KEYS = ("index", "index_generation")


class PooledCheckpointer(StorageCheckpointerBase):
    """Rows as one memory-mapped tensordict, everything else as JSON."""

    def dumps(self, storage: PooledStorage, path: Path | str) -> None:
        folder = Path(path)
        folder.mkdir(exist_ok=True, parents=True)
        state = storage.state_dict()
        rows = TensorDict(
            {str(number): tensor for number, tensor in enumerate(state.pop("fields"))},
            batch_size=[len(storage)],
        )
        if len(storage):
            rows.memmap(folder / "rows")
        (folder / "storage.json").write_text(json.dumps(state))

    def loads(self, storage: PooledStorage, path: Path | str) -> None:
        folder = Path(path)
        state = json.loads((folder / "storage.json").read_text())
        state["fields"] = []
        if state["num_rows"]:
            rows = TensorDict.load_memmap(folder / "rows")
            state["fields"] = [rows[str(number)] for number in range(len(storage.pool.layout))]
        storage.load_state_dict(state)


def check_fields(layout: RowLayout, data: TensorDictBase) -> None:
    """Refuse rows that have other fields than the layout, or other shapes; the field is named."""
    keys = set(data.keys(True, True, is_leaf=is_leaf_nontensor))
    missing = [key for key in layout if key not in keys]
    extra = [key for key in keys if key not in layout and key not in _FOREIGN_KEYS]
    if missing or extra:
        raise KeyError(
            f"data must hold the fields of the row layout, got missing {missing} and unknown "
            f"{sorted(extra, key=str)}. Select the fields, or build the pool with them; "
            "strings need an InstructionTable."
        )
    for key, (shape, dtype) in layout.items():
        value = data.get(key)
        if value.shape[data.batch_dims :] != shape or not torch.can_cast(value.dtype, dtype):
            raise ValueError(
                f"Field {key!r} must be {list(shape)} {dtype}, got "
                f"{list(value.shape[data.batch_dims :])} {value.dtype}. Cast or reshape it."
            )


def check_checkpoint(
    pool: EnvironmentPool, max_size: int, num_own_pages: int, state_dict: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint of other specs, of more rows than ``max_size``, or of too many pages.

    Args:
        pool (EnvironmentPool): where it shall go.
        max_size (int): rows that the storage may hold.
        num_own_pages (int): pages that the storage gives back first.
        state_dict (Mapping): the checkpoint.
    """
    layout = pool.layout
    if state_dict["signature"] != layout.signature:
        raise ValueError(
            f"The checkpoint must come from the same specs, got rows "
            f"of\n{state_dict['layout']}\nfor a pool of\n{layout!r}\nBuild the pool "
            "as that run did, or start the buffer empty."
        )
    if state_dict["num_rows"] > max_size:
        raise ValueError(
            f"The checkpoint's {state_dict['num_rows']} rows must fit in max_size, got "
            f"{max_size}. Raise env_bytes."
        )
    sizes = [size for _, group in state_dict["segments"] for size in group]
    num_pages = sum(-(-size // pool.rows_per_page) for size in sizes or [state_dict["num_rows"]])
    room = pool.num_free_pages + num_own_pages
    if num_pages > room:
        raise ValueError(
            f"The checkpoint's {num_pages} pages must fit in those that are free or the storage's "
            f"own, got {room}. Load it before sampling begins, or raise env_bytes."
        )
