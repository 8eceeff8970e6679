# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How the rows of a minibatch are dealt to the ranks of a learner."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

__all__ = ["MicroBatch", "deal"]


@dataclass(frozen=True)
class MicroBatch:
    """Rows ``start:stop`` of a minibatch, for one forward and backward pass of one rank.

    Args:
        start (int): the first of its rows, counted in the minibatch.
        stop (int): the row after its last one.
        counts (bool): ``False`` where a rank has no row left: it goes through row 0 with weight
            zero, for all ranks take part in the collectives of every pass.
    """

    start: int
    stop: int
    counts: bool = True


def deal(
    num_rows: int, num_ranks: int, rank: int, micro_batch_size: int | None = None
) -> list[MicroBatch]:
    """The micro-batches of one rank.

    Over all ranks they hold each row of the minibatch exactly once. Ranks differ by one row at
    most, micro-batches of one rank too, and every rank has as many of them: what shards parameters
    gathers them in each pass, on all ranks together.

    Args:
        num_rows (int): rows of the minibatch.
        num_ranks (int): ranks.
        rank (int): which of them.
        micro_batch_size (int, optional): most rows of a pass. Defaults to all that a rank has.

    Examples:
        >>> [[(part.start, part.stop) for part in deal(9, 2, rank, 4)] for rank in (0, 1)]
        [[(0, 2), (2, 4)], [(4, 6), (6, 9)]]
        >>> deal(1, 2, 0)
        [MicroBatch(start=0, stop=1, counts=False)]
    """
    largest = -(-num_rows // num_ranks)
    num_parts = -(-largest // (micro_batch_size or largest))
    begin, end = (num_rows * k // num_ranks for k in (rank, rank + 1))
    edges = [begin + (end - begin) * k // num_parts for k in range(num_parts + 1)]
    return [
        MicroBatch(start, stop) if start < stop else MicroBatch(0, 1, counts=False)
        for start, stop in pairwise(edges)
    ]
