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
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

from _machine import log

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
        RuntimeError: from :meth:`take` and :func:`in_turns`, with the traceback from there.
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
        """Let it end by itself; see :meth:`end`."""
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


def in_turns(
    builders: Mapping[str, tuple[Any, ...]],
    job: Callable[[int], tuple[Any, ...]],
    num_rounds: int,
    *,
    num_warm_ups: int = 0,
    beside: Mapping[str, Any] | None = None,
) -> dict[str, list[Any]]:
    """Build arrangements, measure them in turns, and end them and every process that they leave.

    Every other round goes backwards.

    Args:
        builders (Mapping): the arguments of :class:`TurnTaker`, by name.
        job (Callable): what a turn of a round is given.
        num_rounds (int): rounds whose results count.

    Keyword Args:
        num_warm_ups (int): rounds before them, with negative numbers.
        beside (Mapping, optional): what takes turns with them in this process, by a ``take`` of its
            own.

    Returns:
        dict: the results by name, in the order of the rounds.
    """
    # Whoever ends this process means the arrangements too, which are in groups of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    takers: dict[str, TurnTaker] = {}
    try:
        for name, arguments in builders.items():
            takers[name] = TurnTaker(*arguments)
        pending = {taker.connection: name for name, taker in takers.items()}
        while pending:
            for connection in multiprocessing.connection.wait(list(pending)):
                name = pending.pop(connection)  # type: ignore[arg-type]
                takers[name].receive()
                log(f"built {name}")
        turns = {**(beside or {}), **takers}
        results: dict[str, list[Any]] = {name: [] for name in turns}
        for number in range(-num_warm_ups, num_rounds):
            for name in list(turns)[:: 1 if number % 2 == 0 else -1]:
                found = turns[name].take(*job(number))
                log(f"{number} {name}: {found}")
                if number >= 0:
                    results[name].append(found)
        return results
    finally:
        for taker in takers.values():
            taker.ask_to_end()
        end_s = time.monotonic() + _GRACE_S
        for taker in takers.values():
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
