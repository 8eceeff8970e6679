# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Does the environment pool lose, leak or mix up anything over a long run in which workers die?

    python benchmarks/pool_soak.py [--quick] [--trajectories 20000] [--workers 4] [--seed 0]

One process owns the pool, as the coordinator does. Worker processes write trajectories into pages
that they are given one by one; lengths follow a Pareto law (tail index 1.5, from 10 decisions, cut
at 400; mean about 26). Finished trajectories are adopted by a ``PooledStorage`` in groups of four,
and groups are evicted in random order. At random moments a random worker is killed with SIGKILL,
mostly in the middle of a write; its pages are reclaimed, and another process writes its trajectory
again. Every row of every trajectory is checked before its group is evicted: it must hold the
trajectory, the attempt and the position that were written there.

Memory is measured 40 times, of which the first 20, in the first half of the run, are the warm-up.
For each measurement all trajectories are finished and all groups evicted, so that the same things
are alive each time, and garbage and ``malloc`` have given back what they can. What is measured is
the resident anonymous memory of the owner and of one worker that is never killed; the pool itself
is no anonymous memory, its blocks are counted by ``pool_growth_bytes``. An allocator leaves a few
pages of 4096 bytes more or less behind each time (``samples`` has all of them), so growth is what
stands out of that: the least of the last five samples less the most of the first five, never below
0. ``growth_median_bytes`` beside it is not cut off at 0 and shows the noise. ``--leak-bytes`` has
the owner lose so many bytes at each trajectory, to see what would show: 32 do, by 0.5 MB.

The last line of stdout is one JSON object:

growth_bytes           as above, the owner and the worker added
growth_median_bytes    the median of the last five samples less that of the first five, added
external_fragmentation share of the free pages that one trajectory could not have had, at the worst
                       of the samples: before each, all pages that are free are leased for one
internal_waste         share of the pages of finished trajectories that held no row
pages_lost             pages that were not free when nobody had any, at the worst of the samples
pages_double_owned     leases of a page that, by a book of this benchmark's own, somebody still had
rows_wrong             rows that did not hold what was written, of ``rows_checked``
kills, pages_reclaimed workers killed, and the pages that came back from them
page_wait_s            time for which the pool had too few pages for the next trajectory
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import selectors
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from torchrl_dvla.data import PooledStorage
from torchrl_dvla.memory import EnvironmentPool, Page, RowLayout, RowWriter, WorkerView
from torchrl_dvla.swimlane import ManagedProcess
from torchrl_dvla.swimlane.messages import Stop

LAYOUT = RowLayout(
    {
        ("observation", "image"): ((3, 16, 16), torch.uint8),
        "serial": ((1,), torch.int64),
        ("observation", "state"): ((8,), torch.float32),
    }
)
ROWS_PER_PAGE = 4
NUM_PAGES = 1200
MAX_DECISIONS = 400
MIN_DECISIONS = 10
TAIL_INDEX = 1.5
GROUP_SIZE = 4
MAX_ATTEMPTS = 64
PAGES_PER_TRAJECTORY = -(-MAX_DECISIONS // ROWS_PER_PAGE)
NUM_SAMPLES = 20
#: Trajectories between two kills, on average.
KILL_EVERY = 50
_PR_SET_THP_DISABLE = 41


def serial(number: int, attempt: int, index: int) -> int:
    return (number * MAX_ATTEMPTS + attempt) * 1000 + index


def anonymous_bytes() -> int:
    """Resident private memory of this process, after it has given back what it can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("The kernel does not tell the anonymous memory of a process.")


def steady_heap() -> None:
    """Keep the kernel from turning pages of the heap into huge ones: 2 MiB of noise each."""
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def write_trajectories(connection: Connection, view: WorkerView) -> None:
    """Worker: write what is asked for, page by page; killed at any moment."""
    steady_heap()
    writer = RowWriter(view, list(LAYOUT))
    image = np.empty((3, 16, 16), np.uint8)
    while not isinstance(job := connection.recv(), Stop):
        if job == "measure":
            connection.send(("memory", anonymous_bytes()))
            continue
        number, attempt, length = job
        row, generation = 0, 0
        for index in range(length):
            if index % ROWS_PER_PAGE == 0:
                connection.send(("page", number))
                page, generation = connection.recv()
                row = page * ROWS_PER_PAGE
            value = serial(number, attempt, index)
            image.fill(value % 251)
            writer.write(row, generation, (image, value, float(index)))
            row += 1
        connection.send(("done", number))


@dataclass
class Trajectory:
    """What the owner knows of a trajectory."""

    number: int
    length: int
    attempt: int = 0
    pages: list[Page] = field(default_factory=list)


class Soak:
    """The owner: leases, seals, adopts, evicts, kills, and keeps a book of its own."""

    def __init__(self, num_trajectories: int, num_workers: int, seed: int, leak_bytes: int) -> None:
        self.leak_bytes = leak_bytes
        self.leaked: list[bytes] = []
        self.random = random.Random(seed)
        self.num_trajectories = num_trajectories
        self.pool = EnvironmentPool(LAYOUT, NUM_PAGES, ROWS_PER_PAGE)
        self.storage = PooledStorage(self.pool)
        self.selector = selectors.DefaultSelector()
        self.children: list[ManagedProcess] = []
        self.active: list[Trajectory | None] = [None] * num_workers
        for index in range(num_workers):
            self.children.append(self.start(index))
        self.again: deque[Trajectory] = deque()
        self.group: list[Trajectory] = []
        self.stored: dict[int, list[Trajectory]] = {}
        #: Who has each page, told by the moves that this class asked for.
        self.book: dict[int, int] = {}
        self.num_begun = self.num_finished = self.num_groups = self.num_kills = 0
        self.num_double_owned = self.num_lost = self.num_reclaimed = 0
        self.rows_checked = self.rows_wrong = 0
        self.fragmentation = 0.0
        self.until_kill = self.draw_kill()

    # -- lives ----------------------------------------------------------------------------------

    def start(self, index: int) -> ManagedProcess:
        child = ManagedProcess(
            write_trajectories, (self.pool.worker_view(),), name=f"writer-{index}"
        )
        self.selector.register(child.connection, selectors.EVENT_READ, index)
        return child

    def draw_length(self) -> int:
        return min(MAX_DECISIONS, int(MIN_DECISIONS * self.random.paretovariate(TAIL_INDEX)))

    def draw_kill(self) -> int:
        """Messages until the next kill."""
        return 1 + int(self.random.expovariate(1.0) * KILL_EVERY * 8)

    def begin(self, index: int) -> bool:
        if self.num_begun == self.num_trajectories and not self.again:
            return False
        while not self.pool.reserve(PAGES_PER_TRAJECTORY):
            if not self.stored:
                return False  # every page is in the hands of trajectories that go on
            self.evict(self.random.choice(list(self.stored)))
        if self.again:
            trajectory = self.again.popleft()
        else:
            trajectory = Trajectory(self.num_begun, self.draw_length())
            self.num_begun += 1
        self.active[index] = trajectory
        job = (trajectory.number, trajectory.attempt, trajectory.length)
        self.children[index].connection.send(job)
        return True

    def lease(self, trajectory: Trajectory) -> Page:
        page = self.pool.lease(trajectory.number, trajectory.number)
        self.num_double_owned += int(page) in self.book
        self.book[int(page)] = trajectory.number
        return page

    def forget(self, pages: list[Page]) -> None:
        for page in pages:
            del self.book[int(page)]

    def finish(self, index: int) -> None:
        trajectory = self.active[index]
        assert trajectory is not None
        self.active[index] = None
        self.pool.unreserve(PAGES_PER_TRAJECTORY - len(trajectory.pages))
        trajectory.pages = self.pool.seal(trajectory.pages, trajectory.length)
        self.num_finished += 1
        if self.leak_bytes:
            self.leaked.append(os.urandom(self.leak_bytes))
        self.group.append(trajectory)
        if len(self.group) == GROUP_SIZE:
            self.adopt()

    def adopt(self) -> None:
        """Move the finished trajectories into the storage, as a group."""
        if not self.group:
            return
        group, self.group = self.group, []
        key, self.num_groups = self.num_groups, self.num_groups + 1
        self.storage.adopt(key, [t.pages for t in group], [t.length for t in group])
        self.stored[key] = group

    def evict(self, key: int) -> None:
        group = self.stored.pop(key)
        rows = self.pool.rows[self.storage.segment_rows(key)]
        expected = torch.cat(
            [serial(t.number, t.attempt, 0) + torch.arange(t.length) for t in group]
        )
        index = torch.cat([torch.arange(t.length, dtype=torch.float32) for t in group])
        right = rows["serial"].flatten() == expected
        right &= (rows["observation", "image"].flatten(1) == (expected % 251)[:, None]).all(1)
        right &= (rows["observation", "state"] == index[:, None]).all(1)
        self.rows_checked += len(right)
        self.rows_wrong += int((~right).sum())
        self.storage.evict(key)
        for trajectory in group:
            self.forget(trajectory.pages)

    def kill(self, index: int) -> None:
        trajectory, self.active[index] = self.active[index], None
        self.selector.unregister(self.children[index].connection)
        self.children[index].kill()
        self.num_kills += 1
        if trajectory is not None:
            self.pool.unreserve(PAGES_PER_TRAJECTORY - len(trajectory.pages))
            self.num_reclaimed += len(self.pool.reclaim(trajectory.number))
            self.forget(trajectory.pages)
            trajectory.pages = []
            trajectory.attempt += 1
            assert trajectory.attempt < MAX_ATTEMPTS
            self.again.append(trajectory)
        self.children[index] = self.start(index)

    # -- the loop -------------------------------------------------------------------------------

    def run_until(self, num_finished: int) -> None:
        """Go on until so many trajectories are finished, or none is left."""
        while self.num_finished < num_finished:
            for index, trajectory in enumerate(self.active):
                if trajectory is None:
                    self.begin(index)
            if not any(self.active):
                raise RuntimeError(f"nothing runs: {self.pool!r}")
            for key, _ in self.selector.select():
                self.receive(key.data)
                self.until_kill -= 1
                if self.until_kill <= 0:
                    self.until_kill = self.draw_kill()
                    self.kill_someone(key.data)
                    break  # other keys may be of the dead

    def receive(self, index: int) -> None:
        kind, _ = self.children[index].connection.recv()
        trajectory = self.active[index]
        assert trajectory is not None
        if kind == "page":
            page = self.lease(trajectory)
            trajectory.pages.append(page)
            self.children[index].connection.send((int(page), page.generation))
        else:
            self.finish(index)

    def kill_someone(self, last: int) -> None:
        """The worker that was just given a page is likely to be writing; number 0 is spared."""
        victims = range(1, len(self.children))
        self.kill(
            last if last in victims and self.random.random() < 0.7 else self.random.choice(victims)
        )

    # -- measuring ------------------------------------------------------------------------------

    def sample(self) -> tuple[int, int]:
        """Anonymous memory of the owner and of worker 0 when nothing is alive."""
        self.measure_fragmentation()
        self.pool.check()
        for index in range(len(self.active)):
            while self.active[index] is not None:
                self.receive(index)
        self.adopt()
        for key in list(self.stored):
            self.evict(key)
        self.pool.check()
        assert not self.book
        self.num_lost = max(self.num_lost, NUM_PAGES - self.pool.num_free_pages)
        self.children[0].connection.send("measure")
        survivor = self.children[0].connection.recv()[1]
        return anonymous_bytes(), survivor

    def measure_fragmentation(self) -> None:
        """How much of what is free can one trajectory have? Ask for all of it."""
        num_free = self.pool.num_free_pages
        pages: list[Page] = []
        try:
            while len(pages) < num_free:
                pages.append(self.pool.lease("probe", reserved=False))
        except RuntimeError:
            pass
        if num_free:
            self.fragmentation = max(self.fragmentation, 1 - len(pages) / num_free)
        self.pool.free(pages)

    def stop(self) -> None:
        for child in self.children:
            child.stop(5.0)
        self.selector.close()
        self.pool.close()


def growth(samples: list[int]) -> int:
    """What the late samples have more than the early ones, beyond what either vary by."""
    part = len(samples) // 4
    return max(0, min(samples[-part:]) - max(samples[:part]))


def growth_median(samples: list[int]) -> float:
    part = len(samples) // 4
    return statistics.median(samples[-part:]) - statistics.median(samples[:part])


def soak(args: argparse.Namespace) -> dict[str, object]:
    num = args.trajectories or (1500 if args.quick else 20_000)
    num -= num % GROUP_SIZE
    start_s = time.monotonic()
    run = Soak(num, args.workers, args.seed, args.leak_bytes)
    try:
        pool_fd = run.pool._arena._fd
        pool_bytes = os.fstat(pool_fd).st_blocks * 512
        owner, survivor = [], []
        for step in range(1, 2 * NUM_SAMPLES + 1):
            run.run_until(num * step // (2 * NUM_SAMPLES))
            ours, theirs = run.sample()
            if step > NUM_SAMPLES:
                owner.append(ours)
                survivor.append(theirs)
            print(
                f"{run.num_finished}/{num} trajectories, {run.num_kills} kills, "
                f"{ours / 2**20:.2f} + {theirs / 2**20:.2f} MiB",
                file=sys.stderr,
                flush=True,
            )
        stats = run.pool.stats()
        return {
            "benchmark": "pool_soak",
            "growth_bytes": growth(owner) + growth(survivor),
            "growth_median_bytes": growth_median(owner) + growth_median(survivor),
            "pool_growth_bytes": os.fstat(pool_fd).st_blocks * 512 - pool_bytes,
            "external_fragmentation": run.fragmentation,
            "internal_waste": round(stats["internal_waste_total"], 4),
            "pages_lost": run.num_lost,
            "pages_double_owned": run.num_double_owned,
            "rows_wrong": run.rows_wrong,
            "rows_checked": run.rows_checked,
            "trajectories": run.num_finished,
            "mean_decisions": round(run.rows_checked / max(1, run.num_finished), 2),
            "kills": run.num_kills,
            "pages_reclaimed": run.num_reclaimed,
            "leases": stats["leases"],
            "page_wait_s": round(stats["page_wait_s"], 2),
            "samples": {
                "owner_bytes": [value - owner[0] for value in owner],
                "survivor_bytes": [value - survivor[0] for value in survivor],
                "owner_first_bytes": owner[0],
                "survivor_first_bytes": survivor[0],
            },
            "pool_bytes": run.pool.nbytes,
            "duration_s": round(time.monotonic() - start_s, 1),
            "machine": {
                "cores": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "quick": args.quick,
        }
    finally:
        run.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,500 trajectories")
    parser.add_argument("--trajectories", type=int)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leak-bytes", type=int, default=0, help="lost at each trajectory")
    args = parser.parse_args()
    if args.workers < 2:
        parser.error("--workers must be at least 2: one of them is never killed")
    torch.set_num_threads(1)
    steady_heap()
    print(json.dumps(soak(args)))


if __name__ == "__main__":
    main()
