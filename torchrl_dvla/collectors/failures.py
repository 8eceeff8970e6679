# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Crashes in a row: when they cost a group, a task, or the run."""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable

from torchrl_dvla.data import Rollout

__all__ = ["FailureAction", "FailureLog"]


class FailureAction(enum.Enum):
    """What becomes of the rollout that a crash interrupted."""

    RETRY = "retry"
    #: It has failed too often: its group is dropped.
    DROP_GROUP = "drop_group"
    #: And so have others of its task, which takes no further part in the run.
    QUARANTINE_TASK = "quarantine_task"


class FailureLog:
    """Counts of crashes without progress between them: of the run, of each rollout, of each task.

    Many processes may be lost to one cause, a fork server that dies or a machine short of memory.
    That is one *incident*: a crash counts only if the process was started after the last crash that
    counted. A cause that stays hits the replacements too, and these count again.

    Args:
        max_failures (int): incidents in a row, without a finished rollout, that a run survives.
        max_rollout_failures (int): incidents of one rollout after which its group is dropped.
        max_task_failures (int): groups of one task dropped in a row, without a finished rollout of
            it, after which the task is quarantined.

    Keyword Args:
        clock (Callable): seconds, monotonic.

    Examples:
        >>> from torchrl_dvla.data import EpisodeSpec
        >>> times = iter([1.0, 3.0, 4.0])
        >>> log = FailureLog(5, 2, 3, clock=lambda: next(times))
        >>> rollout = Rollout(EpisodeSpec("reach", seed=0), group_id=0, rollout_id=0)
        >>> log.record_crash(0.0, rollout).name  # a process that was started at 0 is lost at 1
        'RETRY'
        >>> log.record_crash(0.0, rollout).name  # another of them, of the same cause
        'RETRY'
        >>> log.record_crash(2.0, rollout).name  # the replacement of the first
        'DROP_GROUP'
    """

    def __init__(
        self,
        max_failures: int,
        max_rollout_failures: int,
        max_task_failures: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_failures = max_failures
        self._max_rollout_failures = max_rollout_failures
        self._max_task_failures = max_task_failures
        self._clock = clock
        self._last_counted_s = -float("inf")
        self._num_in_a_row = 0
        self._by_task: Counter[str] = Counter()

    @property
    def too_many(self) -> bool:
        """Whether the run has had more incidents than it should survive."""
        return self._num_in_a_row > self._max_failures

    def record_progress(self, task: str) -> None:
        """Forget the failures before a rollout of ``task`` that was finished."""
        self._num_in_a_row = 0
        self._by_task.pop(task, None)

    def record_crash(self, started_s: float, rollout: Rollout | None = None) -> FailureAction:
        """Count a process that died, raised or hung.

        Args:
            started_s (float): when it was started.
            rollout (Rollout, optional): what it was busy with.

        Returns:
            FailureAction: what to do about the rollout.
        """
        if started_s < self._last_counted_s:
            return FailureAction.RETRY
        self._last_counted_s = self._clock()
        self._num_in_a_row += 1
        if rollout is None:
            return FailureAction.RETRY
        rollout.num_failures += 1
        if rollout.num_failures < self._max_rollout_failures:
            return FailureAction.RETRY
        self._num_in_a_row = 0  # the cause is dealt with
        return self._drop_group(rollout.spec.task, self._max_rollout_failures)

    def record_refusal(self, task: str) -> FailureAction:
        """Count a group of ``task`` that is dropped for what its environment returned.

        It is one failure, where a crash drops a group for ``max_rollout_failures`` of them.
        """
        return self._drop_group(task, 1)

    def _drop_group(self, task: str, num_failures: int) -> FailureAction:
        self._by_task[task] += num_failures
        if self._by_task[task] < self._max_task_failures * self._max_rollout_failures:
            return FailureAction.DROP_GROUP
        return FailureAction.QUARANTINE_TASK
