# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What ends the sleep of a loop."""

from __future__ import annotations

import contextlib
import os
import threading

__all__ = ["Alarm"]


class Alarm:
    """Wakes a loop that sleeps in a selector, from any thread.

    Examples:
        >>> import selectors
        >>> alarm, selector = Alarm(), selectors.DefaultSelector()
        >>> _ = selector.register(alarm, selectors.EVENT_READ)
        >>> alarm.ring()
        >>> len(selector.select())
        1
        >>> alarm.silence()
        >>> len(selector.select(0.0))
        0
        >>> selector.close(); alarm.close()
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._lock = threading.Lock()
        #: Whether the descriptors were given back.
        self.is_closed = False

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._read

    def ring(self) -> None:
        """End the sleep, or the next one; nobody is waited for. After :meth:`close` nothing."""
        with self._lock:  # a closed descriptor's number may be somebody else's by now
            if not self.is_closed:
                with contextlib.suppress(BlockingIOError):  # full: it rings already
                    os.write(self._write, b"x")

    def silence(self) -> None:
        """Called by the loop when it is awake."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        """Give the descriptors back; safe to call twice."""
        with self._lock:
            if not self.is_closed:
                self.is_closed = True
                os.close(self._read)
                os.close(self._write)

    def __del__(self) -> None:
        self.close()
