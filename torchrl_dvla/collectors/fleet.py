# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""All environments of a node: which are idle, and how many are at work."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torchrl_dvla.collectors.rollout import Rollout, Slot, SlotState

__all__ = ["Fleet"]


class Fleet:
    """The slots of all workers. Every change of who is idle goes through it.

    So the coordinator never looks through all slots to find out what it may do next.

    Args:
        num_workers (int): processes.
        envs_per_worker (int): environments of each.

    Examples:
        >>> from torchrl_dvla.collectors.schedule import EpisodeSpec
        >>> fleet = Fleet(num_workers=2, envs_per_worker=2)
        >>> fleet.admit(1)
        >>> slot = fleet.begin(Rollout(EpisodeSpec("default", 0), 0, 0))
        >>> slot.worker, slot.env_index, len(fleet.idle), fleet.num_at_work
        (1, 0, 1, 1)
        >>> fleet.end(slot)
        >>> len(fleet.idle), fleet.num_at_work
        (2, 0)
    """

    def __init__(self, num_workers: int, envs_per_worker: int) -> None:
        self.envs_per_worker = envs_per_worker
        self.slots = [
            Slot(worker, env_index)
            for worker in range(num_workers)
            for env_index in range(envs_per_worker)
        ]
        #: Environments without a rollout, the one that rests longest first.
        self.idle: deque[Slot] = deque()
        #: Rollouts under way on each worker.
        self.num_at_work_on = [0] * num_workers

    @property
    def num_at_work(self) -> int:
        """Rollouts under way."""
        return sum(self.num_at_work_on)

    def share(self, num_parts: int) -> int:
        """Environments of the largest of ``num_parts`` even parts."""
        return -(-len(self.slots) // num_parts)

    def slot(self, worker: int, env_index: int) -> Slot:
        """One environment."""
        return self.slots[worker * self.envs_per_worker + env_index]

    def of(self, worker: int) -> Sequence[Slot]:
        """The environments of ``worker``."""
        return self.slots[worker * self.envs_per_worker : (worker + 1) * self.envs_per_worker]

    def admit(self, worker: int) -> None:
        """``worker`` has built its environment: all its slots are idle."""
        for slot in self.of(worker):
            slot.enter(SlotState.IDLE)
            self.idle.append(slot)

    def retire(self, worker: int) -> bool:
        """``worker`` gets no further rollout; returns whether all of its are over."""
        slots = self.of(worker)
        for slot in slots:
            if slot.state is SlotState.IDLE:
                self.idle.remove(slot)
                slot.enter(SlotState.RETIRED)
        return all(slot.state is SlotState.RETIRED for slot in slots)

    def sort_idle(self) -> None:
        """Let idle environments begin in the order of their slots, not of how long they rest."""
        self.idle = deque(sorted(self.idle, key=lambda slot: (slot.worker, slot.env_index)))

    def begin(self, rollout: Rollout) -> Slot:
        """``rollout`` begins on the environment that rests longest."""
        slot = self.idle.popleft()
        slot.enter(SlotState.RESETTING)
        slot.rollout = rollout
        self.num_at_work_on[slot.worker] += 1
        return slot

    def end(self, slot: Slot) -> None:
        """The slot's rollout is over."""
        slot.enter(SlotState.IDLE)
        slot.rollout = None
        self.num_at_work_on[slot.worker] -= 1
        self.idle.append(slot)

    def lose(self, slot: Slot) -> Rollout | None:
        """The slot's worker is gone and another one starts; returns the rollout that was lost."""
        if slot.state is SlotState.IDLE:
            self.idle.remove(slot)
        rollout, slot.rollout = slot.rollout, None
        if rollout is not None:
            self.num_at_work_on[slot.worker] -= 1
        slot.enter(SlotState.STARTING)
        slot.idle_reason = "worker_lost"
        return rollout
