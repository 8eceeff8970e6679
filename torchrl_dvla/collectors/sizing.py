# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How large the environment pool of a collector is."""

from __future__ import annotations

from torchrl_dvla.collectors.configs import GroupConfig, WorkerConfig
from torchrl_dvla.memory import DualPool, Plan, RowLayout

__all__ = ["make_plan"]


def make_plan(
    layout: RowLayout,
    group: GroupConfig,
    workers: WorkerConfig,
    rows_per_page: int,
    env_bytes: int | str | None,
) -> Plan:
    """The pages that the groups of the settings can ever use, within a byte budget.

    Args:
        layout (RowLayout): the row of one decision.
        group (GroupConfig): groups and staleness.
        workers (WorkerConfig): environments.
        rows_per_page (int): decisions of one page.
        env_bytes (int or str, optional): byte budget.

    Raises:
        ValueError: if the budget cannot hold the groups of one update.
    """
    return DualPool(env_bytes).plan(
        layout=layout,
        group_size=group.group_size,
        candidate_group_size=group.candidate_group_size,
        groups_per_update=group.groups_per_update,
        max_policy_lag=group.max_policy_lag,
        max_decisions=workers.max_decisions,
        num_env=workers.num_workers * workers.envs_per_worker,
        rows_per_page=rows_per_page,
    )
