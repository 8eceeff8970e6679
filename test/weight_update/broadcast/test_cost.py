# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_dvla.weight_update.broadcast.cost import (
    MAX_BUCKETS,
    LinkModel,
    bucket_bounds,
    choose_plan,
    transfer_s,
)
from torchrl_dvla.weight_update.broadcast.tree import SHAPES, Tree, binomial, chain, star

# 10 ms, 1 MB/s, 1 ms: numbers that can be added up by hand.
SLOW = LinkModel(latency_s=0.010, bytes_per_s=1e6, overhead_s=0.001)


def simulated_s(tree: Tree, num_bytes: int, num_buckets: int, link: LinkModel) -> float:
    """The broadcast bucket by bucket, for a comparison with the closed form."""
    bucket_s = link.message_s(num_bytes / num_buckets)
    children = tree.children()
    arrival = [[0.0] * num_buckets for _ in tree.parents]
    for node in range(len(tree.parents)):  # parents come first
        free = 0.0
        for bucket in range(num_buckets):
            start = max(free, arrival[node][bucket])
            free = start + len(children[node]) * bucket_s
            for child in children[node]:
                arrival[child][bucket] = free + link.latency_s
    return max(times[-1] for times in arrival)


def test_one_transfer_by_hand() -> None:
    # 1 ms + 100 kB at 1 MB/s = 101 ms busy, 10 ms on the way.
    assert transfer_s(chain(1), 100_000, 1, SLOW) == pytest.approx(0.111)
    assert transfer_s(chain(0), 100_000, 1, SLOW) == 0.0


def test_a_chain_by_hand() -> None:
    # Four buckets of 26 ms through three hops: 3 * 10 + (3 + 4 - 1) * 26 = 186 ms.
    assert transfer_s(chain(3), 100_000, 4, SLOW) == pytest.approx(0.186)


def test_a_binomial_tree_by_hand() -> None:
    # To node 8: four hops, senders with 1, 3, 2, 1 children; the widest sets the pace.
    # 4 * 10 + (7 + (2 - 1) * 3) * 51 = 550 ms.
    assert transfer_s(binomial(8), 100_000, 2, SLOW) == pytest.approx(0.550)


def test_a_star_by_hand() -> None:
    # Four copies through one link: 10 + 4 * 101 = 414 ms.
    assert transfer_s(star(4), 100_000, 1, SLOW) == pytest.approx(0.414)


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    num_nodes=st.integers(1, 20),
    num_buckets=st.integers(1, 20),
    num_bytes=st.integers(1, 10**7),
)
def test_the_closed_form_is_what_happens(
    shape: str, num_nodes: int, num_buckets: int, num_bytes: int
) -> None:
    tree = SHAPES[shape](num_nodes)
    assert transfer_s(tree, num_bytes, num_buckets, SLOW) == pytest.approx(
        simulated_s(tree, num_bytes, num_buckets, SLOW)
    )


def test_buckets_of_a_chain_are_the_fewest_that_are_nearly_as_fast() -> None:
    # Fastest: sqrt((n - 1) S / (B o)) = sqrt(4 * 100 s / 1 ms) = 632 buckets, and 101.319 s. With m
    # it takes 100.054 + 400 / m + m / 1000 s: 106.403 with 63, 106.368 with 64.
    assert transfer_s(chain(5), 100_000_000, 632, SLOW) * 1.05 == pytest.approx(106.385, abs=1e-3)
    plan = choose_plan(5, 100_000_000, SLOW, ["chain"])
    assert plan.num_buckets == 64
    assert plan.predicted_s == pytest.approx(106.368)
    # One node has nobody to forward to: cutting would only cost.
    assert choose_plan(1, 100_000_000, SLOW).num_buckets == 1


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    num_nodes=st.integers(1, 12),
    num_bytes=st.integers(1, 10**6),
)
def test_no_fewer_buckets_come_so_near_to_the_fastest(
    shape: str, num_nodes: int, num_bytes: int
) -> None:
    plan = choose_plan(num_nodes, num_bytes, SLOW, [shape])
    limit = max(1, min(MAX_BUCKETS, num_bytes // 64))
    seconds = [transfer_s(plan.tree, num_bytes, m, SLOW) for m in range(1, limit + 1)]
    near = min(seconds) * 1.05
    assert plan.predicted_s == seconds[plan.num_buckets - 1] <= near
    assert all(s > near for s in seconds[: plan.num_buckets - 1])


def test_size_and_node_count_decide() -> None:
    def shape(num_nodes: int, num_bytes: int) -> str:
        return choose_plan(num_nodes, num_bytes).shape

    assert [shape(n, 2_000_000_000) for n in (1, 4, 64)] == ["chain"] * 3
    assert [shape(n, 1_000) for n in (4, 8, 64)] == ["binomial"] * 3
    assert shape(1, 1_000) == shape(2, 1_000) == "chain"  # the same trees: the first one
    # Many nodes: the chain's latencies add up to more than the tree's bytes.
    assert (shape(64, 10_000_000), shape(1_000, 10_000_000)) == ("chain", "binomial")


def test_the_chain_beats_the_star_for_large_versions() -> None:
    num_bytes = 300_000_000
    chained, naive = (
        choose_plan(8, num_bytes, shapes=[shape]).predicted_s for shape in ("chain", "star")
    )
    single = num_bytes / LinkModel().bytes_per_s
    assert chained < 1.15 * single
    assert naive > 8 * single


@given(num_bytes=st.integers(0, 10**5), num_buckets=st.integers(1, 300))
def test_buckets_cover_every_byte_once(num_bytes: int, num_buckets: int) -> None:
    bounds = bucket_bounds(num_bytes, num_buckets)
    assert len(bounds) <= num_buckets
    assert [start for start, _ in bounds] + [num_bytes] == [0] + [stop for _, stop in bounds]
    assert all(start < stop and start % 64 == 0 for start, stop in bounds)


@pytest.mark.parametrize("wrong", [{"latency_s": -1.0}, {"overhead_s": -1.0}, {"bytes_per_s": 0.0}])
def test_impossible_links(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="link must have times of at least 0"):
        LinkModel(**wrong)


def test_unknown_shapes() -> None:
    for shapes in (["ring"], []):
        with pytest.raises(ValueError, match=r"shapes must be some of \['binomial', 'chain'"):
            choose_plan(2, 10, shapes=shapes)
