# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""File in memory without a name, shared between processes by pickle."""

from __future__ import annotations

import os
import tempfile
import weakref
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any, TypeVar

from torchrl_dvla.memory.available_memory import shared_folder

__all__ = ["AnonymousFile"]

_File = TypeVar("_File", bound="AnonymousFile")


class AnonymousFile:
    """Open file that no file system lists, so that nothing is left behind by a killed process.

    It is made with ``memfd_create``, or is an unlinked temporary file where the kernel has no such
    call. It can be pickled, to a child that is being started or over any pipe to a process of the
    same user that already runs; the receiver opens the same file. The sender must still be alive
    when the receiver unpickles.
    """

    #: What error messages call it.
    label = "anonymous file"

    def __init__(self) -> None:
        folder = shared_folder()
        if folder is None:
            fd = os.memfd_create("torchrl_dvla", os.MFD_CLOEXEC)
        else:
            fd, path = tempfile.mkstemp(prefix="torchrl_dvla-", dir=folder)
            os.unlink(path)
        AnonymousFile._open(self, fd)

    def _open(self, fd: int) -> None:
        """Own ``fd``. A subclass takes what :meth:`_state` gives as further arguments."""
        self._fd = fd
        self._finalizer = weakref.finalize(self, os.close, fd)

    def _state(self) -> tuple[Any, ...]:
        """What travels beside the file."""
        return ()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called here."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Close this process's descriptor; safe to call twice."""
        self._finalizer()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.closed:
            raise RuntimeError(
                f"A closed {self.label} cannot be sent to another process. Send it earlier."
            )
        if get_spawning_popen() is not None:
            return self._from_inherited, (DupFd(self._fd), *self._state())
        status = os.fstat(self._fd)
        identity = (status.st_dev, status.st_ino)
        return self._from_process, (os.getpid(), self._fd, identity, *self._state())

    @classmethod
    def _from_fd(cls: type[_File], fd: int, *state: Any) -> _File:
        file = cls.__new__(cls)
        file._open(fd, *state)
        return file

    @classmethod
    def _from_inherited(cls: type[_File], descriptor: Any, *state: Any) -> _File:
        return cls._from_fd(descriptor.detach(), *state)

    @classmethod
    def _from_process(
        cls: type[_File], pid: int, fd: int, identity: tuple[int, int], *state: Any
    ) -> _File:
        # Through /proc rather than multiprocessing's resource sharer, which needs a socket in a
        # temporary folder and a thread, and leaves the folder behind when the process is killed.
        try:
            opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(
                f"The {cls.label} of process {pid} cannot be opened ({error}). It must be alive "
                "and of the same user; else hand it over in the arguments of Process()."
            ) from error
        status = os.fstat(opened)
        if (status.st_dev, status.st_ino) != identity:
            os.close(opened)
            raise RuntimeError(
                f"The {cls.label} of process {pid} is gone: it was closed before this process "
                "opened it. Keep it open until every process has attached."
            )
        return cls._from_fd(opened, *state)
