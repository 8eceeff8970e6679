# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Imports between the packages of torchrl_dvla: they point one way and form no circle."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrl_dvla

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "torchrl_dvla"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each line may import the lines above it, never its neighbours on the same line.
LEVELS: list[set[str]] = [
    {"functional", "memory"},
    {"data", "weight_update"},
    {"envs", "modules", "objectives"},
    {"swimlane"},
    {"recording"},
    {"collectors", "learner"},
    {"topology"},
    {"recipes"},
    {"commands"},
]
# What a user runs: it may import names of the root, as users write them.
PROGRAMS = {"recipes", "commands"}
# These import any package and are imported by none, save the doctor by its command.
LEAVES = {"testing", "doctor"}
# Modules of the root that any package but `functional` may import.
SHARED = {"_version", "differences", "findings", "saved_state", "streams", "validation"}
# `functional` is maths that can be lifted out: torch and itself.
FUNCTIONAL_MAY_IMPORT = {"torch", "torchrl_dvla.functional", *sys.stdlib_module_names}


def imported_names(
    source: str, package: str, *, with_type_checking: bool = True
) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a module imports, inside functions too."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(() if with_type_checking else node.body)
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def wrong_imports(source: str, package: str) -> list[str]:
    """Imports of a module in ``torchrl_dvla.<package>`` that point up or sideways."""
    allowed = {package} | SHARED
    for level in LEVELS:
        if package in level:
            break
        allowed |= level
    if package in PROGRAMS:
        allowed |= set(torchrl_dvla.__all__)
    if package == "commands":
        allowed |= {"doctor"}
    found = []
    for line, name in imported_names(source, f"torchrl_dvla.{package}"):
        parts = name.split(".")
        is_ours = parts[0] == "torchrl_dvla" and len(parts) > 1
        if is_ours and parts[1] not in allowed:
            found.append(f"line {line}: {package} must not import torchrl_dvla.{parts[1]}")
        if package == "functional" and not any(
            name == ok or name.startswith(f"{ok}.") for ok in FUNCTIONAL_MAY_IMPORT
        ):
            found.append(f"line {line}: functional imports torch only, got {name}")
    return found


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """For each module the modules that it imports; imports for type checkers do not count."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        is_package = any(name.startswith(f"{module}.") for name in sources)
        package = module if is_package else module.rpartition(".")[0]
        graph[module] = set()
        for _, name in imported_names(source, package, with_type_checking=False):
            # a name of a module, or a module
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources:
                graph[module].add(target)
    return graph


def test_imports_point_one_way() -> None:
    found = []
    for path in FILES:
        package, *rest = path.relative_to(PACKAGE).parts
        if not rest:
            assert path.stem in SHARED | {"__init__", "__main__"}, f"{path}: give it a package"
        else:
            assert package in LEAVES.union(*LEVELS), f"give {package} a level in {__file__}"
            found += [f"{path.name} {line}" for line in wrong_imports(path.read_text(), package)]
    assert not found, "\n".join(found)


def test_no_import_cycles() -> None:
    sources = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    graphlib.TopologicalSorter(import_graph(sources)).prepare()  # names the circle if it raises


def test_nothing_shipped_imports_testing() -> None:
    for path in (path for path in FILES if "testing" not in path.parts):
        for line, name in imported_names(path.read_text(), ""):
            assert not name.startswith("torchrl_dvla.testing"), f"{path}:{line}"


def test_hydra_is_imported_by_recipes_only() -> None:
    for path in (path for path in FILES if "recipes" not in path.parts):
        for line, name in imported_names(path.read_text(), ""):
            assert name.partition(".")[0] not in {"hydra", "omegaconf"}, f"{path}:{line}"


def test_ray_is_imported_by_the_cluster_only() -> None:
    """All else works without it, and what needs it says so."""
    for path in (path for path in FILES if "topology" not in path.parts):
        for line, name in imported_names(path.read_text(), ""):
            assert name.partition(".")[0] != "ray", f"{path}:{line}"


def test_no_other_module_opens_a_port() -> None:
    """Rows and weights travel in shared memory, messages in pipes: nobody can join from outside.

    Between machines Ray carries rows; who may connect is its business: those who have the token.
    Weights come in by a chain's receiver, from those who know the key that Ray has carried.
    Ranks of a learner form a process group of `torch.distributed`, on the loopback interface.
    """
    ports = {PACKAGE / "learner" / "ranks.py", PACKAGE / "weight_update" / "chain.py"}
    opens = {"listen", "create_server", "start_server", "Listener", "socketserver"}
    opens |= {"TCPStore", "ProcessGroupGloo", "init_process_group"}
    for path in (path for path in FILES if path not in ports):
        for node in ast.walk(ast.parse(path.read_text())):
            used = {getattr(node, field, None) for field in ("id", "attr", "module")}
            used.add(node.name if isinstance(node, ast.alias) else None)
            assert not used & opens, f"{path}:{node.lineno}"


def test_files_carry_the_licence() -> None:
    licence = "# Copyright (c) the torchrl_dvla authors.\n#\n"
    assert [path for path in FILES if not path.read_text().startswith(licence)] == []


@pytest.mark.parametrize(
    ("package", "source", "num_wrong"),
    [
        ("data", "from torchrl_dvla.memory import EnvironmentPool", 0),
        ("data", "from ..memory import EnvironmentPool", 0),
        ("data", "from torchrl_dvla.weight_update import WeightStore", 1),  # a neighbour
        ("data", "from torchrl_dvla import collectors", 1),  # upwards
        ("data", "def f():\n    import torchrl_dvla.swimlane.timeline", 1),  # hidden in a function
        ("data", "from ..collectors import DVLACollector", 1),  # relative
        ("collectors", "from torchrl_dvla.testing import FaultInjector", 1),
        ("collectors", "from torchrl_dvla.recipes.dvla_grpo import utils", 1),
        ("recipes", "from torchrl_dvla import GRPOLoss, collectors", 0),
        ("recipes", "from torchrl_dvla.commands import evaluate", 1),
        ("commands", "from torchrl_dvla import GRPOLoss, doctor", 0),
        ("collectors", "from torchrl_dvla import doctor", 1),
        ("collectors", "from torchrl_dvla import GRPOLoss", 1),  # by way of the root
        ("testing", "from torchrl_dvla.swimlane import Timeline", 0),
        ("functional", "from tensordict import TensorDict", 1),
        ("functional", "import torchrl_dvla.memory", 2),  # a neighbour, and not torch
    ],
)
def test_wrong_imports_are_seen(package: str, source: str, num_wrong: int) -> None:
    assert len(wrong_imports(source, package)) == num_wrong


def test_circles_are_seen() -> None:
    sources = {"p": "", "p.a": "from p import b", "p.b": "def f():\n    from .a import g"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(import_graph(sources)).prepare()
    sources["p.b"] = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import g"
    graphlib.TopologicalSorter(import_graph(sources)).prepare()
