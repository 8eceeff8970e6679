# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Processes of a run: started, watched, and ended for certain."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import io
import logging
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from torchrl_dvla.streams import drop_unwritable_output, use_workers_output, workers_output
from torchrl_dvla.swimlane.messages import Stop

__all__ = ["STOP_SIGNALS", "ManagedProcess", "pickled", "stop_signals_blocked"]

_log = logging.getLogger("torchrl_dvla")

#: What launchers ask a run to end with, often all of its processes at once: `timeout` and systemd,
#: a terminal that is closed, Slurm before it takes the node away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
#: Asks a process for its stack. Launchers that send it as a warning get a dump that nobody reads.
_STACK_SIGNAL = signal.SIGUSR1
#: What every process needs and what takes seconds to import.
_PRELOADED = ("torchrl_dvla.swimlane.env_worker", "torchrl_dvla.swimlane.inference")
#: Seconds for what takes a fork server milliseconds: a fork, the exit code of a process that died.
_ANSWER_S = 10.0
#: The same until it has answered once, which is when it has imported what it preloads.
_IMPORT_S = 300.0
#: Bytes a second that a process is sent at least: 14 GB of a policy take minutes.
_SLOWEST_PIPE = 50e6
#: Seconds for the rest of a message that has begun, and for the kernel to end what is killed.
_REST_S = 60.0
_SEE = "It waits inside a driver or for a file system: see dmesg."
#: multiprocessing's own, which has no public name.
_server: Any = vars(forkserver)["_forkserver"]
#: Process ids of the fork servers that have answered.
_answered: set[int] = set()


class ManagedProcess:
    """A process with one duplex pipe, which ends for certain: by :meth:`stop`, or with its parent.

    Its stack can be read from outside while it hangs, see :meth:`stack`. It ignores Ctrl-C and
    ``STOP_SIGNALS``, which reach the whole process group: only the parent acts on them, and
    ends its processes in order. When the parent's interpreter exits, whatever has not been stopped
    is killed before ``multiprocessing`` waits for it; when the parent is killed, the kernel kills
    the process.

    No wait of the parent is without a limit: a fork server that does not answer is ended, which
    ends all of its children, and the next start makes another.

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
        RuntimeError: if the interpreter is exiting, or two fork servers did not answer.
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
        _limit_messages(self.connection)
        self.name = name
        self.started_s = time.monotonic()
        self.process = context.Process(
            target=_run,
            args=(
                (theirs, their_stacks, workers_output()),
                num_threads,
                dict(env_vars or {}),
                target,
                args,
            ),
            name=name,
            daemon=True,
        )
        try:
            with stop_signals_blocked():
                _start(self.process, sum(len(arg) for arg in args if isinstance(arg, bytes)))
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
        self._at_exit = util.Finalize(
            self, _kill, (name, self._handle, self.process.sentinel), exitpriority=0
        )
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
            has_ended = self._handle is not None and wait([self._handle], 0.0)
            return "has ended, nobody tells how" if has_ended else "is still running"
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
        """End the process now and wait until the kernel has: afterwards it writes no memory.

        Raises:
            RuntimeError: if the kernel does not end it.
        """
        self._handle = None
        self._at_exit()
        if self.process.exitcode is None:
            raise RuntimeError(
                f"{self.name} must end when it is killed, got one that is kept. {_SEE}"
            )
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


class _Pickler(cloudpickle.Pickler):
    """Sends some tensors without what they hold."""

    def __init__(self, file: io.BytesIO, without: Iterable[torch.Tensor]) -> None:
        super().__init__(file)
        self._without = {id(tensor) for tensor in without}

    def reducer_override(self, obj: Any) -> Any:
        if id(obj) not in self._without or type(obj) not in (torch.Tensor, torch.nn.Parameter):
            return super().reducer_override(obj)
        kind = (obj.shape, obj.stride(), obj.dtype, obj.requires_grad)
        return _empty, (*kind, isinstance(obj, torch.nn.Parameter))


def _empty(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    requires_grad: bool,
    is_parameter: bool,
) -> torch.Tensor:
    # Memory that nobody writes to takes none.
    tensor = torch.empty_strided(shape, stride, dtype=dtype)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor


def pickled(value: Any, name: str, *, without: Iterable[torch.Tensor] = ()) -> bytes:
    """What a process is to get by value, by cloudpickle.

    Args:
        value (Any): what to send.
        name (str): what it is called in the error.

    Keyword Args:
        without (iterable of torch.Tensor): tensors in it whose contents the process gets otherwise.

    Raises:
        TypeError: naming what cannot be sent.
    """
    try:
        file = io.BytesIO()
        _Pickler(file, without).dump(value)
        return file.getvalue()
    except Exception as error:  # whatever the object raises
        raise TypeError(
            f"{name} must be such that cloudpickle can send it to a process, got {error!r}. Make "
            "what cannot be sent, such as locks, open files and simulators, inside of it."
        ) from error


def _limit_messages(connection: Connection) -> None:
    """Give the rest of a message that has begun a time limit: its process may be stopped."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(_REST_S), 0))


def _start(process: Any, num_bytes: int) -> None:
    """Start a process; replace a fork server that does not answer, or dies meanwhile, once.

    Args:
        process: the process.
        num_bytes (int): of the objects that it is sent, such as a policy with its weights.

    Raises:
        RuntimeError: if the second does not answer either.
    """
    if process._start_method == "spawn":
        process.start()  # waits for nobody but the kernel
        return
    for is_last in (False, True):
        forkserver.ensure_running()
        pid = _server._forkserver_pid
        limit_s = _ANSWER_S if pid in _answered else _IMPORT_S
        limit_s += num_bytes / _SLOWEST_PIPE
        watchdog = threading.Timer(limit_s, _end_fork_server)
        watchdog.daemon = True
        watchdog.start()
        try:
            process.start()
            _answered.add(pid)
            return
        except (EOFError, ConnectionError) as error:  # the fork server has closed its files
            if is_last:
                raise RuntimeError(
                    f"{process.name} must be started by a fork server, got none of two that "
                    f"answered within {limit_s:g} s. See what they printed, and whether the "
                    "machine has memory and processes left."
                ) from error
            with contextlib.suppress(ProcessLookupError), _handle_of(pid) as handle:
                wait([handle], _REST_S)
        finally:
            watchdog.cancel()


@contextlib.contextmanager
def _handle_of(pid: int) -> Iterator[int]:
    handle = os.pidfd_open(pid)
    try:
        yield handle
    finally:
        os.close(handle)


def _end_fork_server() -> None:
    """End a fork server that does not answer, and all of its children with it."""
    pid = _server._forkserver_pid
    if pid is None:
        return
    _log.warning("The fork server (process %d) does not answer: it is ended.", pid)
    with contextlib.suppress(ProcessLookupError), _handle_of(pid) as handle:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        wait([handle], _REST_S)


def _kill(name: str, handle: int | None, sentinel: int) -> None:
    """End the process of a pidfd, and wait until the kernel has, and multiprocessing knows."""
    if handle is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        has_ended = wait([handle], _REST_S)
        os.close(handle)
        if not has_ended:
            raise RuntimeError(
                f"{name} must end when it is killed, got a process that the kernel keeps for more "
                f"than {_REST_S:g} s. {_SEE}"
            )
    # It is for the fork server to tell: multiprocessing would wait for it for ever.
    if not wait([sentinel], _ANSWER_S):
        _end_fork_server()


@atexit.register
def _remove_socket() -> None:
    """In the fork server, whose end is that of the learner: remove the folder of its socket.

    A learner that was killed could not. All others find nothing to do.
    """
    if _server._forkserver_pid is None and _server._forkserver_address:
        with contextlib.suppress(OSError):  # it is gone, or holds more
            os.unlink(_server._forkserver_address)
            os.rmdir(os.path.dirname(_server._forkserver_address))


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block STOP_SIGNALS in this thread, and so in every process that is started meanwhile.

    They come to all processes of a run at once. Only the parent may act on them, as with Ctrl-C: a
    fork server that died of one would take the workers along before the parent could end them in
    order. The fork server goes on blocking them, a process ignores them from :func:`_run` on. A
    signal that comes meanwhile is delivered afterwards.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks SIGTERM, which the tracker ignores by itself
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def leave_signals_to_parent() -> None:
    """Called in a process: what asks a run to stop is for its parent, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A handler, unlike SIG_IGN and a blocked signal, is not passed on to the programs that an
    # environment starts: those can still be terminated.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        learner = multiprocessing.parent_process()
        if os.getppid() == 1 and learner is not None and learner.pid != 1:
            os._exit(1)  # the parent died before prctl took effect; process 1 takes all along


def _run(
    pipes: tuple[Connection, Connection, tuple[Connection, ...]],
    num_threads: int,
    env_vars: Mapping[str, str],
    target: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    """What every process does first, then its work."""
    connection, stacks, outputs = pipes
    use_workers_output(outputs)
    leave_signals_to_parent()
    # The fork server ends once nobody holds this: with the learner, though this process may hang.
    if _server._forkserver_alive_fd is not None:
        os.close(_server._forkserver_alive_fd)
        _server._forkserver_alive_fd = None
    # In C, from the signal handler: it works while a thread is stuck inside of a library, and
    # writes to a pipe of its own, so that it can come in the middle of a message.
    faulthandler.register(_STACK_SIGNAL, file=stacks.fileno(), all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    drop_unwritable_output()
    os.environ.update(env_vars)
    torch.set_num_threads(num_threads)
    target(connection, *args)
