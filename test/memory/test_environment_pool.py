# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch

from torchrl_dvla.memory import EnvironmentPool, RowLayout, RowWriter

STEPS = RowLayout({"image": ((3, 8, 8), torch.uint8), "step": ((1,), torch.int64)})
LAYOUT = RowLayout(
    {"image": ((3, 4, 4), torch.uint8), "state": ((2,), torch.float32), "done": ((1,), torch.bool)}
)


@pytest.fixture
def pool():
    with EnvironmentPool(LAYOUT, num_pages=5, rows_per_page=3) as pool:
        yield pool
        pool.check()


def test_rows_and_pages(pool):
    assert pool.rows.batch_size == (15,)
    first, second = pool.lease("worker"), pool.lease("worker")
    assert pool.row_index([second, first], num_rows=4).tolist() == [3, 4, 5, 0]
    assert pool.row_index([second]).tolist() == [3, 4, 5]
    assert pool.row_index([]).tolist() == []
    rows = pool.row_index_of([[second, first], [], [first]], [4, 0, 2])
    assert rows.tolist() == [3, 4, 5, 0, 0, 1]
    assert pool.stats()["used_bytes"] == 6 * LAYOUT.row_bytes
    assert pool.stats()["reserved_bytes"] == pool.nbytes == EnvironmentPool.nbytes_for(LAYOUT, 5, 3)


def test_a_view_elsewhere_sees_every_write(pool):
    view = pickle.loads(pickle.dumps(pool.worker_view()))
    view.rows["state"][2] = torch.tensor([1.0, 2.0])
    assert pool.rows["state"][2].tolist() == [1.0, 2.0]
    pool.rows["image"][14] = 255
    assert view.rows["image"][14].min() == 255
    del view
    assert pool.rows["state"][2].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("rows_per_page", [1, 3, 4, 16])
def test_a_budget_is_used_to_the_last_page_and_never_exceeded(rows_per_page):
    budget = 10_000
    num_pages = EnvironmentPool.pages_within(LAYOUT, budget, rows_per_page)
    assert EnvironmentPool.nbytes_for(LAYOUT, num_pages + 1, rows_per_page) > budget
    with EnvironmentPool(LAYOUT, num_pages, rows_per_page) as pool:
        assert pool.nbytes <= budget
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0. Raise the byte"):
        EnvironmentPool(LAYOUT, 0, rows_per_page)


def test_only_the_view_travels(pool):
    with pytest.raises(TypeError, match=r"Send pool\.worker_view\(\)"):
        pickle.dumps(pool)


def test_the_ledger_outlives_the_memory():
    pool = EnvironmentPool(LAYOUT, 2, 2)
    page = pool.lease("worker")
    view = pool.rows["state"].fill_(1.0)
    pool.close()
    pool.close()
    assert not view.any()
    for use in (lambda: pool.rows, pool.worker_view):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    pool.free([page])  # a late clean-up is no crash
    pool.check()


# -- across processes: visibility, and what kill -9 leaves behind ---------------------------------
# Targets of processes must be importable by name; the builtin exec always is.
WRITER = """
import signal
from torchrl_dvla.memory import RowWriter

class Stop:
    def __array__(self, *args, **kwargs):  # numpy asks for it when the field is to be written
        connection.send("half written")
        signal.pause()

pages = connection.recv()
writer = RowWriter(view, ["image", "step"])
for page in pages:
    for offset in range(view.rows_per_page):
        row = page * view.rows_per_page + offset
        writer.write(row, page.generation, [row, 100 + row])
connection.send("written")
later = connection.recv()  # the second view comes over the pipe, to a process that runs already
later.rows["step"][0] = -1
connection.send("seen")
page = connection.recv()
writer.write(page * view.rows_per_page, page.generation, [255, Stop()])
"""


def _mentions(pid: int) -> set[str]:
    """Files that ``pid`` maps, besides its parent, from a place that could outlive it."""

    def files(pid):
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.split(None, 5)[5] for line in maps if "/dev/shm/" in line or "/tmp/" in line}

    return files(pid) - files(os.getpid())


def test_a_spawned_writer_is_seen_and_its_death_costs_only_what_it_was_writing():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with EnvironmentPool(STEPS, num_pages=4, rows_per_page=2) as pool:
        arguments = {"view": pool.worker_view(), "connection": theirs}
        worker = context.Process(target=exec, args=(WRITER, arguments), daemon=True)
        worker.start()
        assert worker.pid is not None

        def answer():
            assert ours.poll(150)
            return ours.recv()

        try:
            done = [pool.lease("worker", 0), pool.lease("worker", 0)]
            open_page = pool.lease("worker", 1)
            ours.send([*done, open_page])
            assert answer() == "written"
            pool.seal(done, num_rows=4)
            rows = pool.row_index(done, 4)
            assert pool.rows["step"][rows].flatten().tolist() == [100, 101, 102, 103]
            assert torch.equal(pool.rows["image"][3], torch.full((3, 8, 8), 3, dtype=torch.uint8))
            ours.send(pool.worker_view())
            assert answer() == "seen"
            assert pool.rows["step"][0] == -1
            # Killed between two fields of a row: that rollout is lost, the sealed one is not.
            ours.send(open_page)
            assert answer() == "half written"
            row = int(open_page) * 2
            assert (pool.rows["image"][row].min(), pool.rows["step"][row]) == (255, 100 + row)
            assert _mentions(worker.pid) == set()
            os.kill(worker.pid, signal.SIGKILL)
            worker.join(30)
            assert worker.exitcode == -signal.SIGKILL
            assert pool.reclaim("worker") == [int(open_page)]
            assert pool.stats()["pages_sealed"] == 2
            assert pool.rows["step"][rows].flatten().tolist() == [-1, 101, 102, 103]
            # The page is leased anew; a late write under the old lease is refused.
            again = pool.lease("other", 2)
            assert int(again) == int(open_page)
            with pytest.raises(RuntimeError, match="which is leased anew"):
                RowWriter(pool.worker_view(), ["step"]).write(row, open_page.generation, [0])
            pool.check()
        finally:
            worker.kill()
            worker.join(30)
    ours.close()
    theirs.close()


def test_an_owner_killed_with_nine_leaves_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # no use of it in a fork
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Only system calls and single-threaded writes: a fork of a process with threads may not
        # take their locks.
        try:
            pool = EnvironmentPool(STEPS, num_pages=64, rows_per_page=64)
            pool.rows["image"].numpy().fill(1)
            os.write(write, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(write)
        assert os.read(read, 1) == b"x"
        assert _mentions(pid) == set()  # its memory has no name to leave behind
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)


def test_a_forked_child_cannot_free_the_parents_memory():
    pool = EnvironmentPool(STEPS, num_pages=1, rows_per_page=2)
    pool.rows["step"].fill_(5)
    pid = os.fork()
    if pid == 0:
        pool.rows["step"][1] = 6
        pool.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert pool.rows["step"].flatten().tolist() == [5, 6]
    pool.close()
