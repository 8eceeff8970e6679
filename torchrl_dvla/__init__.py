# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Asynchronous GRPO fine-tuning of vision-language-action policies, as TorchRL components.

Five components, each with TorchRL's own contract: :class:`DVLACollector` overlaps simulation,
inference, learning and weight distribution; :class:`PooledReplayBuffer` hands out whole groups from
shared memory; :class:`AsyncWeightUpdater` publishes versioned weights without waiting;
:class:`GRPOLoss` learns from action tokens; :class:`TopologyAwareCollector` samples on
the nodes of a cluster. Beside them stand the settings that every script names. Everything else is
imported from its package, such as :mod:`torchrl_dvla.envs`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchrl_dvla._version import __version__

if TYPE_CHECKING:
    from torchrl_dvla.collectors import (
        DVLACollector,
        InferenceConfig,
        WorkerConfig,
        check_policy_protocol,
    )
    from torchrl_dvla.data import EpisodeSpec, GroupConfig, PooledReplayBuffer
    from torchrl_dvla.objectives import GRPOLoss
    from torchrl_dvla.topology import TopologyAwareCollector
    from torchrl_dvla.weight_update import AsyncWeightUpdater

#: Public names by the package that holds them: importing one imports only what it needs.
_PACKAGES = {
    "AsyncWeightUpdater": "weight_update",
    "DVLACollector": "collectors",
    "EpisodeSpec": "data",
    "GRPOLoss": "objectives",
    "GroupConfig": "data",
    "InferenceConfig": "collectors",
    "PooledReplayBuffer": "data",
    "TopologyAwareCollector": "topology",
    "WorkerConfig": "collectors",
    "check_policy_protocol": "collectors",
}

__all__ = [
    "AsyncWeightUpdater",
    "DVLACollector",
    "EpisodeSpec",
    "GRPOLoss",
    "GroupConfig",
    "InferenceConfig",
    "PooledReplayBuffer",
    "TopologyAwareCollector",
    "WorkerConfig",
    "__version__",
    "check_policy_protocol",
]


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PACKAGES[name]}"), name)
    globals()[name] = value  # the next access does not come by here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
