# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""DVLACollector whose workers are planned from the machine; one node only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict.nn import TensorDictModuleBase

from torchrl_dvla.collectors import DVLACollector
from torchrl_dvla.collectors.dvla import EnvFactory
from torchrl_dvla.topology.planning import Placement

__all__ = ["TopologyAwareCollector"]


class TopologyAwareCollector(DVLACollector):
    """:class:`~torchrl_dvla.collectors.DVLACollector` with a plan's worker and inference settings.

    It runs on one node and refuses a plan for more: loops on several nodes are not in this version.

    Args:
        create_env_fn (Callable or str or Mapping): as for ``DVLACollector``.
        policy (TensorDictModuleBase): as for ``DVLACollector``.

    Keyword Args:
        placement (Placement): what runs where, as
            :func:`torchrl_dvla.topology.plan_placement` makes it.
        **kwargs: the further arguments of ``DVLACollector``, except ``workers`` and
            ``inference``, which the placement holds.

    Raises:
        ValueError: if the placement has more than one node.

    Examples:
        >>> from torchrl_dvla.topology import ClusterSpec, plan_placement
        >>> placement = plan_placement(ClusterSpec.local(), env_memory_bytes=2 * 2**30)
        >>> collector = TopologyAwareCollector(  # doctest: +SKIP
        ...     make_env, policy, placement=placement, replay_buffer=buffer
        ... )
    """

    def __init__(
        self,
        create_env_fn: EnvFactory | Mapping[str, EnvFactory],
        policy: TensorDictModuleBase | None = None,
        *,
        placement: Placement,
        **kwargs: Any,
    ) -> None:
        if len(placement.nodes) != 1:
            hosts = [node.host for node in placement.nodes]
            raise ValueError(
                f"placement must have one node in this version, got {hosts}. Plan for one node."
            )
        node = placement.learner
        super().__init__(
            create_env_fn, policy, workers=node.workers, inference=node.inference, **kwargs
        )
        self.placement = placement
