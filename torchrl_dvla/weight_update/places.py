# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Who reads from a weight store: the writer's list of its readers."""

from __future__ import annotations

from torchrl_dvla.weight_update.ledger import Adoption, AdoptionStats, Ledger, ReaderState
from torchrl_dvla.weight_update.locks import LockHandle
from torchrl_dvla.weight_update.segment import reader_byte

__all__ = ["ReaderPlaces"]


class ReaderPlaces:
    """Hands out the rows of a ledger to readers by name, and reads them.

    Args:
        ledger (Ledger): the shared words.
        locks (LockHandle): the writer's, to see which readers are alive.
        max_readers (int): rows.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.weight_update.locks import LockFile
        >>> ledger = Ledger(torch.zeros(Ledger.num_words(3, 2), dtype=torch.int64), 3)
        >>> file = LockFile()
        >>> places = ReaderPlaces(ledger, file.open(), 2)
        >>> places.issue("a"), places.issue("b")
        (0, 1)
        >>> places.release("a")
        >>> places.issue("c"), list(places.stats())
        (0, ['b', 'c'])
    """

    def __init__(self, ledger: Ledger, locks: LockHandle, max_readers: int) -> None:
        self._ledger, self._locks, self._max_readers = ledger, locks, max_readers
        self._rows: dict[str, int] = {}
        self._num_taken: dict[str, int] = {}

    def issue(self, name: str) -> int:
        """Give ``name`` a row.

        Raises:
            ValueError: if the name has one that was not given back.
            RuntimeError: if all rows are taken.
        """
        self._rows = self._open_rows()
        if name in self._rows:
            raise ValueError(
                f"name must be free, got {name!r}, which a reader has. Release that one first."
            )
        taken = set(self._rows.values())
        row = next((row for row in range(self._max_readers) if row not in taken), None)
        if row is None:
            raise RuntimeError(
                f"All {self._max_readers} places for readers are taken. Release dead readers, or "
                "make the store with a larger max_readers."
            )
        self._rows[name] = row
        self._num_taken[name] = 0
        self._ledger.set_state(row, ReaderState.ISSUED)
        return row

    def require(self, name: str) -> None:
        """Raise KeyError if nobody was called ``name``."""
        if name not in self._rows:
            raise KeyError(f"No reader is called {name!r}. There are {sorted(self._rows)}.")

    def release(self, name: str) -> None:
        """Take the row of ``name`` back.

        Raises:
            KeyError: if there is no such reader.
            RuntimeError: if it is alive.
        """
        self.require(name)
        row = self._rows[name]
        if self._is_alive(row):
            raise RuntimeError(
                f"Reader {name!r} is alive, got a request to release it. Let its process end or "
                "call its close() there."
            )
        self._ledger.set_state(row, ReaderState.CLOSED)
        del self._rows[name]

    def stats(self) -> dict[str, AdoptionStats]:
        """What each reader did."""
        return {name: self._ledger.adoption_stats(row) for name, row in self._open_rows().items()}

    def take_adoptions(self) -> dict[str, list[Adoption]]:
        """What each reader adopted since the last call."""
        taken = {}
        for name, row in self._open_rows().items():
            first, self._num_taken[name] = self._num_taken[name], self._ledger.num_adoptions(row)
            taken[name] = self._ledger.adoptions(row, first, self._num_taken[name])
        return taken

    def dead(self) -> list[str]:
        """Readers whose process ended without closing them."""
        return [
            name
            for name, row in self._open_rows().items()
            if self._ledger.state(row) is ReaderState.ATTACHED and not self._is_alive(row)
        ]

    def _open_rows(self) -> dict[str, int]:
        closed = ReaderState.CLOSED
        return {n: row for n, row in self._rows.items() if self._ledger.state(row) is not closed}

    def _is_alive(self, row: int) -> bool:
        return self._locks.is_held_by_others(reader_byte(row))
