# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which groups may begin, and which are learned from next: the bound on staleness."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Admission"]


@dataclass
class _Group:
    deadline: int
    completed: bool = False


class Admission:
    r"""Grants whole groups so that none can be learned from too late (invariant 5).

    Let ``V`` be the learner's version, ``G = groups_per_update`` and ``L = max_policy_lag``. A
    group admitted at version ``V`` gets the *deadline* ``V + L``: the last version at which it may
    be learned. The learner takes ``G`` groups a version, so the groups it can still take with a
    deadline of at most ``d`` are ``G`` for each of the versions ``V .. d``. Write ``U(d)`` for the
    admitted groups with deadline ``<= d`` that are not learned yet, and ``T`` for the groups that
    were learned at the current version already (0, or ``G`` between an update and its publication).

    **Invariant.** For every ``d`` in ``V .. V + L``::

        U(d) + T <= (d - V + 1) * G                                                  (1)

    Each operation keeps it:

    - ``admit`` adds a group with deadline ``V + L`` and so touches (1) only at ``d = V + L``: it is
      granted iff ``U + T + 1 <= (L + 1) * G``.
    - ``drop`` lowers ``U``.
    - ``select`` hands out a cohort ``S`` of ``G`` completed groups only if what stays behind can
      wait for the next version: ``U(d) - S(d) <= (d - V) * G`` for every ``d``. ``learned`` then
      moves the cohort from ``U`` to ``T``, which leaves (1) as it was or better.
    - ``advance`` makes ``V + 1`` of ``V`` and 0 of ``T``. After an update (1) at ``V + 1`` is the
      condition of ``select``; a group admitted in between was admitted with ``T = G``, so
      ``U(V + L) <= L * G`` still holds. An ``advance`` that would break (1) is refused.

    **(a) No group is learned too late.** (1) was checked at version ``d`` when the cohort of that
    version was selected: ``U(d) - S(d) <= 0``, so nothing with deadline ``d`` is left at ``d + 1``.
    Hence a group is learned at ``V' <= admitted + L``, always.

    **(b) No deadlock.** Completed groups are taken in order of deadline. That maximises ``S(d)``
    for all ``d`` at once, so if this choice does not pass, none does. Suppose the learner waits at
    version ``V``, ``T = 0``, and every admitted group has been completed. If ``U >= G``, the ``G``
    oldest leave ``max(0, U(d) - G) <= (d - V) * G`` behind by (1): the cohort passes. If
    ``U < G``, then ``U + 1 <= G <= (L + 1) * G`` and ``admit`` grants another group. So progress
    only needs that every group that was begun ends, completed or dropped. Until then a straggler
    may be overtaken, at most for ``L`` versions; at its deadline the learner waits for it.

    With ``L = 0`` this is the synchronous loop: ``G`` groups at version ``V``, all of them learned
    at ``V``, none admitted between the update and its publication.

    Worked trace, ``G = 1``, ``L = 1``::

        admit(0), admit(1)   granted at V=0, deadlines 1, 1: U(1) = 2 = (L + 1) * G
        admit(2)             refused: it could have to wait until version 2
        select([1])          [1]: group 0 stays, U(1) - S(1) = 1 <= (1 - 0) * 1
        learned([1])         T = 1; admit(2) is refused still: U + T = 2
        advance()            V = 1, T = 0
        admit(2)             granted, deadline 2
        select([2])          None: group 0 has deadline 1 = V, so the learner waits for it
        select([0, 2])       [0]

    The bound is on the version at which a group was *admitted*. Decisions carry the version of the
    weights that took them; these are no older than the admitted version if the inference lane
    adopts the newest weights before the group's first decision, and if the admitted version can be
    adopted when the group is granted (:meth:`begin_only_if`). A rollout that is lost and sampled
    again stays in its group and keeps its deadline: its decisions are younger than those that were
    lost, so the bound holds for them all the more. A group that is given up is dropped.

    All methods may be called from any thread.

    Args:
        groups_per_update (int): ``G``, groups that one learner update takes.
        max_policy_lag (int): ``L``, versions that may lie between admission and learning.

    Keyword Args:
        version (int): the learner's first version.

    Raises:
        ValueError: if *groups_per_update* is not positive or *max_policy_lag* is negative.

    Examples:
        >>> admission = Admission(groups_per_update=1, max_policy_lag=1)
        >>> [admission.admit(group_id) for group_id in (0, 1, 2)]
        [True, True, False]
        >>> admission.select([1])
        [1]
        >>> admission.learned([1])
        >>> admission.advance()
        1
        >>> admission.admit(2), admission.select([2]), admission.select([0, 2])
        (True, None, [0])
    """

    def __init__(self, groups_per_update: int, max_policy_lag: int, *, version: int = 0) -> None:
        if groups_per_update < 1:
            raise ValueError(
                f"groups_per_update must be at least 1, got {groups_per_update}. An update needs a "
                "group to learn from."
            )
        if max_policy_lag < 0:
            raise ValueError(
                f"max_policy_lag must be at least 0, got {max_policy_lag}. 0 is the synchronous "
                "loop."
            )
        self.groups_per_update = groups_per_update
        self.max_policy_lag = max_policy_lag
        self._version = version
        # In the order of admission, which is the order of deadlines since versions only grow.
        self._groups: dict[int, _Group] = {}
        self._num_learned_now = 0
        self._num_admitted = 0
        self._num_learned = 0
        self._num_dropped = 0
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._may_begin: Callable[[], bool] = lambda: True

    # -- reading --------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The learner's version ``V``."""
        with self._changed:
            return self._version

    @property
    def num_unlearned(self) -> int:
        """Groups that were admitted and neither learned nor dropped."""
        with self._changed:
            return len(self._groups)

    @property
    def num_in_flight(self) -> int:
        """Unlearned groups that are not known to be completed."""
        with self._changed:
            return sum(not group.completed for group in self._groups.values())

    @property
    def in_flight(self) -> list[int]:
        """Their ids, oldest first."""
        with self._changed:
            return [key for key, group in self._groups.items() if not group.completed]

    @property
    def may_admit(self) -> bool:
        """Whether :meth:`admit` would grant a group now."""
        with self._changed:
            return self._may_admit()

    def deadline(self, group_id: int) -> int:
        """The last version at which the group may be learned.

        Raises:
            KeyError: if the group is not among the unlearned ones.
        """
        with self._changed:
            return self._group(group_id).deadline

    def admitted_version(self, group_id: int) -> int:
        """The version at which the group was admitted."""
        return self.deadline(group_id) - self.max_policy_lag

    def stats(self) -> dict[str, float]:
        """Counts: groups admitted, learned, dropped, in flight, completed; the version."""
        with self._changed:
            completed = sum(group.completed for group in self._groups.values())
            return {
                "version": self._version,
                "groups_admitted": self._num_admitted,
                "groups_learned": self._num_learned,
                "groups_dropped": self._num_dropped,
                "groups_in_flight": len(self._groups) - completed,
                "groups_completed": completed,
            }

    # -- operations -----------------------------------------------------------------------------

    def admit(self, group_id: int) -> bool:
        """Ask to begin a group.

        Args:
            group_id (int): its id, never used before.

        Returns:
            bool: whether it may begin. A refusal is temporary: it ends with an ``advance`` or a
            ``drop``.

        Raises:
            ValueError: if a group of this id is unlearned.
        """
        with self._changed:
            if group_id in self._groups:
                raise ValueError(
                    f"group_id must be new, got {group_id}, which was admitted before. Count ids "
                    "up."
                )
            if not self._may_admit():
                return False
            self._groups[group_id] = _Group(self._version + self.max_policy_lag)
            self._num_admitted += 1
            return True

    def wait_admissible(self, timeout_s: float | None = None) -> bool:
        """Block until :meth:`admit` would grant a group; ``False`` if the time ran out."""
        with self._changed:
            return self._changed.wait_for(self._may_admit, timeout_s)

    def complete(self, group_id: int) -> None:
        """Note that every rollout of the group is over and the group is kept.

        Raises:
            KeyError: if the group is not among the unlearned ones.
        """
        with self._changed:
            self._group(group_id).completed = True
        self._notify()

    def select(self, completed_group_ids: Iterable[int] | None = None) -> list[int] | None:
        """The next cohort, oldest groups first; changes nothing.

        Args:
            completed_group_ids (iterable of int, optional): what there is to choose from. Defaults
                to the groups noted by :meth:`complete`.

        Returns:
            list of int or None: ``groups_per_update`` ids; ``None`` if too few groups are
            completed, or a straggler that can wait no longer is missing.

        Raises:
            KeyError: if a group is not among the unlearned ones.
        """
        with self._changed:
            if completed_group_ids is None:
                ready = [key for key, group in self._groups.items() if group.completed]
            else:
                wanted = set(completed_group_ids)
                for group_id in wanted:
                    self._group(group_id)
                ready = [key for key in self._groups if key in wanted]
            cohort = ready[: self.groups_per_update]
            if len(cohort) < self.groups_per_update or self._overdue(set(cohort)) is not None:
                return None
            return cohort

    def missing(self, completed_group_ids: Iterable[int]) -> list[int]:
        """Unfinished groups that the learner cannot overtake at this version, oldest first."""
        with self._changed:
            completed = set(completed_group_ids)
            ready = [key for key in self._groups if key in completed][: self.groups_per_update]
            limit = self._overdue(set(ready))
            if limit is None:
                return []
            return [
                key
                for key, group in self._groups.items()
                if key not in completed and group.deadline <= limit
            ]

    def learned(self, group_ids: Sequence[int]) -> None:
        """The cohort was learned from, at the current version.

        Raises:
            KeyError: if a group is not among the unlearned ones; none is removed then.
        """
        with self._changed:
            for group_id in group_ids:
                self._group(group_id)
            for group_id in group_ids:
                del self._groups[group_id]
            self._num_learned_now += len(group_ids)
            self._num_learned += len(group_ids)
        self._notify()

    def drop(self, group_id: int) -> None:
        """Forget a group: it has no contrast, or it failed. Another may be admitted instead.

        Raises:
            KeyError: if the group is not among the unlearned ones.
        """
        with self._changed:
            self._group(group_id)
            del self._groups[group_id]
            self._num_dropped += 1
        self._notify()

    def advance(self) -> int:
        """The learner published: ``V += 1``.

        Returns:
            int: the new version.

        Raises:
            RuntimeError: if an unlearned group would become too old. It cannot happen when every
                publication follows the learning of a cohort.
        """
        with self._changed:
            limit = self._overdue(set())
            if limit is not None:
                late = [key for key, group in self._groups.items() if group.deadline <= limit]
                raise RuntimeError(
                    f"The version cannot advance past {self._version}: groups {late} would be "
                    f"learned more than max_policy_lag={self.max_policy_lag} versions after their "
                    "admission. Publish once after each update, or drop them."
                )
            self._version += 1
            self._num_learned_now = 0
            version = self._version
        self._notify()
        return version

    def begin_only_if(self, condition: Callable[[], bool]) -> None:
        """Grant groups only while ``condition()`` is true as well; that can only delay them.

        The collector holds groups back while a version that counts here cannot be adopted yet. Call
        :meth:`reconsider` when it becomes true. It is called under this object's lock.
        """
        with self._changed:
            self._may_begin = condition

    def reconsider(self) -> None:
        """Wake those that wait for a group to be granted."""
        self._notify()

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener()`` after every change that may let someone go on; it must not block."""
        with self._changed:
            self._listeners.append(listener)

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        with self._changed:
            return {
                "groups_per_update": self.groups_per_update,
                "max_policy_lag": self.max_policy_lag,
                "version": self._version,
                "num_learned_now": self._num_learned_now,
                "groups": [[key, g.deadline, g.completed] for key, g in self._groups.items()],
                "counts": [self._num_admitted, self._num_learned, self._num_dropped],
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: if it was taken with other bounds.
        """
        for name in ("groups_per_update", "max_policy_lag"):
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"{name} must equal the checkpoint's {state_dict[name]}, got "
                    f"{getattr(self, name)}. Its deadlines were given under that bound: start the "
                    "buffer empty to change it."
                )
        with self._changed:
            self._version = int(state_dict["version"])
            self._num_learned_now = int(state_dict["num_learned_now"])
            self._groups = {
                int(key): _Group(int(deadline), bool(completed))
                for key, deadline, completed in state_dict["groups"]
            }
            self._num_admitted, self._num_learned, self._num_dropped = state_dict["counts"]
        self._notify()

    # -- helpers --------------------------------------------------------------------------------

    def _may_admit(self) -> bool:
        limit = (self.max_policy_lag + 1) * self.groups_per_update
        return len(self._groups) + self._num_learned_now + 1 <= limit and self._may_begin()

    def _overdue(self, leaving: set[int]) -> int | None:
        """The deadline ``d`` at which most groups stay beyond the ``(d - V) * G`` that can wait.

        The first of several: with one straggler too many at ``d``, younger groups are too many as
        well, but not once it has gone. ``None`` if all that stay can wait.
        """
        worst, most, staying = None, 0, 0
        for key, group in self._groups.items():
            staying += key not in leaving
            excess = staying - (group.deadline - self._version) * self.groups_per_update
            if excess > most:
                worst, most = group.deadline, excess
        return worst

    def _group(self, group_id: int) -> _Group:
        try:
            return self._groups[group_id]
        except KeyError:
            raise KeyError(
                f"group_id must name an admitted group that is neither learned nor dropped, got "
                f"{group_id}. Admission.admit() must grant a group first."
            ) from None

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listeners = list(self._listeners)
        # Outside the lock: a listener takes its own, and may call back.
        for listener in listeners:
            listener()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(groups_per_update={self.groups_per_update}, "
            f"max_policy_lag={self.max_policy_lag}, version={self.version}, "
            f"num_unlearned={self.num_unlearned})"
        )
