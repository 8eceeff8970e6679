# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An object in a process of its own, to be called, stopped and killed from a test."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Remote", "die_with_parent"]

# Forked children start in milliseconds; they inherit what a test has made, events included.
_FORK = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1


class Remote:
    """``factory(*args)`` in a forked process, and calls of its methods.

    Make it in the main thread, before this process starts threads that hold locks. The child is
    killed by :meth:`kill`, at the end of the context, and by the kernel when this one dies, in
    whatever way.

    Args:
        factory (callable): makes the object, in the child.
        *args: its arguments; what is forked need not be picklable.

    Keyword Args:
        before (callable, optional): called in the child first, for example to enter a network.

    Examples:
        >>> with Remote(list, "abc") as remote:
        ...     remote.call("append", "d")
        ...     remote.call("index", "d")
        3
    """

    def __init__(
        self, factory: Callable[..., Any], *args: Any, before: Callable[[], None] | None = None
    ) -> None:
        self._ours, theirs = _FORK.Pipe()
        self._process = _FORK.Process(
            target=_serve, args=(theirs, os.getpid(), factory, args, before), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        assert self._process.pid is not None
        return self._process.pid

    def start(self, method: str, *args: Any) -> None:
        """Begin a call; :meth:`result` returns its result."""
        self._ours.send((method, args))

    def result(self, timeout_s: float = 60.0) -> Any:
        """Result of the oldest call that was started.

        Raises:
            TimeoutError: if it takes longer than ``timeout_s``.
            EOFError: if the process died.
            Exception: what the call raised.
        """
        if not self._ours.poll(timeout_s):
            raise TimeoutError(f"Process {self.pid} did not answer within {timeout_s} s.")
        value, error, trace = self._ours.recv()
        if error is not None:
            error.add_note(trace)
            raise error
        return value

    def call(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        """Call and wait, see :meth:`result`."""
        self.start(method, *args)
        return self.result(timeout_s)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; after SIGKILL, wait for the end."""
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self._process.join()

    def close(self) -> None:
        """Kill it, whatever it does."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._ours.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _serve(
    connection: Connection,
    parent: int,
    factory: Callable[..., Any],
    args: tuple[Any, ...],
    before: Callable[[], None] | None,
) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    target: Any = None
    try:
        if before is not None:
            before()
        target, failure = factory(*args), None
    except Exception as error:
        failure = error
    while True:
        method, arguments = connection.recv()
        answer: tuple[Any, Exception | None, str]
        try:
            if failure is not None:
                raise failure
            answer = (getattr(target, method)(*arguments), None, "")
        except Exception as error:
            answer = (None, error, traceback.format_exc())
        connection.send(answer)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends.

    The end of a pipe would not do: its other end lives on in every process forked later.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)
