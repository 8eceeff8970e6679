# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Orderly stop of a run at a signal, at a point where its state is whole."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from torchrl_dvla.swimlane.managed_process import STOP_SIGNALS, stop_signals_blocked

__all__ = ["GracefulStop", "StopRequested"]

#: Seconds that the callbacks may take that are still under way at the end.
_CALLBACK_S = 10.0


class StopRequested(BaseException):
    """Exception inside :meth:`GracefulStop.interruptible` when the run was asked to stop.

    Like :class:`KeyboardInterrupt` it derives from :class:`BaseException`, so that no
    ``except Exception`` on the way takes it for a failure.
    """


class GracefulStop:
    """Handler of SIGINT and of what launchers send: a flag, instead of an exception.

    Beside SIGINT and SIGTERM that is SIGHUP, of a terminal that is closed, and SIGUSR1 and SIGUSR2,
    with which batch schedulers announce the end. Those three are left to whoever handles, or
    ignores, them already: ``nohup``, ``faulthandler``, the script.

    A signal may arrive in the middle of an optimizer step or of a write to the replay buffer, when
    raising an exception would leave half of it behind. So the handler only sets a flag. Three
    kinds of code learn of it:

    - the loop reads :attr:`requested` between updates;
    - a wait that another thread can end (a learner blocked on its replay buffer) is ended by the
      callbacks given to :meth:`on_request`. They run in a thread of their own, because a callback
      that takes a lock inside a signal handler can dead-lock with the code that it interrupted;
    - a wait that holds no state (workers starting, an evaluation's result) runs inside
      :meth:`interruptible`, where the handler does raise, :class:`StopRequested`.

    A second signal raises :class:`KeyboardInterrupt`: the way out of a shutdown that hangs. Within
    ``patience_s`` of the first it is taken for the same request, since launchers (``timeout``,
    ``make``, a terminal that signals the whole process group) often deliver one request twice.

    Only the main thread can install signal handlers; the previous ones come back on exit.

    Keyword Args:
        patience_s (float): time after the first signal in which further ones are ignored.

    Raises:
        ValueError: on entry outside the main thread.

    Examples:
        >>> import os, signal, threading
        >>> woken = threading.Event()
        >>> with GracefulStop() as stop:
        ...     stop.on_request(woken.set)
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     woken.wait(10)
        ...     stop.requested, stop.reason
        True
        (True, 'SIGTERM')
    """

    def __init__(self, *, patience_s: float = 2.0) -> None:
        self._patience_s = patience_s
        self._signalled_s = 0.0
        self._previous: dict[signal.Signals, object] = {}
        # SimpleQueue.put is the one inter-thread primitive documented as safe inside a handler.
        self._inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._called = False
        self._thread: threading.Thread | None = None
        self._num_interruptible = 0
        self._reason: str | None = None

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Name of the signal; ``None`` while running."""
        return self._reason

    def on_request(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` once, from another thread, when a stop is asked for.

        Called at once when that has happened already.
        """
        with self._lock:
            if not self._called:
                self._callbacks.append(callback)
                return
        callback()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A region of the main thread that a request may leave by :class:`StopRequested`."""
        self._num_interruptible += 1
        try:
            if self._reason is not None:
                raise StopRequested(self._reason)
            yield
        finally:
            self._num_interruptible -= 1

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "GracefulStop must be entered in the main thread, got "
                f"{threading.current_thread().name!r}. Only the main thread receives signals."
            )
        with stop_signals_blocked():  # starts multiprocessing's tracker, for it to block them, too
            pass
        self._thread = threading.Thread(target=self._watch, name="graceful-stop", daemon=True)
        self._thread.start()
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if number in (signal.SIGINT, signal.SIGTERM) or _is_free(number):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(_CALLBACK_S)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._reason is not None:
            if time.monotonic() - self._signalled_s < self._patience_s:
                return
            raise KeyboardInterrupt(f"second request to stop ({signal.Signals(number).name})")
        self._signalled_s = time.monotonic()
        self._reason = signal.Signals(number).name
        self._inbox.put(self._reason)
        if self._num_interruptible:
            raise StopRequested(self._reason)

    def _watch(self) -> None:
        while self._inbox.get() is not None:
            with self._lock:
                self._called = True
                callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()


def _is_free(number: signal.Signals) -> bool:
    """Whether nobody handles or ignores a signal, neither in Python nor in C as faulthandler."""
    caught = 0
    with contextlib.suppress(OSError, StopIteration):  # no /proc
        status = Path("/proc/self/status").read_text().splitlines()
        caught = int(next(line for line in status if line.startswith("SigCgt:")).split()[1], 16)
    return signal.getsignal(number) is signal.SIG_DFL and not caught >> (number - 1) & 1
