# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Scripts that end without ``shutdown()`` end all the same, and nothing outlives them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("leaving_script.py")
ROOT = SCRIPT.parents[2]


@pytest.mark.parametrize("way", ["built", "end", "raise"])
def test_a_script_without_shutdown_ends(way):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), way],
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=120.0,  # generous: it imports torch; without the exit hook it never ends
    )
    if way == "raise":
        assert ended.returncode == 1
        assert ended.stderr.strip().endswith("ValueError: the user's own mistake")
    else:
        assert ended.returncode == 0
    assert ended.stderr.count("Traceback") == (way == "raise"), ended.stderr
