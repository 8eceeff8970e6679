# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which losses count against whom, and what follows."""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable

from torchrl_dvla.collectors.rollout import Rollout

__all__ = ["FailureLog", "Remedy"]


class Remedy(enum.Enum):
    """What becomes of the rollout that was interrupted."""

    RETRY = "retry"
    #: It has failed too often: its group is given up.
    ABANDON_GROUP = "abandon_group"
    #: And so have others of its task, which takes no further part in the run.
    QUARANTINE_TASK = "quarantine_task"


class FailureLog:
    """Counts losses without progress between them: of the run, of each rollout, of each task.

    Many processes may be lost to one cause, a fork server that dies or a machine short of memory.
    That is one *incident*: a loss counts only if the process was started after the last loss that
    counted. A cause that stays strikes the replacements too, and these count again.

    Args:
        max_failures (int): incidents in a row, without a finished rollout, that a run survives.
        max_rollout_failures (int): incidents of one rollout after which its group is given up.
        max_task_failures (int): groups of one task given up in a row, without a finished rollout of
            it, after which the task is.

    Keyword Args:
        clock (Callable): seconds, monotonic.

    Examples:
        >>> from torchrl_dvla.collectors.schedule import EpisodeSpec
        >>> times = iter([1.0, 3.0, 4.0])
        >>> log = FailureLog(5, 2, 3, clock=lambda: next(times))
        >>> rollout = Rollout(EpisodeSpec("reach", seed=0), group_id=0, rollout_id=0)
        >>> log.lost(0.0, rollout).name  # a process that was started at 0 is lost at 1
        'RETRY'
        >>> log.lost(0.0, rollout).name  # another of them, of the same cause
        'RETRY'
        >>> log.lost(2.0, rollout).name  # the replacement of the first
        'ABANDON_GROUP'
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
        """Whether the run has lost more than it should survive."""
        return self._num_in_a_row > self._max_failures

    def progress(self, task: str) -> None:
        """A rollout of ``task`` was finished."""
        self._num_in_a_row = 0
        self._by_task.pop(task, None)

    def lost(self, started_s: float, rollout: Rollout | None = None) -> Remedy:
        """A process was lost.

        Args:
            started_s (float): when it was started.
            rollout (Rollout, optional): what it was busy with.

        Returns:
            Remedy: what to do about the rollout.
        """
        now_s = self._clock()
        if started_s < self._last_counted_s or (rollout is not None and rollout.cancelled):
            return Remedy.RETRY
        self._last_counted_s = now_s
        self._num_in_a_row += 1
        if rollout is None:
            return Remedy.RETRY
        rollout.num_failures += 1
        if rollout.num_failures < self._max_rollout_failures:
            return Remedy.RETRY
        task = rollout.spec.task
        self._by_task[task] += 1
        self._num_in_a_row = 0  # the cause is dealt with
        if self._by_task[task] < self._max_task_failures:
            return Remedy.ABANDON_GROUP
        return Remedy.QUARANTINE_TASK
