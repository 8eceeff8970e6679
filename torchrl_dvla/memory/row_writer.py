# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Bounds-checked writer of leased rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase, unravel_key

from torchrl_dvla.memory.environment_pool import WorkerView

__all__ = ["RowWriter"]

#: Rows of a field up to this size are gathered first and written in one call: one copy more, and
#: 0.7 us instead of 2.0 for each row of 3 KB. The copy of a large row would cost more than that.
_STACKED_BYTES = 16 * 1024


class RowWriter:
    """Bounds-checked writer of some fields of leased rows, straight into shared memory.

    A row is written only while its page is leased under the given generation. A row that was
    sealed, freed, or leased again for another rollout is refused before the first byte is written,
    so a late or faulty worker cannot damage what a learner reads. A tensor of another shape or type
    than the row is refused by name, never broadcast or cast.

    It holds no lock. The owner of the ledger must not seal a page while a write is under way: it
    waits for the worker's event that the write is over, or for the end of the worker's process.

    A write costs one copy for each field. The check costs two reads of shared memory, about 0.2 us
    (:doc:`/decisions/0010-generations-travel-with-rows`).

    Args:
        view (WorkerView): the rows.
        keys (sequence of NestedKey): the fields, in the order in which :meth:`write` takes them.

    Raises:
        KeyError: if the row has no such field.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.memory import EnvironmentPool, RowLayout
        >>> layout = RowLayout({"state": ((2,), torch.float32), "done": ((1,), torch.bool)})
        >>> pool = EnvironmentPool(layout, num_pages=1, rows_per_page=4)
        >>> page = pool.lease("worker 0")
        >>> writer = RowWriter(pool.worker_view(), ["done"])
        >>> writer.write(3, page.generation, [True])
        >>> pool.rows["done"].flatten().tolist()
        [False, False, False, True]
        >>> pages = pool.seal([page], num_rows=4)
        >>> writer.write(3, page.generation, [False])
        Traceback (most recent call last):
        ...
        RuntimeError: Row 3 must lie in a leased page, got page 0, which is sealed. ...
        >>> pool.close()
    """

    def __init__(self, view: WorkerView, keys: Sequence[NestedKey]) -> None:
        self.keys: list[NestedKey] = [unravel_key(key) for key in keys]
        unknown = [key for key in self.keys if key not in view.layout]
        if unknown:
            raise KeyError(
                f"keys must be fields of the row, got {unknown}. The layout is made of the "
                f"environment's and the policy's specs: {list(view.layout)}."
            )
        self._require_leased = view.require_leased
        self._types = {key: view.layout[key] for key in self.keys}
        self._fields = [view.rows.get(key).numpy() for key in self.keys]
        self._flat = [field.reshape(len(field), -1) for field in self._fields]
        #: The fields by their parent node: reading all entries of a node at once costs less than
        #: two single reads.
        self._by_node: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
        for key, field in zip(self.keys, self._fields):
            path = (key,) if isinstance(key, str) else key
            self._by_node.setdefault(path[:-1], []).append((path[-1], key, field))

    def write(self, row: int, generation: int, values: Sequence[Any]) -> None:
        """Write one value to each field of ``row``.

        Args:
            row (int): the row.
            generation (int): that of the row's page, as in the lease.
            values (sequence): arrays or scalars in the order of the keys. A scalar fills its field.

        Raises:
            RuntimeError: if the row's page is not leased, or was leased anew; nothing is written.
        """
        self._require_leased(row, generation)
        for field, value in zip(self._fields, values, strict=True):
            field[row] = value

    def write_rows(
        self, rows: Sequence[int], generations: Sequence[int], columns: Sequence[Any]
    ) -> None:
        """Write several rows, field by field: for small values that is cheaper than one by one.

        Args:
            rows (sequence of int): ``N`` different rows.
            generations (sequence of int): of the page of each row, as in the lease.
            columns (sequence): for each key ``N`` arrays or, for a field of one number, scalars.

        Raises:
            RuntimeError: if the page of a row is not leased, or was leased anew; nothing is
                written.
        """
        for row, generation in zip(rows, generations, strict=True):
            self._require_leased(row, generation)
        index = np.array(rows)
        for field, column in zip(self._flat, columns, strict=True):
            field[index] = np.reshape(column, (len(index), -1))

    def write_from(self, row: int, generation: int, tensordict: TensorDictBase) -> None:
        """Copy the fields of ``row`` out of a tensordict without batch dimensions.

        Args:
            row (int): the row.
            generation (int): that of the row's page, as in the lease.
            tensordict (TensorDictBase): holds every key.

        Raises:
            RuntimeError: as :meth:`write`.
            KeyError: if the tensordict lacks a key.
            ValueError: if a tensor has not the shape or type of its field; nothing is written.
        """
        self.write_rows_from([row], [generation], [tensordict])

    def write_rows_from(
        self,
        rows: Sequence[int],
        generations: Sequence[int],
        tensordicts: Sequence[TensorDictBase],
    ) -> None:
        """Copy the fields of several rows, each out of a tensordict, as :meth:`write_from` does."""
        found = []
        for node, fields in self._by_node.items():
            nodes = [_entries(tensordict, node) for tensordict in tensordicts]
            for name, key, field in fields:
                tensors: list[Any] = [entries.get(name) for entries in nodes]
                self._check(key, tensors)
                found.append((field, tensors))
        for row, generation in zip(rows, generations, strict=True):
            self._require_leased(row, generation)
        for field, tensors in found:
            if len(rows) > 1 and field[0].nbytes <= _STACKED_BYTES:
                field[rows] = torch.stack(tensors).numpy()
            else:
                for row, tensor in zip(rows, tensors, strict=True):
                    field[row] = tensor.numpy()

    def _check(self, key: NestedKey, tensors: Sequence[Any]) -> None:
        """Refuse what would be broadcast or cast."""
        shape, dtype = self._types[key]
        for tensor in tensors:
            if tensor is None:
                raise KeyError(
                    f"Field {key!r} must be in what is written, got none. The owner of its "
                    "spec, usually the environment, must return it every time."
                )
            if tensor.shape != shape or tensor.dtype is not dtype:
                raise ValueError(
                    f"Field {key!r} must be {list(shape)} {dtype} in every row, got "
                    f"{list(tensor.shape)} {tensor.dtype}. Return what the environment's spec says."
                )


def _entries(tensordict: TensorDictBase, node: tuple[str, ...]) -> dict[str, Any]:
    """Entries of a node of ``tensordict``; none if there is no such node."""
    found = tensordict.get(node, None) if node else tensordict
    return {} if found is None else dict(found.items())
