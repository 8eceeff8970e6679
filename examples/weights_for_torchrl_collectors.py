# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Weights for TorchRL's own collector: AsyncWeightUpdater is a WeightSyncScheme like any other.

Prints the version that each worker of a MultiSyncCollector decides with.
"""

from __future__ import annotations

import functools

from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import MultiSyncCollector
from torchrl.envs.custom import ToyVLAEnv

from torchrl_dvla import AsyncWeightUpdater


def main() -> None:
    policy = TensorDictModule(
        nn.Linear(6, 4), in_keys=[("observation", "state")], out_keys=["action"]
    )
    updater = AsyncWeightUpdater()
    collector = MultiSyncCollector(
        [functools.partial(ToyVLAEnv)] * 2,
        policy=policy,
        frames_per_batch=8,
        total_frames=32,
        weight_sync_schemes={"policy": updater},
    )
    for index, _ in enumerate(collector):
        adopted = updater.store.adopted_versions()
        print(f"batch {index}: published {updater.version}, adopted {adopted}")
        collector.update_policy_weights_()
    collector.shutdown()


if __name__ == "__main__":
    main()
