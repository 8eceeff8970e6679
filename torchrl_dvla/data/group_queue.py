# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""All groups of a run, from admission to the publication of their update."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchrl_dvla.data.group import (
    SPEC_FORM,
    EpisodeSpec,
    Group,
    GroupConfig,
    GroupState,
    InitStateSchedule,
    NoSignal,
    Rollout,
    contradictions,
    judge,
)
from torchrl_dvla.data.schema import ADVANTAGE_KEY
from torchrl_dvla.differences import differences, join_some
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.saved_state import OLDER_VERSION, Number, form_of, require_form, types_of

__all__ = ["GroupQueue", "Publication"]

#: Owner of the pages that a checkpoint's groups are put on.
_OWNER = "checkpoint"
_WHAT_FOLLOWS = {
    "warn": "Sampling goes on.",
    "keep": "Groups are kept as they come until there is contrast again.",
    "raise": "The run ends here.",
}

_COUNTS = "groups_learned groups_kept no_signal_groups groups_kept_without_signal rows_kept updates"

_log = logging.getLogger("torchrl_dvla")


@dataclass
class Publication:
    """What one publication of weights amounts to.

    Args:
        version (int): the version that was published. Whoever publishes may correct it.
    """

    version: int


class GroupQueue:
    r"""Groups of a run: admitted, complete, in the learner's hand; the bound on their staleness.

    One dict of :class:`Group` in the order of admission, under one condition. The collector's
    thread admits, finishes, completes and drops; the learner's thread waits for cohorts and
    publishes. A group leaves when it is dropped, or when the update over it is published; its pages
    are free then.

    Let ``V`` be the learner's version, ``G = groups_per_update`` and ``L = max_policy_lag``. A
    group admitted at version ``V`` gets the *deadline* ``V + L``: the last version at which it may
    be learned. The learner takes ``G`` groups a version, so the groups it can still take with a
    deadline of at most ``d`` are ``G`` for each of the versions ``V .. d``. Write ``U(d)`` for the
    admitted groups with deadline ``<= d`` that are neither learned nor dropped; a cohort that the
    learner has in hand is among them until its update is published.

    **Invariant.** For every ``d`` in ``V .. V + L``::

        U(d) <= (d - V + 1) * G                                                      (1)

    Each operation keeps it:

    - ``admit`` adds a group with deadline ``V + L`` and so touches (1) only at ``d = V + L``: it is
      granted iff ``U + 1 <= (L + 1) * G``.
    - ``drop``, and ``complete`` of a group that is not kept, lower ``U``.
    - ``wait_cohort`` hands out a cohort ``S`` of ``G`` complete groups, one a version, only if what
      stays behind can wait for the next version: ``U(d) - S(d) <= (d - V) * G`` for every ``d``. It
      changes no ``U``.
    - ``publishing`` removes ``S`` and makes ``V + 1`` of ``V``, in one step. (1) at ``V + 1`` is
      the condition of ``wait_cohort``; groups admitted in between were admitted with ``S`` counted,
      so ``U(V + L) - G <= L * G`` still holds. Without a cohort in hand it is refused unless
      ``U(d) <= (d - V) * G``.

    **(a) No group is learned too late.** (1) was checked at version ``d`` when the cohort of that
    version was handed out: ``U(d) - S(d) <= 0``, so nothing with deadline ``d`` is left at
    ``d + 1``. Hence a group is learned at ``V' <= admitted + L``, always.

    **(b) No deadlock.** Complete groups are taken in order of deadline. That maximises ``S(d)``
    for all ``d`` at once, so if this choice does not pass, none does. Suppose the learner waits at
    version ``V`` and every admitted group is complete. If ``U >= G``, the ``G`` oldest leave
    ``max(0, U(d) - G) <= (d - V) * G`` behind by (1): the cohort passes. If ``U < G``, then
    ``U + 1 <= G <= (L + 1) * G`` and ``admit`` grants another group. So progress only needs that
    every group that was begun ends, complete or dropped. Until then a straggler may be overtaken,
    at most for ``L`` versions; at its deadline the learner waits for it.

    With ``L = 0`` this is the synchronous loop: ``G`` groups at version ``V``, all of them learned
    at ``V``, none admitted between the update and its publication.

    Worked trace, ``G = 1``, ``L = 1``::

        admit() admit()      groups 0, 1 at V=0, deadlines 1, 1: U(1) = 2 = (L + 1) * G
        admit()              refused: it could have to wait until version 2
        complete(1)
        wait_cohort()        [1]: group 0 stays, U(1) - S(1) = 1 <= (1 - 0) * 1
        admit()              refused still: group 1 counts until it is published, U = 2
        publishing()         V = 1, group 1 is learned
        admit()              group 2, deadline 2
        complete(2)
        wait_cohort()        waits: group 0 has deadline 1 = V
        complete(0)
        wait_cohort()        [0]

    The bound is on the version at which a group was *admitted*. Decisions carry the version of the
    weights that took them; these are no older than the admitted version if the inference lane
    adopts the newest weights before the group's first decision. A rollout that is lost and sampled
    again stays in its group and keeps its deadline: its decisions are younger than those that were
    lost, so the bound holds for them all the more.

    **Pages.** A group is admitted only once it has reserved the pages that its rollouts
    may need at most. So a rollout that has begun always gets its next page, and the pool cannot
    deadlock. Pages of a rollout are leased by its ``rollout_id``.

    All methods may be called from any thread.

    Args:
        config (GroupConfig): groups and staleness.
        pool (EnvironmentPool): the pages.
        schedule (InitStateSchedule): initial states of the groups.

    Keyword Args:
        pages_per_rollout (int): pages that a rollout of the greatest length needs.
        version (int): the learner's first version.

    Examples:
        >>> import torch
        >>> from torchrl_dvla.memory import RowLayout
        >>> pool = EnvironmentPool(RowLayout({"advantage": ((1,), torch.float32)}), 8)
        >>> config = GroupConfig(group_size=2, groups_per_update=1, max_policy_lag=0)
        >>> groups = GroupQueue(config, pool, InitStateSchedule(), pages_per_rollout=1)
        >>> groups.admit()
        'paused'
        >>> groups.set_paused(False)
        >>> group = groups.admit()
        >>> group.group_id, groups.admit()
        (0, 'no_admission')
        >>> for rollout, reward in zip(group.rollouts, (1.0, 0.0)):
        ...     rollout.pages.append(pool.lease(rollout.rollout_id))
        ...     rollout.record(policy_version=0, reward=reward, success=False, num_env_steps=8)
        ...     groups.finish(rollout)
        >>> groups.complete(group)
        >>> [group.group_id for group in groups.wait_cohort()]
        [0]
        >>> with groups.publishing():
        ...     pass
        >>> groups.version, len(groups), pool.num_free_pages
        (1, 0, 8)
        >>> pool.close()
    """

    def __init__(
        self,
        config: GroupConfig,
        pool: EnvironmentPool,
        schedule: InitStateSchedule,
        *,
        pages_per_rollout: int,
        version: int = 0,
    ) -> None:
        self.config = config
        self.pool = pool
        self.schedule = schedule
        self.pages_per_rollout = pages_per_rollout
        self.version = version
        #: Groups and rollouts begun so far; the next ids.
        self.num_admitted = 0
        self.num_rollouts = 0
        #: Whether no group may begin for now.
        self.paused = True
        #: Held while a group begins, changes or ends; re-entrant.
        self.lock = threading.Condition()
        #: Tasks that kept failing.
        self.quarantined: set[str] = set()
        # In the order of admission, which is the order of deadlines since versions only grow.
        self._groups: dict[int, Group] = {}
        self._cohort: list[Group] = []
        self._reopened: deque[EpisodeSpec] = deque()
        self._publishing = False
        self._listeners: list[Callable[[], None]] = []
        self._ended_because: str | None = None
        self._error: BaseException | None = None
        self._closed = self._ended_solved = False
        #: Groups and the sum of their mean lengths, by reason.
        self._drops: dict[str, list[float]] = {}
        self._drops_since_update: dict[str, int] = {}
        #: Groups with nothing to learn from since the last update.
        self._no_signal = NoSignal()
        #: Those in a row, over updates; and those of them, up to now, that succeeded as a whole.
        self._in_a_row, self._num_solved = NoSignal(), 0
        #: Counts that a checkpoint carries, by their names in stats().
        self._counts = dict.fromkeys(_COUNTS.split(), 0)
        self._kept_length = self._wait_s = self._last_wait_s = 0.0

    # -- reading --------------------------------------------------------------------------------

    @property
    def running(self) -> list[Group]:
        """The groups under way, oldest first."""
        return self._in_state(GroupState.RUNNING)

    @property
    def stored(self) -> list[Group]:
        """The groups whose rows are stored, oldest first; those in hand are among them."""
        with self.lock:
            return [group for group in self._groups.values() if group.kept]

    @property
    def in_hand(self) -> list[Group]:
        """The cohort that the learner has and that is not published yet, oldest first."""
        return self._in_state(GroupState.IN_HAND)

    @property
    def cohort(self) -> list[Group]:
        """The groups in hand, or of the last update when there are none."""
        with self.lock:
            return list(self._cohort)

    def _in_state(self, state: GroupState) -> list[Group]:
        with self.lock:
            return [group for group in self._groups.values() if group.state is state]

    def __len__(self) -> int:
        return len(self._groups)

    def stats(self) -> dict[str, float]:
        """Groups by what became of them, and the learner's waits."""
        with self.lock:
            return {
                **self._counts,
                "policy_version": self.version,
                "groups_admitted": self.num_admitted,
                "groups_dropped": sum(int(count) for count, _ in self._drops.values()),
                "groups_in_flight": len(self.running),
                "groups_stored": len(self.stored),
                "kept_mean_length": self._kept_length / max(1, self._counts["groups_kept"]),
                "wait_s": self._wait_s,
                "last_wait_s": self._last_wait_s,
            }

    def drop_counts(self) -> dict[str, dict[str, float]]:
        """``{"count", "mean_length"}`` of the dropped groups by reason.

        Dropping must not select for success: successful episodes end early, so the mean length of
        the dropped groups beside that of the kept ones shows it. Lengths are in env steps.
        """
        with self.lock:
            return {
                reason: {"count": int(count), "mean_length": length / count}
                for reason, (count, length) in self._drops.items()
            }

    @property
    def is_solved(self) -> bool:
        """Whether nothing is left to learn: ``max_no_signal_groups`` groups in a row, or more.

        Each of their rollouts succeeded, and none of them taught anything. It stays so if
        :meth:`end` was called then, whatever the groups do that were still under way.
        """
        return self._ended_solved or self._num_solved >= self.config.max_no_signal_groups

    # -- sampling -------------------------------------------------------------------------------

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener()`` after every change that may let sampling go on.

        It is called from the thread that made the change, outside of the lock; it must not block.
        """
        with self.lock:
            self._listeners.append(listener)

    def set_paused(self, paused: bool) -> None:
        """Begin no new group, or begin groups again; groups that have begun go on."""
        with self.lock:
            self.paused = paused
        self._notify()

    def admit(self) -> Group | str:
        """The next group to sample, or the reason why none may begin.

        Returns:
            Group or str: a group with its rollouts before their first decision; ``"paused"``;
            ``"no_admission"`` until a publication or a drop; or ``"no_page"``.

        Raises:
            ValueError: if the pool can never have so many pages.
        """
        with self.lock:
            self.require_open()
            if self.paused or self._ended_because is not None:
                return "paused"
            limit = (self.config.max_policy_lag + 1) * self.config.groups_per_update
            if self._publishing or len(self._groups) + 1 > limit:
                return "no_admission"
            # One rollout's pages stay free: a learner that waits for an evaluation frees no others.
            num_pages = self.pages_per_rollout * self.config.num_candidates
            if not self.pool.reserve(num_pages + self.pages_per_rollout):
                return "no_page"
            self.pool.unreserve(self.pages_per_rollout)
            group_id, spec = self.num_admitted, self._next_spec()
            rollout_ids = range(self.num_rollouts, self.num_rollouts + self.config.num_candidates)
            group = Group(
                group_id,
                spec,
                deadline=self.version + self.config.max_policy_lag,
                rollouts=[Rollout(spec, group_id, number) for number in rollout_ids],
            )
            self._groups[group_id] = group
            self.num_admitted += 1
            self.num_rollouts = rollout_ids.stop
            return group

    def _next_spec(self) -> EpisodeSpec:
        while True:  # quarantine() leaves at least one task
            spec = self._reopened.popleft() if self._reopened else next(self.schedule)
            if spec.task not in self.quarantined:
                return spec

    def finish(self, rollout: Rollout) -> None:
        """A rollout of a running group has ended: its pages are sealed.

        What it did not take of its reserved pages is free for others.

        Raises:
            KeyError: if its group is not running.
            RuntimeError: if a page of it is not leased.
            ValueError: if it has no decision, or more than its pages hold.
        """
        with self.lock:
            self._require_running(rollout.group_id)
            rollout.seal(self.pool, self.pages_per_rollout)
        self._notify()

    def complete(self, group: Group) -> None:
        """All rollouts of a group have finished: it is kept for the learner, or dropped.

        A kept group's advantages are written to the ``"advantage"`` of every row of its rollouts,
        and its pages are stored; no tensor moves. The pages of what is not kept are freed.

        Raises:
            KeyError: if the group is not running.
            RuntimeError: if a rollout of it has not finished; or if ``max_no_signal_groups`` groups
                in a row had nothing to learn from and the run is to end then.
        """
        with self.lock:
            self._require_running(group.group_id)
            unfinished = [r.rollout_id for r in group.rollouts if not r.finished]
            if unfinished:
                raise RuntimeError(
                    f"All rollouts of group {group.group_id} must have finished, got {unfinished} "
                    "unfinished. Call finish(rollout) when a rollout ends."
                )
            keep_all = (
                self.config.on_no_signal == "keep"
                and self._counts["no_signal_groups"] >= self.config.max_no_signal_groups
            )
            reason = judge(group, self.config, keep_all=keep_all)
            if reason is None:
                self._store(group)
            else:
                self._forget(group, reason)
            warning = self._watch_signal(group)
        self._notify()
        if warning is None or self._ended_because is not None:  # who ended it says why
            return
        if self.config.on_no_signal == "raise":
            raise RuntimeError(warning)
        _log.warning("%s", warning)

    def _store(self, group: Group) -> None:
        rows = group.row_index(self.pool).numpy()
        sizes = [rollout.num_rows for rollout in group.rollouts]
        column = self.pool.rows.get(ADVANTAGE_KEY).numpy()
        column[rows, 0] = np.repeat(group.advantages.numpy(), sizes)
        self.pool.store(group.pages)
        for rollout in group.candidates:
            if rollout not in group.rollouts:
                self.pool.free(rollout.pages)
                rollout.pages = []
        group.state = GroupState.COMPLETE
        self._counts["groups_kept"] += 1
        self._counts["rows_kept"] += len(rows)
        self._kept_length += group.mean_length

    def _watch_signal(self, group: Group) -> str | None:
        """Count groups in a row with nothing to learn from; what to say when they are too many."""
        if bool(group.advantages.any()):
            self._counts["no_signal_groups"] = self._num_solved = 0
            self._in_a_row = NoSignal()
            return None
        self._counts["no_signal_groups"] += 1
        self._counts["groups_kept_without_signal"] += group.kept
        self._num_solved = self._num_solved + 1 if group.success_rate == 1.0 else 0
        self._no_signal.add(group)
        self._in_a_row.add(group)
        num_groups = self._in_a_row.num_groups  # a resumed run counts anew, as it does the sums
        times, rest = divmod(num_groups, self.config.max_no_signal_groups)
        if rest or times & (times - 1):  # said at 1, 2, 4, 8 times as many
            return None
        return (
            f"{num_groups} groups in a row had nothing to learn from, the last "
            f"because of {group.drop_reason or 'no contrast'!r}. "
            f"{_WHAT_FOLLOWS[self.config.on_no_signal]} {self._in_a_row.describe(self.config)}"
        )

    def drop(self, group: Group, reason: str) -> None:
        """Give a running group up, for instance because its environment keeps failing.

        The pages of its finished rollouts are freed. Those that the others have leased are
        reclaimed, and their reserved pages are given back: nobody may write to them any
        more. A caller that reclaimed them before kept them reserved.

        Args:
            group (Group): a running group.
            reason (str): why, in a few words that do not vary from case to case.

        Raises:
            KeyError: if the group is not running.
        """
        with self.lock:
            self._require_running(group.group_id)
            finished = [rollout for rollout in group.rollouts if rollout.finished]
            group.abandon(self.pool, self.pages_per_rollout)
            group.candidates = finished
            self._forget(group, reason)
        self._notify()

    def _forget(self, group: Group, reason: str) -> None:
        """Drop a group whose ``candidates`` have finished."""
        for rollout in group.candidates:
            self.pool.free(rollout.pages)
            rollout.pages = []
        group.rollouts, group.drop_reason = [], reason
        del self._groups[group.group_id]
        drops = self._drops.setdefault(reason, [0, 0.0])
        drops[0] += 1
        drops[1] += group.mean_length
        self._drops_since_update[reason] = self._drops_since_update.get(reason, 0) + 1

    def quarantine(self, task: str, error: Exception | None = None) -> None:
        """Begin no more groups of a task that keeps failing; its running ones fail by themselves.

        Args:
            task (str): the task.
            error (Exception, optional): raised if no other task is left.

        Raises:
            RuntimeError: if no other task is left and no ``error`` is given.
        """
        with self.lock:
            if self.quarantined.union([task]).issuperset(self.schedule.tasks):
                raise error or RuntimeError(
                    f"No task is left: {sorted(self.quarantined | {task})} kept failing."
                )
            self.quarantined.add(task)  # never the last one: admit() would search for ever

    # -- learning -------------------------------------------------------------------------------

    def wait_cohort(self, timeout_s: float | None = None) -> list[Group]:
        """The groups of one update, oldest first; they are in hand until it is published.

        Args:
            timeout_s (float, optional): how long to wait; ``None`` waits for ever.

        Raises:
            TimeoutError: saying what is missing.
            RuntimeError: if collection has ended and no cohort is left.
        """
        with self.lock:
            self.require_open()
            if in_hand := self.in_hand:
                return in_hand
            start_s = time.monotonic()
            while (cohort := self._select()) is None:
                if self._ended_because is not None:
                    raise RuntimeError(
                        f"The replay buffer was closed: {self._ended_because}"
                    ) from self._error
                left_s = None if timeout_s is None else timeout_s + start_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    raise TimeoutError(self.describe_wait(timeout_s))
                self.lock.wait(left_s)
            self._last_wait_s = time.monotonic() - start_s
            self._wait_s += self._last_wait_s
            self._drops_since_update = {}
            self._no_signal = NoSignal()
            for group in cohort:
                group.state = GroupState.IN_HAND
            self._cohort = cohort
            return list(cohort)

    @contextmanager
    def publishing(self) -> Iterator[Publication]:
        """Publish the weights of an update inside this context.

        On success the cohort in hand is learned, its pages are free and the version has grown by
        one, or is what the body set ``version`` of the :class:`Publication` to. On an exception
        nothing has changed. No group is admitted meanwhile.

        Raises:
            RuntimeError: if a group would become too old. It cannot happen when every publication
                follows an update.
            ValueError: if the body gave a version that is not newer; nothing has changed here then.
        """
        with self.lock:
            self.require_open()
            if self._publishing:
                raise RuntimeError("Weights are being published already. One learner publishes.")
            leaving = self.in_hand
            limit = self._overdue(leaving)
            if limit is not None:
                late = [
                    group.group_id for group in self._groups.values() if group.deadline <= limit
                ]
                raise RuntimeError(
                    f"The version cannot advance past {self.version}: groups {late} would be "
                    f"learned more than max_policy_lag={self.config.max_policy_lag} versions after "
                    "their admission. Publish once after each update, or drop them."
                )
            self._publishing = True
        done = Publication(self.version + 1)
        try:
            yield done
            with self.lock:
                if done.version <= self.version:
                    raise ValueError(
                        f"version must grow with each publication, got {done.version} after "
                        f"{self.version}. Leave it alone, or give the number that was published."
                    )
                self._learned(leaving, done.version)
        finally:
            with self.lock:
                self._publishing = False
            self._notify()  # admission goes on, whether it was refused or not

    def _learned(self, cohort: Sequence[Group], version: int) -> None:
        for group in cohort:
            if not self._closed:
                self.pool.free(group.pages)
            del self._groups[group.group_id]
        self._counts["groups_learned"] += len(cohort)
        self._counts["updates"] += bool(cohort)
        # Deadlines move with numbers that somebody else took: the lag counts updates.
        for group in self._groups.values():
            group.deadline += version - self.version - 1
        self.version = version

    @property
    def num_updates(self) -> int:
        """Cohorts that were learned from so far."""
        return self._counts["updates"]

    def describe_wait(self, timeout_s: float | None = None) -> str:
        """What the learner is waiting for, and what to do about it."""
        with self.lock:
            in_flight = [group.group_id for group in self.running]
            within = "" if timeout_s is None else f" within timeout_s={timeout_s:g}"
            dropped = sorted(self._drops_since_update.items(), key=lambda item: -item[1])
            text = (
                f"No cohort of {self.config.groups_per_update} groups{within}: "
                f"{len(self.stored)} finished, {len(in_flight)} in flight {in_flight[:8]}, "
                f"{sum(self._drops_since_update.values())} dropped since the last update"
            )
            reasons = ", ".join(f"{count} x {reason!r}" for reason, count in dropped)
            text += f" ({reasons}). " if dropped else ". "
            if late := self._missing():
                return text + (
                    f"Groups {[group.group_id for group in late][:8]} can wait no longer than "
                    f"version {self.version} and are unfinished: look for a hung environment."
                )
            if self._no_signal.num_groups > len(self.stored):
                return text + self._no_signal.describe(self.config)
            if in_flight:
                return text + "Sampling is slower than the learner waits: raise timeout_s."
            if dropped:
                return text + "The groups were given up: the log has the reasons."
            return text + "Nothing is being collected: start the collector."

    def _missing(self) -> list[Group]:
        """Running groups that the learner cannot overtake at this version, oldest first."""
        limit = self._overdue(self._ready())
        return [] if limit is None else [g for g in self.running if g.deadline <= limit]

    # -- the end --------------------------------------------------------------------------------

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """No more groups will come: wake a waiting learner.

        Cohorts that are complete are still handed out; then the learner gets a ``RuntimeError``.

        Args:
            reason (str): told to the learner.
            error (BaseException, optional): the cause of its error.
        """
        with self.lock:
            if self._ended_because is None:
                self._ended_because, self._error = reason, error
                self._ended_solved = self.is_solved
            self.lock.notify_all()

    def close(self, reason: str) -> None:
        """The pages are gone: from now on whoever wants groups or rows gets a ``RuntimeError``."""
        self.end(reason)
        with self.lock:
            self._closed = True
            self.lock.notify_all()

    def require_open(self) -> None:
        """Refuse to go on once the pages are gone.

        Raises:
            RuntimeError: naming the reason.
        """
        if self._closed:
            raise RuntimeError(
                f"The replay buffer was closed: {self._ended_because}"
            ) from self._error
        self.pool.require_open()

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counts, complete groups without their rows, initial states to begin anew: plain data."""
        with self.lock:
            self.require_open()
            unfinished = [group.spec for group in self.running]
            return {
                **self._settings(),
                "version": self.version,
                "groups": [group.state_dict() for group in self.stored],
                "reopened": [list(spec) for spec in (*unfinished, *self._reopened)],
                "schedule": self.schedule.state_dict(),
                "num_admitted": self.num_admitted,
                "num_rollouts": self.num_rollouts,
                "counts": dict(self._counts),
                "kept_length": self._kept_length,
                "drops": {reason: list(drops) for reason, drops in self._drops.items()},
                "wait_s": self._wait_s,
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was taken, on pages of this pool.

        Groups that were running then are begun anew, before any other. Call it before sampling
        begins. Rows are not part of it: see :meth:`PooledReplayBuffer.load_state_dict`.

        Raises:
            RuntimeError: if a group is running.
            ValueError: if it was taken with other bounds, does not fit in the free pages, or is
                damaged; nothing has changed then.
        """
        with self.lock:
            groups = self.check_state(state_dict)
            self.schedule.load_state_dict(state_dict["schedule"])  # first: it checks the rest of it
            for group in self.stored:
                self.pool.free(group.pages)
            self._groups = {group.group_id: group for group in groups}
            for group in groups:
                for rollout in group.rollouts:
                    self._lease_pages(rollout)
                self.pool.store(group.pages)
            self._cohort = self.in_hand
            self._reopened = deque(EpisodeSpec(*spec) for spec in state_dict["reopened"])
            self.version = state_dict["version"]
            self.num_admitted = state_dict["num_admitted"]
            self.num_rollouts = state_dict["num_rollouts"]
            self._counts = dict(state_dict["counts"])
            self._kept_length = state_dict["kept_length"]
            self._drops = {reason: list(drops) for reason, drops in state_dict["drops"].items()}
            self._drops_since_update = {}
            self._no_signal, self._in_a_row, self._num_solved = NoSignal(), NoSignal(), 0
            self._wait_s = state_dict["wait_s"]
        self._notify()

    def _settings(self) -> dict[str, Any]:
        """What the groups of a checkpoint depend on, by its name in the state."""
        schedule = self.schedule.state_dict()
        names = ("group_size", "num_candidates", "groups_per_update", "max_policy_lag")
        return {name: getattr(self.config, name) for name in names} | {
            name: schedule[name] for name in ("seed", "tasks", "init_state_ids") if name in schedule
        }

    def check_state(self, state_dict: Mapping[str, Any]) -> list[Group]:
        """The groups of a checkpoint, without pages, once all of it is known to fit.

        Raises:
            RuntimeError, ValueError: as :meth:`load_state_dict`.
        """
        self.require_open()
        if self.running:
            raise RuntimeError("load_state_dict must be called before the first group begins.")
        require_form({str: object}, state_dict, "groups")
        own = self._settings()
        if missing := sorted(own.keys() - state_dict.keys()):
            raise ValueError(f"The groups' state must hold {missing}, got none. {OLDER_VERSION}")
        if problems := differences({name: state_dict[name] for name in own}, own):
            raise ValueError(
                f"Groups and schedule must be those of the checkpoint, got {join_some(problems)}. "
                "Its groups were begun, and given their deadlines, under these: build the "
                "collector with them, or start with an empty buffer to change them."
            )
        form = form_of(self.state_dict()) | {
            "schedule": types_of(self.schedule.state_dict()),
            "groups": [Group.state_form()],
            "reopened": [SPEC_FORM],
            "drops": {str: (Number(1), Number(0))},
        }
        require_form(form, state_dict, "groups")
        if problems := contradictions(state_dict, self.config, self.schedule.tasks):
            raise ValueError(
                f"The checkpoint's groups must fit together, got {join_some(problems)}. It is "
                "damaged, or of a run with other tasks: load an older one, or start the buffer "
                "empty."
            )
        groups = [Group.from_state_dict(state) for state in state_dict["groups"]]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        num_pages = sum(-(-rollout.num_rows // self.pool.rows_per_page) for rollout in rollouts)
        room = self.pool.num_free_pages + sum(len(group.pages) for group in self.stored)
        if num_pages > room:
            raise ValueError(
                f"The checkpoint's {num_pages} pages must fit in those that are free or the "
                f"buffer's own, got {room}. Load it before sampling begins, or raise env_bytes."
            )
        return groups

    def _lease_pages(self, rollout: Rollout) -> None:
        num_pages = -(-rollout.num_rows // self.pool.rows_per_page)
        pages = [
            self.pool.lease(_OWNER, rollout.rollout_id, reserved=False) for _ in range(num_pages)
        ]
        rollout.pages = list(self.pool.seal(pages, rollout.num_rows))

    # -- helpers --------------------------------------------------------------------------------

    def _ready(self) -> list[Group]:
        """The oldest complete groups, as many as an update takes, or fewer."""
        return self._in_state(GroupState.COMPLETE)[: self.config.groups_per_update]

    def _select(self) -> list[Group] | None:
        """The next cohort; ``None`` if groups are too few or a straggler can wait no longer."""
        ready = self._ready()
        if len(ready) < self.config.groups_per_update or self._overdue(ready) is not None:
            return None
        return ready

    def _overdue(self, leaving: list[Group]) -> int | None:
        """The deadline ``d`` at which most groups stay beyond the ``(d - V) * G`` that can wait.

        The first of several: with one straggler too many at ``d``, younger groups are too many as
        well, but not once it has gone. ``None`` if all that stay can wait.
        """
        worst, most, staying = None, 0, 0
        for group in self._groups.values():
            staying += group not in leaving
            excess = staying - (group.deadline - self.version) * self.config.groups_per_update
            if excess > most:
                worst, most = group.deadline, excess
        return worst

    def _require_running(self, group_id: int) -> None:
        self.require_open()
        group = self._groups.get(group_id)
        if group is None or group.state is not GroupState.RUNNING:
            raise KeyError(
                f"group_id must name a group under way, got {group_id}. admit() must grant a group "
                "first."
            )

    def _notify(self) -> None:
        with self.lock:
            if self._select() is not None:
                self.lock.notify_all()
            listeners = list(self._listeners)
        # Outside the lock: a listener takes its own, and may call back.
        for listener in listeners:
            listener()
