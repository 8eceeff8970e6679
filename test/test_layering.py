# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The rooms and who may import whom: the picture in docs/source/guide/rooms.md, as a test."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "torchrl_dvla"
MAX_LINES = 800

# Each line may import the lines above it, never its neighbours on the same line.
LEVELS: list[set[str]] = [
    {"functional", "memory"},
    {"data", "weight_update"},
    {"envs", "modules", "objectives"},
    {"swimlane"},
    {"recording"},
    {"collectors"},
    {"topology"},
]
# Leaves import any room on a level; nobody imports them. `doctor` is the command line's.
LEAVES = {"simulation", "testing", "doctor"}
# Modules of the package's root: `__main__` calls what the commands do.
ROOT_MAY_IMPORT = {
    "__init__": set().union(*LEVELS),
    "__main__": {"doctor", "swimlane"},
    "_version": set(),
    "validation": set(),
}
# Modules of the package's root that everything but `functional` may import.
SHARED = {"validation"}
# `functional` is maths that can be lifted out: torch and itself.
FUNCTIONAL_MAY_IMPORT = {"torch", "torchrl_dvla.functional", *sys.stdlib_module_names}


def rooms_below(room: str) -> set[str]:
    """What a room may import, itself included."""
    if room in LEAVES:
        return {room}.union(*LEVELS)
    level = next(i for i, rooms in enumerate(LEVELS) if room in rooms)
    return {room}.union(*LEVELS[:level])


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, at any depth of nesting.

    Imports inside functions and under TYPE_CHECKING count as well: they are arrows too.
    """
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
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


def package_of(path: Path) -> str:
    return ".".join(["torchrl_dvla", *path.relative_to(PACKAGE).parent.parts])


def violations(path: Path, room: str, package: str) -> list[str]:
    found = []
    allowed = rooms_below(room)
    for line, name in imports(path, package):
        parts = name.split(".")
        if parts[0] == "torchrl_dvla" and len(parts) > 1:
            target = parts[1]
            if target not in allowed | SHARED and not target.startswith("_"):
                found.append(f"{path.name}:{line}: {room} must not import torchrl_dvla.{target}")
        if room == "functional" and not any(
            name == ok or name.startswith(f"{ok}.") for ok in FUNCTIONAL_MAY_IMPORT
        ):
            found.append(f"{path.name}:{line}: functional imports torch only, got {name}")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
IN_ROOMS = [path for path in FILES if path.parent != PACKAGE]


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_room_has_a_place() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0] for path in IN_ROOMS}
    unknown = rooms - LEAVES.union(*LEVELS)
    assert not unknown, f"give {sorted(unknown)} a level in {Path(__file__).name}"


@pytest.mark.parametrize("path", IN_ROOMS, ids=relative)
def test_imports_point_down(path: Path) -> None:
    assert violations(path, path.relative_to(PACKAGE).parts[0], package_of(path)) == []


def test_root_modules() -> None:
    for path in PACKAGE.glob("*.py"):
        assert path.stem in ROOT_MAY_IMPORT, f"{path.name}: code belongs in a room"
        for line, name in imports(path, "torchrl_dvla"):
            parts = name.split(".")
            if parts[0] == "torchrl_dvla" and len(parts) > 1 and not parts[1].startswith("_"):
                assert parts[1] in ROOT_MAY_IMPORT[path.stem], f"{path.name}:{line}: {name}"


def test_recipes_do_not_need_test_doubles() -> None:
    for path in (PACKAGE.parent / "sota-implementations").rglob("*.py"):
        for line, name in imports(path, ""):
            assert not name.startswith("torchrl_dvla.testing"), f"{path}:{line}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_stay_readable(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines, at most {MAX_LINES}: split it"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_carry_the_licence(path: Path) -> None:
    assert path.read_text().startswith("# Copyright (c) the torchrl_dvla authors.\n#\n")


@pytest.mark.parametrize(
    ("room", "source", "num_violations"),
    [
        ("data", "from torchrl_dvla.memory import EnvironmentPool", 0),
        ("data", "from torchrl_dvla.data.schema import IMAGE_KEY", 0),
        ("data", "from ..memory import EnvironmentPool", 0),
        ("data", "from torchrl_dvla.weight_update import WeightStore", 1),  # a neighbour
        ("data", "from torchrl_dvla import collectors", 1),  # upwards
        ("data", "def f():\n    import torchrl_dvla.swimlane.timeline", 1),  # hidden in a function
        ("data", "from ..collectors import DVLACollector", 1),  # relative
        ("collectors", "from torchrl_dvla.testing import FaultInjector", 1),
        ("testing", "from torchrl_dvla.swimlane import Timeline", 0),
        ("functional", "import torch\nimport math", 0),
        ("functional", "from tensordict import TensorDict", 1),
        ("functional", "import torchrl_dvla.memory", 2),  # a neighbour, and not torch
    ],
)
def test_the_test_sees(tmp_path: Path, room: str, source: str, num_violations: int) -> None:
    file = tmp_path / "module.py"
    file.write_text(source)
    assert len(violations(file, room, f"torchrl_dvla.{room}")) == num_violations
