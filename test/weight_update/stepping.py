# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Gates at the steps of the protocol: each of them passes a lock, the ledger or the copier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchrl_dvla.weight_update import WeightReader, WeightStore
from torchrl_dvla.weight_update.segment import SlotViews
from torchrl_dvla.weight_update.slot_writer import WeightCopier

Gate = Callable[[str], None]


def step_writer(store: WeightStore, gate: Gate, *, piece_bytes: int = 64) -> None:
    """Have ``gate`` called with the name of each step of the store's writer."""
    writer = store._writer
    writer._copier = SteppingCopier(store.layout, gate, piece_bytes)
    writer.locks = WriterLocks(writer.locks, gate)  # type: ignore[assignment]
    writer._ledger = WriterLedger(writer._ledger, gate)  # type: ignore[assignment]


def step_reader(reader: WeightReader, gate: Gate) -> None:
    """Have ``gate`` called with the name of each step of ``reader``."""
    reader.has_update()  # attaches
    reader._locks = ReaderLocks(reader._locks, gate)  # type: ignore[assignment]
    reader._ledger = ReaderLedger(reader._ledger, gate)  # type: ignore[assignment]


def stop_deferred_writer(store: WeightStore) -> None:
    """A deferred version stays deferred until the test moves it."""
    store._writer._write_deferred = lambda: None  # type: ignore[method-assign]


class SteppingCopier(WeightCopier):
    def __init__(self, layout: Any, gate: Gate, piece_bytes: int) -> None:
        super().__init__(layout, piece_bytes=piece_bytes)
        self._gate = gate

    def copy(
        self,
        source: Sequence[torch.Tensor],
        destination: SlotViews,
        *,
        check_finite: bool = False,
        should_stop: Callable[[], bool] | None = None,
    ) -> bool:
        def after_piece() -> bool:
            self._gate("copying")
            return should_stop is not None and should_stop()

        return super().copy(source, destination, check_finite=check_finite, should_stop=after_piece)


class Stepping:
    """Passes everything on, and tells ``gate`` of some of it."""

    def __init__(self, wrapped: Any, gate: Gate) -> None:
        self._wrapped, self._gate = wrapped, gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


class WriterLocks(Stepping):
    def try_exclusive(self, byte: int) -> bool:
        is_locked = self._wrapped.try_exclusive(byte)
        if is_locked:
            self._gate("claimed")
        return is_locked

    def unlock(self, byte: int) -> None:
        self._wrapped.unlock(byte)
        self._gate("unlocked")


class WriterLedger(Stepping):
    def begin_write(self, slot: int) -> None:
        self._wrapped.begin_write(slot)
        self._gate("marked")

    def end_write(self, slot: int, **record: int) -> None:
        self._wrapped.end_write(slot, **record)
        self._gate("written")

    def set_latest(self, **latest: int) -> None:
        self._wrapped.set_latest(**latest)
        self._gate("visible")


class ReaderLocks(Stepping):
    def try_shared(self, byte: int) -> bool:
        self._gate("latest read")
        is_locked = self._wrapped.try_shared(byte)
        if is_locked:
            self._gate("slot locked")
        return is_locked


class ReaderLedger(Stepping):
    def version_in(self, slot: int) -> int:
        version = self._wrapped.version_in(slot)
        if version >= 0:
            self._gate("pinned")
        return version
