# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Copying weights into a slot at the speed of memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence

import torch

from torchrl_dvla.weight_update.finite import Sight, is_finite
from torchrl_dvla.weight_update.layout import Bucket, WeightLayout
from torchrl_dvla.weight_update.segment import SlotViews

__all__ = ["WeightCopier", "cast_error"]

# A piece is copied and then checked while it is still in a cache: the check costs arithmetic, not a
# second pass over memory. Two MiB were fastest among 64 KiB to 8 MiB, on a core with 1 MiB of L2.
_PIECE_BYTES = 2 << 20

# Entries of a piece that are looked at one by one, in the source: a call takes some microseconds,
# a piece a tenth of a millisecond.
_MAX_PARTS = 4


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Elements ``start:stop`` of a dtype's run: whole entries, or a part of a large one.

    Args:
        start_in_entry (int): where in its entry the part begins.
    """

    dtype: torch.dtype
    start: int
    stop: int
    indices: tuple[int, ...]
    start_in_entry: int = 0


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where a piece goes in one copy of the weights.

    Args:
        run (torch.Tensor): all of its memory, flat.
        entries (list of torch.Tensor): the entries that it fills, or the one that it is a part of.
    """

    run: torch.Tensor
    entries: list[torch.Tensor]


class WeightCopier:
    """Copies the live (not frozen) entries of a layout into a slot.

    The views of a destination are made once, at its first copy, and go with it.

    Args:
        layout (WeightLayout): which entries there are, and which of them are live.

    Keyword Args:
        piece_bytes (int): bytes copied between two calls of ``between``. Default: 2 MiB.
    """

    def __init__(self, layout: WeightLayout, *, piece_bytes: int = _PIECE_BYTES) -> None:
        self._entries = layout.entries
        self._pieces: list[_Piece] = []
        self._targets_of: weakref.WeakKeyDictionary[SlotViews, list[_Target]] = (
            weakref.WeakKeyDictionary()
        )
        for bucket in layout.buckets:
            self._add_pieces(bucket, piece_bytes)

    def _add_pieces(self, bucket: Bucket, piece_bytes: int) -> None:
        small: list[int] = []
        itemsize = bucket.dtype.itemsize

        def begin_of(index: int) -> int:
            return (self._entries[index].offset_bytes - bucket.offset_bytes) // itemsize

        def flush() -> None:
            if small:
                stop = begin_of(small[-1]) + self._entries[small[-1]].numel
                piece = _Piece(bucket.dtype, begin_of(small[0]), stop, tuple(small))
                self._pieces.append(piece)
                small.clear()

        for index, entry in enumerate(self._entries):
            if entry.is_frozen or entry.dtype != bucket.dtype or not entry.numel:
                continue
            begin = begin_of(index)
            end = begin + entry.numel
            if small and (end - begin_of(small[0])) * itemsize > piece_bytes:
                flush()
            if entry.numel * itemsize <= piece_bytes:
                small.append(index)
                continue
            step = max(1, piece_bytes // itemsize)
            for start in range(0, entry.numel, step):
                stop = min(begin + start + step, end)
                self._pieces.append(_Piece(bucket.dtype, begin + start, stop, (index,), start))
        flush()

    @torch.no_grad()
    def copy(
        self,
        source: Sequence[torch.Tensor],
        destination: SlotViews,
        *,
        check_finite: bool = False,
        between: Callable[[], bool] | None = None,
    ) -> bool:
        """Copy every live entry, casting where the dtypes differ.

        Args:
            source (sequence of torch.Tensor): in the order of the layout's entries.
            destination (SlotViews): where to.

        Keyword Args:
            check_finite (bool): look at what was written, piece by piece.
            between (callable, optional): called after each piece; the copy stops when it returns
                True.

        Returns:
            True if everything was copied and, where that is checked, is finite.
        """
        for piece, target in zip(self._pieces, self._targets(destination), strict=True):
            flats = self._flats(piece, source) if len(piece.indices) == 1 else []
            if flats:
                target.run.copy_(flats[0])
            elif piece.start_in_entry == 0:
                # An entry that is not dense has no flat parts: its first piece carries it all.
                torch._foreach_copy_(target.entries, [source[index] for index in piece.indices])
            if check_finite and not is_finite(target.run):
                return False
            if between is not None and between():
                return False
        return True

    @torch.no_grad()
    def sights(self, source: Sequence[torch.Tensor], destination: SlotViews) -> list[Sight]:
        """Where a look beside ``copy(source, destination)`` finds each piece, in its order."""
        sights = []
        for piece, target in zip(self._pieces, self._targets(destination), strict=True):
            flats = self._flats(piece, source)
            has_same_bytes = all(flat.dtype == piece.dtype for flat in flats)
            sights.append(Sight([target.run], flats if has_same_bytes else ()))
        return sights

    def _flats(self, piece: _Piece, source: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The piece in ``source``, flat; nothing if it is not dense there, or of many entries."""
        flats: list[torch.Tensor] = []
        if len(piece.indices) > _MAX_PARTS:
            return flats
        for index in piece.indices:
            tensor, entry = source[index].detach(), self._entries[index]
            if tensor.stride() != entry.stride:
                return []
            numel = entry.numel if len(piece.indices) > 1 else piece.stop - piece.start
            offset = tensor.storage_offset() + piece.start_in_entry
            flats.append(tensor.as_strided((numel,), (1,), offset))
        return flats

    def _targets(self, destination: SlotViews) -> list[_Target]:
        targets = self._targets_of.get(destination)
        if targets is None:
            targets = self._targets_of[destination] = [
                _Target(
                    destination.runs[piece.dtype][piece.start : piece.stop],
                    [destination.entries[index] for index in piece.indices],
                )
                for piece in self._pieces
            ]
        return targets


def cast_error(layout: WeightLayout, tensors: Sequence[torch.Tensor]) -> float:
    """Largest ``|stored - weight| / |weight|`` over the entries that are stored narrower."""
    worst = 0.0
    for entry, tensor in zip(layout.entries, tensors, strict=True):
        if entry.dtype != entry.source_dtype and tensor.numel():
            exact = tensor.detach().to(torch.float64)
            error = (exact.to(entry.dtype).to(torch.float64) - exact).abs()
            worst = max(worst, float((error / exact.abs().clamp_min(1e-30)).max()))
    return worst
