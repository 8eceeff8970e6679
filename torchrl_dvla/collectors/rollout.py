# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One rollout on its way, and the place where it runs."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.collectors.schedule import EpisodeSpec
from torchrl_dvla.memory import Page

__all__ = ["NO_PLACE", "Rollout", "Slot", "SlotState"]

#: No row: the rollout takes no further decision.
NO_PLACE = (-1, -1)


@dataclass(eq=False)
class Rollout:
    """A rollout that is being collected, of a training group or of an evaluation.

    Args:
        spec (EpisodeSpec): where it starts.
        group_id (int): its group; -1 for evaluation episodes.
        rollout_id (int): unique in the run; negative for evaluation episodes. A rollout that is
            sampled again after a failure keeps it.
        evaluation (Evaluation, optional): the evaluation it belongs to.
        episode (int): its number in that evaluation.
    """

    spec: EpisodeSpec
    group_id: int
    rollout_id: int
    evaluation: Evaluation | None = None
    episode: int = 0
    #: Set when its worker died while a decision for it was being taken.
    abandoned: bool = False
    #: Set when its group was given up: nobody waits for its outcome any more.
    cancelled: bool = False
    #: Times that it was lost and could be sampled again.
    num_failures: int = 0
    pages: list[Page] = field(default_factory=list)
    #: Row of the next decision and generation of its page; the same of the decision after it.
    place: tuple[int, int] = NO_PLACE
    next_place: tuple[int, int] = NO_PLACE
    num_decisions: int = 0
    num_env_steps: int = 0
    episode_return: float = 0.0
    success: bool = False
    instruction_id: int = -1
    first_policy_version: int = -1
    last_policy_version: int = -1

    def fresh_copy(self) -> Rollout:
        """The same rollout before its first decision, to be sampled again."""
        return Rollout(
            self.spec,
            self.group_id,
            self.rollout_id,
            self.evaluation,
            self.episode,
            num_failures=self.num_failures,
        )

    def stamp(self, version: int) -> None:
        """Note the version of the weights behind the newest decision."""
        if self.first_policy_version < 0:
            self.first_policy_version = version
        self.last_policy_version = version


class SlotState(enum.Enum):
    """What an environment is doing."""

    STARTING = "starting"
    IDLE = "idle"
    #: Its worker takes no further rollout, for it is about to be replaced.
    RETIRED = "retired"
    RESETTING = "resetting"
    READY = "ready"
    INFERRING = "inferring"
    STEPPING = "stepping"
    #: Its answer is held until the other environments have given theirs (lockstep only).
    ANSWERED = "answered"


@dataclass(eq=False)
class Slot:
    """One environment of one worker."""

    worker: int
    env_index: int
    state: SlotState = SlotState.STARTING
    rollout: Rollout | None = None
    since_s: float = field(default_factory=time.monotonic)
    idle_reason: str = "starting"

    @property
    def occupant(self) -> Rollout:
        """The rollout that runs here."""
        if self.rollout is None:
            raise RuntimeError(f"{self} must hold a rollout, got none. This is a bug: report it.")
        return self.rollout

    def enter(self, state: SlotState) -> float:
        """Change state; returns the seconds spent in the one before."""
        now_s = time.monotonic()
        spent_s = now_s - self.since_s
        self.state, self.since_s = state, now_s
        return spent_s
