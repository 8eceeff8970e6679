# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Who sends to whom: pure descriptions of broadcast trees.

Node 0 is the learner's. Whatever the tree, it has one child (the star, kept as a rival to measure
against, excepted): the learner's node sends each byte once, however many nodes there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

__all__ = ["SHAPES", "Path", "Tree", "binomial", "chain", "star"]


@dataclasses.dataclass(frozen=True)
class Path:
    """What lies between the learner and one node.

    Args:
        num_hops (int): edges on the way.
        total_fanout (int): children of all senders on the way, added up.
        max_fanout (int): children of the sender that has most of them.
    """

    num_hops: int
    total_fanout: int
    max_fanout: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """A rooted tree over the nodes ``0 ... n``.

    Args:
        parents (tuple of int): the parent of each node, -1 for node 0; a parent comes before its
            children.

    Raises:
        ValueError: if it is no such tree.

    Examples:
        >>> tree = Tree((-1, 0, 1, 1))
        >>> tree.children()
        [[1], [2, 3], [], []]
        >>> tree.paths()[3]
        Path(num_hops=2, total_fanout=3, max_fanout=2)
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        is_tree = bool(self.parents) and self.parents[0] == -1
        if not is_tree or any(not 0 <= p < n for n, p in enumerate(self.parents) if n):
            raise ValueError(
                f"parents must begin with -1 and then name earlier nodes, got {self.parents}. Use "
                "chain() or binomial()."
            )

    @property
    def num_nodes(self) -> int:
        """Nodes that receive: all but node 0."""
        return len(self.parents) - 1

    def children(self) -> list[list[int]]:
        """Those that each node sends to, in ascending order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for child, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(child)
        return children

    def paths(self) -> list[Path]:
        """The path from node 0 to each node, by node."""
        fanout = [len(children) for children in self.children()]
        paths = [Path(0, 0, 0)]
        for parent in self.parents[1:]:
            above, width = paths[parent], fanout[parent]
            paths.append(
                Path(
                    above.num_hops + 1,
                    above.total_fanout + width,
                    max(above.max_fanout, width),
                )
            )
        return paths


def chain(num_nodes: int) -> Tree:
    """Each node sends to the next one.

    Examples:
        >>> chain(3).parents
        (-1, 0, 1, 2)
    """
    return Tree(tuple(range(-1, num_nodes)))


def binomial(num_nodes: int) -> Tree:
    """Node 0 sends to node 1; from there the nodes that have it double with each step.

    The node at place ``j = node - 1`` receives from the place without ``j``'s highest bit.

    Examples:
        >>> binomial(4).parents  # places 1, 2, 3 receive from 0, 0, 1
        (-1, 0, 1, 1, 2)
    """
    places = [1 + place - (1 << (place.bit_length() - 1)) for place in range(1, num_nodes)]
    return Tree((-1, *([0] if num_nodes else []), *places))


def star(num_nodes: int) -> Tree:
    """Node 0 sends to every node itself.

    Examples:
        >>> star(3).parents
        (-1, 0, 0, 0)
    """
    return Tree((-1, *([0] * num_nodes)))


#: Builders by name.
SHAPES: Mapping[str, Callable[[int], Tree]] = MappingProxyType(
    {"chain": chain, "binomial": binomial, "star": star}
)
