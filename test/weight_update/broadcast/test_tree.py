# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_dvla.weight_update.broadcast.tree import (
    MAX_BUCKETS,
    SHAPES,
    LinkModel,
    Path,
    Tree,
    binomial,
    bucket_bounds,
    chain,
    choose_tree,
    transfer_s,
)

# 10 ms, 1 MB/s, 1 ms: numbers that can be added up by hand.
SLOW = LinkModel(latency_s=0.010, bytes_per_s=1e6, overhead_s=0.001)


def test_a_binomial_tree_doubles_with_each_step() -> None:
    # Positions 0 ... 7 are nodes 1 ... 8; each receives from itself without its highest bit:
    # 1 from 0, 2 from 0, 3 from 1, 4 from 0, 5 from 1, 6 from 2, 7 from 3.
    assert binomial(8).parents == (-1, 0, 1, 1, 2, 1, 2, 3, 4)
    assert binomial(8).children == [[1], [2, 3, 5], [4, 6], [7], [8], [], [], [], []]
    assert (binomial(0).parents, binomial(1).parents) == ((-1,), (-1, 0))


def test_paths_by_hand() -> None:
    assert chain(3).paths == [Path(0, 0, 0), Path(1, 1, 1), Path(2, 2, 1), Path(3, 3, 1)]
    # Node 8 of the binomial tree: 0 -> 1 (one child) -> 2 (three) -> 4 (two) -> 8 (one).
    assert binomial(8).paths[8] == Path(4, 1 + 3 + 2 + 1, 3)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5, 7, 8, 17, 64, 100])
def test_depth_width_and_the_one_child_of_the_learner(num_nodes: int) -> None:
    steps = math.ceil(math.log2(num_nodes))
    assert max(path.num_hops for path in binomial(num_nodes).paths) <= 1 + steps
    assert max(len(children) for children in binomial(num_nodes).children[1:]) == steps
    for build in SHAPES.values():
        children = build(num_nodes).children
        assert children[0] == [1]
        assert sorted(child for row in children for child in row) == list(range(1, num_nodes + 1))


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, 0, 3, 0), (-1, -1)])
def test_parents_that_are_no_tree(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="parents must begin with -1"):
        Tree(parents)


@pytest.mark.parametrize(
    ("tree", "num_buckets", "seconds"),
    [
        (chain(1), 1, 0.111),  # 1 ms + 100 kB at 1 MB/s = 101 ms busy, 10 ms latency
        (chain(0), 1, 0.0),
        (chain(3), 4, 0.186),  # buckets of 26 ms, three hops: 3 * 10 + (3 + 4 - 1) * 26
        # To node 8: four hops, senders with 1, 3, 2, 1 children; the widest sets the pace.
        (binomial(8), 2, 0.550),  # 4 * 10 + (7 + (2 - 1) * 3) * 51
        (Tree((-1, 0, 0, 0, 0)), 1, 0.414),  # four copies through one link: 10 + 4 * 101
    ],
)
def test_times_by_hand(tree: Tree, num_buckets: int, seconds: float) -> None:
    assert transfer_s(tree, 100_000, num_buckets, SLOW) == pytest.approx(seconds)


def simulated_s(tree: Tree, num_bytes: int, num_buckets: int, link: LinkModel) -> float:
    """The broadcast bucket by bucket, for a comparison with the closed form."""
    bucket_s = link.message_s(num_bytes / num_buckets)
    arrival = [[0.0] * num_buckets for _ in tree.parents]
    for node, children in enumerate(tree.children):  # parents come first
        free = 0.0
        for bucket in range(num_buckets):
            free = max(free, arrival[node][bucket]) + len(children) * bucket_s
            for child in children:
                arrival[child][bucket] = free + link.latency_s
    return max(times[-1] for times in arrival)


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    num_nodes=st.integers(1, 20),
    num_buckets=st.integers(1, 20),
    num_bytes=st.integers(1, 10**7),
)
def test_the_closed_form_is_the_simulated_time(
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
    plan = choose_tree(5, 100_000_000, SLOW, ["chain"])
    assert plan.num_buckets == 64
    assert plan.predicted_s == pytest.approx(106.368)
    # One node has nobody to forward to: cutting would only cost.
    assert choose_tree(1, 100_000_000, SLOW).num_buckets == 1


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    num_nodes=st.integers(1, 12),
    num_bytes=st.integers(1, 10**6),
)
def test_no_fewer_buckets_are_nearly_as_fast(shape: str, num_nodes: int, num_bytes: int) -> None:
    plan = choose_tree(num_nodes, num_bytes, SLOW, [shape])
    limit = max(1, min(MAX_BUCKETS, num_bytes // 64))
    seconds = [transfer_s(plan.tree, num_bytes, m, SLOW) for m in range(1, limit + 1)]
    near = min(seconds) * 1.05
    assert plan.predicted_s == seconds[plan.num_buckets - 1] <= near
    assert all(s > near for s in seconds[: plan.num_buckets - 1])


def test_size_and_node_count_decide() -> None:
    def shape(num_nodes: int, num_bytes: int) -> str:
        return choose_tree(num_nodes, num_bytes).shape

    assert [shape(n, 2_000_000_000) for n in (1, 4, 64)] == ["chain"] * 3
    assert [shape(n, 1_000) for n in (4, 8, 64)] == ["binomial"] * 3
    assert shape(1, 1_000) == shape(2, 1_000) == "chain"  # the same trees: the first one
    # Many nodes: the chain's latencies add up to more than the tree's bytes.
    assert (shape(64, 10_000_000), shape(1_000, 10_000_000)) == ("chain", "binomial")
    # A chain over eight nodes takes little longer than a single transfer.
    seconds = choose_tree(8, 300_000_000, shapes=["chain"]).predicted_s
    assert seconds < 1.15 * 300_000_000 / LinkModel().bytes_per_s


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


@pytest.mark.parametrize("shapes", [["ring"], []])
def test_unknown_shapes(shapes: list[str]) -> None:
    with pytest.raises(ValueError, match=r"shapes must be some of \['binomial', 'chain'"):
        choose_tree(2, 10, shapes=shapes)
