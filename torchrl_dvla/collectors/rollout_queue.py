# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which rollout runs next."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.collectors.rollout import Rollout
from torchrl_dvla.collectors.schedule import EpisodeSpec, InitStateSchedule
from torchrl_dvla.data import Admission
from torchrl_dvla.memory import EnvironmentPool

__all__ = ["RolloutQueue"]


class RolloutQueue:
    """Hands out rollouts: evaluation episodes first, then open groups, then a newly admitted group.

    A group is admitted as a whole (invariant 5), and only once the pool has promised it the pages
    that its rollouts may need at most. So a rollout that has begun always gets its next page, and
    the pool cannot deadlock.

    Args:
        schedule (InitStateSchedule): initial states of the groups.
        admission (Admission): grants groups by staleness.
        num_candidates (int): rollouts of one group.
        pages_per_rollout (int): pages that a rollout of the greatest length needs.
        pool (EnvironmentPool): gives and takes back the promises.
        evaluations_alone (bool): keep evaluation episodes and training rollouts apart: an
            evaluation waits until admission lets no group begin and none is unfinished; then no
            group begins until it has ended.
    """

    def __init__(
        self,
        schedule: InitStateSchedule,
        admission: Admission,
        *,
        num_candidates: int,
        pages_per_rollout: int,
        pool: EnvironmentPool,
        evaluations_alone: bool = False,
    ) -> None:
        self._schedule = schedule
        self._admission = admission
        self._num_candidates = num_candidates
        self._pages_per_rollout = pages_per_rollout
        self._pool = pool
        self._evaluations_alone = evaluations_alone
        self._pending: deque[Rollout] = deque()
        self._running: set[Rollout] = set()
        self._evaluations: deque[Evaluation] = deque()
        self._evaluation_pending: deque[Rollout] = deque()
        #: Why nothing is played any more.
        self._ended: Exception | None = None
        self._lock = threading.Lock()
        #: Held while a group begins or ends; whoever holds it sees queue, admission and replay
        #: buffer agree about it.
        self.consistent = threading.RLock()
        self.admitting = threading.Event()
        self.num_groups_admitted = 0
        self.num_rollouts = 0
        self._num_episodes = 0  # of evaluations: their ids count down, beside those of training
        #: Initial states of the groups that are not finished, by group.
        self._open_groups: dict[int, EpisodeSpec] = {}
        self._reopened: deque[EpisodeSpec] = deque()
        #: Tasks that kept failing.
        self.quarantined: set[str] = set()

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Queue an evaluation; evaluations run one after the other.

        After :meth:`fail_evaluations` it fails at once.
        """
        with self._lock:
            if self._ended is not None:
                evaluation.fail(self._ended)
            else:
                self._evaluations.append(evaluation)

    def next_evaluation(self) -> Evaluation | None:
        """The evaluation to begin now, if the one before has ended; its episodes become due."""
        with self._lock:
            while self._evaluations and self._evaluations[0].done():
                self._evaluations.popleft()
            if not self._evaluations or self._evaluation_pending:
                return None
            evaluation = self._evaluations[0]
            if any(rollout.evaluation is evaluation for rollout in self._running):
                return None
            self._make_due(evaluation)
            return evaluation

    def replay_evaluation(self) -> bool:
        """The weights of the evaluation under way are lost: all its episodes become due again.

        Returns:
            bool: whether any rollout needs weights that were copied aside.
        """
        with self._lock:
            rollouts = [*self._evaluation_pending, *(r for r in self._running if r.evaluation)]
            evaluation = next((r.evaluation for r in rollouts if not r.cancelled), None)
            if evaluation is not None:
                self._forget_episodes(evaluation)
                evaluation.begin_anew()
                self._make_due(evaluation)
            return bool(rollouts)

    def _make_due(self, evaluation: Evaluation) -> None:
        for episode, spec in enumerate(evaluation.episodes):
            self._evaluation_pending.append(
                Rollout(spec, -1, -1 - self._num_episodes, evaluation, episode)
            )
            self._num_episodes += 1

    def _forget_episodes(self, evaluation: Evaluation) -> None:
        kept = [r for r in self._evaluation_pending if r.evaluation is not evaluation]
        self._evaluation_pending = deque(kept)
        for rollout in self._running:
            if rollout.evaluation is evaluation:
                rollout.cancelled = True

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation has begun and not ended."""
        with self._lock:
            return bool(self._evaluations) and not self._evaluations[0].done()

    def next(self) -> Rollout | str:
        """The next rollout to run, or the reason why none may."""
        if self._evaluations_alone:
            return self._next_apart()
        if self._evaluation_pending and self._pool.reserve(self._pages_per_rollout):
            return self._run(self._evaluation_pending.popleft())
        # Groups that have begun hold the pages that an evaluation waits for: they go on.
        if self._pending:
            return self._run(self._pending.popleft())
        if self._evaluation_pending:
            return "no_page"
        return self._begin_group()

    def _next_apart(self) -> Rollout | str:
        if not any(rollout.evaluation for rollout in self._running):
            rollout = self._run(self._pending.popleft()) if self._pending else self._begin_group()
            if isinstance(rollout, Rollout) or self._running or not self._evaluation_pending:
                return rollout
        if not self._evaluation_pending:
            return "evaluation"
        if not self._pool.reserve(self._pages_per_rollout):
            return "no_page"
        return self._run(self._evaluation_pending.popleft())

    def _begin_group(self) -> Rollout | str:
        if not self.admitting.is_set():
            return "paused"
        if not self._admission.may_admit:
            return "no_admission"
        num_pages = self._pages_per_rollout * self._num_candidates
        # One rollout's pages stay free: a learner that waits for an evaluation frees no others.
        if not self._pool.reserve(num_pages + self._pages_per_rollout):
            return "no_page"
        self._pool.unreserve(self._pages_per_rollout)
        with self.consistent:
            if self._admission.admit(self.num_groups_admitted):
                return self._admitted_group()
        self._pool.unreserve(num_pages)
        return "no_admission"

    def _admitted_group(self) -> Rollout:
        spec = self._next_spec()
        self._open_groups[self.num_groups_admitted] = spec
        for _ in range(self._num_candidates):
            self._pending.append(Rollout(spec, self.num_groups_admitted, self.num_rollouts))
            self.num_rollouts += 1
        self.num_groups_admitted += 1
        return self._run(self._pending.popleft())

    def _next_spec(self) -> EpisodeSpec:
        while True:  # quarantine() leaves at least one task
            spec = self._reopened.popleft() if self._reopened else next(self._schedule)
            if spec.task not in self.quarantined:
                return spec

    def finish(self, rollout: Rollout) -> None:
        """``rollout`` has ended: what it did not take of its promised pages is free for others."""
        self._running.discard(rollout)
        self._pool.unreserve(self._pages_per_rollout - len(rollout.pages))

    def close_group(self, group_id: int) -> None:
        """All rollouts of the group are finished."""
        self._open_groups.pop(group_id, None)

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the initial states of unfinished groups: a resumed run begins them anew.

        The caller holds :attr:`consistent`.
        """
        return {
            "num_groups_admitted": self.num_groups_admitted,
            "num_rollouts": self.num_rollouts,
            "reopened": [tuple(spec) for spec in (*self._open_groups.values(), *self._reopened)],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; unfinished groups come first."""
        self.num_groups_admitted = state_dict["num_groups_admitted"]
        self.num_rollouts = state_dict["num_rollouts"]
        self._reopened = deque(EpisodeSpec(*spec) for spec in state_dict["reopened"])

    def retry(self, rollout: Rollout) -> None:
        """``rollout`` was lost with its worker: sample it again, before anything new."""
        self._running.discard(rollout)
        self._pool.reclaim(rollout.rollout_id, keep_reserved=True)
        if rollout.cancelled:
            self._pool.unreserve(self._pages_per_rollout)
        elif rollout.evaluation is None:
            self._pending.appendleft(rollout.fresh_copy())
        else:  # the promise of an evaluation episode is made when it begins
            self._pool.unreserve(self._pages_per_rollout)
            self._evaluation_pending.appendleft(rollout.fresh_copy())

    def abandon(self, group_id: int) -> None:
        """Give a group up: its rollouts that wait are forgotten, those that run are cancelled."""
        self._open_groups.pop(group_id, None)
        waiting = [rollout for rollout in self._pending if rollout.group_id == group_id]
        for rollout in waiting:
            self._pending.remove(rollout)
            self._pool.unreserve(self._pages_per_rollout)
        for rollout in self._running:
            if rollout.group_id == group_id and rollout.evaluation is None:
                rollout.cancelled = True

    def abandon_evaluation(self, evaluation: Evaluation, error: Exception) -> None:
        """Give an evaluation up; who waits for its result gets ``error``."""
        evaluation.fail(error)
        self._forget_episodes(evaluation)

    def quarantine(self, task: str, error: Exception) -> list[int]:
        """Begin nothing more of ``task``, and give up the evaluations that hold it.

        Returns:
            list of int: its unfinished groups, to be abandoned.

        Raises:
            Exception: ``error``, if no other task is left.
        """
        self.quarantined.add(task)
        if self.quarantined.issuperset(self._schedule.tasks):
            raise error
        with self._lock:
            evaluations = list(self._evaluations)
        for evaluation in evaluations:
            if any(spec.task == task for spec in evaluation.episodes):
                self.abandon_evaluation(evaluation, error)
        return [key for key, spec in self._open_groups.items() if spec.task == task]

    def fail_evaluations(self, error: Exception) -> None:
        """End the evaluations, those to come too: nobody plays them any more."""
        with self._lock:
            self._ended = error
            for evaluation in self._evaluations:
                evaluation.fail(error)
            self._evaluations.clear()

    def _run(self, rollout: Rollout) -> Rollout:
        self._running.add(rollout)
        return rollout
