# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn

from torchrl_dvla.weight_update import WeightStore

from .linear import constant


@pytest.fixture
def learner() -> nn.Linear:
    return constant(0.0)


@pytest.fixture
def store(learner: nn.Linear) -> Iterator[WeightStore]:
    with WeightStore(learner) as store:
        yield store
