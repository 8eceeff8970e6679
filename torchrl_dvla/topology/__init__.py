# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a cluster consists of and what runs where on it."""

from torchrl_dvla.topology.cluster import ClusterSpec, NodeSpec
from torchrl_dvla.topology.planning import plan_placement

__all__ = ["ClusterSpec", "NodeSpec", "plan_placement"]
