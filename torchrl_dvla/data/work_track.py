# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Whom the buffer tells what the learner does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

__all__ = ["NoTrack", "WorkTrack"]


class WorkTrack(Protocol):
    """Takes note of one thread's work and rest: :class:`torchrl_dvla.swimlane.Track`, say."""

    def waiting(self, reason: str) -> None:
        """From now on the thread rests because of *reason*."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """The ``with`` block is work."""


class NoTrack:
    """Nobody wants to know."""

    def waiting(self, reason: str) -> None:
        """Nothing."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Nothing, around a block."""
        return nullcontext()
