# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Finding NaN and infinity among weights, beside their copy or afterwards."""

from __future__ import annotations

import math
import queue
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torchrl_dvla.weight_update.layout import WeightLayout

__all__ = ["CopyLook", "Sight", "is_finite", "non_finite_names", "not_finite"]

# Pieces (of 2 MiB) that a look may be ahead of the copy, and between two words about how far that
# is. Farther ahead, the look takes the copy's share of memory's bandwidth instead of reading for it
# (docs/decisions/0026).
_AHEAD_PIECES, _REPORT_PIECES = 4, 4


def is_finite(flat: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; integers always pass.

    The sum is one vectorised pass that any NaN or infinity survives, at twice the speed of
    ``torch.aminmax`` and fifty times that of ``torch.isfinite(flat).all()``. Finite numbers may
    overflow it; then the extremes decide.

    Examples:
        >>> is_finite(torch.tensor([1.0, -2.0])), is_finite(torch.tensor([1.0, math.nan]))
        (True, False)
    """
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    if not flat.is_floating_point() or not flat.numel():
        return True
    if flat.dtype.itemsize == 1:  # no reduction is implemented for 8-bit floats
        flat = flat.float()
    if flat.dtype != torch.float16 and math.isfinite(flat.sum().item()):  # half overflows at 65504
        return True
    low, high = torch.aminmax(flat)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def non_finite_names(layout: WeightLayout, tensors: Sequence[torch.Tensor]) -> list[str]:
    """``name (k of n elements)`` of each live entry that holds NaN or infinity."""
    names = []
    for entry, tensor in zip(layout.entries, tensors, strict=True):
        if entry.is_frozen:
            continue
        stored = tensor.detach().to(entry.dtype).reshape(-1)
        if is_finite(stored):
            continue
        count = int((~torch.isfinite(stored)).sum())
        names.append(f"{entry.name} ({count} of {entry.numel} elements)")
    return names


def not_finite(names: list[str], version: int) -> ValueError:
    """The error that lists weights that are not finite."""
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return ValueError(
        f"weights must be finite, got NaN or infinity in {listed} of version {version}. The one "
        "before stays in use; look at the gradients, or pass check_finite=False."
    )


class Sight(NamedTuple):
    """What to look at to know whether a piece of a copy is finite.

    Args:
        written (list of torch.Tensor): the piece where it is written, flat.
        source (list of torch.Tensor): where the same bytes are read, flat; none if they are others.
    """

    written: list[torch.Tensor]
    source: Sequence[torch.Tensor] = ()


class CopyLook:
    """A look for NaN and infinity beside a copy through memory, in another thread.

    Where the copy reads what it writes, byte for byte, the look goes a few pieces ahead of it and
    reads the same source: the copy finds it in the cache that the cores share, and memory is read
    once. Else (weights that are cast, not dense, or very small) the look follows and reads what was
    written. The thread that copies says every few pieces how far it is.

    When the copy has ended its source may change, so a look that is late reads what was written. A
    source counts if the copy had not ended by the time that it was read.

    Args:
        sights (list of Sight): the pieces of the copy, in its order; see
            :meth:`WeightCopier.sights`.

    Examples:
        >>> pieces = [torch.zeros(2), torch.zeros(2)]
        >>> look = CopyLook([Sight([piece]) for piece in pieces])
        >>> for piece, value in zip(pieces, (1.0, math.nan)):
        ...     _ = piece.fill_(value)
        ...     _ = look.note_piece()
        >>> look.end()
        >>> look.run()  # in a thread, from the beginning of the copy
        False
    """

    def __init__(self, sights: list[Sight]) -> None:
        self._sights = sights
        self._num_copied = 0
        self._reports: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._has_ended = False
        #: Whether the copy was not made to its end.
        self.is_given_up = False

    def note_piece(self) -> bool:
        """A piece was copied; False, for the copy shall go on."""
        self._num_copied += 1
        if self._num_copied % _REPORT_PIECES == 0 and self._num_copied < len(self._sights):
            self._reports.put(self._num_copied)
        return False

    def end(self, *, is_given_up: bool = False) -> None:
        """The copy has ended; from now on its source may change."""
        self.is_given_up = is_given_up
        self._has_ended = True
        self._reports.put(len(self._sights))

    def run(self) -> bool:
        """Look at every piece until the copy has ended; whether all of it is finite."""
        num_copied, all_finite = 0, True
        for index, (written, source) in enumerate(self._sights):
            while num_copied <= index - (_AHEAD_PIECES if source else 0):
                num_copied = self._reports.get()
            if source and not self._has_ended:
                is_good = all(map(is_finite, source))
                if not self._has_ended:
                    all_finite = all_finite and is_good
                    continue
            while num_copied <= index:
                num_copied = self._reports.get()
            if self.is_given_up:
                return False
            all_finite = all_finite and all(map(is_finite, written))
        while num_copied < len(self._sights):
            num_copied = self._reports.get()
        return all_finite and not self.is_given_up
