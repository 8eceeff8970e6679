# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which rows of a cohort each minibatch of an update takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["CohortPlan", "pack_rollouts"]


def pack_rollouts(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Rollouts in the order given, cut into packs of at most ``most`` rows.

    A rollout that is larger than that is a pack by itself: who has to refuse it does so before.

    Args:
        sizes (sequence of int): rows of each rollout.
        most (int): rows of a pack.

    Returns:
        list of list of int: positions in ``sizes``; each pack has at least one.

    Examples:
        >>> pack_rollouts([3, 2, 2, 4, 1], 5)
        [[0, 1], [2], [3, 4]]
    """
    packs: list[list[int]] = []
    num_rows = 0
    for number, size in enumerate(sizes):
        if not packs or num_rows + size > most:
            packs.append([])
            num_rows = 0
        packs[-1].append(number)
        num_rows += size
    return packs


@dataclass
class CohortPlan:
    """Which rows each minibatch of an update takes; it can be stopped and taken up again anywhere.

    Each epoch is a permutation of the cohort's rows, cut into minibatches of ``batch_size``; the
    last one may be smaller. With ``rollout_sizes`` it is a permutation of its rollouts, and a
    minibatch takes whole ones, as many as have no more than ``batch_size`` rows together.
    Permutations depend on ``(seed, update, epoch)`` alone, so a resumed run sees the minibatches it
    has not seen yet, and no other.

    Args:
        num_rows (int): rows of the cohort.
        batch_size (int): rows of a minibatch.
        num_epochs (int): passes.
        seed (int): seed of the permutations.
        update (int): number of the update in the run.
        shuffle (bool): permute; else rows come in the order they were stored.
        position (int): minibatches handed out.
        rollout_sizes (list of int, optional): rows of each rollout of the cohort, none of which is
            split then.

    Examples:
        >>> plan = CohortPlan(5, batch_size=2, num_epochs=1, seed=0, update=0, shuffle=False)
        >>> while not plan.is_over:
        ...     print(plan.row_ordinals().tolist())
        ...     plan.position += 1
        [0, 1]
        [2, 3]
        [4]
        >>> plan = CohortPlan(5, 4, 1, seed=0, update=0, shuffle=False, rollout_sizes=[3, 2])
        >>> plan.row_ordinals().tolist()
        [0, 1, 2]
    """

    num_rows: int
    batch_size: int
    num_epochs: int
    seed: int
    update: int
    shuffle: bool = True
    position: int = 0
    rollout_sizes: list[int] | None = None

    @property
    def is_over(self) -> bool:
        """Whether every minibatch was handed out."""
        if self.rollout_sizes is None:
            return self.position >= self.num_epochs * -(-self.num_rows // self.batch_size)
        return self._whole_rollouts(self.rollout_sizes) is None

    def row_ordinals(self) -> torch.Tensor:
        """Rows of the next minibatch, int64 ``[<= batch_size]``, counted in the cohort."""
        if self.rollout_sizes is not None:
            rows = self._whole_rollouts(self.rollout_sizes)
            assert rows is not None, "the plan is over"
            return rows
        epoch, number = divmod(self.position, -(-self.num_rows // self.batch_size))
        start = number * self.batch_size
        return self._order(self.num_rows, epoch)[start : start + self.batch_size]

    def _whole_rollouts(self, sizes: list[int]) -> torch.Tensor | None:
        """Rows of the next minibatch, rollout after rollout; ``None`` after the last one."""
        left = self.position
        spans = torch.arange(self.num_rows).split(sizes)
        for epoch in range(self.num_epochs):  # how many minibatches one has depends on its order
            order = self._order(len(sizes), epoch).tolist()
            packs = pack_rollouts([sizes[number] for number in order], self.batch_size)
            if left < len(packs):
                return torch.cat([spans[order[number]] for number in packs[left]])
            left -= len(packs)
        return None

    def _order(self, size: int, epoch: int) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(size)
        # Odd multipliers keep (seed, update, epoch) apart for all counts a run can reach.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + self.update * 1_000_003 + epoch) % 2**63
        return torch.randperm(size, generator=torch.Generator().manual_seed(mixed))
