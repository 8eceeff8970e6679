# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Two pools with budgets of their own, so that neither's pattern can fragment the other."""

from __future__ import annotations

from typing import Any

import torch

from torchrl_dvla.memory.layout import RowLayout
from torchrl_dvla.memory.limits import format_bytes, parse_bytes
from torchrl_dvla.memory.model import ModelPool
from torchrl_dvla.memory.plan import Plan, make_plan
from torchrl_dvla.memory.pool import EnvironmentPool

__all__ = ["DualPool"]


class DualPool:
    """The model pool and the environment pool of one node.

    Args:
        model_bytes (int or str): budget of the model pool.
        env_bytes (int or str): budget of the environment pool.
        device (torch.device or str): where the model pool is.

    Examples:
        >>> layout = RowLayout({"image": ((3, 8, 8), torch.uint8), "x": ((1,), torch.float32)})
        >>> plan = DualPool.plan(
        ...     layout=layout, group_size=2, groups_per_update=2, max_policy_lag=1, max_decisions=8,
        ...     param_bytes=1024, batch_size=4,
        ... )
        >>> print(plan)
        row               196 B ('image' [3, 8, 8] 98%)
        page              4 rows, 784 B
        group, at most    4 pages: 2 rollouts of 8 decisions
        groups at once    4 of 4: 2 an update, lag 1
        environment pool  16 pages, 12.4 KiB
          at least        6.2 KiB
          at most useful  12.4 KiB
        model pool        5.0 KiB
          weight slots    3.0 KiB
          staging batches  2.0 KiB
        >>> with DualPool(plan.model_bytes, plan.env_bytes) as pools:
        ...     pool = pools.environment(layout)
        ...     page = pool.lease("worker 0")
        ...     print(pools.report())
        environment pool  12.4 KiB reserved, 784 B used, 784 B at most
          pages           15 free, 1 leased, 0 sealed, 0 stored (0 promised)
          internal waste  0% of the pages of finished rollouts
          page wait       0.0 s
        model pool        5.0 KiB reserved, 0 B used, 0 B at most
          internal waste  0%
    """

    def __init__(
        self,
        model_bytes: int | str,
        env_bytes: int | str,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.env_bytes = parse_bytes(env_bytes)
        self.model = ModelPool(model_bytes, device)
        self._environment: EnvironmentPool | None = None

    @staticmethod
    def plan(**sizes: Any) -> Plan:
        r"""What a run needs, before anything is allocated.

        A group owns pages from its admission until it is learned from, and at most
        ``(max_policy_lag + 1) * groups_per_update`` groups are in between, each with at most
        ``candidate_group_size * ceil(max_decisions / rows_per_page)`` pages. So many pages never
        run out. An update needs ``groups_per_update`` whole groups at once: fewer pages than those
        would dead-lock, and are refused. Between the two, sampling waits for pages now and then.

        Keyword Args:
            layout (RowLayout): what a row holds, see :meth:`RowLayout.from_specs`.
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
            policy (nn.Module, optional): its parameters and buffers are counted.
            param_bytes (int): the same by number; both add up.
            num_weight_slots (int): copies of the weights. Defaults to 3.
            batch_size (int), num_staging (int): the staging batches. Default to none, and to 2.
            env_bytes (int or str, optional), model_bytes (int or str, optional): budgets to check.
                By default the plan asks for all that is useful.
            device (torch.device or str): of the model pool; on the CPU both pools share the
                machine's memory. Defaults to the CPU.

        Returns:
            Plan: printable.

        Raises:
            ValueError: if it cannot work; the message says which number to change.
        """
        return make_plan(**sizes)

    def environment(
        self,
        layout: RowLayout | None = None,
        rows_per_page: int = 4,
        *,
        pin_memory: bool | None = None,
        numa_node: int | None = None,
    ) -> EnvironmentPool:
        """The environment pool, built at the first call.

        Args:
            layout (RowLayout, optional): what a row holds; needed at the first call.
            rows_per_page (int): rows of a page.

        Keyword Args:
            pin_memory (bool, optional), numa_node (int, optional): as for
                :class:`EnvironmentPool`.

        Raises:
            ValueError: if no layout was ever given, or another one than before.
        """
        if self._environment is None:
            if layout is None:
                raise ValueError(
                    "layout must be given at the first call, got None. Pass a RowLayout."
                )
            self._environment = EnvironmentPool.from_budget(
                layout,
                self.env_bytes,
                rows_per_page,
                pin_memory=pin_memory,
                numa_node=numa_node,
            )
        elif layout is not None and layout.signature != self._environment.layout.signature:
            raise ValueError(
                "layout must equal that of the pool that exists: "
                f"{self._environment.layout.difference(layout)}. Build another DualPool."
            )
        return self._environment

    def stats(self) -> dict[str, float]:
        """Statistics of both pools, prefixed ``model/`` and ``environment/``."""
        stats: dict[str, float] = {f"model/{k}": v for k, v in self.model.stats().items()}
        if self._environment is not None:
            stats |= {f"environment/{k}": v for k, v in self._environment.stats().items()}
        return stats

    def report(self) -> str:
        """Both pools in words: what is reserved, used, wasted and waited for."""
        rows = []
        if self._environment is not None:
            stats = self._environment.stats()
            pages = ", ".join(
                f"{stats[f'pages_{name}']} {name}"
                for name in ("free", "leased", "sealed", "stored")
            )
            waste = f"{stats['internal_waste_total']:.0%} of the pages of finished rollouts"
            rows += [
                ("environment pool", _sizes(stats)),
                ("  pages", f"{pages} ({stats['pages_reserved']} promised)"),
                ("  internal waste", waste),
                ("  page wait", f"{stats['page_wait_s']:.1f} s"),
            ]
        stats = self.model.stats()
        rows.append(("model pool", _sizes(stats)))
        rows += [(f"  {name}", format_bytes(n)) for name, n in self.model.used_by_name().items()]
        rows.append(("  internal waste", f"{stats['internal_waste']:.0%}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def close(self) -> None:
        """Give both pools back."""
        if self._environment is not None:
            self._environment.close()
        self.model.close()

    def __enter__(self) -> DualPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _sizes(stats: dict[str, float]) -> str:
    reserved, used, peak = (
        format_bytes(stats[f"{name}_bytes"]) for name in ("reserved", "used", "peak")
    )
    return f"{reserved} reserved, {used} used, {peak} at most"
