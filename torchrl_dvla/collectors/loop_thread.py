# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A thread with an event loop: how it begins, ends, and is given evaluations."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable

from torchrl_dvla.collectors.evaluation import Evaluation

__all__ = ["LoopThread"]

_log = logging.getLogger("torchrl_dvla")


class LoopThread(abc.ABC):
    """Event loop in a thread of its own, that plays evaluations beside what else it does.

    Args:
        name (str): of the thread.

    Keyword Args:
        on_error (Callable): called with the exception that ends the loop.
        stop_timeout_s (float): what :meth:`stop` allows for the end, unless it is told otherwise.
    """

    def __init__(
        self, name: str, *, on_error: Callable[[BaseException], None], stop_timeout_s: float
    ) -> None:
        self._on_error = on_error
        self._stop_grace_s = stop_timeout_s
        self._evaluations: deque[Evaluation] = deque()
        self._evaluation: Evaluation | None = None
        self._lock = threading.Lock()  # of the evaluations that other threads add
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abc.abstractmethod
    async def _work(self) -> None:
        """What the loop does until it is cancelled."""

    @abc.abstractmethod
    def _on_change(self) -> None:
        """Check again what may go on; called in the thread."""

    @abc.abstractmethod
    def _release(self) -> None:
        """Let go of what the loop has used; it runs no more, or has never run."""

    def start(self) -> None:
        """Begin: from here on what the loop was given belongs to its thread."""
        self._thread.start()

    def notify(self) -> None:
        """Check again what may go on; any thread may call it."""
        self._call(self._on_change)

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Queue an evaluation, from any thread; evaluations are played one after the other."""
        with self._lock:
            if self._stopping:
                evaluation.fail(self._ended())
                return
            self._evaluations.append(evaluation)
        self.notify()

    def stop(self, grace_s: float | None = None) -> None:
        """End the loop and all that it drives, which gets ``grace_s`` seconds for it."""
        with self._lock:
            self._stopping = True
        if grace_s is not None:
            self._stop_grace_s = grace_s
        if self._task is not None:
            self._call(self._task.cancel)
        if self._thread.is_alive():
            self._thread.join()  # it ends: each of its waits has a limit
        else:
            self._close()

    def _call(self, function: Callable[[], object]) -> None:
        """Have the thread call a function; nothing happens before the loop runs, or afterwards."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.error = error
            _log.debug("The loop of %s ends.", self._thread.name, exc_info=True)
            self._on_error(error)
        finally:
            self._close()

    async def _main(self) -> None:
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        if not self._stopping:  # else there was nothing to cancel yet
            await self._work()

    def _close(self) -> None:
        with self._lock:
            self._stopping = True
            for evaluation in (self._evaluation, *self._evaluations):
                if evaluation is not None:
                    evaluation.fail(self._ended())
        self._release()

    def _ended(self) -> RuntimeError:
        ended = RuntimeError("The collector ended before the evaluation did.")
        ended.__cause__ = self.error
        return ended
