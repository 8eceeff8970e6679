# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a cluster consists of."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch

__all__ = ["ClusterSpec", "NodeSpec"]


@dataclass(frozen=True)
class NodeSpec:
    """One machine.

    Args:
        host (str): its name.
        num_cores (int): cores that this process may use.
        memory_bytes (int): main memory.
        num_gpus (int): CUDA devices.
    """

    host: str
    num_cores: int
    memory_bytes: int
    num_gpus: int = 0


@dataclass(frozen=True)
class ClusterSpec:
    """The machines of a run; the first one learns.

    Args:
        nodes (tuple of NodeSpec): at least one.

    Examples:
        >>> cluster = ClusterSpec.local()
        >>> len(cluster.nodes), cluster.nodes[0].num_cores >= 1
        (1, True)
    """

    nodes: tuple[NodeSpec, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError(
                "nodes must hold at least one NodeSpec, got none. Use ClusterSpec.local()."
            )

    @classmethod
    def local(cls) -> ClusterSpec:
        """This machine."""
        try:
            num_cores = len(os.sched_getaffinity(0))
        except AttributeError:  # not on macOS
            num_cores = os.cpu_count() or 1
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return cls((NodeSpec(socket.gethostname(), num_cores, memory_bytes, num_gpus),))
