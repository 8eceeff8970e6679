# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Standard streams whose reader may go away."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

__all__ = ["drop_unwritable_output"]


class _LossyStream:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drop_unwritable_output() -> None:
    """Standard output and error that drop what they cannot write, instead of raising.

    Their reader may go at any time: ``| head``, a terminal that is closed, a disk that is full. No
    run may end for that, nor its exit code change by what is flushed at its end. A stream that was
    closed from the beginning, as by ``>&-``, becomes the null device.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _LossyStream):
            setattr(sys, name, _LossyStream(stream or open(os.devnull, "w")))  # noqa: SIM115
