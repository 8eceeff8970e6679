# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How the rows of a minibatch are dealt to the ranks of a learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torchrl_dvla.data.cohort_plan import pack_rollouts

__all__ = ["MicroBatch", "deal", "deal_rollouts"]


@dataclass(frozen=True)
class MicroBatch:
    """Rows ``start:stop`` of a minibatch, for one forward and backward pass of one rank.

    Args:
        start (int): the first of its rows, counted in the minibatch.
        stop (int): the row after its last one.
        counts (bool): ``False`` where a rank has no row left: it goes through row 0, or the first
            rollout, with weight zero, for all ranks take part in the collectives of every pass.
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


def deal_rollouts(
    num_decisions: Sequence[int], num_ranks: int, rank: int, micro_batch_size: int | None = None
) -> list[MicroBatch]:
    """The micro-batches of one rank where no rollout may be split: for a ratio of each rollout.

    As :func:`deal`, but ranks differ by the rows of a rollout, and micro-batches have as many whole
    rollouts as fit into ``micro_batch_size`` rows. With one rank, it is how a single process
    accumulates.

    Args:
        num_decisions (sequence of int): decisions of the rollout of each row. The rows are those of
            a :class:`~torchrl_dvla.PooledReplayBuffer` of whole rollouts: rollout after rollout.
        num_ranks (int): ranks.
        rank (int): which of them.
        micro_batch_size (int, optional): most rows of a pass. Defaults to all that a rank has.

    Raises:
        ValueError: if the rows are not those of whole rollouts, or a rollout is larger than a pass.

    Examples:
        >>> rows = [3, 3, 3, 2, 2, 1, 4, 4, 4, 4]  # rollouts of 3, 2, 1 and 4 decisions
        >>> [[(part.start, part.stop) for part in deal_rollouts(rows, 2, rank, 4)]
        ...  for rank in (0, 1)]
        [[(0, 3), (3, 5)], [(5, 6), (6, 10)]]
    """
    edges = [0]
    while (start := edges[-1]) < len(num_decisions):
        size = num_decisions[start]
        if size < 1 or list(num_decisions[start : start + size]) != [size] * size:
            raise ValueError(
                f"the minibatch must hold whole rollouts, rollout after rollout, got row {start} "
                f"of a rollout of {size} decisions without all of them from there on. Make the "
                "PooledReplayBuffer with whole_rollouts=True."
            )
        edges.append(start + size)
    sizes = [b - a for a, b in pairwise(edges)]
    if micro_batch_size is not None and max(sizes) > micro_batch_size:
        raise ValueError(
            f"micro_batch_size must be at least {max(sizes)}, the decisions of the longest "
            f"rollout, for a ratio of each rollout, got {micro_batch_size}. Raise it, or use a "
            "ratio_level up to 'sequence_mean'."
        )
    # Each rollout goes to the rank in whose equal share of the rows its middle lies.
    owners = [(a + b) * num_ranks // (2 * edges[-1]) for a, b in pairwise(edges)]
    dealt: list[list[MicroBatch]] = []
    for one in range(num_ranks):
        own = [number for number, owner in enumerate(owners) if owner == one]
        packs = pack_rollouts([sizes[number] for number in own], micro_batch_size or edges[-1])
        dealt.append([MicroBatch(edges[own[p[0]]], edges[own[p[-1]] + 1]) for p in packs])
    idle = MicroBatch(0, sizes[0], counts=False)
    return dealt[rank] + [idle] * (max(map(len, dealt)) - len(dealt[rank]))
