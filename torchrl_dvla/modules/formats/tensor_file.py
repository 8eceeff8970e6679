# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Tensors of a checkpoint by name, in one file, in shards or in files of parts."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torchrl_dvla.differences import join_some

__all__ = ["TensorFile"]

_COPY_AGAIN = "copy the checkpoint again, with all its files"
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class TensorFile:
    """Names, shapes and dtypes of a checkpoint's tensors, which are read when asked for.

    Args:
        path (Path): a safetensors file, or the index of several (``*.index.json``).
        parts (Mapping): further files, of ``torch.save``, by what the names of their tensors begin
            with here. ``"module."`` of a parallel module is taken off the names.

    Raises:
        ValueError: if one is no such file, or a part of one, or the index names other tensors.
    """

    def __init__(self, path: Path, parts: Mapping[str, Path] | None = None) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        #: File of a tensor, and its name in there.
        self._places: dict[str, tuple[Path, str]] = {}
        #: Tensor that a piece is of, and its rows.
        self._pieces: dict[str, tuple[str, slice]] = {}
        weight_map = _weight_map(path) if path.suffix == ".json" else {}
        for shard in sorted({path.parent / name for name in weight_map.values()}) or [path]:
            self._add_safetensors(shard)
        found = {name: place.name for name, (place, _) in self._places.items()}
        if weight_map and found != weight_map:
            problems = sorted(set(found.items()) ^ set(weight_map.items()))
            raise ValueError(
                f"the files beside {path} must hold what it names, got differences: "
                f"{join_some([f'{name!r} in {place}' for name, place in problems])}. They are of "
                f"two checkpoints: {_COPY_AGAIN}."
            )
        for prefix, part in (parts or {}).items():
            for key, tensor in _load(part).items():
                name = prefix + key.removeprefix("module.")
                self._add(name, part, key, tuple(tensor.shape), _DTYPES.get(tensor.dtype, "other"))

    @property
    def files(self) -> set[Path]:
        """The files that hold the tensors."""
        return {path for path, _ in self._places.values()}

    def _add(self, name: str, *place: Any) -> None:
        path, key, self.shapes[name], self.dtypes[name] = place
        self._places[name] = path, key

    def _add_safetensors(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    entry = file.get_slice(name)
                    self._add(name, path, name, tuple(entry.get_shape()), entry.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} must be a safetensors file, got an error: {error}. It is truncated, or a "
                f"Git LFS pointer: {_COPY_AGAIN}."
            ) from error

    def split(self, name: str, rows: Mapping[str, int]) -> None:
        """Have pieces of a tensor, by rows, stand for it: ``"weight"`` as ``"weight[q]"`` etc.

        Nothing is done if it is not there, or has not that many rows.

        Args:
            name (str): the tensor.
            rows (Mapping): number of rows by the piece's name, in order.
        """
        if self.shapes.get(name, (-1,))[0] != sum(rows.values()):
            return
        shape, dtype, start = self.shapes.pop(name), self.dtypes.pop(name), 0
        for piece, count in rows.items():
            own = f"{name}[{piece}]"
            self._pieces[own] = name, slice(start, start + count)
            self.shapes[own], self.dtypes[own] = (count, *shape[1:]), dtype
            start += count

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name."""
        wanted = {name: self._pieces.get(name, (name, slice(None))) for name in names}
        read: dict[str, torch.Tensor] = {}
        for path in sorted({self._places[whole][0] for whole, _ in wanted.values()}):
            here = {n: w for n, w in wanted.items() if self._places[w[0]][0] == path}
            if path.suffix == ".pt":
                loaded = _load(path)
                read |= {
                    n: loaded[self._places[w][1]][rows].clone() for n, (w, rows) in here.items()
                }
                continue
            with safe_open(path, "pt") as file:
                for name, (whole, rows) in here.items():
                    is_piece = name in self._pieces
                    read[name] = file.get_slice(whole)[rows] if is_piece else file.get_tensor(whole)
        return {name: read[name] for name in wanted}

    def write(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write tensors to files of the same names in another folder.

        Args:
            tensors (Mapping): all of them, by name.
            folder (Path): the folder.
        """
        pieces: dict[str, list[torch.Tensor]] = {}
        for name in self.shapes:  # pieces of one tensor are in order
            pieces.setdefault(self._pieces.get(name, (name, None))[0], []).append(tensors[name])
        for path in self.files:
            here = {
                key: torch.cat(pieces[name]) if len(pieces[name]) > 1 else pieces[name][0]
                for name, (place, key) in self._places.items()
                if place == path
            }
            if path.suffix == ".pt":
                torch.save(here, folder / path.name)
                continue
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            save_file(here, str(folder / path.name), metadata=metadata)

    def count(self, names: Iterable[str]) -> dict[str, int]:
        """Number of elements of each dtype."""
        counts: dict[str, int] = {}
        for name in names:
            dtype = self.dtypes[name]
            counts[dtype] = counts.get(dtype, 0) + math.prod(self.shapes[name])
        return counts


def _weight_map(path: Path) -> dict[str, str]:
    """Names of the shards by those of the tensors."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if found and all(isinstance(each, str) and "/" not in each for each in found.values()):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(
        f"{path} must hold a 'weight_map' of names of tensors to files beside it, got none. It is "
        f"damaged: {_COPY_AGAIN}."
    )


def _load(path: Path) -> dict[str, torch.Tensor]:
    """State dict in a file of ``torch.save``; nothing in it is run."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        if all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
            return dict(loaded)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        found = f"an error: {(str(error) or type(error).__name__).splitlines()[0]}"
    else:
        found = "something else"
    raise ValueError(f"{path} must hold a state dict, got {found}. It is damaged: {_COPY_AGAIN}.")
