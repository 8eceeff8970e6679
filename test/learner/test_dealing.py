# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchrl_dvla.learner import MicroBatch, deal


def test_nine_rows_for_two_ranks_by_hand():
    # 4 and 5 rows; the larger part takes two passes of at most 4 rows, so both take two.
    assert deal(9, 2, 0, 4) == [MicroBatch(0, 2), MicroBatch(2, 4)]
    assert deal(9, 2, 1, 4) == [MicroBatch(4, 6), MicroBatch(6, 9)]


def test_a_rank_without_a_row_goes_along_with_weight_zero():
    assert deal(1, 2, 0) == [MicroBatch(0, 1, counts=False)]
    assert deal(1, 2, 1) == [MicroBatch(0, 1)]


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
