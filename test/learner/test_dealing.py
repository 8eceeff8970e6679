# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_dvla.learner import MicroBatch, deal, deal_rollouts


def test_nine_rows_for_two_ranks_by_hand():
    # 4 and 5 rows; the larger part takes two passes of at most 4 rows, so both take two.
    assert deal(9, 2, 0, 4) == [MicroBatch(0, 2), MicroBatch(2, 4)]
    assert deal(9, 2, 1, 4) == [MicroBatch(4, 6), MicroBatch(6, 9)]


def test_a_rank_without_a_row_goes_along_with_weight_zero():
    assert deal(1, 2, 0) == [MicroBatch(0, 1, counts=False)]
    assert deal(1, 2, 1) == [MicroBatch(0, 1)]


def test_four_rollouts_for_two_ranks_by_hand():
    rows = [3, 3, 3, 2, 2, 1, 4, 4, 4, 4]
    # Middles at 1.5, 4, 5.5 and 8 of 10 rows: two rollouts a rank, of 5 rows each.
    assert deal_rollouts(rows, 2, 0) == [MicroBatch(0, 5)]
    assert deal_rollouts(rows, 2, 1) == [MicroBatch(5, 10)]
    # One process in passes of at most 5 rows.
    assert deal_rollouts(rows, 1, 0, 5) == [MicroBatch(0, 5), MicroBatch(5, 10)]
    # A rank without a rollout goes through the first one with weight zero.
    assert deal_rollouts([2, 2], 2, 0) == [MicroBatch(0, 2, counts=False)]


def test_a_split_rollout_and_one_larger_than_a_pass_are_refused():
    for rows in ([2, 2, 3, 3], [2, 1, 2], [0]):
        with pytest.raises(ValueError, match="minibatch must hold whole rollouts.*whole_rollouts="):
            deal_rollouts(rows, 2, 0)
    with pytest.raises(ValueError, match="micro_batch_size must be at least 3, the decisions of"):
        deal_rollouts([3, 3, 3, 1], 2, 0, 2)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 20))
def test_every_rollout_whole_and_once_and_equal_passes(sizes, num_ranks, extra):
    rows = [size for size in sizes for _ in range(size)]
    most = max(sizes) + extra
    dealt = [deal_rollouts(rows, num_ranks, rank, most) for rank in range(num_ranks)]
    assert len({len(parts) for parts in dealt}) == 1
    counted = [part for parts in dealt for part in parts if part.counts]
    assert [row for p in counted for row in range(p.start, p.stop)] == list(range(len(rows)))
    edges = {sum(sizes[:k]) for k in range(len(sizes) + 1)}
    for part in (part for parts in dealt for part in parts):
        assert {part.start, part.stop} <= edges and 0 < part.stop - part.start <= most
    totals = [sum(p.stop - p.start for p in parts if p.counts) for parts in dealt]
    share = len(rows) / num_ranks
    assert all(abs(total - share) <= max(sizes) for total in totals)


@given(st.integers(1, 300), st.integers(1, 9), st.none() | st.integers(1, 40))
def test_every_row_once_equal_parts_equal_passes(num_rows, num_ranks, micro_batch_size):
    dealt = [deal(num_rows, num_ranks, rank, micro_batch_size) for rank in range(num_ranks)]
    assert len({len(parts) for parts in dealt}) == 1
    counted = [[part for part in parts if part.counts] for parts in dealt]
    rows = [row for parts in counted for part in parts for row in range(part.start, part.stop)]
    assert rows == list(range(num_rows))
    totals = [sum(part.stop - part.start for part in parts) for parts in counted]
    assert max(totals) - min(totals) <= 1
    for part in (part for parts in dealt for part in parts):
        assert 0 <= part.start < part.stop <= num_rows
        assert part.stop - part.start <= (micro_batch_size or num_rows)
