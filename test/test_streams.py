# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

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


UNBUFFERED = """
import os
from multiprocessing.connection import Connection
from torchrl_dvla.streams import use_workers_output

source, target = os.pipe2(os.O_DIRECT)  # what is read at once was written at once
use_workers_output((Connection(target, readable=False),))
print("a", "line")
assert os.read(source, 100) == b"a line\\n"
"""


def test_a_line_of_a_worker_is_written_at_once():
    subprocess.run([sys.executable, "-u", "-c", UNBUFFERED], check=True)


SHARED = """
import logging, sys, threading, warnings
from tqdm import tqdm
from torchrl_dvla.streams import share_terminal
from torchrl_dvla.swimlane import ManagedProcess

def work(connection):
    import os
    print("worker: to stdout")
    print("worker: to stderr", file=sys.stderr)
    os.system("echo worker: not from Python")
    sys.stderr.write("bar 1\\rbar 2\\n")
    sys.stdout.write("worker: no end of line")
    sys.stdout.flush()
    connection.recv()

if __name__ == "__main__":
    share_terminal()
    from shared import work
    with tqdm(total=4, desc="the bar", dynamic_ncols=True, mininterval=0, miniters=0) as bar:
        process = ManagedProcess(work, (), name="worker")
        bar.update()
        warnings.warn("a warning")
        bar.update()
        logging.getLogger("somewhere").warning("a log message")
        print("in", "pieces", end="")
        other = threading.Thread(target=lambda: print("of another thread"))
        other.start()
        other.join()
        bar.update()
        print(", together")
        tqdm.write("by tqdm")
        process.stop(60.0)
        bar.update()
    print("no bar,", end=" ", flush=True)
    print("and the end")
"""


@pytest.fixture
def shared(tmp_path):
    """Output of SHARED on a terminal of 80 columns, or in a file."""
    (tmp_path / "shared.py").write_text(SHARED.replace("\\\\", "\\"))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    command = [sys.executable, str(tmp_path / "shared.py")]

    def run(is_terminal):
        if not is_terminal:
            with open(tmp_path / "out", "wb") as out:
                subprocess.run(command, env=env, stdout=out, stderr=out, check=True)
            return (tmp_path / "out").read_bytes().decode()
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        process = subprocess.Popen(command, env=env, stdout=theirs, stderr=theirs)
        os.close(theirs)
        parts = []
        while True:
            try:
                parts.append(os.read(ours, 1 << 16))
            except OSError:  # the other side is closed
                break
        os.close(ours)
        assert process.wait() == 0
        return b"".join(parts).decode().replace("\r\n", "\n")

    return run


@pytest.mark.parametrize("is_terminal", [True, False])
def test_every_line_is_whole_and_apart_from_the_bar(shared, is_terminal):
    output = shared(is_terminal)
    # What a terminal shows of a line is what was written over it last.
    shown = [line.rpartition("\r")[2] for line in output.split("\n")]
    lines = [line for line in shown if line and "the bar" not in line]
    assert sorted(lines) == sorted(
        [
            "worker: to stdout",
            "worker: to stderr",
            "worker: not from Python",
            "bar 2",
            "worker: no end of line",
            *[line for line in lines if re.fullmatch(r".*UserWarning: a warning", line)],
            '  warnings.warn("a warning")',
            "a log message",
            "of another thread",
            "in pieces, together",
            "by tqdm",
            "no bar, and the end",
        ]
    )
    assert len([line for line in lines if "UserWarning" in line]) == 1
    bars = [line for line in shown if "the bar" in line]
    assert len(bars) == 1 and "4/4" in bars[0], "the bar stays as it was at the end"
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]", output) if "the bar" in line)
