# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Locks on single bytes of an anonymous file, which the kernel frees when their holder dies.

The weight store needs three things of a lock: it must work between processes, a killed holder must
not keep it, and taking it must never wait. Linux *open file description* (OFD) record locks give
all three: they belong to one ``open()`` of the file, two of them conflict even inside one process
(so threads exclude each other as processes do), and they vanish with the last descriptor of that
``open()``, whatever ended the process. A lock and its release cost one system call each, below 1
us.

Each of those calls takes the spin lock of the file's lock list. A successful ``lock`` therefore
sees every memory write made before the ``unlock`` it had to follow, on any processor: the handshake
of the store needs no fence that Python could not give.

Reference: Linux manual page ``F_OFD_SETLK(2const)``.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
import weakref
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

__all__ = ["LockFile", "LockHandle"]

# struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks), native alignment.
_FLOCK = "hhqqi4x"


def _request(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)


class LockHandle:
    """One open file description of a :class:`LockFile`: the identity that holds locks.

    Every holder (a reader, the writer) opens its own handle. A handle must not be shared by a
    forked child: the child's copy of the descriptor would keep the locks after the parent's death,
    so it is closed at once on the child's side of a fork.

    Args:
        path (str): where to open the file.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._requests: dict[tuple[int, int], bytes] = {}
        _OPEN_HANDLES.add(self)

    @property
    def is_open(self) -> bool:
        """Whether the handle can still hold locks."""
        return self._fd >= 0

    def try_shared(self, byte: int) -> bool:
        """Lock ``byte`` together with other readers; False when a writer holds it. Never waits."""
        return self._set(fcntl.F_RDLCK, byte)

    def try_exclusive(self, byte: int) -> bool:
        """Lock ``byte`` alone; False when anybody else holds it. Never waits."""
        return self._set(fcntl.F_WRLCK, byte)

    def unlock(self, byte: int) -> None:
        """Give ``byte`` back; nothing happens when this handle did not hold it."""
        self._set(fcntl.F_UNLCK, byte)

    def is_held_by_others(self, byte: int) -> bool:
        """Whether another handle, in any process, holds a lock on ``byte``."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, byte))
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Release every lock of this handle."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _set(self, kind: int, byte: int) -> bool:
        request = self._requests.get((kind, byte))
        if request is None:
            request = self._requests[kind, byte] = _request(kind, byte)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, request)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def __del__(self) -> None:
        self.close()


class LockFile:
    """An anonymous file of lockable bytes, known to every process that was given it.

    It has no name in any file system, so nothing is left behind whoever is killed. It travels to a
    child process by pickle while that process is being spawned, or over a pipe to one that runs.

    Raises:
        RuntimeError: on a system without OFD locks or without ``/proc``.

    Examples:
        >>> file = LockFile()
        >>> reader, writer = file.open(), file.open()
        >>> reader.try_shared(0), writer.try_exclusive(0)
        (True, False)
        >>> reader.close()
        >>> writer.try_exclusive(0)
        True
        >>> writer.close(); file.close()
    """

    def __init__(self) -> None:
        if not hasattr(fcntl, "F_OFD_SETLK"):
            raise RuntimeError(
                "WeightStore needs open-file-description locks (F_OFD_SETLK), got a system without "
                "them. Run on Linux 3.15 or newer."
            )
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("dvla-weight-locks", os.MFD_CLOEXEC)
        else:
            self._fd, name = tempfile.mkstemp(prefix="dvla-weight-locks")
            os.unlink(name)

    def open(self) -> LockHandle:
        """A new holder of locks.

        Raises:
            RuntimeError: if the file was closed, or ``/proc`` is not mounted.
        """
        if self._fd < 0:
            raise RuntimeError("The weight store's lock file is closed. Make a new WeightStore.")
        try:
            # Opening the descriptor's entry in /proc, unlike dup(), makes a new description.
            return LockHandle(f"/proc/self/fd/{self._fd}")
        except OSError as error:
            raise RuntimeError(
                f"The weight store's lock file cannot be reopened through /proc/self/fd ({error}). "
                "Mount /proc in this container."
            ) from error

    def close(self) -> None:
        """Close this process's descriptor; open handles keep their locks."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is not None:
            return _from_inherited, (reduction.DupFd(self._fd),)
        return _from_process, (os.getpid(), self._fd, os.fstat(self._fd).st_ino)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def _from_fd(fd: int) -> LockFile:
    file = LockFile.__new__(LockFile)
    file._fd = fd
    return file


def _from_inherited(descriptor: Any) -> LockFile:
    return _from_fd(descriptor.detach())


def _from_process(pid: int, fd: int, inode: int) -> LockFile:
    # As the arena does: through /proc, which leaves nothing behind when a process is killed.
    try:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RuntimeError(
            f"The weight store of process {pid} cannot be opened ({error}). That process must be "
            "alive and of the same user; else hand readers over in the arguments of Process()."
        ) from error
    if os.fstat(opened).st_ino != inode:
        os.close(opened)
        raise RuntimeError(
            f"The weight store of process {pid} was closed before its reader arrived. Keep it open "
            "until every reader is attached."
        )
    return _from_fd(opened)


_OPEN_HANDLES: weakref.WeakSet[LockHandle] = weakref.WeakSet()


def _close_after_fork() -> None:
    for handle in list(_OPEN_HANDLES):
        handle.close()


os.register_at_fork(after_in_child=_close_after_fork)
