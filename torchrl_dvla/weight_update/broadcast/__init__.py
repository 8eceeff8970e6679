# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Weights between nodes: from the learner's store to the store of every other node.

:class:`WeightBroadcast` runs beside the learner, a :class:`WeightRelay` on each other node. Bytes
travel along a chain or a binomial tree, whichever the cost model finds faster (:mod:`.tree`). Who
sends what to whom is decided round by round (:mod:`.rounds`) and sent over control connections
(:mod:`.channel`); each edge is a process group of two (:mod:`.edge`), so that a dead node breaks
nothing but its own edges; what passes through a node's edges is :mod:`.transfer`.
"""

from torchrl_dvla.weight_update.broadcast.broadcaster import Transfer, WeightBroadcast
from torchrl_dvla.weight_update.broadcast.relay import WeightRelay
from torchrl_dvla.weight_update.broadcast.tree import LinkModel

__all__ = ["LinkModel", "Transfer", "WeightBroadcast", "WeightRelay"]
