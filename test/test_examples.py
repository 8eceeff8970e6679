# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every example runs as its page says: from anywhere, on a CPU, and prints what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: What each example prints at the end.
LAST_LINE = {
    "evaluate_while_training.py": r"after: \d+% under policy version 12",
    "own_environment.py": r"after: ([89]\d|100)%",
    "timeline.py": r"critical lane: \w+",
    "weights_for_torchrl_collectors.py": r"batch 3: published 3, "
    r"adopted \{'worker 0': 3, 'worker 1': 3\}",
}


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(LAST_LINE)


@pytest.mark.parametrize("name", sorted(LAST_LINE))
def test_example(name, run_python):
    run = run_python(ROOT / "examples" / name)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(LAST_LINE[name], run.stdout.splitlines()[-1]), run.stdout
