# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The weight-control plane: how a learner's weights reach those who act with them.

:class:`WeightStore` holds versions in shared memory; each :class:`WeightReader` adopts the newest
one between two of its batches; :class:`AsyncWeightUpdater` is both as a TorchRL
``WeightSyncScheme``. They serve one node; :class:`WeightBroadcast` brings the versions to the
:class:`WeightRelay` of every other node, which has a store of its own for the readers there.
"""

from torchrl_dvla.weight_update.broadcast import (
    LinkModel,
    Transfer,
    WeightBroadcast,
    WeightRelay,
)
from torchrl_dvla.weight_update.layout import WeightLayout
from torchrl_dvla.weight_update.ledger import Adoption, AdoptionStats
from torchrl_dvla.weight_update.publish_stats import PublishStats
from torchrl_dvla.weight_update.reader import WeightReader
from torchrl_dvla.weight_update.store import WeightStore
from torchrl_dvla.weight_update.updater import AsyncWeightUpdater

__all__ = [
    "Adoption",
    "AdoptionStats",
    "AsyncWeightUpdater",
    "LinkModel",
    "PublishStats",
    "Transfer",
    "WeightBroadcast",
    "WeightLayout",
    "WeightReader",
    "WeightRelay",
    "WeightStore",
]
