# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Rounds: what makes a run a pure function of its seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torchrl_dvla.collectors.rollout import Slot, SlotState

__all__ = ["Lockstep"]

#: States in which an environment still owes its answer to the round.
_WORKING = frozenset({SlotState.RESETTING, SlotState.STEPPING, SlotState.INFERRING})


class Lockstep:
    """Holds answers back until every environment at work has given one.

    Which rollout runs where, which rows share a policy call, and in which order rollouts end would
    otherwise depend on which worker happened to be faster. In a round every environment that is at
    work answers once; then all answers are handled in the order of the slots, as a sequential loop
    over the environments would. An environment whose worker was lost is not waited for.

    Args:
        slots (sequence of Slot): all environments, in the order that answers are handled in.

    Examples:
        >>> slots = [Slot(worker=0, env_index=index) for index in range(2)]
        >>> lockstep = Lockstep(slots)
        >>> for slot in slots:
        ...     _ = slot.enter(SlotState.STEPPING)
        >>> lockstep.hold(slots[1], "second")
        >>> list(lockstep.release())
        []
        >>> lockstep.hold(slots[0], "first")
        >>> [message for _, message in lockstep.release()]
        ['first', 'second']
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._answers: dict[Slot, Any] = {}

    @property
    def settled(self) -> bool:
        """Whether no environment is at work and no answer is held: a round may begin."""
        return not self._answers and not self._any_working()

    def hold(self, slot: Slot, message: Any) -> None:
        """Keep the answer of ``slot`` until the round ends; it has no deadline meanwhile."""
        slot.enter(SlotState.ANSWERED)
        self._answers[slot] = message

    def release(self) -> Iterator[tuple[Slot, Any]]:
        """All answers of a round in the order of the slots; nothing while one is missing."""
        if not self._answers or self._any_working():
            return
        answers, self._answers = self._answers, {}
        for slot in self._slots:
            # A worker that was lost after its answer has taken the rollout along.
            if slot in answers and slot.state is SlotState.ANSWERED:
                yield slot, answers[slot]

    def _any_working(self) -> bool:
        return any(slot.state in _WORKING for slot in self._slots)
