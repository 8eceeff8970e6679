# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Weight-control plane: from the learner's weights to the policies that act with them.

:class:`WeightStore` holds versions in shared memory; each :class:`WeightReader` adopts the latest
one between two of its batches; :class:`AsyncWeightUpdater` is both as a TorchRL
``WeightSyncScheme``. They serve one node; on others a :class:`WeightReplica` takes the bytes of
each version, which go from node to node by :class:`ChainReceiver`.
"""

from torchrl_dvla.weight_update.chain import (
    BUCKET_BYTES,
    Address,
    ChainReceiver,
    new_key,
    send_along_chain,
)
from torchrl_dvla.weight_update.reader import WeightReader
from torchrl_dvla.weight_update.replica import WeightReplica, weight_digest
from torchrl_dvla.weight_update.segment import Adoption, AdoptionStats
from torchrl_dvla.weight_update.slot_writer import PublishStats
from torchrl_dvla.weight_update.store import WeightStore
from torchrl_dvla.weight_update.updater import AsyncWeightUpdater
from torchrl_dvla.weight_update.weight_layout import WeightLayout

__all__ = [
    "BUCKET_BYTES",
    "Address",
    "Adoption",
    "AdoptionStats",
    "AsyncWeightUpdater",
    "ChainReceiver",
    "PublishStats",
    "WeightLayout",
    "WeightReader",
    "WeightReplica",
    "WeightStore",
    "new_key",
    "send_along_chain",
    "weight_digest",
]
