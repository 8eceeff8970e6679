# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Two pools with budgets of their own, so that neither's pattern can fragment the other."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from torchrl_dvla.memory.layout import RowLayout
from torchrl_dvla.memory.limits import format_bytes, parse_bytes
from torchrl_dvla.memory.plan import Plan, make_plan
from torchrl_dvla.memory.pool import EnvironmentPool

__all__ = ["DualPool", "ModelPool"]

_ALIGNMENT_BYTES = 256


class ModelPool:
    """Device memory for what lives as long as the run: weights, double buffers, staging batches.

    On the CPU it is one block that tensors are cut from; on CUDA a private
    :class:`torch.cuda.MemPool`, whose segments no other allocation can enter. Tensors are never
    given back one by one: what is allocated here is allocated once (invariant 6).

    The CUDA branch was written against PyTorch's documentation and is tested with a fake; it was
    not run on a GPU by this project.

    Args:
        model_bytes (int or str): the budget.
        device (torch.device or str): where.

    Examples:
        >>> pool = ModelPool("1KB")
        >>> pool.empty((4, 4)).shape
        torch.Size([4, 4])
        >>> pool.stats()["used_bytes"]
        256
    """

    def __init__(self, model_bytes: int | str, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.nbytes = parse_bytes(model_bytes)
        self._used = 0
        self._mem_pool: Any = None
        self._block: torch.Tensor | None = None
        if self.device.type == "cuda":
            self._mem_pool = torch.cuda.MemPool()
        else:
            self._block = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, name: str = "tensor"
    ) -> torch.Tensor:
        """An uninitialised tensor from the pool.

        Args:
            shape (sequence of int): its shape.
            dtype (torch.dtype): its type.
            name (str): what it is for, for the error message.

        Raises:
            RuntimeError: if the budget is spent.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        taken = -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if self._used + taken > self.nbytes:
            raise RuntimeError(
                f"model_bytes must hold {name} of {format_bytes(size)} besides the "
                f"{format_bytes(self._used)} in use, got {self.nbytes}. Raise model_bytes to at "
                f"least {self._used + taken}."
            )
        start, self._used = self._used, self._used + taken
        if self._block is not None:
            return self._block[start : start + size].view(dtype).view(tuple(shape))
        with self.use():
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def use(self) -> contextlib.AbstractContextManager[None]:
        """Let allocations inside the block go to the pool (CUDA; elsewhere it changes nothing).

        Such allocations are not counted against the budget.
        """
        if self._mem_pool is None:
            return contextlib.nullcontext()
        return torch.cuda.use_mem_pool(self._mem_pool)

    def stats(self) -> dict[str, int]:
        """``reserved_bytes`` (the budget), ``used_bytes`` and ``peak_bytes``."""
        return {
            "reserved_bytes": self.nbytes,
            "used_bytes": self._used,
            "peak_bytes": self._used,  # nothing is given back before the end
        }

    def close(self) -> None:
        """Drop the memory; tensors that live on keep it."""
        self._block = None
        self._mem_pool = None
        self.nbytes = self._used  # nothing more can be taken


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
        row               196 B ('image' 98%)
        page              4 rows, 784 B
        group, at most    4 pages
        groups at once    4 of 4
        environment pool  16 pages, 12.4 KiB
          at least        6.2 KiB
          at most useful  12.4 KiB
        model pool        4.6 KiB
          weight slots    3.0 KiB
          staging batches  1.6 KiB
        >>> with DualPool(plan.model_bytes, plan.env_bytes) as pools:
        ...     pools.environment(layout).num_pages
        16
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
    def plan(
        *,
        layout: RowLayout,
        group_size: int,
        groups_per_update: int,
        max_policy_lag: int,
        max_decisions: int,
        num_env: int = 1,
        param_bytes: int = 0,
        **options: Any,
    ) -> Plan:
        r"""What a run needs, before anything is allocated.

        A group owns pages from its admission until it is learned from, and at most
        ``(max_policy_lag + 1) * groups_per_update`` groups are in between, each with at most
        ``candidate_group_size * ceil(max_decisions / rows_per_page)`` pages. So many pages never
        run out. An update needs ``groups_per_update`` whole groups at once: fewer pages than those
        would dead-lock, and are refused. Between the two, sampling waits for pages now and then.

        Keyword Args:
            layout (RowLayout): what a row holds.
            group_size (int): rollouts of a group.
            groups_per_update (int): groups of an update.
            max_policy_lag (int): the staleness bound.
            max_decisions (int): decisions of a rollout at most.
            num_env (int): environments that run at once. Defaults to 1.
            param_bytes (int): bytes of the policy's parameters.
            **options: ``candidate_group_size``, ``rows_per_page`` (4), ``num_weight_slots`` (3),
                ``batch_size`` and ``num_staging`` (2) of the staging batches, and the budgets
                ``env_bytes`` and ``model_bytes`` to check; by default the plan asks for all that is
                useful.

        Returns:
            Plan: printable.

        Raises:
            ValueError: if it cannot work; the message says which number to change.
        """
        return make_plan(
            layout=layout,
            group_size=group_size,
            groups_per_update=groups_per_update,
            max_policy_lag=max_policy_lag,
            max_decisions=max_decisions,
            num_env=num_env,
            param_bytes=param_bytes,
            **options,
        )

    def environment(
        self,
        layout: RowLayout | None = None,
        rows_per_page: int = 4,
        *,
        pin_memory: bool | None = None,
    ) -> EnvironmentPool:
        """The environment pool, built at the first call.

        Args:
            layout (RowLayout, optional): what a row holds; needed at the first call.
            rows_per_page (int): rows of a page.

        Keyword Args:
            pin_memory (bool, optional): as for :class:`EnvironmentPool`.

        Raises:
            ValueError: if no layout was ever given, or another one than before.
        """
        if self._environment is None:
            if layout is None:
                raise ValueError(
                    "layout must be given at the first call, got None. Pass a RowLayout."
                )
            self._environment = EnvironmentPool.from_budget(
                layout, self.env_bytes, rows_per_page, pin_memory=pin_memory
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

    def close(self) -> None:
        """Give both pools back."""
        if self._environment is not None:
            self._environment.close()
        self.model.close()

    def __enter__(self) -> DualPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
