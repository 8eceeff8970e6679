# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One process at a time in the folder of a run."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import weakref
from datetime import datetime
from pathlib import Path

from torchrl_dvla.recording.recorder import check_writable

__all__ = ["RunLock"]

_log = logging.getLogger("torchrl_dvla")

#: The file that is locked, and says by whom.
_OWNER = "owner"
_SOMEBODY = "another process"


class RunLock:
    """Exclusive use of a run's folder, until :meth:`release` or the end of the process.

    The kernel holds it, as a lock on the file ``owner`` in the folder that says who has it: a
    process that is killed leaves none behind. On NFS, Linux holds it at the server for all nodes,
    but not on mounts with ``nolock`` or ``local_lock``, where two nodes do not see each other. A
    file system without locks gives a warning.

    Args:
        folder (str or os.PathLike): the folder; made if missing.

    Raises:
        ValueError: if another process has it, or it cannot be written to.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lock = RunLock(folder)
        ...     (lock.folder / "owner").read_text().startswith(f"process {os.getpid()} on ")
        True
        >>> lock.release()
    """

    @staticmethod
    def owner_of(folder: str | os.PathLike[str]) -> str:
        """Who has a run's folder, whose lock is left as it is; empty if nobody has.

        On a file system without locks nobody seems to.

        Raises:
            FileNotFoundError: if it never was the folder of a run.
        """
        with (Path(folder) / _OWNER).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or _SOMEBODY
            except OSError:
                pass
        return ""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder: Path = check_writable(folder)
        descriptor = os.open(self.folder / _OWNER, os.O_RDWR | os.O_CREAT, 0o666)
        #: Let the folder go.
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 1 << 10).decode(errors="replace").strip()
            self.release()
            raise ValueError(
                f"The run folder must be free, got {str(self.folder)!r}, in use by "
                f"{owner or _SOMEBODY}. Wait for its end or end it, or start a new run."
            ) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): start no second run there.", folder, error)
        started = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.write(
            descriptor, f"process {os.getpid()} on {socket.gethostname()}, {started}\n".encode()
        )
