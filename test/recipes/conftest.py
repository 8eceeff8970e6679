# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest

from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings


@pytest.fixture
def settings(tmp_path):
    """Settings of the recipe from a configuration with overrides, logging below ``tmp_path``."""

    def build(name, *overrides):
        return compose_settings(name, [f"log.dir={tmp_path / 'runs'}", *overrides])

    return build
