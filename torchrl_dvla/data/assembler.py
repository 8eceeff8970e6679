# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Rollouts become groups: returns, advantages, keep or drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pvariance

import numpy as np
import torch

from torchrl_dvla.data.groups import GroupRecord, RolloutRecord
from torchrl_dvla.data.schema import ADVANTAGE_KEY
from torchrl_dvla.functional.advantage import group_advantage
from torchrl_dvla.memory import EnvironmentPool, PageState

__all__ = ["GroupAssembler", "max_variance_subset"]


class GroupAssembler:
    """Collects sealed rollouts until a group is complete, then judges it.

    A complete group gets its advantages, written to the ``"advantage"`` of every row of a rollout,
    and is kept; or it is dropped with a reason. The assembler frees the pages of what is not kept,
    before it returns the record: the caller hands every record to ``PooledReplayBuffer.extend``,
    which stores kept groups and accounts for dropped ones.

    With ``candidate_group_size > group_size`` a group samples more rollouts than it keeps and keeps
    the subset of greatest variance (:func:`max_variance_subset`): a task that is solved once in
    sixteen then still yields groups with contrast.

    One thread uses it.

    Args:
        pool (EnvironmentPool): where the rows are.
        group_size (int): rollouts that a kept group has; at least 2.
        candidate_group_size (int, optional): rollouts sampled for it. Defaults to ``group_size``.

    Keyword Args:
        return_bounds (tuple of float, optional): open interval that the mean return of all
            candidates must fall in for the group to be kept.
        normalise_std (bool): divide advantages by the group's deviation. Defaults to ``True``.
        drop_no_contrast (bool): drop groups whose returns are all equal; their advantages are zero.
            Defaults to ``True``.

    Raises:
        ValueError: if a size is too small or the bounds are not increasing.
    """

    def __init__(
        self,
        pool: EnvironmentPool,
        group_size: int,
        candidate_group_size: int | None = None,
        *,
        return_bounds: tuple[float, float] | None = None,
        normalise_std: bool = True,
        drop_no_contrast: bool = True,
    ) -> None:
        if group_size < 2:
            raise ValueError(
                f"group_size must be at least 2, got {group_size}. A rollout is judged against the "
                "others of its group."
            )
        candidate_group_size = candidate_group_size or group_size
        if candidate_group_size < group_size:
            raise ValueError(
                f"candidate_group_size must be at least group_size={group_size}, got "
                f"{candidate_group_size}. Leave it out to keep every rollout."
            )
        if return_bounds is not None and not return_bounds[0] < return_bounds[1]:
            raise ValueError(
                f"return_bounds must be increasing, got {return_bounds}. Pass (low, high)."
            )
        self.pool = pool
        self.group_size = group_size
        self.candidate_group_size = candidate_group_size
        self.return_bounds = return_bounds
        self.normalise_std = normalise_std
        self.drop_no_contrast = drop_no_contrast
        #: While True, no complete group is dropped, whatever its returns.
        self.keep_all = False
        self._pending: dict[int, list[RolloutRecord]] = {}
        self._advantages = pool.rows.get(ADVANTAGE_KEY).numpy()

    @property
    def pending(self) -> dict[int, int]:
        """Rollouts collected so far, by the id of the incomplete group."""
        return {group_id: len(rollouts) for group_id, rollouts in self._pending.items()}

    def add(self, rollout: RolloutRecord) -> GroupRecord | None:
        """Take a finished rollout over, with its sealed pages.

        Args:
            rollout (RolloutRecord): the rollout.

        Returns:
            GroupRecord or None: the group, if this rollout was its last.

        Raises:
            RuntimeError: if a page of it is not sealed.
            ValueError: if it started from another scene than its group, or is there already.
        """
        num_pages = -(-rollout.num_rows // self.pool.rows_per_page)
        if len(rollout.pages) > num_pages:
            rollout = replace(rollout, pages=rollout.pages[:num_pages])
        unsealed = [page for page in rollout.pages if self.pool.state(page) != PageState.SEALED]
        if unsealed or len(rollout.pages) < num_pages or not num_pages:
            raise RuntimeError(
                f"Rollout {rollout.rollout_id} must own {num_pages} sealed pages for its "
                f"{rollout.num_rows} rows, got {list(rollout.pages)} of which {unsealed} are not "
                "sealed. Call pool.seal(pages, num_rows) when the rollout ends."
            )
        members = self._pending.setdefault(rollout.group_id, [])
        if members and members[0].scene != rollout.scene:
            raise ValueError(
                f"The rollouts of group {rollout.group_id} must share one scene, got "
                f"{rollout.scene} beside {members[0].scene} (task, seed, init_state_id). Returns "
                "of different scenes cannot be compared."
            )
        if any(member.rollout_id == rollout.rollout_id for member in members):
            raise ValueError(
                f"rollout_id must be new in group {rollout.group_id}, got {rollout.rollout_id} "
                "again. Count ids up."
            )
        members.append(rollout)
        if len(members) < self.candidate_group_size:
            return None
        del self._pending[rollout.group_id]
        # By id, not by who finished first: short episodes finish first, and succeed more often.
        members.sort(key=lambda member: member.rollout_id)
        return self._judge(members)

    def abandon(self, group_id: int, reason: str) -> GroupRecord:
        """Give a group up, for instance because its environment keeps failing.

        Args:
            group_id (int): the group; it may have no finished rollout yet.
            reason (str): why, in a few words that do not vary from case to case.

        Returns:
            GroupRecord: dropped, its pages are free.
        """
        return self._dropped(group_id, self._pending.pop(group_id, []), reason)

    def clear(self) -> None:
        """Forget every incomplete group and free its pages."""
        for members in self._pending.values():
            for member in members:
                self.pool.free(member.pages)
        self._pending.clear()

    def _judge(self, members: list[RolloutRecord]) -> GroupRecord:
        returns = [member.episode_return for member in members]
        mean = fmean(returns)
        if self.keep_all:
            return self._kept(members, returns)
        if self.drop_no_contrast and min(returns) == max(returns):
            reason = f"no contrast: all rollouts returned {returns[0]:g}"
            return self._dropped(members[0].group_id, members, reason)
        if self.return_bounds and not self.return_bounds[0] < mean < self.return_bounds[1]:
            low, high = self.return_bounds
            return self._dropped(
                members[0].group_id, members, f"mean return outside ({low:g}, {high:g})"
            )
        return self._kept(members, returns)

    def _kept(self, members: list[RolloutRecord], returns: list[float]) -> GroupRecord:
        chosen = max_variance_subset(returns, self.group_size)
        rollouts = tuple(members[index] for index in chosen)
        kept_returns = torch.tensor([r.episode_return for r in rollouts], dtype=torch.float32)
        advantages = group_advantage(kept_returns, normalise_std=self.normalise_std)
        sizes = [rollout.num_rows for rollout in rollouts]
        rows = self.pool.row_index_of([rollout.pages for rollout in rollouts], sizes)
        self._advantages[rows.numpy(), 0] = np.repeat(advantages.numpy(), sizes)
        for index, member in enumerate(members):
            if index not in chosen:
                self.pool.free(member.pages)
        return GroupRecord(
            members[0].group_id, *members[0].scene, rollouts, advantages, tuple(members)
        )

    def _dropped(self, group_id: int, members: list[RolloutRecord], reason: str) -> GroupRecord:
        for member in members:
            self.pool.free(member.pages)
        scene = members[0].scene if members else ("", 0, -1)
        return GroupRecord(group_id, *scene, (), torch.empty(0), tuple(members), reason)


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
