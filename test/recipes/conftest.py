# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from torchrl_dvla.recipes.dvla_grpo.settings import settings_from
from torchrl_dvla.recipes.dvla_grpo.train import CONFIG


@pytest.fixture
def settings(tmp_path):
    """Settings of the recipe from a configuration with overrides, logging below ``tmp_path``."""

    def build(name, *overrides):
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG)):
            cfg = compose(name, [f"log.dir={tmp_path / 'runs'}", *overrides])
        return settings_from(cfg)

    return build
