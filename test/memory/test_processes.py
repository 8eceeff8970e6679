# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The pool across real processes: visibility, and what kill -9 leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from torchrl_dvla.memory import EnvironmentPool, RowLayout

LAYOUT = RowLayout({"image": ((3, 8, 8), torch.uint8), "step": ((1,), torch.int64)})

# Targets of processes must be importable by name; the builtin exec always is.
WRITER = """
pages = connection.recv()
for page in pages:
    for offset in range(view.rows_per_page):
        row = view.row(page, offset)
        view.rows["image"][row] = row
        view.rows["step"][row] = 100 + row
connection.send("written")
later = connection.recv()  # the second view comes over the pipe, to a process that runs already
later.rows["step"][0] = -1
connection.send("seen")
connection.recv()
"""

OWNER = """
import os, sys, torch
from torchrl_dvla.memory import EnvironmentPool, RowLayout
pool = EnvironmentPool(RowLayout({"x": ((1 << 20,), torch.uint8)}), num_pages=4, rows_per_page=2)
pool.rows["x"].fill_(1)
print("ready", flush=True)
sys.stdin.read()
"""


def _names() -> set[str]:
    folders = [folder for folder in ("/dev/shm", "/tmp") if os.path.isdir(folder)]
    ours = ("torchrl_dvla", "torch_", "pymp-", "psm_")
    return {
        f"{folder}/{name}"
        for folder in folders
        for name in os.listdir(folder)
        if name.startswith(ours)
    }


def _mentions(pid: int) -> set[str]:
    """Files that ``pid`` maps from a place that could outlive it."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(None, 5)[5] for line in maps if "/dev/shm/" in line or "/tmp/" in line}


def test_spawned_writers_and_kill_nine():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with EnvironmentPool(LAYOUT, num_pages=4, rows_per_page=2) as pool:
        arguments = {"view": pool.worker_view(), "connection": theirs}
        worker = context.Process(target=exec, args=(WRITER, arguments), daemon=True)
        worker.start()
        assert worker.pid is not None
        # The owner starts meanwhile: importing takes most of the time of this test.
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            done = [pool.lease("worker", 0), pool.lease("worker", 0)]
            open_page = pool.lease("worker", 1)
            ours.send([*done, open_page])
            assert ours.poll(120)
            assert ours.recv() == "written"
            pool.seal(done, num_rows=4)
            rows = pool.row_index(done, 4)
            assert pool.rows["step"][rows].flatten().tolist() == [100, 101, 102, 103]
            assert torch.equal(pool.rows["image"][3], torch.full((3, 8, 8), 3, dtype=torch.uint8))
            ours.send(pool.worker_view())
            assert ours.poll(60)
            assert ours.recv() == "seen"
            assert pool.rows["step"][0] == -1
            # Killed in the middle of its second rollout: that one is lost, the first is not.
            os.kill(worker.pid, signal.SIGKILL)
            worker.join(30)
            assert worker.exitcode == -signal.SIGKILL
            assert pool.reclaim("worker") == [int(open_page)]
            assert pool.stats()["pages_sealed"] == 2
            pool.check()

            assert owner.stdout is not None
            assert owner.stdout.readline() == b"ready\n"
            before = _names()
            assert _mentions(owner.pid) == set()  # its memory has no name to leave behind
            owner.kill()
            assert owner.wait(30) == -signal.SIGKILL
            assert _names() <= before
        finally:
            for process in (worker, owner):
                process.kill()
            worker.join(30)
            owner.communicate(timeout=30)
    ours.close()
    theirs.close()


def test_a_forked_child_cannot_free_the_parents_memory():
    pool = EnvironmentPool(LAYOUT, num_pages=1, rows_per_page=2)
    pool.rows["step"].fill_(5)
    pid = os.fork()
    if pid == 0:
        pool.rows["step"][1] = 6
        pool.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert pool.rows["step"].flatten().tolist() == [5, 6]
    pool.close()
