# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
r"""Broadcast trees, their cost model, and the tree and bucket count of least cost.

Node 0 is the learner's and has one child in every tree: it sends each byte once, however many nodes
there are.

**The model.** A version of :math:`S` bytes is cut into :math:`m` buckets. A node sends a bucket on
as soon as it has all of it (invariant 3 concerns readers, who see whole versions only; a relay may
forward what it cannot show yet). One bucket keeps a sender busy for each child for

.. math::
    \tau(m) = o + \frac{S}{m\,B},

with the bandwidth :math:`B` of its link and an overhead :math:`o` per message; it arrives after the
latency :math:`\alpha`, which keeps nobody busy, since receives are posted ahead of time. A node
with :math:`c` children shares its link among them: it needs :math:`c\,\tau` for a bucket. On the
path to one node, with :math:`h` hops and senders of fan-out :math:`c_1 \dots c_h`, the first bucket
arrives after :math:`h\alpha + \tau \sum c_i`. Each further one follows at the pace of the slowest
sender on the way, by induction over the hops: what arrives at intervals of :math:`g` leaves a
sender that needs :math:`c\tau` at intervals of :math:`\max(g, c\tau)`. Hence

.. math::
    T(m) = \max_{\text{nodes}} \; h\alpha + \Bigl(\sum_i c_i + (m - 1) \max_i c_i\Bigr) \tau(m).

For a chain over :math:`n` nodes that is :math:`n\alpha + (n + m - 1)\,\tau(m)`, which is least at
:math:`m^* = \sqrt{(n - 1)\,S / (B\,o)}`: with large versions it approaches :math:`S / B`, the time
of a single transfer, whatever :math:`n`. A binomial tree has only about :math:`\log_2 n` hops, but
its widest node sends every byte :math:`\lceil\log_2 n\rceil` times. So the chain wins for large
versions, the tree where latency counts for more than bytes. :math:`T` is a maximum of functions
that are convex in :math:`m`, so the best :math:`m` is found by bisection.

**Few buckets.** Every bucket costs all nodes CPU time, the learner's too. Around its minimum
:math:`T` is flat, so the plan has the fewest buckets that are within 5 % of it. For a chain and a
large version these are about :math:`20 (n - 1)`, whatever its size: with them the time of the first
bucket through all nodes, :math:`(n - 1) S / (m B)`, is 5 % of :math:`S / B`.

Not in the model: the time to open edges after a change of the tree, and the plan and the result of
a round (one latency each), which every shape pays alike. The guide's page on the weight plane has
what was predicted beside what was measured.

Reference: Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2" (1994) for
latency and bandwidth; Alexandrov et al., "LogGP" (1995) for the overhead beside the latency.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

__all__ = ["LinkModel", "Tree", "TreePlan", "bucket_bounds", "choose_tree"]

#: All receives of a round are posted at once; this bounds their number.
MAX_BUCKETS = 1024
_ALIGNMENT_BYTES = 64
#: How much longer than necessary a version may take so that it goes in fewer buckets.
_SLACK = 0.05


class Path(NamedTuple):
    """What lies between the learner and one node.

    Args:
        num_hops (int): edges on the path.
        total_fanout (int): children of all senders on the path, added up.
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
        >>> tree.children
        [[1], [2, 3], [], []]
        >>> tree.paths[3]
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

    @cached_property
    def children(self) -> list[list[int]]:
        """Those that each node sends to, in ascending order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for child, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(child)
        return children

    @cached_property
    def paths(self) -> list[Path]:
        """The path from node 0 to each node, by node."""
        paths = [Path(0, 0, 0)]
        for parent in self.parents[1:]:
            hops, total, widest = paths[parent]
            fanout = len(self.children[parent])
            paths.append(Path(hops + 1, total + fanout, max(widest, fanout)))
        return paths

    @cached_property
    def leaf_paths(self) -> set[Path]:
        """The different paths to the nodes without children: the slowest path is one of them."""
        return {path for path, children in zip(self.paths, self.children) if not children}


def chain(num_nodes: int) -> Tree:
    """A tree in which each node sends to the next one.

    Examples:
        >>> chain(3).parents
        (-1, 0, 1, 2)
    """
    return Tree(tuple(range(-1, num_nodes)))


def binomial(num_nodes: int) -> Tree:
    """A tree in which node 0 sends to node 1, and the nodes that have a version double each step.

    The node at position ``j = node - 1`` receives from the position without ``j``'s highest bit.

    Examples:
        >>> binomial(4).parents  # positions 1, 2, 3 receive from 0, 0, 1
        (-1, 0, 1, 1, 2)
    """
    parents = [1 + j - (1 << (j.bit_length() - 1)) for j in range(1, num_nodes)]
    return Tree((-1, *([0] if num_nodes else []), *parents))


#: Builders by name.
SHAPES: dict[str, Callable[[int], Tree]] = {"chain": chain, "binomial": binomial}


@dataclasses.dataclass(frozen=True)
class LinkModel:
    """Cost of a message between two nodes. The default is a data centre's 10 Gb/s.

    Args:
        latency_s (float): from the end of sending to the end of receiving. Default: 100 µs.
        bytes_per_s (float): bandwidth of a node's link. Default: 1.25e9.
        overhead_s (float): sender's time per message. Default: 50 µs.

    Raises:
        ValueError: for a negative time or a bandwidth that is not positive.

    Examples:
        >>> LinkModel(latency_s=0.001, bytes_per_s=1e9, overhead_s=0.0).message_s(1_000_000)
        0.001
    """

    latency_s: float = 100e-6
    bytes_per_s: float = 1.25e9
    overhead_s: float = 50e-6

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.overhead_s < 0 or self.bytes_per_s <= 0:
            raise ValueError(
                f"link must have times of at least 0 and a positive bandwidth, got {self}. Measure "
                "them, or leave the defaults."
            )

    def message_s(self, num_bytes: float) -> float:
        """How long a message of ``num_bytes`` keeps its sender busy."""
        return self.overhead_s + num_bytes / self.bytes_per_s


DEFAULT_LINK = LinkModel()


@dataclasses.dataclass(frozen=True)
class TreePlan:
    """A tree and the number of buckets that a version travels in.

    Args:
        shape (str): ``"chain"`` or ``"binomial"``.
        tree (Tree): the nodes in it.
        num_buckets (int): pieces a version is cut into.
        predicted_s (float): time until the last node has it.
    """

    shape: str
    tree: Tree
    num_buckets: int
    predicted_s: float


def transfer_s(tree: Tree, num_bytes: int, num_buckets: int, link: LinkModel) -> float:
    """Time until every node of ``tree`` has all of ``num_bytes``.

    Args:
        tree (Tree): who sends to whom.
        num_bytes (int): size of the version.
        num_buckets (int): pieces it is cut into.
        link (LinkModel): cost of a message.

    Returns:
        seconds; 0 without nodes.

    Examples:
        >>> link = LinkModel(latency_s=0.5, bytes_per_s=1.0, overhead_s=1.0)
        >>> transfer_s(chain(3), 8, 4, link)  # 3 * 0.5 + (3 + 4 - 1) * (1 + 2)
        19.5
    """
    bucket_s = link.message_s(num_bytes / num_buckets)
    return max(
        path.num_hops * link.latency_s
        + (path.total_fanout + (num_buckets - 1) * path.max_fanout) * bucket_s
        for path in tree.leaf_paths
    )


def choose_tree(
    num_nodes: int,
    num_bytes: int,
    link: LinkModel = DEFAULT_LINK,
    shapes: Sequence[str] = ("chain", "binomial"),
) -> TreePlan:
    """The shape that the model finds fastest, the chain on a tie, in as few buckets as is sensible.

    Args:
        num_nodes (int): nodes that receive.
        num_bytes (int): size of a version.
        link (LinkModel): cost of a message.
        shapes (sequence of str): names of the trees to choose from.

    Returns:
        the plan.

    Raises:
        ValueError: for an unknown shape.

    Examples:
        >>> choose_tree(8, 300_000_000).shape, choose_tree(8, 10_000).shape
        ('chain', 'binomial')
    """
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown or not shapes:
        raise ValueError(
            f"shapes must be some of {sorted(SHAPES)}, got {list(shapes)}. Leave them out to have "
            "one chosen."
        )
    plans = (_plan(shape, num_nodes, num_bytes, link) for shape in shapes)
    return min(plans, key=lambda plan: plan[0])[1]


def bucket_bounds(num_bytes: int, num_buckets: int) -> list[tuple[int, int]]:
    """Begin and end of each bucket of ``num_bytes``, the same at both ends of an edge.

    Examples:
        >>> bucket_bounds(300, 2)  # whole cache lines
        [(0, 192), (192, 300)]
        >>> bucket_bounds(0, 2)
        []
    """
    if not num_bytes:
        return []
    step = -(-num_bytes // num_buckets)
    step = -(-step // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return [(start, min(start + step, num_bytes)) for start in range(0, num_bytes, step)]


def _plan(shape: str, num_nodes: int, num_bytes: int, link: LinkModel) -> tuple[float, TreePlan]:
    """The least time of a shape, and the plan that is nearly as fast with fewer buckets."""
    tree = SHAPES[shape](num_nodes)

    def predicted_s(num_buckets: int) -> float:
        return transfer_s(tree, num_bytes, num_buckets, link)

    limit = min(MAX_BUCKETS, max(1, num_bytes // _ALIGNMENT_BYTES))
    # Convex: left of the least value, one bucket more is better.
    best = _first(limit, lambda m: predicted_s(m + 1) >= predicted_s(m))
    least_s = predicted_s(best)
    fewest = _first(best, lambda m: predicted_s(m) <= (1 + _SLACK) * least_s)
    return least_s, TreePlan(shape, tree, fewest, predicted_s(fewest))


def _first(limit: int, is_true: Callable[[int], bool]) -> int:
    """The first number from 1 that is true, as all after it are; ``limit`` if none below it is."""
    return 1 + bisect.bisect_left(range(1, limit), True, key=is_true)
