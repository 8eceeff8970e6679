# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Environment pool over a long run in which workers die: does it lose or mix up pages?

    python benchmarks/pool_soak.py [--quick] [--trajectories 20000] [--seed 0]

One process owns the pool, as the collector does. Worker processes write trajectories into pages
that they are given one by one; lengths follow a Pareto law (mean about 26 decisions, cut at 400).
Finished trajectories are stored in groups of four, and groups leave in random order. At random
moments a random worker is killed with SIGKILL, mostly in the middle of a write; its pages are
reclaimed, and another process writes its trajectory again. Before a group leaves, every row is
checked: it must hold the trajectory, the attempt and the position that were written there.

The last line of stdout is one JSON object:

internal_waste         share of the pages of finished trajectories that held no row
pages_lost             pages that were not free when nobody had any, at the worst of 40 counts
pages_double_owned     leases of a page that, by this benchmark's own record, somebody still had
rows_wrong             rows that did not hold what was written, of ``rows_checked``
kills, pages_reclaimed workers killed, and the pages that came back from them
page_wait_s            time for which the pool had too few pages for the next trajectory
"""

from __future__ import annotations

import argparse
import os
import random
import selectors
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _machine import arguments, log, report

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
GROUP_SIZE = 4
#: One of them is never killed.
NUM_WORKERS = 4
MAX_ATTEMPTS = 64
PAGES_PER_TRAJECTORY = -(-MAX_DECISIONS // ROWS_PER_PAGE)
#: Share of the messages, about eight a trajectory, after which a worker is killed.
KILL_SHARE = 1 / 400


def serial(number: int, attempt: int, index: int) -> int:
    return (number * MAX_ATTEMPTS + attempt) * 1000 + index


def write_trajectories(connection: Connection, view: WorkerView) -> None:
    """Worker: write what is asked for, page by page; killed at any moment."""
    writer = RowWriter(view, list(LAYOUT))
    image = np.empty((3, 16, 16), np.uint8)
    while not isinstance(job := connection.recv(), Stop):
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
    """The owner: leases, seals, stores, frees, kills, and keeps its own record of all pages."""

    def __init__(self, num_trajectories: int, num_workers: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.num_trajectories = num_trajectories
        self.pool = EnvironmentPool(LAYOUT, NUM_PAGES, ROWS_PER_PAGE)
        self.selector = selectors.DefaultSelector()
        self.active: list[Trajectory | None] = [None] * num_workers
        self.children = [self.start(index) for index in range(num_workers)]
        self.again: deque[Trajectory] = deque()
        self.group: list[Trajectory] = []
        self.stored: dict[int, list[Trajectory]] = {}
        #: The trajectory that has each page.
        self.owners: dict[int, int] = {}
        self.num_begun = self.num_finished = self.num_groups = self.num_kills = 0
        self.num_double_owned = self.num_lost = self.rows_checked = self.rows_wrong = 0

    def start(self, index: int) -> ManagedProcess:
        child = ManagedProcess(
            write_trajectories, (self.pool.worker_view(),), name=f"writer-{index}"
        )
        self.selector.register(child.connection, selectors.EVENT_READ, index)
        return child

    def begin(self, index: int) -> None:
        if self.num_begun == self.num_trajectories and not self.again:
            return
        while not self.pool.reserve(PAGES_PER_TRAJECTORY):
            if not self.stored:
                return  # every page is leased to a trajectory that goes on
            self.evict(self.random.choice(list(self.stored)))
        if self.again:
            trajectory = self.again.popleft()
        else:
            length = int(10 * self.random.paretovariate(1.5))
            trajectory = Trajectory(self.num_begun, min(MAX_DECISIONS, length))
            self.num_begun += 1
        self.active[index] = trajectory
        job = (trajectory.number, trajectory.attempt, trajectory.length)
        self.children[index].connection.send(job)

    def store(self) -> None:
        """Store the finished trajectories as a group."""
        if not self.group:
            return
        self.stored[self.num_groups], self.group = self.group, []
        self.pool.store([page for t in self.stored[self.num_groups] for page in t.pages])
        self.num_groups += 1

    def evict(self, key: int) -> None:
        """Check the rows of a group and free its pages."""
        group = self.stored.pop(key)
        index = self.pool.row_index_of([t.pages for t in group], [t.length for t in group])
        rows = self.pool.rows[index]
        first = [serial(t.number, t.attempt, 0) for t in group]
        expected = torch.cat([n + torch.arange(t.length) for n, t in zip(first, group)])
        index = torch.cat([torch.arange(t.length, dtype=torch.float32) for t in group])
        right = rows["serial"].flatten() == expected
        right &= (rows["observation", "image"].flatten(1) == (expected % 251)[:, None]).all(1)
        right &= (rows["observation", "state"] == index[:, None]).all(1)
        self.rows_checked += len(right)
        self.rows_wrong += int((~right).sum())
        pages = [page for t in group for page in t.pages]
        self.pool.free(pages)
        for page in pages:
            del self.owners[int(page)]

    def kill(self, index: int) -> None:
        trajectory, self.active[index] = self.active[index], None
        self.selector.unregister(self.children[index].connection)
        self.children[index].kill()
        self.num_kills += 1
        if trajectory is not None:
            self.pool.unreserve(PAGES_PER_TRAJECTORY - len(trajectory.pages))
            for page in self.pool.reclaim(trajectory.number):
                del self.owners[page]
            trajectory.pages = []
            trajectory.attempt += 1
            self.again.append(trajectory)
        self.children[index] = self.start(index)

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
                if self.random.random() < KILL_SHARE:
                    # The worker that was just given a page is likely to be writing.
                    others = range(1, len(self.children))
                    is_last = key.data in others and self.random.random() < 0.7
                    self.kill(key.data if is_last else self.random.choice(others))
                    break  # other keys may be of the dead

    def receive(self, index: int) -> None:
        kind, _ = self.children[index].connection.recv()
        trajectory = self.active[index]
        assert trajectory is not None
        if kind == "page":
            page = self.pool.lease(trajectory.number, trajectory.number)
            self.num_double_owned += int(page) in self.owners
            self.owners[int(page)] = trajectory.number
            trajectory.pages.append(page)
            self.children[index].connection.send((int(page), page.generation))
            return
        self.active[index] = None
        self.pool.unreserve(PAGES_PER_TRAJECTORY - len(trajectory.pages))
        trajectory.pages = self.pool.seal(trajectory.pages, trajectory.length)
        self.num_finished += 1
        self.group.append(trajectory)
        if len(self.group) == GROUP_SIZE:
            self.store()

    def count_lost(self) -> None:
        """Finish and evict everything: pages that are not free then are lost."""
        self.pool.check()
        for index in range(len(self.active)):
            while self.active[index] is not None:
                self.receive(index)
        self.store()
        for key in list(self.stored):
            self.evict(key)
        self.pool.check()
        assert not self.owners
        self.num_lost = max(self.num_lost, NUM_PAGES - self.pool.num_free_pages)

    def stop(self) -> None:
        for child in self.children:
            child.stop(5.0)
        self.selector.close()
        self.pool.close()


def soak(args: argparse.Namespace) -> dict[str, object]:
    num = args.trajectories or (1500 if args.quick else 20_000)
    num -= num % GROUP_SIZE
    run = Soak(num, NUM_WORKERS, args.seed)
    try:
        for step in range(1, 41):
            run.run_until(num * step // 40)
            run.count_lost()
            log(f"{run.num_finished}/{num} trajectories, {run.num_kills} kills")
        stats = run.pool.stats()
    finally:
        run.stop()
    return {
        "internal_waste": round(stats["internal_waste_total"], 4),
        "pages_lost": run.num_lost,
        "pages_double_owned": run.num_double_owned,
        "rows_wrong": run.rows_wrong,
        "rows_checked": run.rows_checked,
        "trajectories": run.num_finished,
        "kills": run.num_kills,
        "pages_reclaimed": stats["pages_reclaimed"],
        "page_wait_s": round(stats["page_wait_s"], 2),
    }


def main() -> None:
    args = arguments(__doc__, "1,500 trajectories", trajectories=int, seed=0)
    torch.set_num_threads(1)
    report("pool_soak", soak(args), args.quick)


if __name__ == "__main__":
    main()
