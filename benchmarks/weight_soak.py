# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Does a reader ever see a mix of two versions, whoever is killed and whenever?

    python benchmarks/weight_soak.py [--quick] [--adoptions 100000] [--seed 0]

A writer publishes all the time; readers adopt each version that they meet and read every weight
twice. At random moments readers are killed (SIGKILL) and replaced, and the writer is killed; what
it leaves must be one whole version, the same for every reader and for one that comes late. Then a
new writer with a new store begins: in turns with weights of 20 KB, which are copied and checked in
one piece, and of 6 MB, in several. The last line of stdout is one JSON object:

torn_reads        reads that mixed two versions
num_adoptions     adoptions that were read; the run ends when there are enough of them
num_large         those of the large weights
num_backwards     adoptions of an older version than the one before
num_bad_ends      readers that did not find the same whole version after the writer's death
num_deferred      versions that found no free slot at once (three slots, all readers behind)
num_reader_kills, num_writer_kills
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _machine import arguments, log, report
from torch import nn

from torchrl_dvla.weight_update import WeightReader, WeightStore

ADOPTIONS, TORN, BACKWARDS, PID, END_VERSION = range(5)
#: Words that belong to all: end of the epoch, and versions deferred by the writer.
IS_OVER, DEFERRED = 0, 1
#: Elements of one of five tensors, in turns.
NUMELS = (1_024, 300_000)
NUM_READERS = 3
NOT_YET, BAD = -1, -2
_PR_SET_CHILD_SUBREAPER = 36


class Constant(nn.Module):
    """Weights that all have one value, in five tensors."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(numel) for _ in range(5))

    def is_whole(self, value: float) -> bool:
        """Whether every element is ``value``, read twice with other work between."""
        return all(bool((part == value).all()) for _ in range(2) for part in self.parts)


def forked(body: Callable[[], None]) -> int:
    """Run ``body`` in a child; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return pid


def read(reader: WeightReader, numel: int, words: torch.Tensor, row: torch.Tensor) -> None:
    module, previous = Constant(numel), -1
    mine, shared = row.numpy(), words.numpy()
    mine[PID] = os.getpid()
    while not shared[IS_OVER]:
        version = reader.adopt_into(module)
        if version != previous:
            mine[ADOPTIONS] += 1
            mine[TORN] += not module.is_whole(float(version))
            mine[BACKWARDS] += version < previous
        previous = version
    version = reader.adopt_into(module)
    mine[END_VERSION] = version if module.is_whole(float(version)) else BAD


def write(numel: int, words: torch.Tensor, rows: torch.Tensor) -> None:
    """Publish all the time, and replace readers that were killed; the last row's one comes late."""
    learner = Constant(numel)
    store = WeightStore(learner, max_readers=len(rows) + 4)
    names: dict[int, int] = {}

    def start(index: int) -> None:
        reader = store.reader(index)
        names[forked(lambda: read(reader, numel, words, rows[index]))] = index

    for index in range(len(rows) - 1):
        start(index)
    late = store.reader("late")

    def wait_and_read() -> None:
        rows[-1, PID] = os.getpid()
        while not int(words[IS_OVER]):
            time.sleep(0.01)
        read(late, numel, words, rows[-1])

    forked(wait_and_read)
    while True:
        with torch.no_grad():
            torch._foreach_add_(list(learner.parts), 1.0)
        store.publish()
        words[DEFERRED] = store.stats().num_deferred
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if pid in names:
            index = names.pop(pid)
            store.release(index)
            start(index)


def run_epoch(
    generator: random.Random, numel: int, rows: torch.Tensor, goal: int
) -> dict[str, int]:
    """One writer from birth to death."""
    num_before = int(rows[:, ADOPTIONS].sum())
    words = torch.zeros(2, dtype=torch.int64).share_memory_()
    rows[:, PID], rows[:, END_VERSION] = 0, NOT_YET
    num_reader_kills = 0
    writer = forked(lambda: write(numel, words, rows))
    end_s = time.monotonic() + generator.uniform(0.5, 3.0)
    while time.monotonic() < end_s and int(rows[:, ADOPTIONS].sum()) < goal:
        time.sleep(generator.uniform(0.0, 0.1))
        pid = int(rows[generator.randrange(len(rows) - 1), PID])
        if pid and generator.random() < 0.5:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                num_reader_kills += 1
    while not rows[-1, PID]:  # a slow start: not everybody is there yet
        time.sleep(0.01)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    words[IS_OVER] = 1
    # A reader that was killed last has not been replaced: its writer was dead.
    deadline = time.monotonic() + 30.0
    while True:
        try:
            os.waitpid(-1, 0 if time.monotonic() < deadline else os.WNOHANG)
        except ChildProcessError:
            break
    ends = [int(end) for end in rows[:, END_VERSION] if int(end) != NOT_YET]
    num_bad_ends = sum(end == BAD or end != ends[-1] for end in ends)
    if int(rows[-1, END_VERSION]) == NOT_YET:
        num_bad_ends += 1  # nobody kills the late one
    num_adoptions = int(rows[:, ADOPTIONS].sum()) - num_before
    return {
        "num_large": num_adoptions if numel == max(NUMELS) else 0,
        "num_reader_kills": num_reader_kills,
        "num_writer_kills": 1,
        "num_bad_ends": num_bad_ends,
        "num_ends_compared": len(ends),
        "num_deferred": int(words[DEFERRED]),
    }


def main() -> None:
    args = arguments(__doc__, "10,000 adoptions", adoptions=int, seed=0)
    torch.set_num_threads(1)
    # Readers whose writer was killed become children of this process, which waits for them.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    goal = args.adoptions or (10_000 if args.quick else 100_000)
    rows = torch.zeros(NUM_READERS + 1, 5, dtype=torch.int64).share_memory_()
    generator, totals, start_s = random.Random(args.seed), dict[str, int](), time.monotonic()
    for numel in itertools.cycle(NUMELS):
        if int(rows[:, ADOPTIONS].sum()) >= goal:
            break
        for key, value in run_epoch(generator, numel, rows, goal).items():
            totals[key] = totals.get(key, 0) + value
        log(f"{int(rows[:, ADOPTIONS].sum())} of {goal} adoptions")
    result = {
        "torn_reads": int(rows[:, TORN].sum()),
        "num_adoptions": int(rows[:, ADOPTIONS].sum()),
        "num_backwards": int(rows[:, BACKWARDS].sum()),
        **totals,
        "readers": NUM_READERS,
        "seed": args.seed,
        "duration_s": round(time.monotonic() - start_s, 1),
    }
    report("weight_soak", result, args.quick)
    if result["torn_reads"] or result["num_backwards"] or totals["num_bad_ends"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
