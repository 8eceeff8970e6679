# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Memory for what lives as long as the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict

from torchrl_dvla.memory.arena import SharedArena
from torchrl_dvla.memory.layout import RowLayout
from torchrl_dvla.memory.limits import format_bytes, parse_bytes

__all__ = ["ModelPool"]

_ALIGNMENT_BYTES = 256


class ModelPool:
    """Memory for what lives as long as the run: weights, double buffers, staging batches.

    On the CPU it is one arena that tensors are cut from, page-locked where CUDA is present; on CUDA
    a private :class:`torch.cuda.MemPool`, whose segments no other allocation can enter. Tensors are
    never given back one by one: what is allocated here is allocated once (invariant 6), so there is
    nothing to fragment.

    The CUDA branch was written against PyTorch's documentation and is tested with a fake; it was
    not run on a GPU by this project.

    Args:
        model_bytes (int or str): the budget.
        device (torch.device or str): where.

    Raises:
        RuntimeError: on the CPU, if there is not so much memory.

    Examples:
        >>> pool = ModelPool("1KB")
        >>> pool.empty((4, 4), name="weights").shape
        torch.Size([4, 4])
        >>> pool.stats()["used_bytes"], pool.used_by_name()
        (256, {'weights': 256})
        >>> pool.close()
    """

    def __init__(self, model_bytes: int | str, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.nbytes = parse_bytes(model_bytes)
        self._used = 0
        self._asked = 0
        self._by_name: dict[str, int] = {}
        self._mem_pool: Any = None
        self._arena: SharedArena | None = None
        if self.device.type == "cuda":
            self._mem_pool = torch.cuda.MemPool()
        elif self.nbytes:
            self._arena = SharedArena(self.nbytes)
            self._arena.pin()

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, name: str = "tensor"
    ) -> torch.Tensor:
        """An uninitialised tensor from the pool.

        Args:
            shape (sequence of int): its shape.
            dtype (torch.dtype): its type.
            name (str): what it is for, for the report and the error message.

        Raises:
            RuntimeError: if the budget is spent; nothing has changed then.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        taken = -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if self._used + taken > self.nbytes:
            raise RuntimeError(
                f"model_bytes must hold {name} of {format_bytes(size)} besides the "
                f"{format_bytes(self._used)} in use, got {self.nbytes}. Raise model_bytes to at "
                f"least {self._used + taken}."
            )
        if self._arena is not None:
            tensor = self._arena.tensor(self._used, shape, dtype)
        else:
            with self._allocating():
                tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        self._used += taken
        self._asked += size
        self._by_name[name] = self._by_name.get(name, 0) + taken
        return tensor

    def rows(self, layout: RowLayout, num_rows: int, name: str = "rows") -> TensorDict:
        """Uninitialised rows ``[num_rows, *shape]`` of a layout, for staging.

        Args:
            layout (RowLayout): fields.
            num_rows (int): rows.
            name (str): what they are for.

        Raises:
            RuntimeError: if the budget is spent.
        """
        rows = TensorDict({}, batch_size=[num_rows], device=self.device)
        for key, (shape, dtype) in layout.items():
            rows.set(key, self.empty((num_rows, *shape), dtype, name))
        return rows

    @staticmethod
    def nbytes_for(layout: RowLayout, num_rows: int) -> int:
        """What :meth:`rows` takes from the budget."""
        sizes = (num_rows * shape.numel() * dtype.itemsize for shape, dtype in layout.values())
        return sum(-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Let allocations inside the block go to the pool (CUDA; elsewhere it changes nothing).

        For memory that other code allocates, such as a library's buffers.

        Raises:
            RuntimeError: at the end of the block, if the pool has outgrown its budget.
        """
        if self._mem_pool is None:
            yield
            return
        with self._allocating():
            yield
        held = self._held_bytes()
        if held > self.nbytes:
            raise RuntimeError(
                f"model_bytes must hold what is allocated in use(), got {self.nbytes} for "
                f"{held} ({format_bytes(held)}). Raise model_bytes to at least {held}."
            )

    def used_by_name(self) -> dict[str, int]:
        """Bytes taken, by what they were taken for."""
        return dict(self._by_name)

    def stats(self) -> dict[str, float]:
        """Gauges of the pool.

        Returns:
            dict: ``reserved_bytes`` (the budget; on the CPU it is allocated at once),
            ``used_bytes``, ``peak_bytes`` and ``internal_waste``, the share of the used bytes that
            is alignment. Nobody waits for this pool: what does not fit is an error at the start.
        """
        held = self._used if self._mem_pool is None else max(self._used, self._held_bytes())
        return {
            "reserved_bytes": self.nbytes,
            "used_bytes": held,
            "peak_bytes": held,  # nothing is given back before the end
            "internal_waste": 1.0 - self._asked / self._used if self._used else 0.0,
        }

    def close(self) -> None:
        """Give the memory back; tensors that live on read zeros (CPU) or keep it (CUDA)."""
        if self._arena is not None:
            self._arena.close()
        self._arena = None
        self._mem_pool = None
        self.nbytes = self._used  # nothing more can be taken

    def _allocating(self) -> contextlib.AbstractContextManager[None]:
        if self._mem_pool is None:
            return contextlib.nullcontext()
        return torch.cuda.use_mem_pool(self._mem_pool, self.device)

    def _held_bytes(self) -> int:
        segments = self._mem_pool.snapshot(include_traces=False)
        return sum(int(segment["allocated_size"]) for segment in segments)
