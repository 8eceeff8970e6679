# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the coordinator, the environment workers and the inference lane say to each other.

Observations, actions and rewards are never among it: they stay in the rows of the environment pool,
and a message carries row numbers (invariant 1). ``start_s`` and ``end_s`` are
``time.monotonic`` seconds of the work that a message reports, for the timeline.

What concerns single environments travels many at a time, :class:`Orders` one way and
:class:`Report` the other, as columns: :func:`pack` and :func:`unpack` say how
(:doc:`/decisions/0030-batched-messages`). A message is read whole or not at all: one that a dying
worker has half written ends in end of file and is never acted on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

__all__ = [
    "Columns",
    "EnvSpecs",
    "Failed",
    "Infer",
    "Inferred",
    "Orders",
    "Ready",
    "Report",
    "Reset",
    "Snapshot",
    "Step",
    "Stepped",
    "Stop",
    "UsePool",
    "UseThreads",
    "pack",
    "unpack",
]

Record = TypeVar("Record", bound=tuple)
#: Records of one type, field by field; empty if there is none.
Columns = tuple[Sequence[Any], ...]


def pack(records: Iterable[tuple[Any, ...]]) -> Columns:
    """Columns of records of one type: a tenth of the bytes and of the time of pickling records.

    Examples:
        >>> pack([Ready(0, "go"), Ready(3, "stop")])
        ((0, 3), ('go', 'stop'))
    """
    return tuple(zip(*records))


def unpack(kind: type[Record], columns: Columns) -> Iterator[Record]:
    """The records again.

    Examples:
        >>> list(unpack(Ready, ((0, 3), ("go", "stop"))))
        [Ready(env_index=0, instruction='go'), Ready(env_index=3, instruction='stop')]
    """
    return map(kind._make, zip(*columns))  # type: ignore[attr-defined]


class EnvSpecs(NamedTuple):
    """Worker to coordinator, once: the environment is built and this is what it speaks."""

    #: Observation leaves other than strings: nested key, shape, dtype.
    observation: tuple[tuple[Any, tuple[int, ...], Any], ...]
    chunk_size: int
    action_dim: int


class UsePool(NamedTuple):
    """Coordinator to worker or inference lane, once: where the rows are."""

    pool_view: Any


class Reset(NamedTuple):
    """Coordinator to worker: start a rollout and write its first observation into ``row``.

    ``generation`` is that of the row's page in its lease: the worker refuses to write a page that
    is in another life by then.
    """

    env_index: int
    task: str
    seed: int
    init_state_id: int
    row: int
    generation: int


class Ready(NamedTuple):
    """Worker to coordinator: the first observation of the rollout is in its row."""

    env_index: int
    instruction: str


class Step(NamedTuple):
    """Coordinator to worker: execute the chunk in ``row``.

    The next observation goes to ``next_row``; -1 marks the last decision that the rollout may take.
    """

    env_index: int
    row: int
    generation: int
    next_row: int
    next_generation: int


class Stepped(NamedTuple):
    """Worker to coordinator: the chunk was executed, reward and flags are in its row."""

    env_index: int
    done: bool
    success: bool
    reward: float
    num_env_steps: int


class Orders(NamedTuple):
    """Coordinator to worker: chunks to execute and rollouts to start, in this order."""

    #: Columns of :class:`Step`.
    steps: Columns
    #: Columns of :class:`Reset`.
    resets: Columns


class Report(NamedTuple):
    """Worker to coordinator: what was done since the report before."""

    #: Columns of :class:`Stepped`.
    stepped: Columns
    #: Columns of :class:`Ready`.
    ready: Columns
    #: Stretches of work: name, start_s, end_s.
    spans: list[tuple[str, float, float]]


class Failed(NamedTuple):
    """Worker or inference lane to coordinator: an exception ended the work; the sender is gone."""

    traceback: str


class Infer(NamedTuple):
    """Coordinator to inference lane: take a decision for each of ``rows``.

    ``new_instructions`` are the strings that the lane has not been told yet, by id. ``seed`` is
    that of the tokens to sample; ``None`` draws from the lane's own generator.
    """

    rows: list[int]
    instruction_ids: list[int]
    new_instructions: dict[int, str]
    greedy: bool
    use_snapshot: bool
    seed: int | None = None


class UseThreads(NamedTuple):
    """Coordinator to inference process: the share of the cores has changed."""

    num_threads: int


class Snapshot(NamedTuple):
    """Coordinator to inference lane: copy the newest weights aside, for an evaluation."""


class Inferred(NamedTuple):
    """Inference lane to coordinator: the decisions are in their rows."""

    policy_version: int
    start_s: float
    end_s: float
    #: Part of the time that passed in the queue of a device which another lane was using.
    device_wait_s: float = 0.0


class Stop(NamedTuple):
    """Coordinator to anyone: finish."""
