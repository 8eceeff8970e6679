# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Shared memory: pages and their ledger, budgets, the environment pool and the model pool."""

from __future__ import annotations

from torchrl_dvla.memory.arena import SharedArena
from torchrl_dvla.memory.available_memory import available_bytes, format_bytes, parse_bytes
from torchrl_dvla.memory.dual_pool import DualPool, ModelPool, Plan
from torchrl_dvla.memory.environment_pool import EnvironmentPool, WorkerView
from torchrl_dvla.memory.pages import Page, PageLedger, PageState
from torchrl_dvla.memory.row_access import RowFields, RowWriter
from torchrl_dvla.memory.row_layout import RowLayout

__all__ = [
    "DualPool",
    "EnvironmentPool",
    "ModelPool",
    "Page",
    "PageLedger",
    "PageState",
    "Plan",
    "RowFields",
    "RowLayout",
    "RowWriter",
    "SharedArena",
    "WorkerView",
    "available_bytes",
    "format_bytes",
    "parse_bytes",
]
