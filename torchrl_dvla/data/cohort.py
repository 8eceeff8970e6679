# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One learner update over one cohort of groups."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict

from torchrl_dvla.data.fields import RowFields
from torchrl_dvla.memory import ModelPool, RowLayout

__all__ = ["CohortPlan", "DropCounts", "Staging"]


@dataclass
class CohortPlan:
    """Which rows each minibatch of an update takes; it can be stopped and taken up again anywhere.

    Each epoch is a permutation of the cohort's rows, cut into minibatches of ``batch_size``; the
    last one may be smaller. Permutations depend on ``(seed, update, epoch)`` alone, so a resumed
    run sees the minibatches it has not seen yet, and no other.

    Args:
        group_ids (sequence of int): the cohort.
        num_rows (int): its rows.
        batch_size (int): rows of a minibatch.
        num_epochs (int): passes.
        seed (int): seed of the permutations.
        update (int): number of the update in the run.
        shuffle (bool): permute; else rows come in the order they were stored.
        position (int): minibatches handed out.

    Examples:
        >>> plan = CohortPlan([0], 5, batch_size=2, num_epochs=1, seed=0, update=0, shuffle=False)
        >>> [index.tolist() for index in plan]
        [[0, 1], [2, 3], [4]]
        >>> plan.position
        3
    """

    group_ids: Sequence[int]
    num_rows: int
    batch_size: int
    num_epochs: int
    seed: int
    update: int
    shuffle: bool = True
    position: int = 0

    @property
    def num_minibatches(self) -> int:
        """Minibatches of the whole update."""
        return self.num_epochs * -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Row ordinals ``[<= batch_size]`` of the minibatches from ``position`` on."""
        per_epoch = -(-self.num_rows // self.batch_size)
        while self.position < self.num_minibatches:
            epoch, number = divmod(self.position, per_epoch)
            order = self._order(epoch)
            for start in range(number * self.batch_size, self.num_rows, self.batch_size):
                # Counted before it is handed out: a checkpoint that the learner takes after its
                # optimiser step does not repeat the minibatch.
                self.position += 1
                yield order[start : start + self.batch_size]

    def _order(self, epoch: int) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.num_rows)
        # Odd multipliers keep (seed, update, epoch) apart for all counts a run can reach.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + self.update * 1_000_003 + epoch) % 2**63
        return torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(mixed))

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "group_ids": list(self.group_ids)}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> CohortPlan:
        """Take an update up where it was left."""
        return cls(**state_dict)


class Staging:
    """Persistent batches that rows are gathered into; pinned where CUDA is.

    Batches come in turn from a ring, so that a copy of one to the device may still run while the
    next is being filled. Nothing is allocated after the constructor.

    Args:
        layout (RowLayout): fields.
        batch_size (int): rows of a batch.
        num_batches (int): length of the ring.
        model_pool (ModelPool, optional): where their memory comes from and is counted. By default
            the batches are allocated by themselves.

    Raises:
        RuntimeError: if the budget of *model_pool* is spent.
    """

    def __init__(
        self,
        layout: RowLayout,
        batch_size: int,
        num_batches: int = 2,
        model_pool: ModelPool | None = None,
    ) -> None:
        def rows() -> TensorDict:
            if model_pool is not None:
                return model_pool.rows(layout, batch_size, "staging batches")
            return layout.empty(batch_size, pin_memory=torch.cuda.is_available())

        #: Rows of a batch.
        self.batch_size = batch_size
        self._batches = [RowFields(rows(), layout) for _ in range(num_batches)]
        self._turn = 0
        self._lock = threading.Lock()

    def next(self) -> RowFields:
        """The batch to fill."""
        with self._lock:
            batch = self._batches[self._turn]
            self._turn = (self._turn + 1) % len(self._batches)
            return batch


class DropCounts:
    """Which groups were dropped, why, and how long their episodes were.

    Dropping must not select for success: successful episodes end early, so their mean length beside
    that of the kept groups shows it.
    """

    def __init__(self) -> None:
        self._counts: dict[str, list[float]] = {}

    def add(self, reason: str, mean_length: float) -> None:
        """Count a dropped group."""
        entry = self._counts.setdefault(reason, [0, 0.0])
        entry[0] += 1
        entry[1] += mean_length

    @property
    def total(self) -> int:
        """All dropped groups."""
        return int(sum(count for count, _ in self._counts.values()))

    def by_reason(self) -> dict[str, dict[str, float]]:
        """``{"count", "mean_length"}`` by reason; the length is in env steps."""
        return {
            reason: {"count": int(count), "mean_length": length / count}
            for reason, (count, length) in self._counts.items()
        }

    def describe(self) -> str:
        """In words, most frequent reason first."""
        ranked = sorted(self._counts.items(), key=lambda item: -item[1][0])
        return ", ".join(f"{int(count)} x {reason!r}" for reason, (count, _) in ranked)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {reason: list(entry) for reason, entry in self._counts.items()}

    def load_state_dict(self, state_dict: Mapping[str, Sequence[float]]) -> None:
        """Take counts over."""
        self._counts = {reason: list(entry) for reason, entry in state_dict.items()}
