# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Row layout: fields of a row, and where each lies in memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Integral

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, unravel_key

from torchrl_dvla.memory.arena import SharedArena

__all__ = ["RowLayout"]

#: Every field begins on a cache line of its own.
_ALIGNMENT_BYTES = 64
#: What NumPy moves, and a learner computes with.
_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.float32, torch.float64,
)  # fmt: skip
_NUMPY = {dtype: torch.empty(0, dtype=dtype).numpy().dtype for dtype in _DTYPES}
#: A row is one decision: two cameras of 4K take a twentieth of it.
_MAX_ROW_BYTES = 2**30


class RowLayout(Mapping[NestedKey, tuple[torch.Size, torch.dtype]]):
    """An ordered record type: nested key -> (shape, dtype) of one row, without batch dimensions.

    Args:
        fields (Mapping): shape and dtype by nested key.

    Raises:
        ValueError: if there is no field, a shape is not static, a key is given twice or is part of
            another, or the row has more than 1 GiB; the message names the key.
        TypeError: if a key is not made of strings, or a dtype is none of bool, uint8, int8 to
            int64 and float16 to float64.

    Examples:
        >>> layout = RowLayout({
        ...     ("observation", "image"): ((3, 4, 4), torch.uint8),
        ...     ("next", "reward"): ((1,), torch.float32),
        ... })
        >>> layout.row_bytes
        52
        >>> layout["next", "reward"]
        (torch.Size([1]), torch.float32)
    """

    def __init__(self, fields: Mapping[NestedKey, tuple[Sequence[int], torch.dtype]]) -> None:
        if not fields:
            raise ValueError("fields must name at least one tensor, got none. Add the row's keys.")
        self._fields: dict[NestedKey, tuple[torch.Size, torch.dtype]] = {}
        paths: list[tuple[str, ...]] = []
        num_bytes = 0
        for key, (shape, dtype) in fields.items():
            path = key if isinstance(key, tuple) else (key,)
            if not path or not all(isinstance(part, str) and part for part in path):
                raise TypeError(
                    f"Field {key!r} must be named by a string, or a tuple of them. Rename it."
                )
            if dtype not in _DTYPES:
                raise TypeError(
                    f"Field {key!r} must have a torch.dtype among bool, uint8, int8 to int64 and "
                    f"float16 to float64, got {dtype!r}. Convert it; strings and objects "
                    "live in a side table (see torchrl_dvla.data.InstructionTable), not in rows."
                )
            if not all(isinstance(size, Integral) and size >= 1 for size in shape):
                raise ValueError(
                    f"Field {key!r} must have a static shape of positive sizes, got {list(shape)}. "
                    "Give the spec its size, or leave the key out of the row."
                )
            num_bytes += math.prod(shape) * dtype.itemsize  # torch counts to 2**63 only
            if num_bytes > _MAX_ROW_BYTES:
                raise ValueError(
                    f"A row must have at most {_MAX_ROW_BYTES} bytes, got {num_bytes} with field "
                    f"{key!r} {list(shape)} {dtype}. Make it smaller, or leave it out of the row."
                )
            paths.append(path)
            self._fields[unravel_key(key)] = (torch.Size(shape), dtype)
        for one, other in pairwise(sorted(paths)):
            if other[: len(one)] == one:
                raise ValueError(f"Field {one} must be named once, got {other} too. Rename one.")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, padding between fields not counted."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self._fields.values())

    @property
    def signature(self) -> str:
        """A digest of keys, shapes and types: equal for equal layouts, in every process and run."""
        text = repr([(key, tuple(shape), str(dtype)) for key, (shape, dtype) in self.items()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def nbytes(self, num_rows: int) -> int:
        """Bytes of ``num_rows`` rows, each field contiguous over all rows and aligned."""
        return sum(
            _aligned(num_rows * shape.numel() * dtype.itemsize) for shape, dtype in self.values()
        )

    def rows(self, arena: SharedArena, num_rows: int, offset_bytes: int = 0) -> TensorDict:
        """Zero-copy views ``[num_rows, *shape]`` of every field on ``arena``.

        Fields follow each other (structure of arrays), so gathering rows of one field is one
        ``index_select`` over contiguous memory.

        Args:
            arena (SharedArena): the memory.
            num_rows (int): rows.
            offset_bytes (int): where the first field begins.

        Returns:
            TensorDict: batch size ``[num_rows]``, locked: entries can be written, not replaced.
        """
        rows = TensorDict({}, batch_size=[num_rows])
        for key, (shape, dtype) in self.items():
            rows.set(key, arena.tensor(offset_bytes, (num_rows, *shape), dtype))
            offset_bytes += _aligned(num_rows * shape.numel() * dtype.itemsize)
        return rows.lock_()

    def empty(self, num_rows: int, *, pin_memory: bool = False) -> TensorDict:
        """Private rows of the same layout ``[num_rows, *shape]``, for staging."""
        rows = TensorDict({}, batch_size=[num_rows])
        for key, (shape, dtype) in self.items():
            tensor = torch.empty((num_rows, *shape), dtype=dtype, pin_memory=pin_memory)
            rows.set(key, tensor)
        return rows

    def columns(self, buffer: np.ndarray, num_rows: int) -> dict[NestedKey, np.ndarray]:
        """Zero-copy views ``[num_rows, *shape]`` of every field on bytes that may come from afar.

        Args:
            buffer (np.ndarray): uint8 ``[nbytes(num_rows)]``.
            num_rows (int): rows.

        Raises:
            ValueError: if the buffer has another size.

        Examples:
            >>> layout = RowLayout({"x": ((2,), torch.float32), "done": ((1,), torch.bool)})
            >>> columns = layout.columns(np.zeros(layout.nbytes(3), np.uint8), 3)
            >>> columns["x"].shape, columns["done"].dtype
            ((3, 2), dtype('bool'))
        """
        if buffer.shape != (self.nbytes(num_rows),):
            raise ValueError(
                f"buffer must hold the {self.nbytes(num_rows)} bytes of {num_rows} rows, got "
                f"{list(buffer.shape)}. Both ends must have the same layout."
            )
        columns, offset_bytes = {}, 0
        for key, (shape, dtype) in self.items():
            nbytes = num_rows * shape.numel() * dtype.itemsize
            part = buffer[offset_bytes : offset_bytes + nbytes].view(_NUMPY[dtype])
            columns[key] = part.reshape(num_rows, *shape)
            offset_bytes += _aligned(nbytes)
        return columns

    def __getitem__(self, key: NestedKey) -> tuple[torch.Size, torch.dtype]:
        return self._fields[unravel_key(key)]

    def __iter__(self) -> Iterator[NestedKey]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        fields = [f"    {key!r}: {list(shape)} {dtype}," for key, (shape, dtype) in self.items()]
        return "\n".join([f"{type(self).__name__}({self.row_bytes} bytes a row", *fields, ")"])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
