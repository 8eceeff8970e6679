# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Access to rows by number: a worker's bounds-checked writes, and copies at memory speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key

from torchrl_dvla.memory.environment_pool import WorkerView

__all__ = ["RowFields", "RowWriter"]


class RowWriter:
    """Bounds-checked writer of some fields of leased rows, straight into shared memory.

    A row is written only while its page is leased under the given generation. A row that was
    sealed, freed, or leased again for another rollout is refused before the first byte is written,
    so a late or faulty worker cannot damage what a learner reads. A tensor of another shape or type
    than the row is refused by name, never broadcast or cast.

    It holds no lock. The owner of the ledger must not seal a page while a write is under way: it
    waits for the worker's event that the write is over, or for the end of the worker's process.

    A write costs one copy for each field. The check costs two reads of shared memory, about 0.1 us
    (:doc:`/decisions/0010-page-generation-in-messages`).

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
        #: The fields by their parent node: reading all entries of a node at once costs less than
        #: two single reads.
        self._by_node: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
        for key, field in zip(self.keys, self._fields):
            path = (key,) if isinstance(key, str) else key
            self._by_node.setdefault(path[:-1], []).append((path[-1], key, field))

    def write(
        self, row: int | list[int], generation: int | list[int], values: Sequence[Any]
    ) -> None:
        """Write one value to each field of ``row``.

        Args:
            row (int or list of int): the row; or ``n`` rows.
            generation (int or list of int): that of each row's page, as in the lease.
            values (sequence): arrays or scalars in the order of the keys. A scalar fills its field.
                For ``n`` rows, ``[n, *shape]`` in each field, as an array or a list.

        Raises:
            RuntimeError: if a row's page is not leased, or was leased anew; nothing is written.
        """
        self._require_all_leased(row, generation)
        for field, value in zip(self._fields, values, strict=True):
            if isinstance(row, int):
                field[row] = value
            else:
                field[row] = np.reshape(value, (len(row), *field.shape[1:]))

    def write_from(
        self,
        row: int | list[int],
        generation: int | list[int],
        tensordict: TensorDictBase,
        index: list[int] | None = None,
    ) -> None:
        """Copy the fields of ``row`` out of a tensordict without batch dimensions.

        Args:
            row (int or list of int): the row; or ``n`` rows.
            generation (int or list of int): that of each row's page, as in the lease.
            tensordict (TensorDictBase): holds every key, on any device; for ``n`` rows of batch
                size ``[N]``. Each field takes one copy, however many rows there are.
            index (list of int, optional): for ``n`` rows, their entries of ``[N]``.

        Raises:
            RuntimeError: as :meth:`write`.
            KeyError: if the tensordict lacks a key.
            ValueError: if a tensor has not the shape or type of its field, or holds NaN or
                infinity; nothing is written.
        """
        found = []
        batch_size = () if index is None else tensordict.batch_size
        if index is not None and index == list(range(tensordict.batch_size[0])):
            index = None  # no copy that selects them
        for node, fields in self._by_node.items():
            entries = _entries(tensordict, node)
            for name, key, field in fields:
                found.append((field, self._checked(key, entries.get(name), batch_size, index)))
        self._require_all_leased(row, generation)
        for field, values in found:
            field[row] = values

    def _require_all_leased(self, row: Any, generation: Any) -> None:
        if isinstance(row, int):
            self._require_leased(row, generation)
        else:
            for one_row, its_generation in zip(row, generation, strict=True):
                self._require_leased(one_row, its_generation)

    def _checked(
        self,
        key: NestedKey,
        tensor: Any,
        batch_size: Sequence[int],
        index: list[int] | None,
    ) -> np.ndarray:
        """``tensor``, unless it would be broadcast or cast, or would make a whole learner NaN."""
        shape, dtype = self._types[key]
        if tensor is None:
            raise KeyError(
                f"Field {key!r} must be in what is written, got none. The owner of its spec, "
                "usually the environment, must return it every time."
            )
        if tensor.shape != (*batch_size, *shape) or tensor.dtype is not dtype:
            raise ValueError(
                f"Field {key!r} must be {[*batch_size, *shape]} {dtype} in every row, got "
                f"{list(tensor.shape)} {tensor.dtype}. Return what the environment's spec says."
            )
        tensor = tensor if index is None else tensor[index]
        values: np.ndarray = tensor.cpu().numpy()
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(
                f"Field {key!r} must be finite, got {values.ravel()[:8].tolist()}. The simulator "
                "may have become unstable: end such an episode as a failure."
            )
        return values


def _entries(tensordict: TensorDictBase, node: tuple[str, ...]) -> dict[str, Any]:
    """Entries of a node of ``tensordict``; none if there is no such node."""
    found = tensordict.get(node, None) if node else tensordict
    return dict(found.items()) if isinstance(found, TensorDictBase) else {}


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
