# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The run whose pools the tests of this folder plan by hand."""

from __future__ import annotations

from typing import Any

import torch

from torchrl_dvla.memory import RowLayout

LAYOUT = RowLayout({"image": ((3, 16, 16), torch.uint8), "state": ((8,), torch.float32)})
SIZES: dict[str, Any] = {
    "layout": LAYOUT,
    "group_size": 4,
    "groups_per_update": 3,
    "max_policy_lag": 1,
    "max_decisions": 10,
    "rows_per_page": 4,
}
