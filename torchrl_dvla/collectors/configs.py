# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a collector is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torchrl_dvla.memory import parse_bytes

__all__ = ["GroupConfig", "InferenceConfig", "SchedulerConfig", "WorkerConfig"]

DroughtPolicy = Literal["warn", "keep", "raise"]


def _require_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}. Set it to 1 or more.")


@dataclass(frozen=True)
class GroupConfig:
    """Groups of rollouts, and how stale they may be when they are learned from.

    Args:
        group_size (int): rollouts of one initial state whose returns are compared; at least 2. They
            need not run at once: with fewer environments than that they run one after the other.
        candidate_group_size (int, optional): rollouts sampled for a group, of which ``group_size``
            are kept, chosen for contrast. Defaults to ``group_size``.
        groups_per_update (int): groups that one learner update takes.
        max_policy_lag (int): versions of the weights that may lie between taking a decision and
            learning from it. 0 is the synchronous loop.
        return_bounds (tuple, optional): a group is learned from only if its mean return lies
            strictly between these. Groups whose returns are all equal are always left out: their
            advantages are zero.
        normalise_std (bool): divide advantages by the group's standard deviation.
        max_drought (int): groups in a row with nothing to learn from after which the run is said to
            be in a *drought*; a warning says so, and again after as many more.
        on_drought (str): how it goes on. ``"warn"`` (default) samples on, while the learner waits:
            nothing is learned from noise, and the time limit of the replay buffer ends a wait that
            is too long. ``"keep"`` keeps whatever comes until there is contrast again, with
            advantages of zero, so that the learner's clock, its other loss terms and the initial
            states go on. ``"raise"`` ends the run.

    Examples:
        >>> GroupConfig(group_size=1)
        Traceback (most recent call last):
        ...
        ValueError: group_size must be at least 2, got 1. A group compares rollouts of one initial \
state: one rollout has no advantage.
    """

    group_size: int = 8
    candidate_group_size: int | None = None
    groups_per_update: int = 4
    max_policy_lag: int = 1
    return_bounds: tuple[float, float] | None = None
    normalise_std: bool = True
    max_drought: int = 16
    on_drought: DroughtPolicy = "warn"

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2, got {self.group_size}. A group compares rollouts "
                "of one initial state: one rollout has no advantage."
            )
        if self.candidate_group_size is not None and self.candidate_group_size < self.group_size:
            raise ValueError(
                f"candidate_group_size must be at least group_size ({self.group_size}), got "
                f"{self.candidate_group_size}. Leave it out to keep every rollout."
            )
        if self.max_policy_lag < 0:
            raise ValueError(
                f"max_policy_lag must be at least 0, got {self.max_policy_lag}. 0 is the "
                "synchronous loop."
            )
        _require_positive("groups_per_update", self.groups_per_update)
        _require_positive("max_drought", self.max_drought)
        if self.on_drought not in get_args(DroughtPolicy):
            raise ValueError(
                f"on_drought must be one of {list(get_args(DroughtPolicy))}, got "
                f"{self.on_drought!r}. 'warn' samples on."
            )

    @property
    def num_candidates(self) -> int:
        """Rollouts sampled for one group."""
        return self.candidate_group_size or self.group_size


@dataclass(frozen=True)
class WorkerConfig:
    """Environment workers.

    Args:
        num_workers (int): processes.
        envs_per_worker (int): rollouts that a worker holds open at once.
        max_decisions (int): decisions after which a rollout is truncated.
        max_in_flight (int, optional): rollouts that may be under way at once. Defaults to one in
            each environment.
        reset_timeout_s (float): seconds after which a reset counts as hung and its worker is
            replaced.
        step_timeout_s (float): the same for one decision.
        start_timeout_s (float): seconds for the construction of the first environments.
        stop_timeout_s (float): seconds that workers get to end before they are killed.
        max_failures (int): failures in a row, without a finished rollout between them, that the run
            survives. Losses of one cause, which strikes processes that were there already, are one
            failure.
        max_rollout_failures (int): failures of one rollout after which its group is given up.
        max_task_failures (int): groups of one task given up in a row, without a finished rollout of
            it, after which the run goes on without the task.
        max_rss_bytes (int or str, optional): private resident memory at which a worker is replaced
            by a new one, between two rollouts. Memory that it shares with others does not count.
            Defaults to no limit.
        num_threads (int): intra-op torch threads of a worker.
        env_vars (Mapping): environment variables of the workers.
        start_method (str): how processes are started.
        pin_workers (bool): keep each worker on one core, where there is no more than one of them a
            core and their steps cost more than everything else. Off by default:
            :doc:`/decisions/0034-share-of-the-cpu-bound` says what it gains and where it was tried.

    Raises:
        ValueError: for a number that is not positive, or for ``pin_workers`` with a
            ``num_threads`` above 1.
    """

    num_workers: int = 2
    envs_per_worker: int = 1
    max_decisions: int = 64
    max_in_flight: int | None = None
    reset_timeout_s: float = 120.0
    step_timeout_s: float = 60.0
    start_timeout_s: float = 300.0
    stop_timeout_s: float = 3.0
    max_failures: int = 5
    max_rollout_failures: int = 3
    max_task_failures: int = 3
    max_rss_bytes: int | str | None = None
    num_threads: int = 1
    env_vars: Mapping[str, str] = field(default_factory=dict)
    start_method: Literal["forkserver", "spawn"] = "forkserver"
    pin_workers: bool = False

    def __post_init__(self) -> None:
        positive = ("num_workers", "envs_per_worker", "max_decisions", "max_failures")
        for name in (*positive, "max_rollout_failures", "max_task_failures"):
            _require_positive(name, getattr(self, name))
        if self.max_in_flight is not None:
            _require_positive("max_in_flight", self.max_in_flight)
        if self.max_rss_bytes is not None:
            _require_positive("max_rss_bytes", parse_bytes(self.max_rss_bytes))
        if self.pin_workers and self.num_threads > 1:
            raise ValueError(
                f"num_threads must be 1 with pin_workers, got {self.num_threads}. They would take "
                "turns on one core: leave pin_workers out."
            )


@dataclass(frozen=True)
class InferenceConfig:
    """The inference lane.

    Args:
        where (str): ``"process"`` (default), or ``"thread"`` of the learner's process.
        max_batch_size (int, optional): rows of one policy call. Defaults to half of the
            environments, so that one half is simulated while the policy decides for the other; to
            all of them if the run is deterministic, for there the two take turns.
        max_wait_s (float): seconds that a row that is ready waits for others to share its policy
            call, while there are others and the policy is free. 0 calls it as soon as it is free.
        num_threads (int): intra-op torch threads of the process.
        timeout_s (float): seconds after which a policy call counts as hung. The process is replaced
            then; a thread cannot be, so the run ends with its stack.
        start_timeout_s (float): the same for the first call of a lane, which has to wait for its
            policy.
        deterministic (bool, optional): work in rounds, so that batches, losses and weights are a
            pure function of the seeds: every environment at work is waited for before the next
            policy call, and evaluations run between the cohorts of two updates. It needs
            ``max_policy_lag=0`` and is the default there. It holds for one machine and build of
            torch, for environments that depend on their seed alone, and until the first fault. With
            a thread, nobody else may draw from torch's generator while groups are collected.

    Sampled tokens are drawn from a seed of each policy call, except by a thread that is not
    deterministic: it shares the generator of the learner's process.
    """

    where: Literal["process", "thread"] = "process"
    max_batch_size: int | None = None
    max_wait_s: float = 1e-2
    num_threads: int = 1
    timeout_s: float = 120.0
    start_timeout_s: float = 300.0
    deterministic: bool | None = None

    def __post_init__(self) -> None:
        if self.where not in ("process", "thread"):
            raise ValueError(
                f"where must be 'process' or 'thread', got {self.where!r}. Take 'process' unless "
                "the policy cannot be pickled."
            )
        if self.max_batch_size is not None:
            _require_positive("max_batch_size", self.max_batch_size)
        if self.max_wait_s < 0:
            raise ValueError(
                f"max_wait_s must be at least 0, got {self.max_wait_s}. 0 calls the policy as soon "
                "as it is free."
            )

    def is_deterministic(self, max_policy_lag: int) -> bool:
        """Whether the run works in rounds.

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


@dataclass(frozen=True)
class SchedulerConfig:
    """What the :class:`~torchrl_dvla.swimlane.Scheduler` may move while the lanes run.

    It always moves ``max_in_flight`` (up to one rollout in each environment) and
    ``max_batch_size`` (up to as many rows); the rest where a bound is given.

    Args:
        window_s (float): seconds of one measurement at least; it lasts longer where four decisions
            of every rollout under way do. Where sampling and learner share cores it should hold a
            whole update, or the learner's phases look like gains and losses.
        max_wait_s (float): the longest that a row may be made to wait for others to share its
            policy call. 0 leaves the wait as it is.
        num_epochs (tuple, optional): fewest and most passes over the groups of an update. More
            while the learner would rest, fewer while sampling waits for it.
        num_cores (int, optional): cores that inference process and learner share; torch's threads
            of each are moved.
        min_gain (float): relative gain in decisions a second below which a move is taken back.
    """

    window_s: float = 3.0
    max_wait_s: float = 0.032
    num_epochs: tuple[int, int] | None = None
    num_cores: int | None = None
    min_gain: float = 0.02

    def __post_init__(self) -> None:
        _require_positive("window_s", self.window_s)
        if self.max_wait_s < 0:
            raise ValueError(
                f"max_wait_s must not be negative, got {self.max_wait_s}. 0 leaves the wait alone."
            )
        if self.num_epochs is not None and not 1 <= self.num_epochs[0] <= self.num_epochs[1]:
            raise ValueError(
                f"num_epochs must be (fewest, most) with 1 <= fewest <= most, got "
                f"{self.num_epochs}. (1, 4) is usual."
            )
        if self.num_cores is not None and self.num_cores < 2:
            raise ValueError(
                f"num_cores must be at least 2, got {self.num_cores}. One core cannot be shared "
                "out: leave it out."
            )
