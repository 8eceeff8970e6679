# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a cluster consists of, and the collector that works on it.

:class:`TopologyAwareCollector` runs a whole sampling-inference loop on every node of a
:class:`Placement`; Ray says who is there.
"""

from torchrl_dvla.topology.cluster import ClusterSpec, GPUSpec, NodeSpec
from torchrl_dvla.topology.cost_model import LaneCosts
from torchrl_dvla.topology.plan_svg import draw_plan
from torchrl_dvla.topology.planning import (
    Load,
    NodePlacement,
    NodePlan,
    Placement,
    RunPlan,
    plan_placement,
    plan_run,
)
from torchrl_dvla.topology.simulation import SimulatedRun, simulate_run
from torchrl_dvla.topology.topology_aware import TopologyAwareCollector

__all__ = [
    "ClusterSpec",
    "GPUSpec",
    "LaneCosts",
    "Load",
    "NodePlacement",
    "NodePlan",
    "NodeSpec",
    "Placement",
    "RunPlan",
    "SimulatedRun",
    "TopologyAwareCollector",
    "draw_plan",
    "plan_placement",
    "plan_run",
    "simulate_run",
]
