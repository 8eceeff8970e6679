# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Plan of the machines of a run, and the collector that takes it; one node in this version."""

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
