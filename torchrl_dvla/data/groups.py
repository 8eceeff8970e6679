# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Records of finished rollouts and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from torchrl_dvla.memory import EnvironmentPool

__all__ = ["GroupRecord", "RolloutRecord"]


@dataclass(frozen=True)
class RolloutRecord:
    """A finished rollout: where its rows are and how it went.

    Args:
        rollout_id (int): unique in the run.
        group_id (int): the group it belongs to.
        pages (sequence of Page): its sealed pages, in order.
        num_rows (int): its decisions.
        episode_return (float): sum of its rewards.
        success (bool): whether it solved the task.
        num_env_steps (int): env steps executed.
        first_policy_version (int): version behind its first decision.
        last_policy_version (int): version behind its last decision.
        task (str): what it was asked to do.
        seed (int): seed of its scene.
        init_state_id (int): its numbered initial state; -1 if the environment sampled one.
    """

    rollout_id: int
    group_id: int
    pages: Sequence[int]
    num_rows: int
    episode_return: float
    success: bool
    num_env_steps: int
    first_policy_version: int = 0
    last_policy_version: int = 0
    task: str = ""
    seed: int = 0
    init_state_id: int = -1

    @property
    def scene(self) -> tuple[str, int, int]:
        """What all rollouts of a group must share: task, seed, init_state_id."""
        return self.task, self.seed, self.init_state_id


@dataclass(frozen=True, eq=False)
class GroupRecord:
    """A finished group: the rollouts to learn from, or the reason why there are none.

    Args:
        group_id (int): its id.
        task (str): what its rollouts were asked to do.
        seed (int): seed of their scene.
        init_state_id (int): their numbered initial state, or -1.
        rollouts (tuple of RolloutRecord): those that are kept, in the order of their ids; they own
            their pages. Empty if the group is dropped.
        advantages (torch.Tensor): float32 ``[N]``, one for each kept rollout.
        candidates (tuple of RolloutRecord): all rollouts that were sampled, for metrics. The pages
            of those that are not kept belong to the pool again.
        drop_reason (str, optional): why the group is dropped; ``None`` = it is kept.
    """

    group_id: int
    task: str
    seed: int
    init_state_id: int
    rollouts: tuple[RolloutRecord, ...]
    advantages: torch.Tensor
    candidates: tuple[RolloutRecord, ...]
    drop_reason: str | None = None

    @property
    def kept(self) -> bool:
        """Whether there is something to learn from."""
        return self.drop_reason is None

    @property
    def pages(self) -> list[int]:
        """Pages of the kept rollouts."""
        return [page for rollout in self.rollouts for page in rollout.pages]

    @property
    def num_rows(self) -> int:
        """Decisions of the kept rollouts."""
        return sum(rollout.num_rows for rollout in self.rollouts)

    @property
    def mean_return(self) -> float:
        """Mean return of all candidates."""
        return _mean([rollout.episode_return for rollout in self.candidates])

    @property
    def success_rate(self) -> float:
        """Share of the candidates that solved the task."""
        return _mean([float(rollout.success) for rollout in self.candidates])

    @property
    def mean_length(self) -> float:
        """Mean env steps of the candidates."""
        return _mean([float(rollout.num_env_steps) for rollout in self.candidates])

    @property
    def first_policy_version(self) -> int:
        """The oldest version behind any kept decision; -1 if none is kept."""
        return min((rollout.first_policy_version for rollout in self.rollouts), default=-1)

    @property
    def last_policy_version(self) -> int:
        """The newest version behind any kept decision; -1 if none is kept."""
        return max((rollout.last_policy_version for rollout in self.rollouts), default=-1)

    def row_index(self, pool: EnvironmentPool) -> torch.Tensor:
        """Row numbers in ``pool``, int64 ``[num_rows]``, rollout after rollout."""
        rollouts = self.rollouts
        return pool.row_index_of([r.pages for r in rollouts], [r.num_rows for r in rollouts])

    def state_dict(self) -> dict[str, Any]:
        """Plain data without pages, which mean nothing to another process."""
        state: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("rollouts", "candidates", "advantages")
        }
        state["advantages"] = self.advantages.tolist()
        for name in ("rollouts", "candidates"):
            state[name] = [asdict(replace(r, pages=[])) for r in getattr(self, name)]
        return state

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Any], pages: Sequence[Sequence[int]]
    ) -> GroupRecord:
        """Build a group again, its kept rollouts on new ``pages``."""
        state = dict(state_dict)
        rollouts = tuple(
            RolloutRecord(**{**rollout, "pages": tuple(owned)})
            for rollout, owned in zip(state.pop("rollouts"), pages, strict=True)
        )
        candidates = tuple(RolloutRecord(**rollout) for rollout in state.pop("candidates"))
        advantages = torch.tensor(state.pop("advantages"), dtype=torch.float32)
        return cls(**state, rollouts=rollouts, advantages=advantages, candidates=candidates)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
