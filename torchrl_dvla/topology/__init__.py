# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a cluster consists of, and the collector that works on it.

:class:`TopologyAwareCollector` runs a whole sampling-inference loop on every node of a
:class:`Placement`; Ray says who is there.
"""

from torchrl_dvla.topology.planning import (
    ClusterSpec,
    NodePlacement,
    NodeSpec,
    Placement,
    plan_placement,
)
from torchrl_dvla.topology.topology_aware import TopologyAwareCollector

__all__ = [
    "ClusterSpec",
    "NodePlacement",
    "NodeSpec",
    "Placement",
    "TopologyAwareCollector",
    "plan_placement",
]
