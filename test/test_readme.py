# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the README promises is true: its program runs, its files and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MAX_LINES = 28


def snippet() -> str:
    between = re.search(r"<!-- snippet -->(.*?)<!-- end of snippet -->", README, re.DOTALL)
    assert between is not None
    program = re.fullmatch(r"\s*```python\n(.*?)```\s*", between[1], re.DOTALL)
    assert program is not None
    return program[1]


def test_snippet_is_short() -> None:
    assert len(snippet().splitlines()) <= MAX_LINES


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_snippet_runs(tmp_path: Path, run_python) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(snippet())
    run = run_python(file)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"(update \d+: \d+% success\n){5}", run.stdout), run.stdout
    assert "Traceback" not in run.stderr
    # nothing is left that somebody would have to clean up
    assert "resource_tracker" not in run.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/source/guide/*.md"), *ROOT.glob("examples/*.md")]
    for page in pages:
        for line in page.read_text().splitlines():
            command = re.match(r"\s*\$ make ([a-z ]+)", line)
            mentioned = re.findall(r"`make ([a-z]+)", line)
            used = {*mentioned, *(command[1].split() if command else [])}
            assert used <= targets, f"{page.name}: {line.strip()}"
