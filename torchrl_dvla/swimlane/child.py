# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Starting and ending the child processes of a run."""

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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

__all__ = ["Child", "prepare_child"]

_PR_SET_PDEATHSIG = 1
#: Asks a child for its stack. Launchers that send it as a warning get a dump that nobody reads.
_STACK_SIGNAL = signal.SIGUSR1
#: What every child needs and what takes seconds to import.
_PRELOADED = ("torchrl_dvla.swimlane.env_worker", "torchrl_dvla.swimlane.inference")


def prepare_child(num_threads: int, env_vars: Mapping[str, str] | None = None) -> None:
    """First call in every child process: what it must never do to its parent or outlive.

    Ctrl-C reaches the whole process group, but only the parent may act on it: it ends its children
    in order. When the parent is killed without a chance to do so, the kernel ends the child.

    Args:
        num_threads (int): intra-op threads of torch in this process.
        env_vars (Mapping, optional): environment variables to set.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A handler of the parent's recipe must not be inherited by a forked child.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1 and multiprocessing.parent_process() is not None:
            os._exit(1)  # the parent died before prctl took effect
    os.environ.update(env_vars or {})
    torch.set_num_threads(num_threads)


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread, and so in every process that is started meanwhile.

    ``timeout``, systemd and batch schedulers send SIGTERM to all processes of a run at once. Only
    the parent may act on it, as with Ctrl-C: a fork server that died of it would take the workers
    along before the parent could end them in order. A signal that comes meanwhile is delivered
    afterwards.
    """
    # First, for multiprocessing unblocks the signal by itself when it starts its tracker.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _run_child(
    target: Callable[..., None], connection: Connection, stacks: Connection, args: tuple[Any, ...]
) -> None:
    # In C, from the signal handler: it works while a thread is stuck inside of a library, and
    # writes to a pipe of its own, so that it can come in the middle of a message.
    faulthandler.register(_STACK_SIGNAL, file=stacks.fileno(), all_threads=True, chain=False)
    target(connection, *args)


class Child:
    """A child process with one duplex pipe, ended for certain by :meth:`stop`.

    Its stack can be read from outside while it hangs, see :meth:`stack`.

    Args:
        target (Callable): module-level function, called in the child as ``target(connection,
            *args)``.
        args (tuple): picklable arguments.

    Keyword Args:
        name (str): shown in process lists and errors.
        start_method (str): ``"forkserver"`` (default) or ``"spawn"``. The fork server is one clean,
            single-threaded process that has imported torch and this package: a child is there
            within milliseconds, which is what makes a lost worker cheap to replace.
    """

    def __init__(
        self,
        target: Callable[..., None],
        args: tuple[Any, ...],
        *,
        name: str,
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
            target=_run_child, args=(target, theirs, their_stacks, args), name=name, daemon=True
        )
        try:
            with _sigterm_blocked():
                self.process.start()
        except BaseException:
            self.connection.close()
            self._stacks.close()
            raise
        finally:
            # Our copy of their end must go, or the child's death would never show as end of file.
            theirs.close()
            their_stacks.close()
        # multiprocessing takes a child for dead when the fork server is: this asks the kernel.
        self._handle: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._handle = os.pidfd_open(self.pid)

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self.process.pid)

    def fileno(self) -> int:
        """Descriptor to wait on for messages and for the child's death."""
        return self.connection.fileno()

    def exit_description(self) -> str:
        """How the child ended, in words."""
        code = self.process.exitcode
        if code is None:
            return "is still running"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def stack(self, timeout_s: float = 0.2) -> str:
        """What every thread of the child is doing, for the log: ask a hung child before its end.

        Args:
            timeout_s (float): seconds that the answer may take. A child that blocks signals, or has
                not come up yet, gives none.
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
        """End the child now and wait until the kernel has: afterwards it writes no memory."""
        if self._handle is not None:
            self._signal(signal.SIGKILL)
            wait([self._handle])  # until it has ended
            os.close(self._handle)
            self._handle = None
        self.process.join()
        self.connection.close()
        self._stacks.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def stop(self, message: Any, grace_s: float) -> None:
        """Ask the child to end; kill it when it has not within ``grace_s`` seconds."""
        with contextlib.suppress(OSError, ValueError):
            self.connection.send(message)
        self.process.join(grace_s)
        self.kill()
