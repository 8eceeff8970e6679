# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Arrangements of many processes that live side by side and work in turns."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

_GRACE_S = 20.0


class TurnTaker:
    """A process and all those that it starts, whose time stands still between its turns.

    What takes a minute to start is built once and measured often, beside others. Without that, what
    collects in the background would do so in the time of the others, slow them down and have a
    stock of data when its own turn comes. So the whole process group is stopped (``SIGSTOP``) at
    the end of a turn and continued at the beginning of the next. Deadlines inside an arrangement
    must outlast the turns of the others.

    Args:
        build (Callable): called with ``args`` in the new process; a context manager of a callable
            that takes one turn. Picklable.
        *args: picklable.

    Raises:
        RuntimeError: from :meth:`take` and :func:`wait_ready`, with the traceback from there.
    """

    def __init__(self, build: Callable[..., AbstractContextManager[Any]], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, args))
        self._process.start()
        theirs.close()

    def take(self, *job: Any) -> Any:
        """One turn: call what was built with ``job`` and return its result."""
        self._signal(signal.SIGCONT)
        self.connection.send(job)
        return self.receive()

    def ask_to_end(self) -> None:
        """Let it end by itself; see :func:`close`."""
        self._signal(signal.SIGCONT)
        try:
            self.connection.send(None)
        except OSError:
            pass

    def end(self, timeout_s: float) -> None:
        """Kill what is left after ``timeout_s``."""
        self._process.join(timeout_s)
        self._signal(signal.SIGKILL)
        self._process.join()

    def receive(self) -> Any:
        """The result of the turn under way, after which time stands still."""
        try:
            error, result = self.connection.recv()
        except EOFError:
            raise RuntimeError("the process ended without a word: was it killed?") from None
        self._signal(signal.SIGSTOP)
        if error is not None:
            raise RuntimeError(f"a turn failed:\n{error}")
        return result

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)  # type: ignore[arg-type]
        except ProcessLookupError:  # nothing is left of it, or it has no group yet
            if number == signal.SIGKILL:
                self._process.kill()


def wait_ready(takers: Mapping[str, TurnTaker]) -> Iterator[str]:
    """Yield the names of ``takers`` as they are built; each is stopped at once."""
    pending = {taker.connection: name for name, taker in takers.items()}
    while pending:
        for connection in multiprocessing.connection.wait(list(pending)):
            name = pending.pop(connection)  # type: ignore[arg-type]
            takers[name].receive()
            yield name


def close(takers: Iterable[TurnTaker]) -> None:
    """End ``takers`` and every process that they leave behind."""
    takers = list(takers)
    for taker in takers:
        taker.ask_to_end()
    end_s = time.monotonic() + _GRACE_S
    for taker in takers:
        taker.end(max(0.0, end_s - time.monotonic()))


def _serve(
    connection: Connection, build: Callable[..., AbstractContextManager[Any]], args: tuple[Any, ...]
) -> None:
    os.setpgid(0, 0)
    with open(os.devnull, "w") as null:  # simulators print notices; stdout is for the result
        os.dup2(null.fileno(), 1)
    try:
        with build(*args) as take:
            connection.send((None, None))
            while (job := connection.recv()) is not None:
                connection.send((None, take(*job)))
    except BaseException:
        connection.send((traceback.format_exc(), None))
        raise
