# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Size of the project: files and code lines of the package, lines of tests and benchmarks.

Code lines are lines without docstrings, comments and blank lines. For information: the exit code is
0 whatever is counted. With paths as arguments, counts those instead.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_FILES, MAX_CODE_LINES, MAX_TEST_LINES = 120, 14_000, 22_000


def python_files(path: Path) -> list[Path]:
    """Python files below a folder, or the file itself."""
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def num_lines(path: Path) -> int:
    """All lines of a file."""
    return len(path.read_text().splitlines())


def num_code_lines(path: Path) -> int:
    """Lines of a file without docstrings, comments and blank lines."""
    text = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(
        1
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in docstrings
    )


def main() -> None:
    """Print the sizes of the project, or of the paths given."""
    if sys.argv[1:]:
        for path in map(Path, sys.argv[1:]):
            files = python_files(path)
            code, lines = sum(map(num_code_lines, files)), sum(map(num_lines, files))
            print(f"{path}: {len(files)} files, {code} code lines, {lines} lines")
        return
    package = python_files(ROOT / "torchrl_dvla")
    tests = [*python_files(ROOT / "test"), *python_files(ROOT / "benchmarks")]
    for what, size, limit in (
        ("files of torchrl_dvla", len(package), MAX_FILES),
        ("code lines of torchrl_dvla", sum(map(num_code_lines, package)), MAX_CODE_LINES),
        ("lines of test and benchmarks", sum(map(num_lines, tests)), MAX_TEST_LINES),
    ):
        verdict = "within" if size <= limit else "above"
        print(f"{size:6d} {what}, {verdict} {limit}")


if __name__ == "__main__":
    main()
