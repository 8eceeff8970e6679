# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Processes of a run: started, watched, and ended for certain."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from torchrl_dvla.swimlane.messages import Stop

__all__ = ["ManagedProcess"]

_PR_SET_PDEATHSIG = 1
#: Asks a process for its stack. Launchers that send it as a warning get a dump that nobody reads.
_STACK_SIGNAL = signal.SIGUSR1
#: What every process needs and what takes seconds to import.
_PRELOADED = ("torchrl_dvla.swimlane.env_worker", "torchrl_dvla.swimlane.inference")


class ManagedProcess:
    """A process with one duplex pipe, which ends for certain: by :meth:`stop`, or with its parent.

    Its stack can be read from outside while it hangs, see :meth:`stack`. It ignores Ctrl-C and
    SIGTERM, which reach the whole process group: only the parent acts on them, and ends its
    processes in order. When the parent's interpreter exits, whatever has not been stopped is killed
    before ``multiprocessing`` waits for it; when the parent is killed, the kernel kills the
    process.

    Args:
        target (Callable): module-level function, called in the process as ``target(connection,
            *args)``.
        args (tuple): picklable arguments.

    Keyword Args:
        name (str): shown in process lists and errors.
        num_threads (int): intra-op torch threads of the process.
        env_vars (Mapping, optional): environment variables of the process.
        start_method (str): ``"forkserver"`` (default) or ``"spawn"``. The fork server is one clean,
            single-threaded process that has imported torch and this package: a process is there
            within milliseconds, which is what makes a crashed worker cheap to replace.

    Raises:
        RuntimeError: if the interpreter is exiting.
    """

    def __init__(
        self,
        target: Callable[..., None],
        args: tuple[Any, ...],
        *,
        name: str,
        num_threads: int = 1,
        env_vars: Mapping[str, str] | None = None,
        start_method: str = "forkserver",
    ) -> None:
        context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            context.set_forkserver_preload(list(_PRELOADED))
        self.connection: Connection
        self.connection, theirs = context.Pipe(duplex=True)
        self._stacks, their_stacks = context.Pipe(duplex=False)
        self.name = name
        self.started_s = time.monotonic()
        self.process = context.Process(
            target=_run,
            args=(theirs, their_stacks, num_threads, dict(env_vars or {}), target, args),
            name=name,
            daemon=True,
        )
        try:
            with _sigterm_blocked():
                self.process.start()
        except BaseException:
            self.connection.close()
            self._stacks.close()
            raise
        finally:
            # Our copy of their end must go, or the process's death would never show as end of file.
            theirs.close()
            their_stacks.close()
        # multiprocessing takes a process for dead when the fork server is: this asks the kernel.
        self._handle: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._handle = os.pidfd_open(self.pid)
        # At exit, multiprocessing sends SIGTERM, which is ignored, and then waits for ever. What
        # has a priority runs before that.
        self._at_exit = util.Finalize(self, _kill, (self._handle,), exitpriority=0)
        # Asked now, not before the start: a thread that starts a process during the exit may have
        # come too late for it.
        if util.is_exiting():
            self.kill()
            raise RuntimeError(f"{name} must not be started: the interpreter is exiting.")

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self.process.pid)

    def exit_description(self) -> str:
        """How the process ended, in words."""
        code = self.process.exitcode
        if code is None:
            return "is still running"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def describe_end(self) -> str:
        """How the process ended, in a sentence, once its pipe has shown that it has."""
        self.process.join(5.0)
        return f"{self.name} {self.exit_description()}."

    def stack(self, timeout_s: float = 0.2) -> str:
        """What every thread of the process is doing, for the log: ask a hung one before its end.

        Args:
            timeout_s (float): seconds that the answer may take. A process that blocks signals, or
                has not come up yet, gives none.
        """
        self._signal(_STACK_SIGNAL)
        deadline_s, text = time.monotonic() + timeout_s, b""
        # The dump has no end mark: what is written in one go has ended when nothing follows.
        while self._stacks.poll(max(0.0, deadline_s - time.monotonic()) if not text else 0.02):
            part = os.read(self._stacks.fileno(), 1 << 16)
            if not part:
                break
            text += part
        return text.decode(errors="replace").strip() or "It does not answer signals: no stack."

    def private_bytes(self) -> int:
        """Resident memory that no other process shares; 0 where ``/proc`` does not tell."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
        return 0

    def kill(self) -> None:
        """End the process now and wait until the kernel has: afterwards it writes no memory."""
        self._at_exit()
        self._handle = None
        self.process.join()
        self.connection.close()
        self._stacks.close()

    def stop(self, grace_s: float = 5.0) -> None:
        """Send :class:`Stop`; kill the process if it has not ended within ``grace_s`` seconds."""
        with contextlib.suppress(OSError, ValueError):
            self.connection.send(Stop())
        self.process.join(grace_s)
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):  # it is dead; at exit the handle is closed, too
                signal.pidfd_send_signal(self._handle, number)


def _kill(handle: int | None) -> None:
    """End the process of a pidfd, and wait until the kernel has."""
    if handle is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        wait([handle])
        os.close(handle)


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread, and so in every process that is started meanwhile.

    ``timeout``, systemd and batch schedulers send SIGTERM to all processes of a run at once. Only
    the parent may act on it, as with Ctrl-C: a fork server that died of it would take the workers
    along before the parent could end them in order. The fork server goes on blocking it, a process
    ignores it from :func:`_run` on. A signal that comes meanwhile is delivered afterwards.
    """
    # First, for multiprocessing unblocks the signal by itself when it starts its tracker.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _run(
    connection: Connection,
    stacks: Connection,
    num_threads: int,
    env_vars: Mapping[str, str],
    target: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    """What every process does first, then its work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A handler, unlike SIG_IGN and a blocked signal, is not passed on to the programs that an
    # environment starts: those can still be terminated.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1 and multiprocessing.parent_process() is not None:
            os._exit(1)  # the parent died before prctl took effect
    # In C, from the signal handler: it works while a thread is stuck inside of a library, and
    # writes to a pipe of its own, so that it can come in the middle of a message.
    faulthandler.register(_STACK_SIGNAL, file=stacks.fileno(), all_threads=True, chain=False)
    os.environ.update(env_vars)
    torch.set_num_threads(num_threads)
    target(connection, *args)
