# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The names a user imports, and what each must bring along."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from importlib import metadata
from pathlib import Path

import pytest

import torchrl_dvla

ROOT = Path(__file__).resolve().parents[1]

# Public name -> the TorchRL (or PyTorch) class whose contract it keeps.
CONTRACTS = {
    "AsyncWeightUpdater": "torchrl.weight_update.WeightSyncScheme",
    "DVLACollector": "torchrl.collectors.BaseCollector",
    "GRPOLoss": "torchrl.objectives.LossModule",
    "PooledReplayBuffer": "torchrl.data.ReplayBuffer",
    "TopologyAwareCollector": "torchrl.collectors.BaseCollector",
}
# Settings and descriptions that every script names.
SETTINGS = ("EpisodeSpec", "GroupConfig", "InferenceConfig", "WorkerConfig")
FUNCTIONS = ("check_policy_protocol",)
NAMES = (*CONTRACTS, *SETTINGS, *FUNCTIONS)


def test_public_names_are_exactly_these() -> None:
    assert sorted(torchrl_dvla.__all__) == sorted([*NAMES, "__version__"])
    assert set(torchrl_dvla.__all__) <= set(dir(torchrl_dvla))


@pytest.mark.parametrize("name", CONTRACTS)
def test_keeps_the_contract_it_extends(name: str) -> None:
    assert issubclass(getattr(torchrl_dvla, name), pkgutil.resolve_name(CONTRACTS[name]))


@pytest.mark.parametrize("name", NAMES)
def test_is_documented_with_a_running_example(name: str) -> None:
    public = getattr(torchrl_dvla, name)
    doc = inspect.getdoc(public) or ""
    assert "Args:" in doc, f"{name}'s docstring lacks Args:"
    if name in CONTRACTS:
        assert "Examples:" in doc, f"{name}'s docstring lacks Examples:"
        assert ">>> " in doc, f"{name}'s example is no doctest"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "torchrl_dvla" / "__init__.py").read_text())
    conditions = [node for node in tree.body if isinstance(node, ast.If)]
    block = next(node for node in conditions if ast.unparse(node.test) == "TYPE_CHECKING")
    names = {a.name for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert names == set(NAMES)


def test_import_is_light(run_python) -> None:
    run = run_python("-c", "import sys, torchrl_dvla; print(*sys.modules)")
    assert run.returncode == 0
    heavy = {"torch", "torchrl", "tensordict", "transformers", "mujoco", "libero", "ray"}
    heavy |= {"hydra", "omegaconf", "torchrl_dvla.recipes"}
    assert not heavy & set(run.stdout.split())


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'GRPOLos'"):
        torchrl_dvla.GRPOLos  # noqa: B018


def test_version_is_told_once() -> None:
    try:
        installed = metadata.version("torchrl-dvla")
    except metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")
    assert installed == torchrl_dvla.__version__
