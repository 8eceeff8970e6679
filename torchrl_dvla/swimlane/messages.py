# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Messages between the collector, the environment workers and the inference process.

Commands go to a process, events come back. Observations, actions and rewards are never among them:
they stay in the rows of the environment pool, and a message carries row numbers (invariant 1). What
concerns single environments travels many at a time, :class:`WorkerCommands` one way and
:class:`WorkerEvents` the other. A message is read whole or not at all: one that a dying process has
half written ends in end of file and is never acted on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torchrl_dvla.data.schema import NO_HASH

__all__ = [
    "EnvSpecs",
    "Failed",
    "Infer",
    "Inferred",
    "Refused",
    "RefusedError",
    "Reset",
    "ResetDone",
    "Snapshot",
    "Step",
    "StepDone",
    "Stop",
    "UsePool",
    "WorkerCommands",
    "WorkerEvents",
]


class EnvSpecs(NamedTuple):
    """First event of a worker: its environment is built, and these are its shapes."""

    #: Observation leaves other than strings: nested key, shape, dtype.
    observation: tuple[tuple[Any, tuple[int, ...], Any], ...]
    chunk_size: int
    action_dim: int
    #: Whether it says by ``"success"`` what is solved; else a rollout that terminates is.
    has_success: bool = True
    #: Whether it says by ``"language_instruction"`` what is asked for.
    has_instruction: bool = True
    #: Whether its ``state_spec`` has ``"init_state_id"``, which picks the initial state.
    has_init_states: bool = True
    #: Rollouts that one step of it serves: ``N`` of batch size ``[N]``, 1 without batch dimensions.
    num_rollouts: int = 1
    #: The lowest and the highest action that it executes, over all dimensions; ``None``: any.
    action_bounds: tuple[float, float] | None = None


class UsePool(NamedTuple):
    """First command to a worker or the inference process: where the rows are."""

    pool_view: Any
    #: To a worker: :attr:`EnvSpecs.num_rollouts` of every environment of the run.
    num_rollouts: int = 1


class Reset(NamedTuple):
    """Command: start a rollout and write its first observation into ``row``.

    ``env_index`` counts the rollouts that the environments of the worker can play: of batched ones
    of ``[N]``, rollout ``i`` of environment ``e`` is ``e * N + i``. ``generation`` is that of the
    row's page in its lease: the worker refuses to write a page that is leased anew by then.
    """

    env_index: int
    task: str
    seed: int
    init_state_id: int
    row: int
    generation: int


class Step(NamedTuple):
    """Command: execute the chunk in ``row`` and write its outcome there.

    The next observation goes to ``next_row``; -1 marks the last decision that the rollout may take.
    """

    env_index: int
    row: int
    generation: int
    next_row: int
    next_generation: int


class WorkerCommands(NamedTuple):
    """Commands for one worker, executed in this order: chunks first, then new rollouts.

    A batched environment is stepped once for all its chunks, and reset once for all its new
    rollouts.
    """

    steps: list[Step]
    resets: list[Reset]


class ResetDone(NamedTuple):
    """Event: the first observation of the rollout is in its row."""

    env_index: int
    instruction: str
    #: As in :class:`EnvSpecs`, of this task.
    has_success: bool = True
    #: ``"init_state_hash"`` of the reset, if it has one.
    init_state_hash: int = NO_HASH


class StepDone(NamedTuple):
    """Event: the chunk was executed; outcome and next observation are in their rows."""

    env_index: int
    done: bool
    success: bool
    #: Sum over the chunk.
    reward: float
    num_env_steps: int
    #: What the rollout is asked to do from now on, if that has changed.
    instruction: str | None = None
    #: Executed env steps whose action lay outside of the action spec, and was clipped.
    num_clipped: int = 0


class RefusedError(ValueError):
    """What an environment returned can neither be stored in a row nor learned from."""


class Refused(NamedTuple):
    """Event: a rollout has ended with a :class:`RefusedError`; the worker goes on."""

    env_index: int
    reason: str


class WorkerEvents(NamedTuple):
    """What a worker has done since its last message, in order."""

    events: list[ResetDone | StepDone | Refused]
    #: Stretches of work for the timeline: name, start and end in ``time.monotonic`` seconds.
    spans: list[tuple[str, float, float]]


class Failed(NamedTuple):
    """Last event of a worker or the inference process: an exception has ended it."""

    traceback: str


class Infer(NamedTuple):
    """Command: take a decision for each of ``rows``."""

    rows: list[int]
    instruction_ids: list[int]
    #: The strings that the inference process has not been sent yet, by id.
    new_instructions: dict[int, str]
    greedy: bool
    use_snapshot: bool
    #: Seed of the tokens to sample.
    seed: int


class Inferred(NamedTuple):
    """Event: the decisions are in their rows; the call lasted from ``start_s`` to ``end_s``."""

    policy_version: int
    start_s: float
    end_s: float


class Snapshot(NamedTuple):
    """Command: copy the latest weights aside, for an evaluation, or drop that copy after it."""

    is_over: bool = False


class Stop(NamedTuple):
    """Command: end."""
