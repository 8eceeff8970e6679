# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import math

import pytest

from torchrl_dvla.weight_update.broadcast.tree import SHAPES, Path, Tree, binomial, chain, star


def test_a_binomial_tree_doubles_with_each_step() -> None:
    # Places 0 ... 7 are nodes 1 ... 8; a place receives from itself without its highest bit:
    # 1 from 0, 2 from 0, 3 from 1, 4 from 0, 5 from 1, 6 from 2, 7 from 3.
    assert binomial(8).parents == (-1, 0, 1, 1, 2, 1, 2, 3, 4)
    assert binomial(8).children() == [[1], [2, 3, 5], [4, 6], [7], [8], [], [], [], []]
    assert binomial(0).parents == (-1,)
    assert binomial(1).parents == (-1, 0)


def test_paths_by_hand() -> None:
    assert chain(3).paths() == [Path(0, 0, 0), Path(1, 1, 1), Path(2, 2, 1), Path(3, 3, 1)]
    # Node 8 of the binomial tree: 0 -> 1 (one child) -> 2 (three) -> 4 (two) -> 8 (one).
    assert binomial(8).paths()[8] == Path(4, 1 + 3 + 2 + 1, 3)
    assert star(4).paths()[3] == Path(1, 4, 4)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5, 8, 17, 64, 100])
def test_depth_and_width_are_logarithmic(num_nodes: int) -> None:
    tree = binomial(num_nodes)
    steps = math.ceil(math.log2(num_nodes))
    assert max(path.num_hops for path in tree.paths()) <= 1 + steps
    assert max(len(children) for children in tree.children()[1:]) == steps


@pytest.mark.parametrize("shape", ["chain", "binomial"])
@pytest.mark.parametrize("num_nodes", [1, 2, 7, 100])
def test_the_learner_has_one_child(shape: str, num_nodes: int) -> None:
    tree = SHAPES[shape](num_nodes)
    assert tree.children()[0] == [1]
    assert tree.num_nodes == num_nodes
    assert sorted(child for children in tree.children() for child in children) == list(
        range(1, num_nodes + 1)
    )


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, 0, 3, 0), (-1, -1)])
def test_what_is_no_tree(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="parents must begin with -1"):
        Tree(parents)
