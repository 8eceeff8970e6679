# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Asynchronous GRPO for vision-language-action policies, as TorchRL components.

Five public names, assembled like any other TorchRL pieces:

- :class:`DVLACollector` runs simulation and inference beside the learner, on one machine;
- :class:`TopologyAwareCollector` is that collector with settings planned from the machine;
- :class:`PooledReplayBuffer` hands out whole groups of rollouts straight from shared memory;
- :class:`AsyncWeightUpdater` publishes versioned weights that readers adopt on their own time;
- :class:`GRPOLoss` is the clipped, group-relative objective.

Everything else lives in its room (``torchrl_dvla.data``, ``torchrl_dvla.envs``, ...) and is
imported from there. The names load on first use, so that ``import torchrl_dvla`` costs next to
nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchrl_dvla._version import __version__

if TYPE_CHECKING:
    from torchrl_dvla.collectors import DVLACollector
    from torchrl_dvla.data import PooledReplayBuffer
    from torchrl_dvla.objectives import GRPOLoss
    from torchrl_dvla.topology import TopologyAwareCollector
    from torchrl_dvla.weight_update import AsyncWeightUpdater

__all__ = [
    "AsyncWeightUpdater",
    "DVLACollector",
    "GRPOLoss",
    "PooledReplayBuffer",
    "TopologyAwareCollector",
    "__version__",
]

_ROOM_OF = {
    "AsyncWeightUpdater": "weight_update",
    "DVLACollector": "collectors",
    "GRPOLoss": "objectives",
    "PooledReplayBuffer": "data",
    "TopologyAwareCollector": "topology",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value  # the next access does not come by here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
