# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The collector of a cluster: one closed sampling-inference loop a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from torchrl_dvla.collectors.dvla import DVLACollector
from torchrl_dvla.collectors.placement import Placement

__all__ = ["TopologyAwareCollector"]


class TopologyAwareCollector(DVLACollector):
    """A :class:`DVLACollector` whose lanes are placed by a plan instead of by hand.

    Observations and actions never leave the node that made them; between nodes only weights and
    gradients travel. On a single node that is exactly a :class:`DVLACollector` with the node's
    worker and inference settings, which is what this version runs; a plan for more nodes is
    refused.

    Args:
        create_env_fn (Callable or Mapping): see :class:`DVLACollector`.
        policy (TensorDictModuleBase): see :class:`DVLACollector`.

    Keyword Args:
        placement (Placement): what runs where, as
            :func:`torchrl_dvla.topology.plan_placement` makes it.
        **kwargs: the further arguments of :class:`DVLACollector`, except ``workers`` and
            ``inference``, which the placement holds.

    Raises:
        ValueError: if the placement has more than one node.

    Examples:
        >>> from torchrl_dvla.topology import ClusterSpec, plan_placement
        >>> placement = plan_placement(ClusterSpec.local(), env_memory_bytes=2 * 2**30)
        >>> collector = TopologyAwareCollector(  # doctest: +SKIP
        ...     make_env, policy, placement=placement, replay_buffer=buffer
        ... )

    Reference:
        D-VLA, arXiv 2605.13276, topology-aware replication.
    """

    def __init__(
        self,
        create_env_fn: Callable[[], EnvBase] | Mapping[str, Callable[[], EnvBase]],
        policy: TensorDictModuleBase | None = None,
        *,
        placement: Placement,
        **kwargs: Any,
    ) -> None:
        if len(placement.nodes) != 1:
            hosts = [node.host for node in placement.nodes]
            raise ValueError(
                f"placement must have one node in this version, got {hosts}. Run one node; loops "
                "on several nodes come with the cluster runtime."
            )
        node = placement.learner
        super().__init__(
            create_env_fn, policy, workers=node.workers, inference=node.inference, **kwargs
        )
        self.placement = placement
