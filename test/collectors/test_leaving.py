# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Scripts that end without ``shutdown()`` end all the same, and nothing outlives them."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("leaving_script.py")


@pytest.mark.parametrize("way", ["built", "end", "raise"])
def test_a_script_without_shutdown_ends(run_python, way):
    ended = run_python(SCRIPT, way)  # without the exit hook it never ends
    if way == "raise":
        assert ended.returncode == 1
        assert ended.stderr.strip().endswith("ValueError: the user's own mistake")
    else:
        assert ended.returncode == 0
    assert ended.stderr.count("Traceback") == (way == "raise"), ended.stderr
