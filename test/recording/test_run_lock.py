# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

from torchrl_dvla.recording import RunLock


def test_the_owner_is_named_until_it_lets_go(tmp_path):
    lock = RunLock(tmp_path / "run")
    owner = re.escape(f"in use by process {os.getpid()} on {socket.gethostname()}, 20")
    with pytest.raises(ValueError, match=f"{owner}.*Wait for its end"):
        RunLock(tmp_path / "run")
    lock.release()
    RunLock(tmp_path / "run")


def test_a_process_that_is_killed_leaves_no_lock(tmp_path):
    script = (
        "import sys; from torchrl_dvla.recording import RunLock; lock = RunLock(sys.argv[1]); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on "):
            RunLock(tmp_path)
        process.kill()
    RunLock(tmp_path)
