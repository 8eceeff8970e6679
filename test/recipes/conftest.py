# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

RECIPE = Path(__file__).resolve().parents[2] / "sota-implementations" / "dvla_grpo"
MODULES = ("settings", "utils", "validation", "bookkeeping", "dvla_grpo")


@pytest.fixture
def recipe(monkeypatch):
    """The modules of the recipe, which import each other by bare names as scripts do."""
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: importlib.import_module(name) for name in MODULES}
    yield SimpleNamespace(**modules)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def settings(recipe, tmp_path):
    """Settings of the recipe from a configuration with overrides, logging below ``tmp_path``."""

    def build(name, *overrides):
        with initialize_config_dir(version_base="1.3", config_dir=str(RECIPE / "config")):
            cfg = compose(name, [f"log.dir={tmp_path / 'runs'}", *overrides])
        return recipe.settings.settings_from(cfg)

    return build
