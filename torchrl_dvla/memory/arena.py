# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Arena: a block of shared memory without a name."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Sequence

import torch

from torchrl_dvla.memory.anonymous_file import AnonymousFile
from torchrl_dvla.memory.available_memory import format_bytes, shareable_bytes

__all__ = ["SharedArena"]


class SharedArena(AnonymousFile):
    """Block of shared memory that dies with the last process that maps it.

    An :class:`AnonymousFile`: after ``kill -9`` of every process the kernel takes the memory back,
    and a process that an arena is pickled to maps the same bytes. All of it is allocated here and
    now; a later write cannot fail for lack of memory.

    Args:
        nbytes (int): size in bytes.

    Raises:
        ValueError: if *nbytes* is not positive.
        RuntimeError: if there is not enough memory; nothing is allocated then.

    Examples:
        >>> arena = SharedArena(64)
        >>> a = arena.tensor(0, (2, 2), torch.float32)
        >>> b = arena.tensor(8, (2,), torch.float32)
        >>> _ = b.fill_(1.0)
        >>> a
        tensor([[0., 0.],
                [1., 1.]])
        >>> arena.close()
    """

    label = "shared memory"

    def __init__(self, nbytes: int) -> None:
        if nbytes <= 0:
            raise ValueError(f"nbytes must be positive, got {nbytes}. Give the bytes to share.")
        free, where = shareable_bytes()
        if free is not None and nbytes > free:
            raise RuntimeError(_too_large(nbytes, f"only {format_bytes(free)} are free{where}"))
        super().__init__()
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
        except OSError as error:
            super().close()
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
                raise RuntimeError(_too_large(nbytes, os.strerror(error.errno))) from error
            raise
        self._map_memory(nbytes)
        self._owner_pid = os.getpid()

    def _open(self, fd: int, nbytes: int) -> None:  # type: ignore[override]
        super()._open(fd)
        self._map_memory(nbytes)

    def _map_memory(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._map: mmap.mmap | None = mmap.mmap(self._fd, nbytes)
        self._owner_pid = -1
        self._unpin: weakref.finalize[..., SharedArena] | None = None

    def _state(self) -> tuple[int]:
        return (self.nbytes,)

    @property
    def is_owner(self) -> bool:
        """Whether this process created the arena."""
        return self._owner_pid == os.getpid()

    def tensor(
        self, offset_bytes: int, shape: Sequence[int], dtype: torch.dtype = torch.uint8
    ) -> torch.Tensor:
        """A tensor on the arena's own bytes: writes are seen by every process that maps it.

        Args:
            offset_bytes (int): where it begins; a multiple of the item size.
            shape (sequence of int): its shape.
            dtype (torch.dtype): its type.

        Returns:
            torch.Tensor: a contiguous view, no copy.

        Raises:
            ValueError: if it does not lie within the arena or is misaligned.
            RuntimeError: if the arena is closed.
        """
        if self._map is None:
            raise RuntimeError("The arena is closed. Views must be taken before close().")
        num_items = torch.Size(shape).numel()
        end = offset_bytes + num_items * dtype.itemsize
        if offset_bytes < 0 or end > self.nbytes:
            raise ValueError(
                f"offset_bytes and shape must stay within the arena's {self.nbytes} bytes, got "
                f"{offset_bytes} and {list(shape)} of {dtype} (ends at {end}). Make the arena "
                "larger."
            )
        if offset_bytes % dtype.itemsize:
            raise ValueError(
                f"offset_bytes must be a multiple of {dtype.itemsize} for {dtype}, got "
                f"{offset_bytes}. Round it up."
            )
        if num_items == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=num_items, offset=offset_bytes)
        return flat.view(tuple(shape))

    def pin(self) -> bool:
        """Page-lock the memory for CUDA copies; does nothing without CUDA.

        Returns:
            bool: whether the memory is pinned.

        Raises:
            RuntimeError: if the driver refuses.
        """
        if self._unpin is not None:
            return True
        if not torch.cuda.is_available():
            return False
        whole = self.tensor(0, (self.nbytes,))
        reason = ""
        try:
            code = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), self.nbytes, 0)
            if int(code):
                reason = f"cudaHostRegister: {torch.cuda.cudart().cudaGetErrorString(code)}"
        except RuntimeError as error:  # a GPU that is full, or another process's own
            reason = str(error)
        if reason:
            raise RuntimeError(
                f"{format_bytes(self.nbytes)} could not be page-locked ({reason}). Raise the limit "
                "of locked memory (ulimit -l), or hide a GPU that is not to be used "
                "(CUDA_VISIBLE_DEVICES='')."
            )
        # At the latest when nobody takes views any more: the driver must not keep what is unmapped.
        self._unpin = weakref.finalize(self, _unregister, whole, os.getpid())
        self._unpin.atexit = False
        return True

    def close(self, *, empty: bool = True) -> None:
        """Give the memory back; safe to call twice.

        The process that created the arena releases the physical memory at once, for every process:
        whoever still holds a view reads zeros and cannot crash. Other processes only drop their
        map.

        Keyword Args:
            empty (bool): if ``False``, the memory stays as it is and goes with the last view.
        """
        if self._map is None:
            return
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        if empty and self.is_owner and hasattr(mmap, "MADV_REMOVE"):
            try:
                self._map.madvise(mmap.MADV_REMOVE)
            except OSError:
                pass  # a file system without holes: the memory goes with the last view
        # Never mmap.close(): torch keeps no export on the buffer, so that would unmap memory under
        # the feet of live views. The map goes when the last of them does.
        self._map = None
        super().close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"{type(self).__name__}(nbytes={self.nbytes}, {state})"


def _unregister(whole: torch.Tensor, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has the map, not the registration
        torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())


def _too_large(nbytes: int, reason: str) -> str:
    return (
        f"nbytes must fit in shared memory, got {nbytes} ({format_bytes(nbytes)}): {reason}. Lower "
        "the byte budget, or raise the memory limit of the machine or container."
    )
