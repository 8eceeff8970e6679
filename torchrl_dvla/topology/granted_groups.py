# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Groups that the learner has granted to a node."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torchrl_dvla.data import Group, InstructionTable, Rollout
from torchrl_dvla.data.schema import INSTRUCTION_ID_KEY
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.topology.node_messages import (
    Grant,
    GroupDone,
    GroupDropped,
    TaskQuarantined,
    pack_rows,
)

__all__ = ["GrantedGroups"]


class GrantedGroups:
    """The groups of a node: as many as the learner has granted, gone once they are complete.

    It stands where a collector on one machine has its :class:`~torchrl_dvla.data.GroupQueue`, but
    it decides nothing: the learner admits, judges and learns. Granted ahead of need, a group waits
    here for an idle environment, so that no decision waits for the learner.

    **Bound on staleness.** The learner bounds the versions between the admission of a group and its
    update. Decisions must not be older than the admission, so a group begins only once the version
    of that time, or a newer one, is visible on the node; the inference lane adopts the newest
    before each batch.

    All methods may be called from any thread.

    Args:
        pool (EnvironmentPool): pages of the node.
        instructions (InstructionTable): strings by the ids in its rows.

    Keyword Args:
        pages_per_rollout (int): pages that a rollout of the greatest length needs.
        num_candidates (int): rollouts of a group.
        version (Callable): the version that is visible on the node.
        send (Callable): takes events for the learner.
    """

    def __init__(
        self,
        pool: EnvironmentPool,
        instructions: InstructionTable,
        *,
        pages_per_rollout: int,
        num_candidates: int,
        version: Callable[[], int],
        send: Callable[[Any], None],
    ) -> None:
        self.pool = pool
        self.pages_per_rollout = pages_per_rollout
        self.quarantined: set[str] = set()
        self._instructions = instructions
        self._num_candidates = num_candidates
        self._version = version
        self._send = send
        self._lock = threading.Lock()
        self._granted: deque[Grant] = deque()
        self._running: dict[int, Group] = {}
        self._listeners: list[Callable[[], None]] = []

    @property
    def running(self) -> Sequence[Group]:
        """The groups that have begun, oldest first."""
        with self._lock:
            return list(self._running.values())

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener()`` after every change that may let sampling go on."""
        self._listeners.append(listener)

    def grant(self, grants: Sequence[Grant]) -> None:
        """Add groups that the learner has admitted."""
        with self._lock:
            # The oldest first: one that comes late was another node's, and is waited for.
            self._granted = deque(sorted((*self._granted, *grants)))
        self.notify()

    def notify(self) -> None:
        """Tell the listeners: there are new grants, or a new version."""
        for listener in self._listeners:
            listener()

    def admit(self) -> Group | str:
        """The next granted group, or why none may begin."""
        with self._lock:
            while self._granted and self._granted[0].spec.task in self.quarantined:
                failing = self._granted.popleft()
                self._send(GroupDropped(failing.group_id, "the environment kept failing"))
            if not self._granted:
                return "no_admission"
            if self._granted[0].min_version > self._version():
                return "no_version"
            if not self.pool.reserve(self.pages_per_rollout * self._num_candidates):
                return "no_page"
            grant = self._granted.popleft()
            first = grant.first_rollout_id
            group = Group(
                grant.group_id,
                grant.spec,
                grant.deadline,
                [
                    Rollout(grant.spec, grant.group_id, number)
                    for number in range(first, first + self._num_candidates)
                ],
            )
            self._running[group.group_id] = group
            return group

    def finish(self, rollout: Rollout) -> None:
        """A rollout has ended: what it did not take of its reserved pages is free for others."""
        rollout.seal(self.pool, self.pages_per_rollout)
        self.notify()

    def complete(self, group: Group) -> None:
        """Send a group to the learner; its pages are free here."""
        index = group.row_index(self.pool)
        rows = pack_rows(self.pool, index)
        for rollout in group.rollouts:
            self.pool.free(rollout.pages)
            rollout.pages = []
        ids = {rollout.instruction_id for rollout in group.rollouts}
        ids.update(self._ids_in(rows, len(index)))
        texts = {number: self._instructions.text(number) for number in sorted(ids)}
        self._end(group, GroupDone(group.group_id, group.rollouts, rows, texts))

    def _ids_in(self, rows: Any, num_rows: int) -> set[int]:
        """Instruction ids of packed rows: one may change during a rollout."""
        columns = self.pool.layout.columns(rows, num_rows)
        return set(columns[INSTRUCTION_ID_KEY].ravel().tolist())

    def drop(self, group: Group, reason: str) -> None:
        """Give a running group up."""
        group.abandon(self.pool, self.pages_per_rollout)
        for rollout in group.rollouts:
            self.pool.free(rollout.pages)
            rollout.pages = []
        self._end(group, GroupDropped(group.group_id, reason))

    def _end(self, group: Group, event: Any) -> None:
        with self._lock:
            del self._running[group.group_id]
        self._send(event)
        self.notify()

    def quarantine(self, task: str, error: Exception | None = None) -> None:
        """Begin no more groups of a task; running ones fail by themselves.

        Args:
            task (str): the task.
            error (Exception, optional): what the learner is told, if it was found here.
        """
        self.quarantined.add(task)
        if error is not None:
            self._send(TaskQuarantined(task, str(error)))
        self.notify()
