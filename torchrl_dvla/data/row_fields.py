# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Copying rows by number, at the speed of ``memcpy``."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

__all__ = ["RowFields"]


class RowFields:
    """Fields of rows, gathered from and scattered to row numbers.

    A gather is the second and last copy of an observation, a scatter the first of a decision, so
    both have to run at memory speed. NumPy moves the bytes: for rows of the size of an image it
    copies each with one ``memcpy``, where ``index_select`` is a fifth slower and ``index_copy_``
    ten times (record 15 in ``docs/decisions`` has the measurement). Neither holds the interpreter
    lock meanwhile.

    Args:
        rows (TensorDictBase): contiguous CPU tensors ``[R, *shape]`` by key; they are shared, not
            copied.
        keys (iterable of NestedKey, optional): the fields to use. Defaults to all.

    Examples:
        >>> fields = RowFields(TensorDict({"x": torch.arange(4.0)}, [4]))
        >>> fields.gather(torch.tensor([3, 1]))["x"]
        tensor([3., 1.])
        >>> fields.scatter(torch.tensor([0]), TensorDict({"x": torch.tensor([9.0])}, [1]))
        >>> fields.gather(torch.tensor([0]))["x"]
        tensor([9.])
    """

    def __init__(self, rows: TensorDictBase, keys: Iterable[NestedKey] | None = None) -> None:
        self.num_rows = rows.batch_size[0]
        #: The fields, in order.
        self.keys = list(rows.keys(True, True) if keys is None else keys)
        self._tensors = {key: rows.get(key) for key in self.keys}
        self._bytes = {key: _as_bytes(tensor) for key, tensor in self._tensors.items()}

    def gather(self, index: torch.Tensor, out: RowFields | None = None) -> TensorDict:
        """Copy rows out.

        Args:
            index (torch.Tensor): int64 ``[n]``, row numbers.
            out (RowFields, optional): a batch ``[m]``, ``m >= n``, with the same fields, whose
                first ``n`` rows are overwritten. By default new memory is allocated.

        Returns:
            TensorDict: batch size ``[n]``; with ``out`` a fresh tensordict of views on it.

        Raises:
            IndexError: if a row does not exist.
        """
        numbers = self._numbers(index)
        batch = TensorDict({}, batch_size=[len(numbers)])
        for key in self.keys:
            if out is None:
                tensor = self._tensors[key]
                taken = torch.empty((len(numbers), *tensor.shape[1:]), dtype=tensor.dtype)
                _take(self._bytes[key], numbers, _as_bytes(taken))
                batch.set(key, taken)
            else:
                _take(self._bytes[key], numbers, out._bytes[key][: len(numbers)])
                batch.set(key, out._tensors[key][: len(numbers)])
        return batch

    def scatter(self, index: torch.Tensor, values: TensorDictBase) -> None:
        """Copy rows in.

        Args:
            index (torch.Tensor): int64 ``[n]``, row numbers; with a number given twice, either row
                may be the one that stays.
            values (TensorDictBase): ``[n]`` rows that hold every field; other keys are ignored,
                other types cast.

        Raises:
            IndexError: if a row does not exist.
        """
        numbers = self._numbers(index)
        for key in self.keys:
            tensor = self._tensors[key]
            value = values.get(key).to(tensor).expand(len(numbers), *tensor.shape[1:])
            self._bytes[key][numbers] = _as_bytes(value.contiguous())

    def _numbers(self, index: torch.Tensor) -> np.ndarray:
        numbers: np.ndarray = index.numpy()
        # Checked once for all fields; the copies themselves then skip it.
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_rows:
            raise IndexError(
                f"index must be within the {self.num_rows} rows, got {numbers.min()} to "
                f"{numbers.max()}. Pass row numbers of this pool."
            )
        return numbers


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of ``[R, *shape]`` as ``[R, bytes of a row]``; NumPy lacks some of the types."""
    flat = tensor.detach().view(tensor.shape[0], tensor.shape[1:].numel())
    array: np.ndarray = flat.view(torch.uint8).numpy()
    return array


def _take(source: np.ndarray, numbers: np.ndarray, out: np.ndarray) -> None:
    # "clip" is the mode that writes straight into ``out``.
    source.take(numbers, axis=0, out=out, mode="clip")
