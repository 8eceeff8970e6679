# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What crosses between the learner and a node: grants and versions one way, reports the other.

Rows never cross one by one, and no tensor of them is pickled: a complete group is one array of
bytes (:func:`pack_rows`), which Ray carries beside the message, and which is copied once into the
learner's pages (:func:`unpack_rows`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from torchrl_dvla.collectors.evaluation import EvaluationResult
from torchrl_dvla.collectors.metrics import CollectionCounters
from torchrl_dvla.data import EpisodeSpec, Rollout
from torchrl_dvla.data.schema import INSTRUCTION_ID_KEY
from torchrl_dvla.memory import EnvironmentPool, RowLayout
from torchrl_dvla.swimlane.chrome_trace import Span
from torchrl_dvla.swimlane.messages import EnvSpecs
from torchrl_dvla.weight_update import Address, WeightLayout

__all__ = [
    "EvaluationDone",
    "Grant",
    "GroupDone",
    "GroupDropped",
    "LoopEnded",
    "NodeFacts",
    "NodeReport",
    "RunPlan",
    "TaskQuarantined",
    "pack_rows",
    "unpack_rows",
]


class NodeFacts(NamedTuple):
    """What a node says of itself once its environments are built."""

    specs: EnvSpecs
    #: Versions of what has to be the same everywhere, by the name of the package.
    versions: dict[str, str]
    #: Process id of the node's loop, and its clock (``time.monotonic``) as this was sent.
    pid: int
    now_s: float
    #: Where the weights are sent to.
    address: Address


class RunPlan(NamedTuple):
    """What a node needs of the learner before it may sample."""

    layout: RowLayout
    weight_layout: WeightLayout
    rows_per_page: int
    pages_per_rollout: int
    #: Rollouts of a group, and groups that the node may hold.
    num_candidates: int
    num_groups: int


class Grant(NamedTuple):
    """A group that the learner has admitted and that this node is to sample."""

    group_id: int
    spec: EpisodeSpec
    first_rollout_id: int
    deadline: int
    #: The version at admission: with an older one the bound on staleness would not hold.
    min_version: int


class GroupDone(NamedTuple):
    """Event: a group is complete."""

    group_id: int
    #: All candidates in the order of their ids, without pages.
    rollouts: list[Rollout]
    #: Their rows, see :func:`pack_rows`, and the strings by the ids of this node.
    rows: np.ndarray
    instructions: dict[int, str]


class GroupDropped(NamedTuple):
    """Event: a group was given up."""

    group_id: int
    reason: str


class TaskQuarantined(NamedTuple):
    """Event: a task kept failing."""

    task: str
    reason: str


class EvaluationDone(NamedTuple):
    """Event: this node's episodes of an evaluation are over, or cannot be played."""

    evaluation_id: int
    result: EvaluationResult | None
    error: str = ""


class LoopEnded(NamedTuple):
    """Event: an exception has ended the node's loop."""

    reason: str
    #: Whether it would end any other node's loop as well.
    is_final: bool


class NodeReport(NamedTuple):
    """What a node has done since its last report; also its heartbeat."""

    events: list[Any]
    #: What was logged: level and text.
    logs: list[tuple[int, str]]
    counters: CollectionCounters
    spans: list[Span]


def pack_rows(pool: EnvironmentPool, index: torch.Tensor) -> np.ndarray:
    """Rows of a pool as bytes, field after field, uint8 ``[layout.nbytes(num_rows)]``.

    Args:
        pool (EnvironmentPool): the rows.
        index (torch.Tensor): which, int64 ``[num_rows]``.
    """
    buffer = np.empty(pool.layout.nbytes(len(index)), np.uint8)
    numbers = index.numpy()
    for key, column in pool.layout.columns(buffer, len(index)).items():
        np.take(pool.rows.get(key).numpy(), numbers, axis=0, out=column, mode="clip")
    return buffer


def unpack_rows(
    pool: EnvironmentPool, index: torch.Tensor, buffer: np.ndarray, ids: dict[int, int]
) -> None:
    """Copy what :func:`pack_rows` made into rows of another pool of the same layout.

    Args:
        pool (EnvironmentPool): the rows, on leased pages.
        index (torch.Tensor): which, int64 ``[num_rows]``.
        buffer (np.ndarray): the bytes.
        ids (dict): instruction ids of this pool by those of the other.

    Raises:
        ValueError: if the bytes are not those of so many rows.
        KeyError: for an instruction id that is not among ``ids``.
    """
    numbers = index.numpy()
    for key, column in pool.layout.columns(buffer, len(index)).items():
        if key == INSTRUCTION_ID_KEY:
            column = np.array([ids[number] for number in column.ravel().tolist()]).reshape(
                column.shape
            )
        pool.rows.get(key).numpy()[numbers] = column
