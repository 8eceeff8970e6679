# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Arena: a block of shared memory without a name."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import torch

from torchrl_dvla.memory.available_memory import format_bytes, shareable_bytes, shared_folder

__all__ = ["SharedArena"]


class SharedArena:
    """A block of shared memory that dies with the last process that maps it.

    The memory has no name in any file system (``memfd_create``; an unlinked temporary file where
    the kernel has none), so nothing can be left behind: after ``kill -9`` of every process the
    kernel takes it back. All of it is allocated here and now; a later write cannot fail for lack of
    memory.

    An arena can be pickled, to a child that is being started or over any pipe to a process of the
    same user that already runs; the receiver maps the same bytes. The sender must still be alive
    when the receiver unpickles.

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

    def __init__(self, nbytes: int) -> None:
        if nbytes <= 0:
            raise ValueError(f"nbytes must be positive, got {nbytes}. Give the bytes to share.")
        free, where = shareable_bytes()
        if free is not None and nbytes > free:
            raise RuntimeError(_too_large(nbytes, f"only {format_bytes(free)} are free{where}"))
        fd = _anonymous_file()
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
                raise RuntimeError(_too_large(nbytes, os.strerror(error.errno))) from error
            raise
        self._adopt(fd, nbytes)
        self._owner_pid = os.getpid()

    def _adopt(self, fd: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._fd = fd
        self._map: mmap.mmap | None = mmap.mmap(fd, nbytes)
        self._owner_pid = -1
        self._unpin: weakref.finalize[..., SharedArena] | None = None
        self._finalizer = weakref.finalize(self, os.close, fd)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called here."""
        return self._map is None

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

        Not run on a GPU in this project's own tests, which exercise it with a fake runtime.

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
        code = int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), self.nbytes, 0))
        if code:
            raise RuntimeError(
                f"{format_bytes(self.nbytes)} could not be page-locked (cudaHostRegister: {code}). "
                "Raise the limit of locked memory (ulimit -l)."
            )
        # At the latest when nobody takes views any more: the driver must not keep what is unmapped.
        self._unpin = weakref.finalize(self, _unregister, whole, os.getpid())
        self._unpin.atexit = False
        return True

    def close(self) -> None:
        """Give the memory back; safe to call twice.

        The process that created the arena releases the physical memory at once, for every process:
        whoever still holds a view reads zeros and cannot crash. Other processes only drop their
        map.
        """
        if self._map is None:
            return
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        if self.is_owner and hasattr(mmap, "MADV_REMOVE"):
            try:
                self._map.madvise(mmap.MADV_REMOVE)
            except OSError:
                pass  # a file system without holes: the memory goes with the last view
        # Never mmap.close(): torch keeps no export on the buffer, so that would unmap memory under
        # the feet of live views. The map goes when the last of them does.
        self._map = None
        self._finalizer()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._map is None:
            raise RuntimeError("A closed arena cannot be sent to another process. Send it earlier.")
        if get_spawning_popen() is not None:
            return _from_inherited, (DupFd(self._fd), self.nbytes)
        status = os.fstat(self._fd)
        identity = (status.st_dev, status.st_ino)
        return _from_process, (os.getpid(), self._fd, identity, self.nbytes)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"{type(self).__name__}(nbytes={self.nbytes}, {state})"


def _from_fd(fd: int, nbytes: int) -> SharedArena:
    arena = SharedArena.__new__(SharedArena)
    arena._adopt(fd, nbytes)
    return arena


def _from_inherited(descriptor: Any, nbytes: int) -> SharedArena:
    return _from_fd(descriptor.detach(), nbytes)


def _from_process(pid: int, fd: int, identity: tuple[int, int], nbytes: int) -> SharedArena:
    # Through /proc rather than multiprocessing's resource sharer, which needs a socket in a
    # temporary folder and a thread, and leaves the folder behind when the process is killed.
    try:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RuntimeError(
            f"The shared memory of process {pid} cannot be opened ({error}). It must be alive and "
            "of the same user; else hand the arena over in the arguments of Process()."
        ) from error
    status = os.fstat(opened)
    if (status.st_dev, status.st_ino) != identity:
        os.close(opened)
        raise RuntimeError(
            f"The shared memory of process {pid} is gone: it was closed before this process mapped "
            "it. Keep the pool open until every worker has taken its view."
        )
    return _from_fd(opened, nbytes)


def _unregister(whole: torch.Tensor, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has the map, not the registration
        torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())


def _anonymous_file() -> int:
    folder = shared_folder()
    if folder is None:
        return os.memfd_create("torchrl_dvla", os.MFD_CLOEXEC)
    fd, path = tempfile.mkstemp(prefix="torchrl_dvla-", dir=folder)
    os.unlink(path)
    return fd


def _too_large(nbytes: int, reason: str) -> str:
    return (
        f"nbytes must fit in shared memory, got {nbytes} ({format_bytes(nbytes)}): {reason}. Lower "
        "the byte budget, or raise the memory limit of the machine or container."
    )
