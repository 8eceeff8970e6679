# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Weight store of a node that does not learn: its versions come from the learner, as bytes."""

from __future__ import annotations

import hashlib
from typing import NoReturn

import numpy as np

from torchrl_dvla.weight_update.store import WeightStore
from torchrl_dvla.weight_update.weight_layout import WeightLayout, WeightSource

__all__ = ["WeightReplica", "weight_digest"]


def weight_digest(data: np.ndarray) -> str:
    """SHA-256 of the bytes of a version, by which a node knows that they are the learner's.

    Args:
        data (np.ndarray): uint8, contiguous.

    Examples:
        >>> weight_digest(np.zeros(64, np.uint8))[:8]
        'f5a5fd42'
    """
    return hashlib.sha256(data.data).hexdigest()


class WeightReplica(WeightStore):
    """Replica of the learner's store on another node: slots are filled byte by byte from its slots.

    Readers of the node adopt from it as they do from any store, by the same protocol. It has no
    version, and so no reader may adopt, before the first :meth:`write`.

    Args:
        layout (WeightLayout): that of the learner's store.
        frozen (np.ndarray): bytes of the weights that travel once, uint8 ``[frozen_bytes]``.
        num_slots (int): see :class:`WeightStore`. Default: 3.

    Keyword Args:
        max_readers (int): see :class:`WeightStore`. Default: 64.

    Raises:
        ValueError: if the bytes are not those of the layout.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.weight_update import WeightStore
        >>> store = WeightStore(torch.nn.Linear(2, 1), first_version=7)
        >>> reader = store.reader("nodes")
        >>> version, live, frozen = reader.pin_bytes()
        >>> replica = WeightReplica(store.layout, frozen)
        >>> replica.write(version, live, weight_digest(live))
        >>> replica.version, torch.equal(
        ...     replica.reader("here").pin()[1]["weight"], reader.pin()[1]["weight"]
        ... )
        (7, True)
        >>> replica.close(); store.close()
    """

    def __init__(
        self,
        layout: WeightLayout,
        frozen: np.ndarray,
        num_slots: int = 3,
        *,
        max_readers: int = 64,
    ) -> None:
        if frozen.shape != (layout.frozen_bytes,):
            raise ValueError(
                f"frozen must hold the {layout.frozen_bytes} bytes of the layout's frozen weights, "
                f"got {list(frozen.shape)}. Send those of the learner's store."
            )
        # The learner has checked what it published.
        self._open(layout, num_slots, max_readers, check_finite=False)
        if layout.frozen_bytes:
            np.copyto(self._segment.raw(0)[1], frozen)

    def write(self, version: int, live: np.ndarray, digest: str) -> None:
        """Make a version of the learner's the latest one here. Never waits for a reader.

        Args:
            version (int): its number there; it must grow.
            live (np.ndarray): bytes of its slot, uint8 ``[slot_bytes]``.
            digest (str): what the learner says that :func:`weight_digest` gives.

        Raises:
            ValueError: if the bytes are others than the learner's; nothing has changed then.
        """
        self._require_writer()
        found = weight_digest(live) if live.shape == (self.layout.slot_bytes,) else "another size"
        if found != digest:
            raise ValueError(
                f"Version {version} must have the learner's digest {digest}, got {found}. It is "
                "not used: look for a damaged network, or for somebody in it."
            )
        self._writer.write_bytes(live, version)

    def publish(
        self, source: WeightSource | None = None, *, version: int | None = None
    ) -> NoReturn:
        """Refuse weights that are not the learner's."""
        raise RuntimeError("A WeightReplica publishes nothing: publish in the learner's store.")
