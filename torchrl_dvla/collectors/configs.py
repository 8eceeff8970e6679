# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Settings of the sampling and the inference lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchrl_dvla.memory import parse_bytes
from torchrl_dvla.validation import Count, Range, Seconds, Threads, check_fields

__all__ = ["InferenceConfig", "WorkerConfig"]

_NO_FORK = Range(remedy="A fork of the learner's process would share its threads' locks.")


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of the environment workers.

    Args:
        num_workers (int): processes.
        envs_per_worker (int): environments of a worker, of which one is simulated while others wait
            for their decision. Each holds one rollout open; one of batch size ``[N]``, ``N``.
        max_tasks (int, optional): tasks of which each of them is kept built, so that memory does
            not grow with the number of tasks; the one played last is closed for another.
            Defaults to all. A simulator of LIBERO takes 0.9 GB, and 1.7 s to build again.
        max_decisions (int): decisions after which a rollout is truncated.
        reset_timeout_s (float): seconds after which a reset counts as hung and its worker is
            replaced.
        step_timeout_s (float): the same for one decision.
        start_timeout_s (float): seconds for the construction of the first environments.
        stop_timeout_s (float): seconds that workers get to end before they are killed.
        max_failures (int): failures in a row, without a finished rollout between them, that the run
            survives. Crashes of one cause, which hits processes that were there already, are one
            failure.
        max_rollout_failures (int): failures of one rollout after which its group is dropped.
        max_task_failures (int): groups of one task dropped in a row for failures, without a
            finished rollout of it, after which the run goes on without the task. A group that is
            dropped for a refused rollout counts as one of ``max_rollout_failures``.
        max_rss_bytes (int or str, optional): private resident memory at which a worker is replaced
            by a new one, between two rollouts. Memory that it shares with others does not count.
            Defaults to no limit.
        num_threads (int): intra-op torch threads of a worker.
        env_vars (Mapping): environment variables of the workers.
        start_method (str): how processes are started.

    Raises:
        ValueError: for a setting of another type or out of range.
    """

    num_workers: Count = 2
    envs_per_worker: Count = 1
    max_tasks: Count | None = None
    max_decisions: Count = 64
    reset_timeout_s: Seconds = 120.0
    step_timeout_s: Seconds = 60.0
    start_timeout_s: Seconds = 300.0
    stop_timeout_s: Seconds = 3.0
    max_failures: Count = 5
    max_rollout_failures: Count = 3
    max_task_failures: Count = 3
    max_rss_bytes: int | str | None = None
    num_threads: Threads = 1
    env_vars: Mapping[str, str] = field(default_factory=dict)
    start_method: Annotated[Literal["forkserver", "spawn"], _NO_FORK] = "forkserver"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_rss_bytes is not None and parse_bytes(self.max_rss_bytes, "max_rss_bytes") == 0:
            raise ValueError("max_rss_bytes must be positive, got 0. None sets no limit.")


@dataclass(frozen=True)
class InferenceConfig:
    """Settings of the inference lane.

    Args:
        max_batch_size (int, optional): rows of one policy call. Defaults to those of half of the
            environments, so that one half is simulated while the policy decides for the other; to
            all of them if the run is deterministic, for there the two take turns.
        max_wait_s (float): seconds that a row that is ready waits for others to share its policy
            call, while there are others and the policy is free. 0 calls it as soon as it is free.
        num_threads (int): intra-op torch threads of the process.
        timeout_s (float): seconds after which a policy call counts as hung. The process is replaced
            then.
        start_timeout_s (float): the same for the first call of a process, which has to wait for its
            policy.
        deterministic (bool, optional): work in lockstep, so that batches, losses and weights are a
            pure function of the seeds: every busy environment is waited for before the next
            policy call, and evaluations run between the cohorts of two updates. It needs
            ``max_policy_lag=0`` and is the default there. It holds for one machine and build of
            torch, for environments that depend on their seed alone, and until the first fault.

    Sampled tokens are drawn from a seed of each policy call.

    Raises:
        ValueError: for a setting of another type or out of range.
    """

    max_batch_size: Count | None = None
    max_wait_s: Annotated[float, Range(0, 2_000_000)] = 1e-2
    num_threads: Threads = 1
    timeout_s: Seconds = 120.0
    start_timeout_s: Seconds = 300.0
    deterministic: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def is_deterministic(self, max_policy_lag: int) -> bool:
        """Whether the run works in lockstep.

        Raises:
            ValueError: if it was asked to and ``max_policy_lag`` is not 0.
        """
        if self.deterministic and max_policy_lag > 0:
            raise ValueError(
                "deterministic must be None or False with a max_policy_lag above 0, got True and "
                f"{max_policy_lag}. Which version takes a decision depends on the learner's speed "
                "then: set max_policy_lag=0."
            )
        return max_policy_lag == 0 if self.deterministic is None else self.deterministic
