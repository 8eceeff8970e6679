# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from tqdm import tqdm
from torchrl_dvla.streams import drop_unwritable_output

drop_unwritable_output()
sys.stdin.readline()  # until the reader has gone
for number in tqdm(range(3), miniters=1, mininterval=0.0):
    tqdm.write("x" * 100_000)
    print("buffered until the end")
sys.exit(7)
"""


@pytest.mark.parametrize("way", ["| head", ">&-"])
def test_a_reader_that_went_changes_nothing(way):
    out, theirs = os.pipe()
    closes = {"preexec_fn": lambda: (os.close(1), os.close(2))} if way == ">&-" else {}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        **closes,
    )
    os.close(theirs)
    os.close(out)
    process.communicate(b"\n")
    assert process.returncode == 7
