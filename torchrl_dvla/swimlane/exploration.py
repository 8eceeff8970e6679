# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An exploration type that belongs to one thread."""

from __future__ import annotations

import threading
from typing import Any

from tensordict.nn import probabilistic

__all__ = ["own_exploration_type"]


class _OwnOrShared:
    """What TorchRL keeps the exploration type in, with a value of its own for some threads.

    Args:
        shared: TorchRL's own holder, which every other thread goes on using.
    """

    def __init__(self, shared: Any) -> None:
        self._shared = shared
        self._own = threading.local()

    def own(self) -> None:
        """The calling thread has a value of its own from now on."""
        self._own.mode = None

    def get_mode(self) -> Any:
        own = vars(self._own)
        return own["mode"] if own else self._shared.get_mode()

    def set_mode(self, mode: Any) -> None:
        if vars(self._own):
            self._own.mode = mode
        else:
            self._shared.set_mode(mode)


def own_exploration_type() -> None:
    """Give the calling thread an exploration type of its own; other threads keep the common one.

    ``set_exploration_type`` changes one value for the whole process, and every TorchRL loss sets it
    for the time of its ``forward``. A policy that samples in a second thread would take its most
    likely tokens while the loss runs; and where two such blocks interleave, the value that the last
    one restores is the other's, for good (:doc:`/decisions/0045-exploration-type-of-a-thread`).

    Examples:
        >>> from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type
        >>> def lane():
        ...     own_exploration_type()
        ...     with set_exploration_type(ExplorationType.RANDOM):
        ...         inside.set()
        ...         leave.wait()
        >>> inside, leave = threading.Event(), threading.Event()
        >>> thread = threading.Thread(target=lane)
        >>> thread.start()
        >>> _ = inside.wait()
        >>> print(exploration_type())
        None
        >>> leave.set()
        >>> thread.join()
    """
    holder = probabilistic._interaction_type
    if not isinstance(holder, _OwnOrShared):
        with _INSTALLING:
            holder = probabilistic._interaction_type
            if not isinstance(holder, _OwnOrShared):
                # TorchRL looks the holder up by this name at every access.
                probabilistic._interaction_type = holder = _OwnOrShared(holder)
    holder.own()


_INSTALLING = threading.Lock()
