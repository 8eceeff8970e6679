# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Dual pool: the budgets of a node's two pools, their plan, and the pools themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict

from torchrl_dvla.memory.arena import SharedArena
from torchrl_dvla.memory.available_memory import format_bytes, parse_bytes, shareable_bytes
from torchrl_dvla.memory.environment_pool import EnvironmentPool
from torchrl_dvla.memory.row_layout import RowLayout
from torchrl_dvla.validation import Range, check

__all__ = ["DualPool", "ModelPool", "Plan", "expected_waste", "recommended_rows_per_page"]

#: Rows of a page where nothing is known about the length of rollouts.
_ROWS_PER_PAGE = 4
#: Share of the pages that a recommended page size may leave without a row.
_MAX_WASTE = 0.05
#: Share above which a plan says so.
_NOTED_WASTE = 0.10


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


def recommended_rows_per_page(expected_decisions: float) -> int:
    """The largest page that leaves at most 5 % of its rows empty on average.

    The collector's work is per page, so larger pages cost it less; their last rows stay empty.

    Args:
        expected_decisions (float): mean length of a rollout in decisions.

    Examples:
        >>> recommended_rows_per_page(18.5), recommended_rows_per_page(100), expected_waste(11, 100)
        (2, 11, 0.047619047619047616)
    """
    return max(1, int(1 + 2 * expected_decisions * _MAX_WASTE / (1 - _MAX_WASTE)))


@dataclass(frozen=True)
class Plan:
    """Sizes of both pools, from :meth:`DualPool.plan`; print it to read it.

    Args:
        layout (RowLayout): the row of one decision.
        rows_per_page (int): decisions of a page.
        pages_per_group (int): pages that the candidates of one group take at most.
        num_pages (int): pages of the environment pool.
        env_bytes (int): bytes of the environment pool.
        min_env_bytes (int): with fewer, learner and sampling would wait for each other.
        weight_bytes (int): bytes of the weight slots.
        staging_bytes (int): bytes of the staging batches.
        model_bytes (int): bytes of the model pool.
        notes (tuple of str): what works, but not as well as it could.
        table (str): the plan as lines of text, without the notes.
    """

    layout: RowLayout
    rows_per_page: int
    pages_per_group: int
    num_pages: int
    env_bytes: int
    min_env_bytes: int
    weight_bytes: int
    staging_bytes: int
    model_bytes: int
    notes: tuple[str, ...]
    table: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one decision."""
        return self.layout.row_bytes

    def __str__(self) -> str:
        return "\n".join([self.table, *(f"note: {note}" for note in self.notes)])


class ModelPool:
    """Host memory with a budget, for what lives as long as the run: weight slots, staging batches.

    Every block is an arena of its own, allocated when it is asked for and page-locked for copies to
    the device where CUDA is present. Blocks are asked for at the start of a run (invariant 6) and
    given back as a whole by closing their arena, so there is nothing to fragment.

    Args:
        model_bytes (int or str): the budget.

    Examples:
        >>> pool = ModelPool("1KB")
        >>> pool.empty((4, 4), name="weights").shape
        torch.Size([4, 4])
        >>> pool.stats()["used_bytes"], pool.used_by_name()
        (64, {'weights': 64})
        >>> pool.close()
    """

    def __init__(self, model_bytes: int | str) -> None:
        self.nbytes = parse_bytes(model_bytes, "model_bytes")
        self._arenas: list[tuple[str, SharedArena]] = []
        self._outliving: set[SharedArena] = set()
        self._peak_bytes = 0
        self._padding_bytes = 0
        self._is_closed = False

    def arena(self, nbytes: int, name: str = "arena", *, outlives: bool = False) -> SharedArena:
        """A block of shared memory, which can be sent to other processes.

        Args:
            nbytes (int): its size in bytes, counted in the budget until it is closed.
            name (str): what it is for, for the report and the error message.

        Keyword Args:
            outlives (bool): its tensors keep their contents when the pool is closed.

        Raises:
            ValueError: if *nbytes* is not positive.
            RuntimeError: if the budget is spent, or the machine has not so much memory; nothing
                has changed then.
        """
        if self._is_closed:
            raise RuntimeError("The model pool was closed by its owner. Make a new one.")
        used = sum(self.used_by_name().values())
        if used + nbytes > self.nbytes:
            raise RuntimeError(
                f"model_bytes must hold {name} of {format_bytes(nbytes)} besides the "
                f"{format_bytes(used)} in use, got {self.nbytes}. Raise model_bytes to at least "
                f"{used + nbytes}."
            )
        arena = SharedArena(nbytes)
        arena.pin()
        self._arenas.append((name, arena))
        if outlives:
            self._outliving.add(arena)
        self._peak_bytes = max(self._peak_bytes, used + nbytes)
        return arena

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, name: str = "tensor"
    ) -> torch.Tensor:
        """A tensor from the pool, zeros at first.

        Args:
            shape (tuple of int): its shape.
            dtype (torch.dtype): its type.
            name (str): what it is for.

        Raises:
            ValueError, RuntimeError: as :meth:`arena`.
        """
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self.arena(nbytes, name).tensor(0, shape, dtype)

    def rows(self, layout: RowLayout, num_rows: int, name: str = "rows") -> TensorDict:
        """Rows ``[num_rows, *shape]`` of a layout, for staging; locked, as :meth:`RowLayout.rows`.

        Args:
            layout (RowLayout): fields.
            num_rows (int): rows.
            name (str): what they are for.

        Raises:
            ValueError, RuntimeError: as :meth:`arena`.
        """
        arena = self.arena(self.nbytes_for(layout, num_rows), name)
        self._padding_bytes += arena.nbytes - num_rows * layout.row_bytes
        return layout.rows(arena, num_rows)

    @staticmethod
    def nbytes_for(layout: RowLayout, num_rows: int) -> int:
        """What :meth:`rows` takes from the budget."""
        return layout.nbytes(num_rows)

    def used_by_name(self) -> dict[str, int]:
        """Bytes in use, by what they are used for."""
        used: dict[str, int] = {}
        for name, arena in self._arenas:
            if not arena.closed:
                used[name] = used.get(name, 0) + arena.nbytes
        return used

    def stats(self) -> dict[str, float]:
        """Gauges of the pool.

        Returns:
            dict: ``reserved_bytes`` (the budget), ``used_bytes``, ``peak_bytes`` (the most that was
            in use at once) and ``internal_waste``, the share of the used bytes that is padding
            between the fields of rows. Nothing waits for this pool: what does not fit is an error
            at the start.
        """
        used = sum(self.used_by_name().values())
        return {
            "reserved_bytes": self.nbytes,
            "used_bytes": used,
            "peak_bytes": self._peak_bytes,
            "internal_waste": self._padding_bytes / used if used else 0.0,
        }

    def close(self) -> None:
        """Give the memory back; safe to call twice. Tensors that live on read zeros.

        Those of an arena that outlives the pool keep its memory.
        """
        for _, arena in self._arenas:
            arena.close(empty=arena not in self._outliving)
        self.nbytes, self._is_closed = 0, True


class DualPool:
    """Environment pool and model pool of one node, each with a budget of its own.

    Neither pool's pattern of use can fragment the other. The constructor allocates nothing:
    :meth:`plan` works out the sizes of a run, :meth:`allocate` makes the pools.

    Args:
        env_bytes (int or str, optional): budget of the environment pool. Defaults to what the plan
            finds useful.
        model_bytes (int or str, optional): budget of the model pool. Defaults to what the plan
            needs.

    Examples:
        >>> layout = RowLayout({"image": ((3, 8, 8), torch.uint8), "x": ((1,), torch.float32)})
        >>> pools = DualPool()
        >>> plan = pools.plan(
        ...     layout=layout, group_size=2, groups_per_update=2, max_policy_lag=1, max_decisions=8,
        ...     weight_bytes=3072, batch_size=4,
        ... )
        >>> print(plan)
        row                196 B ('image' [3, 8, 8] 98%)
        page               4 rows, 784 B
        group, at most     4 pages: 2 rollouts of 8 decisions
        groups at once     4 of 4: 2 an update, lag 1
        environment pool   16 pages, 12.4 KiB
          at least         6.2 KiB
          at most useful   12.4 KiB
        model pool         4.6 KiB
          weight slots     3.0 KiB
          staging batches  1.6 KiB
        >>> with pools:
        ...     pools.allocate(plan)
        ...     slots = pools.model.arena(plan.weight_bytes, "weight slots")
        ...     page = pools.environment.lease("worker 0")
        ...     print(pools.report())
        environment pool  12.4 KiB reserved, 784 B used, 784 B at most
          pages           15 free (0 reserved), 1 leased, 0 sealed, 0 stored of 16
          internal waste  0% of the pages of finished rollouts
          page wait       0.0 s
        model pool        4.6 KiB reserved, 3.0 KiB used, 3.0 KiB at most
          weight slots    3.0 KiB
          internal waste  0%
    """

    def __init__(
        self, env_bytes: int | str | None = None, model_bytes: int | str | None = None
    ) -> None:
        self.env_bytes = None if env_bytes is None else parse_bytes(env_bytes, "env_bytes")
        self.model_bytes = None if model_bytes is None else parse_bytes(model_bytes, "model_bytes")
        self._pools: tuple[EnvironmentPool, ModelPool] | None = None

    def plan(
        self,
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
        num_spare_groups: int = 0,
        weight_bytes: int = 0,
        batch_size: int = 0,
        num_staging: int = 2,
    ) -> Plan:
        r"""Sizes of both pools for a run, before anything is allocated.

        A group owns pages from its admission until it is learned from, and at most
        ``(max_policy_lag + 1) * groups_per_update`` groups are in between, each with at most
        ``candidate_group_size * ceil(max_decisions / rows_per_page)`` pages. So many pages never
        run out. An update needs ``groups_per_update`` whole groups at once: fewer pages than those
        would dead-lock, and are refused. Between the two, sampling waits for pages now and then.

        Keyword Args:
            layout (RowLayout): the row of one decision, as ``data.decision_layout`` makes it.
            group_size (int): rollouts of a group.
            groups_per_update (int): groups of an update.
            max_policy_lag (int): the staleness bound.
            max_decisions (int): decisions of a rollout at most (the horizon).
            num_env (int): environments that run at once. Defaults to 1.
            candidate_group_size (int, optional): rollouts that are sampled for a group. Defaults to
                *group_size*.
            rows_per_page (int, optional): decisions of a page. Defaults to what suits
                *expected_decisions*, or 4.
            expected_decisions (float, optional): mean decisions of a rollout; with it, the plan
                tells how much of its pages is wasted.
            num_spare_groups (int): groups whose pages are useful besides, for the rollouts of an
                evaluation. Defaults to none.
            weight_bytes (int): bytes of all weight slots. Defaults to none.
            batch_size (int), num_staging (int): rows and number of the staging batches. Default to
                none, and to 2.

        Returns:
            Plan: printable.

        Raises:
            ValueError: if it cannot work; the message says which number to change.
        """
        if rows_per_page is None:
            rows_per_page = _ROWS_PER_PAGE
            if expected_decisions is not None:
                rows_per_page = recommended_rows_per_page(expected_decisions)
        num_candidates = candidate_group_size or group_size
        for name, value, least in (
            ("group_size", group_size, 2),
            ("candidate_group_size", num_candidates, group_size),
            ("groups_per_update", groups_per_update, 1),
            ("max_policy_lag", max_policy_lag, 0),
            ("max_decisions", max_decisions, 1),
            ("rows_per_page", rows_per_page, 1),
            ("weight_bytes", weight_bytes, 0),
            ("batch_size", batch_size, 0),
            ("num_staging", num_staging, 1),
        ):
            check(name, value, int, Range(least, remedy="Raise it."))
        if expected_decisions is not None and not 1 <= expected_decisions <= max_decisions:
            raise ValueError(
                f"expected_decisions must be between 1 and max_decisions ({max_decisions}), got "
                f"{expected_decisions}. Give the mean length of a rollout."
            )
        pages_per_group = num_candidates * -(-max_decisions // rows_per_page)
        num_groups = (max_policy_lag + 1) * groups_per_update
        min_bytes, full_bytes = (
            EnvironmentPool.nbytes_for(layout, number * pages_per_group, rows_per_page)
            for number in (groups_per_update, num_groups + num_spare_groups)
        )
        num_pages, env_bytes = (num_groups + num_spare_groups) * pages_per_group, full_bytes
        if self.env_bytes is not None:
            num_pages = EnvironmentPool.pages_within(layout, self.env_bytes, rows_per_page)
            env_bytes = EnvironmentPool.nbytes_for(layout, num_pages, rows_per_page)
        num_fit = min(num_groups, num_pages // pages_per_group)
        largest = _largest_field(layout)
        if num_fit < groups_per_update:
            fewer = f"lower groups_per_update to {num_fit}, or" if num_fit else "or"
            raise ValueError(
                f"env_bytes must be at least {min_bytes} ({format_bytes(min_bytes)}), got "
                f"{self.env_bytes} ({format_bytes(self.env_bytes or 0)}): an update needs "
                f"{groups_per_update} whole groups of {pages_per_group} pages, {num_fit} fit. "
                f"Raise env_bytes, {fewer} lower group_size, max_decisions or the image size "
                f"({largest} of a row)."
            )
        staging_bytes = num_staging * ModelPool.nbytes_for(layout, batch_size)
        needed = weight_bytes + staging_bytes
        model_bytes = needed if self.model_bytes is None else self.model_bytes
        if model_bytes < needed:
            raise ValueError(
                f"model_bytes must be at least {needed} ({format_bytes(weight_bytes)} of weight "
                f"slots and {num_staging} staging batches of {batch_size} rows), got "
                f"{model_bytes}. Raise it, or lower batch_size or num_staging."
            )
        _require_memory(env_bytes, min_bytes, model_bytes)

        notes = []
        if num_fit < num_groups:
            notes.append(
                f"{num_fit} of the {num_groups} groups that max_policy_lag allows fit: sampling "
                f"waits for the learner. {format_bytes(full_bytes)} hold all."
            )
        if num_env > num_fit * num_candidates:
            notes.append(
                f"{num_env - num_fit * num_candidates} of the {num_env} environments can never be "
                "busy: raise groups_per_update or max_policy_lag, or lower num_env."
            )
        page = f"{rows_per_page} rows, {format_bytes(rows_per_page * layout.row_bytes)}"
        if expected_decisions is not None:
            waste = expected_waste(rows_per_page, expected_decisions)
            page += f", {waste:.0%} wasted at {expected_decisions:g} decisions"
            if waste > _NOTED_WASTE:
                notes.append(
                    f"pages of {rows_per_page} rows waste {waste:.0%} of the memory of rollouts of "
                    f"{expected_decisions:g} decisions: lower rows_per_page to "
                    f"{recommended_rows_per_page(expected_decisions)}."
                )
        rollouts = f"{num_candidates} rollouts of {max_decisions} decisions"
        lag = f"{groups_per_update} an update, lag {max_policy_lag}"
        return Plan(
            layout=layout,
            rows_per_page=rows_per_page,
            pages_per_group=pages_per_group,
            num_pages=num_pages,
            env_bytes=env_bytes,
            min_env_bytes=min_bytes,
            weight_bytes=weight_bytes,
            staging_bytes=staging_bytes,
            model_bytes=model_bytes,
            notes=tuple(notes),
            table=_table(
                ("row", f"{format_bytes(layout.row_bytes)} ({largest})"),
                ("page", page),
                ("group, at most", f"{pages_per_group} pages: {rollouts}"),
                ("groups at once", f"{num_fit} of {num_groups}: {lag}"),
                ("environment pool", f"{num_pages} pages, {format_bytes(env_bytes)}"),
                ("  at least", format_bytes(min_bytes)),
                ("  at most useful", format_bytes(full_bytes)),
                ("model pool", format_bytes(model_bytes)),
                ("  weight slots", format_bytes(weight_bytes)),
                ("  staging batches", format_bytes(staging_bytes)),
            ),
        )

    def allocate(self, plan: Plan) -> None:
        """Make the pools: :attr:`environment` with all of its memory, :attr:`model` empty.

        Args:
            plan (Plan): their sizes.

        Raises:
            RuntimeError: if the pools exist already, or there is not enough memory.
        """
        if self._pools is not None:
            raise RuntimeError("The pools exist already. Make another DualPool for another run.")
        environment = EnvironmentPool(plan.layout, plan.num_pages, plan.rows_per_page)
        self._pools = environment, ModelPool(plan.model_bytes)

    def _allocated(self) -> tuple[EnvironmentPool, ModelPool]:
        if self._pools is None:
            raise RuntimeError("The pools do not exist yet. Call allocate(plan) first.")
        return self._pools

    @property
    def environment(self) -> EnvironmentPool:
        """The pages, after :meth:`allocate`."""
        return self._allocated()[0]

    @property
    def model(self) -> ModelPool:
        """The memory of weight slots and staging batches, after :meth:`allocate`."""
        return self._allocated()[1]

    def stats(self) -> dict[str, float]:
        """Statistics of both pools, prefixed ``model/`` and ``environment/``."""
        stats = {f"model/{k}": v for k, v in self.model.stats().items()}
        return stats | {f"environment/{k}": v for k, v in self.environment.stats().items()}

    def report(self) -> str:
        """Both pools as lines of text: what is reserved, used, wasted and waited for."""
        pages, model = self.environment.stats(), self.model.stats()
        waste = f"{pages['internal_waste_total']:.0%} of the pages of finished rollouts"
        used = self.model.used_by_name().items()
        return _table(
            ("environment pool", _usage(pages)),
            ("  pages", self.environment.page_counts()),
            ("  internal waste", waste),
            ("  page wait", f"{pages['page_wait_s']:.1f} s"),
            ("model pool", _usage(model)),
            *((f"  {name}", format_bytes(nbytes)) for name, nbytes in used),
            ("  internal waste", f"{model['internal_waste']:.0%}"),
        )

    def close(self) -> None:
        """Give both pools back; safe to call twice, and before :meth:`allocate`."""
        for pool in self._pools or ():
            pool.close()

    def __enter__(self) -> DualPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _table(*rows: tuple[str, str]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _usage(stats: dict[str, float]) -> str:
    reserved, used, peak = (
        format_bytes(stats[f"{name}_bytes"]) for name in ("reserved", "used", "peak")
    )
    return f"{reserved} reserved, {used} used, {peak} at most"


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
