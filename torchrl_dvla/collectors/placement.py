# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What runs on which node."""

from __future__ import annotations

from dataclasses import dataclass

from torchrl_dvla.collectors.configs import InferenceConfig, WorkerConfig

__all__ = ["NodePlacement", "Placement"]


@dataclass(frozen=True)
class NodePlacement:
    """The closed sampling-inference loop of one node.

    Args:
        host (str): the node.
        workers (WorkerConfig): its sampling lane.
        inference (InferenceConfig): its inference lane.
        learner (bool): whether the learner runs here.
    """

    host: str
    workers: WorkerConfig
    inference: InferenceConfig
    learner: bool = False


@dataclass(frozen=True)
class Placement:
    """One loop a node, and one node with the learner.

    Args:
        nodes (tuple of NodePlacement): the nodes.

    Examples:
        >>> node = NodePlacement("localhost", WorkerConfig(), InferenceConfig(), learner=True)
        >>> Placement((node,)).learner.host
        'localhost'
        >>> Placement(())
        Traceback (most recent call last):
        ...
        ValueError: nodes must hold exactly one node with learner=True, got 0. Mark the node that
        learns.
    """

    nodes: tuple[NodePlacement, ...]

    def __post_init__(self) -> None:
        num_learners = sum(node.learner for node in self.nodes)
        if num_learners != 1:
            raise ValueError(
                f"nodes must hold exactly one node with learner=True, got {num_learners}. Mark the "
                "node that learns."
            )

    @property
    def learner(self) -> NodePlacement:
        """The node with the learner."""
        return next(node for node in self.nodes if node.learner)
