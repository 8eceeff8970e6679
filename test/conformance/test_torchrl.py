# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's contracts: its public names, and its own tests on this package's classes.

The decisions are in the guide, docs/source/guide/torchrl_contracts.md, whose tables are read here.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GUIDE = (HERE.parents[1] / "docs/source/guide/torchrl_contracts.md").read_text()
TORCHRL_TESTS = os.environ.get("TORCHRL_TESTS")


def table(heading):
    """The rows of the last table below a heading; of a cell with code, the code."""
    section = GUIDE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    return [[re.findall(r"`([^`]+)`", cell) or [cell] for cell in row] for row in rows[1:]]


@pytest.mark.parametrize("ours", sorted({row[0][0] for row in table("Every inherited name")}))
def test_every_inherited_name_is_decided(ours):
    rows = {row[2][0]: row for row in table("Every inherited name") if row[0] == [ours]}
    cls, base = pkgutil.resolve_name(ours), pkgutil.resolve_name(rows["inherited"][1][0])
    root = next(c for c in base.__mro__[1:] if not c.__module__.startswith("torchrl"))
    names = {name for name in {*dir(base)} - {*dir(root)} if not name.startswith("_")}
    names |= {f"{name}=" for name in [*inspect.signature(base.__init__).parameters][1:]}
    assert sorted(name for row in rows.values() for name in row[3]) == sorted(names)
    for decision in rows.keys() - {"inherited"}:
        for name in (name for name in rows[decision][3] if not name.endswith("=")):
            assert inspect.getattr_static(cls, name) is not inspect.getattr_static(base, name)


def run(adapter, tests, report):
    """Node ids of the tests that passed, failed and were skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "torchrl_adapters", "-c", os.devnull]
    command += ["--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore", "--tb=no"]
    command += ["--timeout=180", "--timeout-method=signal", *tests]
    env = {**os.environ, "ADAPTER": adapter, "ADAPTER_REPORT": str(report)}
    env["PYTHONPATH"] = f"{HERE}{os.pathsep}{HERE.parents[1]}"
    report.unlink(missing_ok=True)
    done = subprocess.run(command, cwd=TORCHRL_TESTS, env=env, capture_output=True, text=True)
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(report.read_text())


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(
    TORCHRL_TESTS is None, reason="TORCHRL_TESTS must name the test folder of a TorchRL checkout"
)
@pytest.mark.parametrize("row", table("TorchRL's own tests"), ids=lambda row: row[0][0])
def test_what_fails_in_torchrls_own_tests_is_in_the_guide(row, tmp_path):
    (adapter,), tests = row[0], row[3]
    results = run(adapter, tests, tmp_path / "report.json")
    assert results["passed"]
    failed = {node: node.partition("[")[0] for node in results["failed"]}
    reasons = table("What fails there, and why")
    listed = [p for row in reasons if row[0] == [adapter] for p in row[1]]
    known = {name for p in listed for name in fnmatch.filter(failed.values(), f"*{p}")}
    unlisted = {node for node, name in failed.items() if name not in known}
    if unlisted:  # one that fails once, or on TorchRL's own classes, too, says nothing about ours
        names = sorted({failed[node] for node in unlisted})
        unlisted &= set(run(adapter, names, tmp_path / "report.json")["failed"])
        unlisted -= set(run("none", names, tmp_path / "report.json")["failed"])
    assert sorted(unlisted) == []
    stale = [p for p in listed if not fnmatch.filter(failed.values(), f"*{p}")]
    assert stale == [], "the guide lists tests that pass"
