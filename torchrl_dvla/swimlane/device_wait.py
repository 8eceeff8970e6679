# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Time that a lane's work stood in the queue of a device which another lane was using."""

from __future__ import annotations

import threading

__all__ = ["note_device_wait", "take_device_wait"]

_noted = threading.local()


def note_device_wait(duration_s: float) -> None:
    """Say that this thread has just waited *duration_s* seconds for a busy device.

    Called by whoever can tell, such as :class:`torchrl_dvla.testing.EmulatedDevice`. Kernels of two
    lanes that share a CUDA device interleave: there the wait shows as longer work instead.

    Examples:
        >>> note_device_wait(0.25)
        >>> note_device_wait(0.5)
        >>> take_device_wait(), take_device_wait()
        (0.75, 0.0)
    """
    _noted.duration_s = getattr(_noted, "duration_s", 0.0) + duration_s


def take_device_wait() -> float:
    """Seconds that this thread has noted since it last asked."""
    duration_s: float = getattr(_noted, "duration_s", 0.0)
    _noted.duration_s = 0.0
    return duration_s
