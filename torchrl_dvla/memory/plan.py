# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many bytes a run needs, before any is taken."""

from __future__ import annotations

from dataclasses import dataclass

from torchrl_dvla.memory.layout import RowLayout
from torchrl_dvla.memory.limits import available_bytes, format_bytes, parse_bytes
from torchrl_dvla.memory.pool import EnvironmentPool

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The outcome of :meth:`DualPool.plan`; print it to read it.

    Args:
        row_bytes (int): bytes of one decision.
        largest_field (str): the field that takes most of them, with its share.
        rows_per_page (int): decisions of a page.
        pages_per_group (int): pages that the candidates of one group take at most.
        num_groups (int): groups that may own pages at once under the staleness bound.
        num_groups_fit (int): how many of them fit in the budget.
        num_pages (int): pages of the environment pool.
        env_bytes (int): bytes of the environment pool.
        min_env_bytes (int): fewer would dead-lock.
        full_env_bytes (int): more would stay unused.
        weight_bytes (int): bytes of the weight slots.
        staging_bytes (int): bytes of the staging batches.
        model_bytes (int): bytes of the model pool.
        num_env (int): environments that run at once.
        num_rollouts (int): rollouts that admission lets run at once.
    """

    row_bytes: int
    largest_field: str
    rows_per_page: int
    pages_per_group: int
    num_groups: int
    num_groups_fit: int
    num_pages: int
    env_bytes: int
    min_env_bytes: int
    full_env_bytes: int
    weight_bytes: int
    staging_bytes: int
    model_bytes: int
    num_env: int
    num_rollouts: int

    @property
    def notes(self) -> list[str]:
        """What works, but not as well as it could."""
        notes = []
        if self.num_groups_fit < self.num_groups:
            notes.append(
                f"{self.num_groups_fit} of the {self.num_groups} groups that max_policy_lag allows "
                f"fit: sampling waits for the learner. {format_bytes(self.full_env_bytes)} hold "
                "all."
            )
        if self.num_env > self.num_rollouts:
            notes.append(
                f"{self.num_env - self.num_rollouts} of the {self.num_env} environments can never "
                "be busy: raise groups_per_update or max_policy_lag, or lower num_env."
            )
        return notes

    def __str__(self) -> str:
        rows = [
            ("row", f"{format_bytes(self.row_bytes)} ({self.largest_field})"),
            (
                "page",
                f"{self.rows_per_page} rows, {format_bytes(self.rows_per_page * self.row_bytes)}",
            ),
            ("group, at most", f"{self.pages_per_group} pages"),
            ("groups at once", f"{self.num_groups_fit} of {self.num_groups}"),
            ("environment pool", f"{self.num_pages} pages, {format_bytes(self.env_bytes)}"),
            ("  at least", format_bytes(self.min_env_bytes)),
            ("  at most useful", format_bytes(self.full_env_bytes)),
            ("model pool", format_bytes(self.model_bytes)),
            ("  weight slots", format_bytes(self.weight_bytes)),
            ("  staging batches", format_bytes(self.staging_bytes)),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def make_plan(
    *,
    layout: RowLayout,
    group_size: int,
    groups_per_update: int,
    max_policy_lag: int,
    max_decisions: int,
    num_env: int = 1,
    candidate_group_size: int | None = None,
    rows_per_page: int = 4,
    param_bytes: int = 0,
    num_weight_slots: int = 3,
    batch_size: int = 0,
    num_staging: int = 2,
    env_bytes: int | str | None = None,
    model_bytes: int | str | None = None,
) -> Plan:
    """See :meth:`DualPool.plan`."""
    counts = {
        "group_size": (group_size, 2),
        "groups_per_update": (groups_per_update, 1),
        "max_policy_lag": (max_policy_lag, 0),
        "max_decisions": (max_decisions, 1),
        "num_env": (num_env, 1),
        "rows_per_page": (rows_per_page, 1),
        "candidate_group_size": (candidate_group_size or group_size, group_size),
    }
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}. Raise it.")
    num_candidates = candidate_group_size or group_size
    pages_per_group = num_candidates * -(-max_decisions // rows_per_page)
    num_groups = (max_policy_lag + 1) * groups_per_update

    def nbytes(num_pages: int) -> int:
        return EnvironmentPool.nbytes_for(layout, num_pages, rows_per_page)

    full_bytes = nbytes(num_groups * pages_per_group)
    min_bytes = nbytes(groups_per_update * pages_per_group)
    budget = full_bytes if env_bytes is None else parse_bytes(env_bytes)
    largest = max(layout, key=lambda key: layout[key][0].numel() * layout[key][1].itemsize)
    largest_bytes = layout[largest][0].numel() * layout[largest][1].itemsize
    share = f"{largest!r} {largest_bytes / layout.row_bytes:.0%}"
    if budget < min_bytes:
        num_fit = sum(nbytes(n * pages_per_group) <= budget for n in range(1, groups_per_update))
        raise ValueError(
            f"env_bytes must be at least {min_bytes} ({format_bytes(min_bytes)}), got {budget} "
            f"({format_bytes(budget)}): an update needs {groups_per_update} whole groups of "
            f"{pages_per_group} pages, {num_fit} fit. Raise env_bytes, lower groups_per_update to "
            f"{max(1, num_fit)}, or lower group_size, max_decisions or the image size ({share} of "
            "a row)."
        )
    num_fit = sum(nbytes(n * pages_per_group) <= budget for n in range(1, num_groups + 1))
    num_pages = _pages_within(layout, budget, rows_per_page)
    if env_bytes is None:
        num_pages = num_groups * pages_per_group
    weight_bytes = param_bytes * num_weight_slots
    staging_bytes = num_staging * layout.nbytes(batch_size) if batch_size else 0
    needed = weight_bytes + staging_bytes
    model_budget = needed if model_bytes is None else parse_bytes(model_bytes)
    if model_budget < needed:
        raise ValueError(
            f"model_bytes must be at least {needed} ({format_bytes(needed)}: {num_weight_slots} "
            f"weight slots and {num_staging} staging batches), got {model_budget}. Raise it, or "
            "lower batch_size or num_weight_slots."
        )
    free = available_bytes()
    if free is not None and nbytes(num_pages) > free:
        raise ValueError(
            f"env_bytes must fit in memory, got {nbytes(num_pages)} "
            f"({format_bytes(nbytes(num_pages))}) with {format_bytes(free)} available. At least "
            f"{format_bytes(min_bytes)} are needed: set env_bytes between, lower "
            "groups_per_update, or raise the memory limit."
        )
    return Plan(
        row_bytes=layout.row_bytes,
        largest_field=share,
        rows_per_page=rows_per_page,
        pages_per_group=pages_per_group,
        num_groups=num_groups,
        num_groups_fit=num_fit,
        num_pages=num_pages,
        env_bytes=nbytes(num_pages),
        min_env_bytes=min_bytes,
        full_env_bytes=full_bytes,
        weight_bytes=weight_bytes,
        staging_bytes=staging_bytes,
        model_bytes=model_budget,
        num_env=num_env,
        num_rollouts=num_fit * num_candidates,
    )


def _pages_within(layout: RowLayout, budget: int, rows_per_page: int) -> int:
    num_pages = budget // (rows_per_page * layout.row_bytes)
    while num_pages and EnvironmentPool.nbytes_for(layout, num_pages, rows_per_page) > budget:
        num_pages -= 1
    return num_pages
