# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Weights between nodes: from the learner's store to the store of every other node.

:class:`WeightBroadcast` runs beside the learner, a :class:`WeightRelay` on each other node. Bytes
travel along a chain or a binomial tree (:mod:`.tree`), whichever the cost model finds faster
(:mod:`.cost`); who sends what to whom is decided round by round (:mod:`.rounds`); each edge is a
process group of two (:mod:`.link`), so that a dead node takes nothing down but its own edges.
"""

from torchrl_dvla.weight_update.broadcast.cost import LinkModel
from torchrl_dvla.weight_update.broadcast.relay import WeightRelay
from torchrl_dvla.weight_update.broadcast.root import WeightBroadcast
from torchrl_dvla.weight_update.broadcast.telemetry import Transfer

__all__ = ["LinkModel", "Transfer", "WeightBroadcast", "WeightRelay"]
