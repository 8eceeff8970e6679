# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Who owns bytes: the two pools, pages, leases, budgets."""

from __future__ import annotations

from torchrl_dvla.memory.arena import SharedArena
from torchrl_dvla.memory.dual import DualPool
from torchrl_dvla.memory.layout import RowLayout
from torchrl_dvla.memory.limits import available_bytes, format_bytes, parse_bytes
from torchrl_dvla.memory.model import ModelPool
from torchrl_dvla.memory.pages import Page, PageLedger, PageState
from torchrl_dvla.memory.plan import Plan
from torchrl_dvla.memory.pool import EnvironmentPool, WorkerView
from torchrl_dvla.memory.writer import RowWriter

__all__ = [
    "DualPool",
    "EnvironmentPool",
    "ModelPool",
    "Page",
    "PageLedger",
    "PageState",
    "Plan",
    "RowLayout",
    "RowWriter",
    "SharedArena",
    "WorkerView",
    "available_bytes",
    "format_bytes",
    "parse_bytes",
]
