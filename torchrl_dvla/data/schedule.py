# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which initial state each group starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["EpisodeSpec", "InitStateSchedule"]


class EpisodeSpec(NamedTuple):
    """What a rollout starts from: two rollouts of equal specs start in the very same scene.

    Args:
        task (str): key of ``create_env_fn``.
        seed (int): given to ``env.set_seed`` before the reset.
        init_state_id (int): the environment's numbered initial state; -1 lets it sample one.
    """

    task: str
    seed: int
    init_state_id: int = -1


class InitStateSchedule(Iterator[EpisodeSpec]):
    """An endless, repeatable sequence of initial states, task after task.

    Args:
        tasks (sequence of str): keys of ``create_env_fn``, taken in turn.
        init_state_ids (sequence of int, optional): numbered initial states, taken in turn once
            every task had the one before. Defaults to ``None``: the environment samples by seed.
        seed (int): seeds of the scenes are ``seed * 1_000_003 + k`` for the k-th group, so that two
            runs of different seeds share no scene in their first million groups.

    Examples:
        >>> schedule = InitStateSchedule(("a", "b"), init_state_ids=(4, 5), seed=0)
        >>> [(spec.task, spec.init_state_id) for spec, _ in zip(schedule, range(5))]
        [('a', 4), ('b', 4), ('a', 5), ('b', 5), ('a', 4)]
        >>> state = schedule.state_dict()
        >>> expected = next(schedule)
        >>> schedule.load_state_dict(state)
        >>> next(schedule) == expected
        True
    """

    def __init__(
        self,
        tasks: Sequence[str] = ("default",),
        init_state_ids: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        if not tasks:
            raise ValueError("tasks must name at least one task, got none. Pass ('default',).")
        if init_state_ids is not None and not len(init_state_ids):
            raise ValueError(
                "init_state_ids must hold at least one id, got none. Pass None to let the "
                "environment sample."
            )
        self.tasks = tuple(tasks)
        self.init_state_ids = None if init_state_ids is None else tuple(init_state_ids)
        self.seed = seed
        self._cursor = 0

    def __next__(self) -> EpisodeSpec:
        cursor = self._cursor
        self._cursor += 1
        task = self.tasks[cursor % len(self.tasks)]
        init_state_id = -1
        if self.init_state_ids is not None:
            ids = self.init_state_ids
            init_state_id = ids[cursor // len(self.tasks) % len(ids)]
        return EpisodeSpec(task, (self.seed * 1_000_003 + cursor) % 2**31, init_state_id)

    def state_dict(self) -> dict[str, Any]:
        """The cursor and the seed."""
        return {"cursor": self._cursor, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._cursor, self.seed = int(state_dict["cursor"]), int(state_dict["seed"])
