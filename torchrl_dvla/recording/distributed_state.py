# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""State of an optimizer as a folder that processes write together, and any number of them read."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from torchrl_dvla.saved_state import read_state

__all__ = ["is_distributed", "load_distributed", "read_whole", "save_distributed"]

_STATE = "state.pt"
_METADATA = ".metadata"


def is_distributed(path: Path) -> bool:
    """Whether a folder was written by :func:`save_distributed`."""
    return (path / _METADATA).is_file()


def save_distributed(policy: nn.Module, optimizer: Optimizer, path: Path) -> None:
    """Write an optimizer's state by the names of the parameters, each process what it has.

    Args:
        policy (nn.Module): has the parameters, whole or sharded.
        optimizer (Optimizer): of these parameters.
        path (Path): the folder, the same for all processes.
    """
    with _quiet():
        state = get_optimizer_state_dict(policy, optimizer)
        dcp.save({"optimizer": state}, checkpoint_id=path, no_dist=not dist.is_initialized())


def load_distributed(policy: nn.Module, optimizer: Optimizer, path: Path) -> None:
    """Load an optimizer's state, each process what it is to have.

    Args:
        policy (nn.Module): has the parameters, whole or sharded.
        optimizer (Optimizer): of these parameters.
        path (Path): folder of :func:`save_distributed`, of any number of processes, or with the
            ``state.pt`` of a single one.
    """
    with _quiet():
        if is_distributed(path):
            state = get_optimizer_state_dict(policy, optimizer)  # to be overwritten, in place
            _read(state, path)
            set_optimizer_state_dict(policy, optimizer, state)
            return
        names = [name for name, p in policy.named_parameters() if p.requires_grad]
        found = read_state(path / _STATE, mmap=True)
        whole: dict[str, Any] = {
            "state": {names[index]: dict(entry) for index, entry in found["state"].items()},
            "param_groups": [
                # What PyTorch's newer optimizers know keeps its default.
                {**own, **group, "params": [names[index] for index in group["params"]]}
                for own, group in zip(optimizer.param_groups, found["param_groups"], strict=True)
            ],
        }
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(policy, optimizer, whole, options=options)


def read_whole(policy: nn.Module, optimizer: Optimizer, path: Path) -> dict[str, Any]:
    """The whole state in a folder of :func:`save_distributed`, as a plain optimizer has it.

    Args:
        policy (nn.Module): has the parameters; they are whole.
        optimizer (Optimizer): of these parameters; not changed but for state that it has not made
            yet.
        path (Path): the folder.
    """
    with _quiet():
        state = tree_map_only(
            torch.Tensor, torch.clone, get_optimizer_state_dict(policy, optimizer)
        )
        _read(state, path)
    name_of = {id(p): name for name, p in policy.named_parameters()}
    ordered = [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
    index_of = {name: index for index, name in enumerate(ordered)}
    return {
        "state": {index_of[name]: entry for name, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [index_of[name] for name in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def _read(state: dict[str, Any], path: Path) -> None:
    dcp.load(
        {"optimizer": state},
        storage_reader=_DataReader(path),
        # A parameter that never had a gradient has no state there.
        planner=DefaultLoadPlanner(allow_partial_load=True),
        no_dist=not dist.is_initialized(),
    )


class _DataReader(dcp.FileSystemReader):
    """Reader of a folder whose metadata is data: PyTorch's would run whatever a pickle asks for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / _METADATA).open("rb") as file:
            metadata = _DataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _DataUnpickler(pickle.Unpickler):
    _FOLDER = "torch.distributed.checkpoint"
    _NAMES = {
        f"{_FOLDER}.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        f"{_FOLDER}.filesystem": {"_StorageInfo"},
        "pathlib": {"PosixPath"},
        "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int64", "uint8", "bool"},
        "torch.serialization": {"_get_layout"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self._NAMES.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(
            f"{_METADATA} must hold the layout of a checkpoint, got one that asks for "
            f"{module}.{name}. It is damaged, or was not written by {self._FOLDER}: load another."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warnings about what is meant here: one process, and no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield
