# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Weight store of a node that does not learn: its versions come from the learner, as bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import numpy as np

from torchrl_dvla.weight_update.store import WeightStore
from torchrl_dvla.weight_update.weight_layout import WeightLayout, WeightSource

__all__ = ["WeightReplica", "weight_digest"]


class Fill(Protocol):
    """What fills arrays with a version, see :meth:`ChainReceiver.receive`."""

    def __call__(
        self, parts: Sequence[np.ndarray], on_bucket: Callable[[memoryview], object]
    ) -> None:
        """Fill them, and call ``on_bucket`` with all of their bytes, in order."""


def weight_digest(parts: Sequence[np.ndarray]) -> str:
    """SHA-256 of the bytes of a version, by which a node knows that they are the learner's.

    Args:
        parts (sequence of np.ndarray): uint8, contiguous.

    Examples:
        >>> weight_digest([np.zeros(32, np.uint8), np.zeros(32, np.uint8)])[:8]
        'f5a5fd42'
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()


class WeightReplica(WeightStore):
    """Replica of the learner's store on another node: slots are filled byte by byte from its slots.

    Readers of the node adopt from it as they do from any store, by the same protocol. It has no
    version, and so no reader may adopt, before the first :meth:`write`.

    Args:
        layout (WeightLayout): that of the learner's store.
        num_slots (int): see :class:`WeightStore`. Default: 3.

    Keyword Args:
        max_readers (int): see :class:`WeightStore`. Default: 64.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.weight_update import WeightStore
        >>> store = WeightStore(torch.nn.Linear(2, 1), first_version=7)
        >>> reader = store.reader("nodes")
        >>> version, live, frozen = reader.pin_bytes()
        >>> def fill(parts, on_bucket):  # a ChainReceiver's
        ...     for part, sent in zip(parts, live, strict=True):
        ...         part[:] = sent
        ...         on_bucket(part.data)
        >>> replica = WeightReplica(store.layout)
        >>> replica.write(version, fill, weight_digest(live))
        >>> replica.version, torch.equal(
        ...     replica.reader("here").pin()[1]["weight"], reader.pin()[1]["weight"]
        ... )
        (7, True)
        >>> replica.close(); store.close()
    """

    def __init__(self, layout: WeightLayout, num_slots: int = 3, *, max_readers: int = 64) -> None:
        # The learner has checked what it published.
        self._open(layout, num_slots, max_readers, check_finite=False)

    def write(self, version: int, fill: Fill, digest: str) -> None:
        """Make a version of the learner's the latest one here. Never waits for a reader.

        Args:
            version (int): its number there; it must grow.
            fill (callable): fills the memory of a slot.
            digest (str): what the learner says that :func:`weight_digest` gives.

        Raises:
            ValueError: if the bytes are others than the learner's; what is visible is so still.
        """
        self._require_writer()
        self._writer.write_parts(
            lambda parts: _fill_checked(fill, parts, digest, f"Version {version}"), version
        )

    def write_frozen(self, fill: Fill, digest: str) -> None:
        """Write the weights that travel once, before the first version.

        Args:
            fill (callable): fills their memory.
            digest (str): what the learner says that :func:`weight_digest` gives.

        Raises:
            ValueError: if the bytes are others than the learner's.
        """
        _fill_checked(fill, [self._segment.raw(0)[1]], digest, "What is frozen")

    def publish(
        self, source: WeightSource | None = None, *, version: int | None = None
    ) -> NoReturn:
        """Refuse weights that are not the learner's."""
        raise RuntimeError("A WeightReplica publishes nothing: publish in the learner's store.")


def _fill_checked(fill: Fill, parts: Sequence[np.ndarray], digest: str, what: str) -> None:
    found = hashlib.sha256()
    fill(parts, found.update)
    if found.hexdigest() != digest:
        raise ValueError(
            f"{what} must have the learner's digest {digest}, got {found.hexdigest()}. It is not "
            "used: look for a damaged network, or for somebody in it."
        )
