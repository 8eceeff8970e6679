# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where a node keeps the weights that it carries: a slot of its store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from torchrl_dvla.weight_update.reader import PinnedSlot
from torchrl_dvla.weight_update.store import WeightStore

__all__ = ["Hold", "SlotHold", "StoreHold"]


class Hold(Protocol):
    """Where a node keeps what it carries."""

    has_frozen: bool

    @property
    def version(self) -> int:
        """The newest whole version here, offered or not; -1 for none."""

    @property
    def frozen(self) -> torch.Tensor:
        """Weights that travel once, uint8 ``[frozen_bytes]``."""

    def receive(self, fill: Callable[[torch.Tensor], None], version: int) -> None:
        """Have ``fill`` write a version; it counts only if that returns."""

    def held(self, version: int) -> torch.Tensor:
        """The bytes of ``version``, which came before; they stay as they are for this round."""


class SlotHold:
    """What the learner's node carries: a version that is pinned for the whole round.

    Args:
        slot (PinnedSlot): the version.
    """

    has_frozen = True

    def __init__(self, slot: PinnedSlot) -> None:
        self._slot = slot

    @property
    def version(self) -> int:
        """See :class:`Hold`."""
        return self._slot.version

    @property
    def frozen(self) -> torch.Tensor:
        """See :class:`Hold`."""
        return self._slot.frozen

    def receive(self, fill: Callable[[torch.Tensor], None], version: int) -> None:
        """See :class:`Hold`."""
        raise RuntimeError("The learner's node receives nothing. This is an error in the order.")

    def held(self, version: int) -> torch.Tensor:
        """See :class:`Hold`."""
        return self._slot.live


class StoreHold:
    """What a relay carries is in its node's store, of which it is the only writer.

    Args:
        store (WeightStore): the node's.
        tell (callable): called when a version has come, before the node's children all have it.
    """

    def __init__(self, store: WeightStore, tell: Callable[[], None]) -> None:
        self._store = store
        self._tell = tell
        self._newest: torch.Tensor | None = None
        self.has_frozen = not store.layout.frozen_bytes

    @property
    def version(self) -> int:
        """See :class:`Hold`."""
        return self._store.version

    @property
    def frozen(self) -> torch.Tensor:
        """See :class:`Hold`."""
        return self._store.frozen_memory

    def receive(self, fill: Callable[[torch.Tensor], None], version: int) -> None:
        """See :class:`Hold`."""
        came: list[torch.Tensor] = []

        def keep(memory: torch.Tensor) -> None:
            fill(memory)
            came.append(memory)

        self._newest = None
        self._store.receive(keep, version=version)
        self._newest = came[0]
        self._tell()

    def held(self, version: int) -> torch.Tensor:
        """See :class:`Hold`.

        No pin is needed: only the next :meth:`receive` may write the memory that the newest version
        came into. It is the offered slot, or the place of a version that waits for a slot.
        """
        if self._newest is None or version != self.version:
            raise RuntimeError(
                f"Version {version} was ordered from a node that has {self.version}. This is an "
                "error in the order."
            )
        return self._newest
