# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many bytes a run needs, before any is taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from torchrl_dvla.memory.layout import RowLayout
from torchrl_dvla.memory.limits import format_bytes, parse_bytes, shareable_bytes
from torchrl_dvla.memory.model import ModelPool
from torchrl_dvla.memory.pool import EnvironmentPool

__all__ = ["Plan", "expected_waste", "make_plan", "recommended_rows_per_page"]

#: Rows of a page where nothing is known about the length of rollouts.
_ROWS_PER_PAGE = 4
#: Share of the pages that a recommended page size may leave without a row.
_AIM = 0.05
#: Share above which a plan says so.
_LIMIT = 0.10


def expected_waste(rows_per_page: int, expected_decisions: float) -> float:
    r"""Share of a rollout's pages that holds no row, on average.

    A rollout of ``n`` rows takes ``ceil(n / p)`` pages of ``p`` rows. Where lengths spread over at
    least a page, its last page is filled to any height equally often, so :math:`(p - 1) / 2` rows
    stay empty on average, however long it is:

    .. math::
        w(p, \bar n) = \frac{(p - 1) / 2}{\bar n + (p - 1) / 2}

    Args:
        rows_per_page (int): ``p``.
        expected_decisions (float): mean length :math:`\bar n` of a rollout in decisions.

    Examples:
        >>> round(expected_waste(4, 18.5), 3), expected_waste(1, 18.5)
        (0.075, 0.0)
    """
    empty = (rows_per_page - 1) / 2
    return empty / (expected_decisions + empty)


def recommended_rows_per_page(expected_decisions: float, max_waste: float = _AIM) -> int:
    """The largest page that wastes at most ``max_waste`` on average.

    The book-keeping is per page, so larger pages cost the coordinator less; their end is wasted.

    Args:
        expected_decisions (float): mean length of a rollout in decisions.
        max_waste (float): share of a rollout's pages that may hold no row.

    Examples:
        >>> recommended_rows_per_page(18.5), recommended_rows_per_page(100), expected_waste(11, 100)
        (2, 11, 0.047619047619047616)
    """
    return max(1, int(1 + 2 * expected_decisions * max_waste / (1 - max_waste)))


@dataclass(frozen=True)
class Plan:
    """The outcome of :meth:`DualPool.plan`; print it to read it.

    Args:
        row_bytes (int): bytes of one decision.
        largest_field (str): the field that takes most of them, with its shape and share.
        rows_per_page (int): decisions of a page.
        expected_decisions (float, optional): mean length of a rollout, if it was told.
        num_candidates (int): rollouts that are sampled for a group.
        groups_per_update (int): groups of an update.
        max_policy_lag (int): the staleness bound.
        max_decisions (int): decisions of a rollout at most.
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
    expected_decisions: float | None
    num_candidates: int
    groups_per_update: int
    max_policy_lag: int
    max_decisions: int
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
    def internal_waste(self) -> float | None:
        """Share of the pages of finished rollouts that will hold no row; ``None`` = not known."""
        if self.expected_decisions is None:
            return None
        return expected_waste(self.rows_per_page, self.expected_decisions)

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
        if self.expected_decisions is not None and (self.internal_waste or 0.0) > _LIMIT:
            better = recommended_rows_per_page(self.expected_decisions)
            notes.append(
                f"pages of {self.rows_per_page} rows waste {self.internal_waste:.0%} of the memory "
                f"of rollouts of {self.expected_decisions:g} decisions: lower rows_per_page to "
                f"{better}."
            )
        return notes

    def __str__(self) -> str:
        page = f"{self.rows_per_page} rows, {format_bytes(self.rows_per_page * self.row_bytes)}"
        if self.internal_waste is not None:
            page += f", {self.internal_waste:.0%} wasted at {self.expected_decisions:g} decisions"
        rollouts = f"{self.num_candidates} rollouts of {self.max_decisions} decisions"
        lag = f"{self.groups_per_update} an update, lag {self.max_policy_lag}"
        rows = [
            ("row", f"{format_bytes(self.row_bytes)} ({self.largest_field})"),
            ("page", page),
            ("group, at most", f"{self.pages_per_group} pages: {rollouts}"),
            ("groups at once", f"{self.num_groups_fit} of {self.num_groups}: {lag}"),
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
    rows_per_page: int | None = None,
    expected_decisions: float | None = None,
    policy: nn.Module | None = None,
    param_bytes: int = 0,
    num_weight_slots: int = 3,
    batch_size: int = 0,
    num_staging: int = 2,
    env_bytes: int | str | None = None,
    model_bytes: int | str | None = None,
    device: torch.device | str = "cpu",
) -> Plan:
    """See :meth:`DualPool.plan`."""
    if rows_per_page is None:
        rows_per_page = _ROWS_PER_PAGE
        if expected_decisions is not None:
            rows_per_page = recommended_rows_per_page(expected_decisions)
    counts = {
        "group_size": (group_size, 2),
        "groups_per_update": (groups_per_update, 1),
        "max_policy_lag": (max_policy_lag, 0),
        "max_decisions": (max_decisions, 1),
        "num_env": (num_env, 1),
        "rows_per_page": (rows_per_page, 1),
        "candidate_group_size": (candidate_group_size or group_size, group_size),
        "param_bytes": (param_bytes, 0),
        "num_weight_slots": (num_weight_slots, 3),
        "batch_size": (batch_size, 0),
        "num_staging": (num_staging, 1),
    }
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}. Raise it.")
    if expected_decisions is not None and not 1 <= expected_decisions <= max_decisions:
        raise ValueError(
            f"expected_decisions must be between 1 and max_decisions ({max_decisions}), got "
            f"{expected_decisions}. Give the mean length of a rollout."
        )
    num_candidates = candidate_group_size or group_size
    pages_per_group = num_candidates * -(-max_decisions // rows_per_page)
    num_groups = (max_policy_lag + 1) * groups_per_update

    def nbytes(num_pages: int) -> int:
        return EnvironmentPool.nbytes_for(layout, num_pages, rows_per_page)

    full_bytes = nbytes(num_groups * pages_per_group)
    min_bytes = nbytes(groups_per_update * pages_per_group)
    budget = full_bytes if env_bytes is None else parse_bytes(env_bytes)
    largest = _largest_field(layout)
    if budget < min_bytes:
        num_fit = sum(nbytes(n * pages_per_group) <= budget for n in range(1, groups_per_update))
        fewer = f"lower groups_per_update to {num_fit}, or" if num_fit else "or"
        raise ValueError(
            f"env_bytes must be at least {min_bytes} ({format_bytes(min_bytes)}), got {budget} "
            f"({format_bytes(budget)}): an update needs {groups_per_update} whole groups of "
            f"{pages_per_group} pages, {num_fit} fit. Raise env_bytes, {fewer} lower group_size, "
            f"max_decisions or the image size ({largest} of a row)."
        )
    num_fit = sum(nbytes(n * pages_per_group) <= budget for n in range(1, num_groups + 1))
    num_pages = num_groups * pages_per_group
    if env_bytes is not None:
        num_pages = EnvironmentPool.pages_within(layout, budget, rows_per_page)
    if policy is not None:
        param_bytes += sum(tensor.nbytes for tensor in policy.state_dict().values())
    weight_bytes = param_bytes * num_weight_slots
    staging_bytes = num_staging * ModelPool.nbytes_for(layout, batch_size)
    needed = weight_bytes + staging_bytes
    model_budget = needed if model_bytes is None else parse_bytes(model_bytes)
    if model_budget < needed:
        raise ValueError(
            f"model_bytes must be at least {needed} ({format_bytes(needed)}: {num_weight_slots} "
            f"weight slots and {num_staging} staging batches), got {model_budget}. Raise it, or "
            "lower batch_size or num_weight_slots."
        )
    _require_memory(
        nbytes(num_pages), min_bytes, model_budget if torch.device(device).type == "cpu" else 0
    )
    return Plan(
        row_bytes=layout.row_bytes,
        largest_field=largest,
        rows_per_page=rows_per_page,
        expected_decisions=expected_decisions,
        num_candidates=num_candidates,
        groups_per_update=groups_per_update,
        max_policy_lag=max_policy_lag,
        max_decisions=max_decisions,
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


def _largest_field(layout: RowLayout) -> str:
    key, (shape, dtype) = max(
        layout.items(), key=lambda item: item[1][0].numel() * item[1][1].itemsize
    )
    share = shape.numel() * dtype.itemsize / layout.row_bytes
    return f"{key!r} {list(shape)} {share:.0%}"


def _require_memory(env_bytes: int, min_bytes: int, model_bytes: int) -> None:
    """Both pools must fit in what the machine has left: asking for more ends the run later."""
    free, where = shareable_bytes()
    if free is None or env_bytes + model_bytes <= free:
        return
    besides = f" besides {format_bytes(model_bytes)} of model_bytes" if model_bytes else ""
    if min_bytes + model_bytes <= free:
        remedy = f"Set env_bytes to at most {free - model_bytes}"
    else:
        remedy = (
            f"An update needs at least {format_bytes(min_bytes)}: lower groups_per_update, "
            "group_size, max_decisions or the image size"
        )
    raise ValueError(
        f"env_bytes must fit in memory, got {env_bytes} ({format_bytes(env_bytes)}){besides} with "
        f"{format_bytes(free)} free{where}. {remedy}, or raise the limit of the machine or "
        "container."
    )
