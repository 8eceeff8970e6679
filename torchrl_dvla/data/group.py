# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Groups of rollouts: their settings, their records, and whether they are learned from."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, pvariance
from typing import Annotated, Any, Literal, NamedTuple

import torch

from torchrl_dvla.data.schema import NO_HASH
from torchrl_dvla.functional.advantage import ADVANTAGES, Advantage, has_contrast
from torchrl_dvla.memory import EnvironmentPool, Page
from torchrl_dvla.saved_state import COUNT, MaybeAbsent, Number, form_of, require_form, types_of
from torchrl_dvla.validation import Count, Range, check, check_fields

__all__ = [
    "SPEC_FORM",
    "EpisodeSpec",
    "Group",
    "GroupConfig",
    "GroupState",
    "InitStateSchedule",
    "NoSignal",
    "Rollout",
    "contradictions",
    "judge",
    "max_variance_subset",
]

NoSignalPolicy = Literal["warn", "keep", "raise"]
_SEVERAL = Range(
    2, remedy="A group compares rollouts of one initial state: one rollout has no advantage."
)

#: Deviations of a group are squared in float32.
_LARGEST_RETURN = 1e18
#: Returns that differ by at most this, relative to the largest of them or to 1, count as equal.
_RETURN_TOLERANCE = 1e-5


@dataclass(frozen=True)
class GroupConfig:
    """Settings of groups, and how stale they may be when they are learned from.

    Args:
        group_size (int): rollouts of one initial state whose returns are compared; at least 2. They
            need not run at once: with fewer environments than that they run one after the other.
        candidate_group_size (int, optional): rollouts sampled for a group, of which ``group_size``
            are kept, chosen for contrast (:func:`max_variance_subset`): a task that is solved once
            in sixteen then still yields groups with contrast. Defaults to ``group_size``.
        groups_per_update (int): groups that one learner update takes.
        max_policy_lag (int): versions of the weights that may lie between taking a decision and
            learning from it. 0 is the synchronous loop.
        return_bounds (tuple, optional): a group is learned from only if its mean return lies
            strictly between these. Groups without contrast are always left out: their advantages
            are zero.
        advantage (str or callable): how returns become advantages. ``"mean_std"`` (default):
            difference to the group's mean, over its unbiased standard deviation (GRPO). ``"mean"``:
            the difference alone (Dr. GRPO). ``"leave_one_out"``: the difference to the mean of the
            others (RLOO). Or a function from the returns of a group, float32 ``[N]``, to its
            advantages ``[N]``, for instance ``partial(group_advantage, correction=0)``.
        max_no_signal_groups (int): groups in a row with nothing to learn from after which a warning
            says so, and again whenever there are twice as many.
        on_no_signal (str): how it goes on then. ``"warn"`` (default) samples on, while the learner
            waits: nothing is learned from noise, and the time limit of the replay buffer ends a
            wait that is too long. ``"keep"`` keeps whatever comes until there is contrast again,
            with advantages of zero, so that the learner's clock, its other loss terms and the
            initial states go on. ``"raise"`` ends the run.

    Raises:
        ValueError: for a setting of another type or out of range, or a function that does not
            return one finite advantage for each return.

    Examples:
        >>> GroupConfig(group_size=1)
        Traceback (most recent call last):
        ...
        ValueError: group_size must be at least 2, got 1. A group compares rollouts of one initial \
state: one rollout has no advantage.
    """

    group_size: Annotated[int, _SEVERAL] = 8
    candidate_group_size: int | None = None
    groups_per_update: Count = 4
    max_policy_lag: Annotated[int, Range(0, remedy="0 is the synchronous loop.")] = 1
    return_bounds: tuple[float, float] | None = None
    advantage: Advantage | Callable[[torch.Tensor], torch.Tensor] = "mean_std"
    max_no_signal_groups: Count = 16
    on_no_signal: NoSignalPolicy = "warn"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.candidate_group_size is not None and self.candidate_group_size < self.group_size:
            raise ValueError(
                f"candidate_group_size must be at least group_size ({self.group_size}), got "
                f"{self.candidate_group_size}. Leave it out to keep every rollout."
            )
        if self.return_bounds is not None and not self.return_bounds[0] < self.return_bounds[1]:
            raise ValueError(
                f"return_bounds must be increasing, got {self.return_bounds}. Pass (low, high)."
            )
        self.advantages_of(torch.arange(float(self.group_size)))  # fails here, not in a run

    @property
    def num_candidates(self) -> int:
        """Rollouts sampled for one group."""
        return self.candidate_group_size or self.group_size

    def advantages_of(self, returns: torch.Tensor) -> torch.Tensor:
        """Advantages ``[N]``, float32, of the rollouts of a group, by their returns ``[N]``.

        Raises:
            ValueError: if *advantage* is a function that does not give one for each.
        """
        estimator = self.advantage if callable(self.advantage) else ADVANTAGES[self.advantage]
        found = torch.as_tensor(estimator(returns), dtype=torch.float32)
        if found.shape != returns.shape or not bool(found.isfinite().all()):
            raise ValueError(
                f"advantage must give one finite number for each of the returns "
                f"{returns.tolist()}, got {found.tolist()}. Let it return a tensor of their shape."
            )
        return found


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


#: Form of a saved spec, see :mod:`torchrl_dvla.saved_state`.
SPEC_FORM = (str, COUNT, Number(-1, whole=True))


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
        is_several = isinstance(tasks, Iterable) and not isinstance(tasks, str | Mapping)
        names = list(tasks) if is_several else tasks
        self.tasks: tuple[str, ...] = check("tasks", names, tuple[str, ...])
        if not self.tasks:
            raise ValueError("tasks must name at least one task, got none. Pass ('default',).")
        if init_state_ids is not None and not len(init_state_ids):
            raise ValueError(
                "init_state_ids must hold at least one id, got none. Pass None to let the "
                "environment sample."
            )
        ids = None if init_state_ids is None else list(init_state_ids)
        self.init_state_ids: tuple[int, ...] | None = check(
            "init_state_ids", ids, tuple[int, ...] | None, Range(-1, remedy="-1 is a sampled one.")
        )
        self.seed = check("seed", seed, int)
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
        """The cursor, and what it counts."""
        return {
            "cursor": self._cursor,
            "seed": self.seed,
            "tasks": list(self.tasks),
            "init_state_ids": self.init_state_ids and list(self.init_state_ids),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: if it holds something else, or is of other tasks or init states.
        """
        form = types_of(self.state_dict()) | form_of(InitStateSchedule.state_dict(self))
        form |= {"cursor": COUNT, "seed": Number(whole=True)}
        require_form(form, state_dict, "schedule")
        self._cursor, self.seed = state_dict["cursor"], state_dict["seed"]


@dataclass(eq=False)
class Rollout:
    """One rollout: under way, and afterwards the record of how it went.

    Args:
        spec (EpisodeSpec): where it starts.
        group_id (int): its group; -1 for an episode of an evaluation.
        rollout_id (int): unique in the run. A rollout that is sampled again keeps it.
        pages (list of Page): pages of its rows, in order; sealed once it has finished.
        num_rows (int): its decisions.
        episode_return (float): sum of its rewards.
        success (bool): whether it solved the task.
        num_env_steps (int): env steps executed.
        first_policy_version (int): version behind its first decision; -1 before that.
        last_policy_version (int): version behind its newest decision.
        instruction_id (int): what it is asked to do, by id; -1 before its reset.
        num_failures (int): times that it was lost and sampled again.
        finished (bool): whether :meth:`GroupQueue.finish` took it.
        init_state_hash (int): what it started from, as its environment says it; -1 if it does not.
        duration_s (float): from its reset to its end. No part of a saved state.
    """

    spec: EpisodeSpec
    group_id: int
    rollout_id: int
    pages: list[Page] = field(default_factory=list)
    num_rows: int = 0
    episode_return: float = 0.0
    success: bool = False
    num_env_steps: int = 0
    first_policy_version: int = -1
    last_policy_version: int = -1
    instruction_id: int = -1
    num_failures: int = 0
    finished: bool = False
    init_state_hash: int = NO_HASH
    duration_s: float = 0.0

    def seal(self, pool: EnvironmentPool, num_reserved: int) -> None:
        """It has ended: seal its pages, and free what it did not take of its reserved ones.

        Args:
            pool (EnvironmentPool): the pages.
            num_reserved (int): pages that were reserved for it.
        """
        num_leased = len(self.pages)
        self.pages = list(pool.seal(self.pages, self.num_rows))
        self.finished = True
        pool.unreserve(num_reserved - num_leased)

    def restart(self) -> None:
        """Forget what was sampled, to sample it again; ``num_failures`` stays."""
        fresh = Rollout(self.spec, self.group_id, self.rollout_id, num_failures=self.num_failures)
        self.__dict__.update(vars(fresh))

    def record(
        self, *, policy_version: int, reward: float, success: bool, num_env_steps: int
    ) -> None:
        """Add the outcome of one decision.

        Keyword Args:
            policy_version (int): version of the weights that took it.
            reward (float): sum over its env steps.
            success (bool): whether the task was solved during it.
            num_env_steps (int): env steps that it executed.
        """
        if self.first_policy_version < 0:
            self.first_policy_version = policy_version
        self.last_policy_version = policy_version
        self.num_rows += 1
        self.episode_return += reward
        self.success |= success
        self.num_env_steps += num_env_steps


def _rollout_state(rollout: Rollout) -> dict[str, Any]:
    """What is saved of a rollout: neither its pages nor a time, which no two runs share."""
    state = {**asdict(replace(rollout, pages=[])), "spec": list(rollout.spec)}
    del state["duration_s"]
    return state


class GroupState(enum.Enum):
    """What becomes of a group; groups that were learned from or dropped are forgotten."""

    RUNNING = "running"
    COMPLETE = "complete"
    #: Handed to the learner; its update is not published yet.
    IN_HAND = "in hand"


@dataclass(eq=False)
class Group:
    """A group of rollouts of one initial state, from admission on.

    Args:
        group_id (int): its id; ids count up.
        spec (EpisodeSpec): where its rollouts start.
        deadline (int): the last version at which it may be learned from.
        rollouts (list of Rollout): all of them while it runs; those that are kept once it is
            complete, in the order of their ids. They own their pages.
        candidates (list of Rollout): all rollouts that were sampled, once it is complete. The pages
            of those that are not kept belong to the pool again.
        advantages (torch.Tensor): float32 ``[N]``, one for each kept rollout.
        state (GroupState): where it stands.
        drop_reason (str, optional): why the group is dropped; ``None`` = it is not.
    """

    group_id: int
    spec: EpisodeSpec
    deadline: int
    rollouts: list[Rollout]
    candidates: list[Rollout] = field(default_factory=list)
    advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    state: GroupState = GroupState.RUNNING
    drop_reason: str | None = None

    @property
    def kept(self) -> bool:
        """Whether there is something to learn from."""
        return self.state is not GroupState.RUNNING

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
    def init_state_hash(self) -> int:
        """Of the init state that its rollouts share; -1 if the environment does not say it."""
        return self.rollouts[0].init_state_hash if self.rollouts else NO_HASH

    @property
    def last_policy_version(self) -> int:
        """The newest version behind any kept decision; -1 if none is kept."""
        return max((rollout.last_policy_version for rollout in self.rollouts), default=-1)

    def abandon(self, pool: EnvironmentPool, num_reserved: int) -> None:
        """Give it up: no rollout that has not finished keeps a page, leased or reserved.

        Args:
            pool (EnvironmentPool): the pages.
            num_reserved (int): pages that were reserved for each rollout.
        """
        for rollout in self.rollouts:
            if not rollout.finished:
                pool.reclaim(rollout.rollout_id, keep_reserved=True)
                pool.unreserve(num_reserved)
                rollout.pages = []

    def row_index(self, pool: EnvironmentPool) -> torch.Tensor:
        """Row numbers in ``pool``, int64 ``[num_rows]``, rollout after rollout."""
        rollouts = self.rollouts
        return pool.row_index_of([r.pages for r in rollouts], [r.num_rows for r in rollouts])

    @staticmethod
    def state_form() -> dict[str, Any]:
        """What :meth:`state_dict` returns, as a form of :mod:`torchrl_dvla.saved_state`."""
        rollout = form_of(_rollout_state(Rollout(EpisodeSpec("", 0), 0, 0)))
        return {
            "group_id": COUNT,
            "spec": SPEC_FORM,
            "deadline": COUNT,
            "state": str,
            "advantages": [Number()],
            "candidates": [
                rollout
                | {"spec": SPEC_FORM, "episode_return": Number(), "pages": ()}
                | {"success": bool, "finished": bool}
                | {"init_state_hash": MaybeAbsent(Number(NO_HASH, whole=True))}
            ],
            "kept": [COUNT],
        }

    def state_dict(self) -> dict[str, Any]:
        """A complete group as plain data, without pages, which mean nothing to another process."""
        return {
            "group_id": self.group_id,
            "spec": list(self.spec),
            "deadline": self.deadline,
            "state": self.state.value,
            "advantages": self.advantages.tolist(),
            "candidates": [_rollout_state(rollout) for rollout in self.candidates],
            "kept": [self.candidates.index(rollout) for rollout in self.rollouts],
        }

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> Group:
        """Build a group again; its rollouts have no pages yet."""
        candidates = [
            Rollout(**{**rollout, "spec": EpisodeSpec(*rollout["spec"])})
            for rollout in state_dict["candidates"]
        ]
        return cls(
            group_id=state_dict["group_id"],
            spec=EpisodeSpec(*state_dict["spec"]),
            deadline=state_dict["deadline"],
            rollouts=[candidates[index] for index in state_dict["kept"]],
            candidates=candidates,
            advantages=torch.tensor(state_dict["advantages"], dtype=torch.float32),
            state=GroupState(state_dict["state"]),
        )


@dataclass
class NoSignal:
    """Groups with nothing to learn from: how many, and how their rollouts did.

    Args:
        num_groups (int): groups.
        returns (float): sum of their mean returns.
        successes (float): sum of their success rates.
    """

    num_groups: int = 0
    returns: float = 0.0
    successes: float = 0.0

    def add(self, group: Group) -> None:
        """Count another group."""
        self.num_groups += 1
        self.returns += group.mean_return
        self.successes += group.success_rate

    def describe(self, config: GroupConfig) -> str:
        """What they say of the tasks, and what to do about it."""
        returned = f"{self.num_groups} groups {{}} (mean return {self.returns / self.num_groups:g})"
        is_sure = self.num_groups >= config.max_no_signal_groups
        if is_sure and self.successes == self.num_groups:
            return (
                f"All {returned.format('succeeded')}: the tasks are solved, and nothing is left to "
                "learn. Take harder ones, or end here."
            )
        if is_sure and self.successes == 0:
            return (
                f"All {returned.format('failed')}: the tasks are too hard for the policy. Start "
                "from a better one, take easier tasks, raise candidate_group_size, or sample at a "
                "higher temperature."
            )
        return (
            f"{returned.format('had nothing to teach')}: take easier or harder tasks, raise "
            "candidate_group_size, or widen return_bounds."
        )


def judge(group: Group, config: GroupConfig, *, keep_all: bool = False) -> str | None:
    """Advantages of a group whose rollouts have finished, or why it is dropped.

    Args:
        group (Group): gets ``candidates``; if it is kept, also ``rollouts`` and ``advantages``.
        config (GroupConfig): the settings.

    Keyword Args:
        keep_all (bool): keep it whatever its returns, as long as they and their squares are finite.

    Returns:
        str or None: the reason to drop it, in words that do not vary from case to case.
    """
    # By id, not by who finished first: short episodes finish first, and succeed more often.
    group.candidates = sorted(group.rollouts, key=lambda rollout: rollout.rollout_id)
    returns = [rollout.episode_return for rollout in group.candidates]
    if not all(abs(value) <= _LARGEST_RETURN for value in returns):  # nor is NaN
        return "a return is not finite"
    differ = bool(
        has_contrast(torch.tensor(returns, dtype=torch.float64), tolerance=_RETURN_TOLERANCE)
    )
    if not keep_all and not differ:
        return "no contrast"
    if not keep_all and config.return_bounds is not None:
        low, high = config.return_bounds
        if not low < fmean(returns) < high:
            return f"mean return outside ({low:g}, {high:g})"
    chosen = max_variance_subset(returns, config.group_size)
    group.rollouts = [group.candidates[index] for index in chosen]
    if differ:
        kept_returns = torch.tensor([returns[index] for index in chosen], dtype=torch.float32)
        group.advantages = config.advantages_of(kept_returns)
    else:
        group.advantages = torch.zeros(len(chosen))
    return None


def contradictions(
    state: Mapping[str, Any], config: GroupConfig, tasks: Collection[str]
) -> list[str]:
    """Entries of a queue's saved state that contradict others, or the bound on staleness."""
    problems, last_id = [], -1
    for number, group in enumerate(state["groups"]):
        kept, num_candidates = group["kept"], len(group["candidates"])
        ahead = group["deadline"] - state["version"]
        rules = {
            "group_id": last_id < group["group_id"] < state["num_admitted"],
            "deadline": 0 <= ahead <= config.max_policy_lag
            and number < (ahead + 1) * config.groups_per_update,
            "state": group["state"] in (GroupState.COMPLETE.value, GroupState.IN_HAND.value),
            "kept": len(kept) == len(set(kept)) == len(group["advantages"])
            and 0 <= max(kept, default=-1) < num_candidates,
            "candidates": all(
                rollout["finished"]
                and rollout["num_rows"] >= 1
                and rollout["rollout_id"] < state["num_rollouts"]
                and rollout["group_id"] == group["group_id"]
                and list(rollout["spec"]) == list(group["spec"])
                and rollout["first_policy_version"] <= rollout["last_policy_version"]
                for rollout in group["candidates"]
            ),
        }
        last_id = group["group_id"]
        problems += [f"'groups.{number}.{name}'" for name, fits in rules.items() if not fits]
    num_in_hand = [group["state"] for group in state["groups"]].count(GroupState.IN_HAND.value)
    if num_in_hand not in (0, config.groups_per_update):
        problems.append(f"{num_in_hand} groups in the learner's hand")
    if unknown := {spec[0] for spec in state["reopened"]}.difference(tasks):
        problems.append(f"'reopened' of unknown tasks {sorted(unknown)}")
    return problems


def max_variance_subset(returns: Sequence[float], size: int) -> list[int]:
    """Positions of the ``size`` returns of greatest variance, in increasing order.

    Such a subset consists of the lowest ``i`` and the highest ``size - i`` returns for some ``i``.
    Among equal variances the most even split wins, and among equal returns the earlier position.
    For returns of 0 and 1 it is as many of each as there are, up to one half.

    Args:
        returns (sequence of float): returns ``[M]``.
        size (int): how many to keep, at most ``M``.

    Returns:
        list of int: ``size`` positions.

    Raises:
        ValueError: if there are fewer than ``size`` returns.

    Examples:
        >>> max_variance_subset([0.0, 0.0, 0.0, 1.0, 0.0, 1.0], 4)
        [0, 1, 3, 5]

    Reference:
        Xu et al., "Not All Rollouts are Useful: Down-Sampling Rollouts in LLM Reinforcement
        Learning", 2025, https://arxiv.org/abs/2504.13818.
    """
    if not 1 <= size <= len(returns):
        raise ValueError(
            f"size must be between 1 and the {len(returns)} returns, got {size}. Sample more "
            "rollouts."
        )
    if size == len(returns):
        return list(range(size))
    upwards = sorted(range(len(returns)), key=lambda index: (returns[index], index))
    downwards = sorted(range(len(returns)), key=lambda index: (-returns[index], index))
    best: list[int] = []
    best_score: tuple[float, float] | None = None
    for num_low in range(size + 1):
        low = upwards[:num_low]
        high = [index for index in downwards if index not in low][: size - num_low]
        values = [returns[index] for index in low + high]
        # Rounded, so that rounding noise does not decide between equal variances.
        score = (round(pvariance(values), 9), -abs(num_low - size / 2))
        if best_score is None or score > best_score:
            best, best_score = sorted(low + high), score
    return best


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
