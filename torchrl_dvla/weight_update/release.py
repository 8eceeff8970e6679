# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What is left to do with a version after ``publish`` has returned, and the thread that does it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Protocol

__all__ = ["Release", "Releaser"]

# A thread that has had nothing to do for so long ends; the next version starts another. To start
# one takes the learner as long as to copy a megabyte.
_LINGER_S = 5.0


class Release(Protocol):
    """A version that was taken and that no reader can adopt yet."""

    version: int

    def run(self) -> None:
        """Look at it, and bring it to the readers; raise what keeps it from them."""


class Releaser:
    """Runs releases one after the other in a thread; one may wait, versions never queue.

    What a release raises, a refusal above all, is kept for the learner and raised by its next call:
    :meth:`finish` or :meth:`raise_error`. The refused version is forgotten.

    Examples:
        >>> class Refused:
        ...     version = 1
        ...
        ...     def run(self):
        ...         raise ValueError("weights must be finite")
        >>> releaser = Releaser()
        >>> releaser.submit(Refused())
        >>> releaser.finish()
        Traceback (most recent call last):
        ...
        ValueError: weights must be finite
        >>> releaser.newest
        -1
        >>> releaser.close()
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: Release | None = None
        self._running: Release | None = None
        self._error: BaseException | None = None
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_idle(self) -> bool:
        """Whether no version is on its way."""
        return self.newest < 0

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener()`` in the thread after each release; it must not block."""
        self._listeners.append(listener)

    @property
    def newest(self) -> int:
        """The newest version that is on its way; -1 for none."""
        with self._changed:
            on_the_way = (self._running, self._waiting)
            return max((r.version for r in on_the_way if r is not None), default=-1)

    def submit(self, release: Release) -> None:
        """Have ``release`` run next. None may be waiting: :meth:`withdraw` it first."""
        with self._changed:
            assert self._waiting is None
            self._waiting = release
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="dvla-weight-release", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def withdraw(self) -> Release | None:
        """The release that waits, if it has not begun; it will not be run."""
        with self._changed:
            release, self._waiting = self._waiting, None
            return release

    def finish(self) -> None:
        """Wait until nothing is on its way, and raise what kept a version from its readers."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._running is None)
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the first error since the last one that was raised, if there is one."""
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Do what is left to do, then end. An error that nobody has seen becomes a warning."""
        with self._changed:
            self._is_closing = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        try:
            self.raise_error()
        except Exception as error:
            warnings.warn(f"The last publish was in vain: {error}", RuntimeWarning, stacklevel=4)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing, _LINGER_S)
                if self._waiting is None:
                    self._thread = None
                    return
                release = self._running = self._waiting
                self._waiting = None
            error: BaseException | None = None
            try:
                release.run()
            except BaseException as raised:
                error = raised
            del release  # and with it the memory that it looks at
            with self._changed:
                self._error = self._error or error
                self._running = None
                self._changed.notify_all()
            del error
            try:
                for listener in self._listeners:
                    listener()
            except Exception as raised:
                with self._changed:
                    self._error = self._error or raised
                    self._changed.notify_all()
