# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does each main idea of the design bring? Each is switched off alone, on the same workload.

    python benchmarks/ablations.py [--quick]

**The latencies are emulated**: the mix ``sampling_equals_gradient`` of ``overlap.py``, with images
of 128x128 and a policy of 128 MB, most of which is published and adopted but computes nothing. So
is the link of ``remote_inference``. All else is real: ``DVLACollector`` with worker processes, an
inference process, pages, admission, a publication of weights after each update. The package has no
switch for any of this: what is switched off is wrapped here, in the processes of that arrangement.

full
    everything on.
one_lane_after_another
    collect, then learn, then publish: the sequential loop of ``overlap.py``.
shared_lock_and_queue
    rows and weights queue for one lock of all processes, held by a worker that writes a row, by the
    inference process that gathers or scatters rows, or fetches a version, as a whole copy, by the
    learner that gathers a minibatch or publishes, and by the collector that begins or ends a group.
one_pool
    rows and weights take memory from one pool, the system's, when they are written, and give it
    back: a page's when the page is freed, a slot's before its next version; minibatches are
    allocated anew. Names and descriptors of fresh blocks, which cost more, are not in it. Nor is
    what one heap of both kinds would fragment: rows are found by number in one block, so that
    cannot be had without changing the package.
remote_inference
    observations cross a link to the policy, decisions come back; 1 ms each way, up to 1 ms of a
    timer, and 1 Gbit/s that all share. Nobody but the rollout waits. Versions are adopted as in
    ``full``: one copy of each goes to a node that decides for itself, too.

learned_per_s            decisions a second that were learned from; ``ratio_vs_full`` by rounds
publish_s                how long a publication kept the learner, of all publications
learner_waits            share of the time that the learner waited for a cohort
memory_mb                of all processes, private and shared, at the end
growth_mb_per_minute     its trend in the second half, interval of 95 %, and whether it ``grows`` by
                         more than 1 %, as ``collector_soak.py`` says it

All arrangements are built once and take turns, between which their processes are stopped. The last
line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import functools
import mmap
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from _machine import arguments, paired_ratio, report, spread
from _turns import in_turns
from collector_soak import describe, sample
from overlap import EQUAL, MIXES, Draws, Loop, Mix, make_env, make_policy, running
from tensordict import TensorDictBase
from torch import nn
from torchrl.modules.vla import TinyVLA

from torchrl_dvla.collectors.decision_batcher import DecisionBatcher
from torchrl_dvla.data import GroupQueue
from torchrl_dvla.data.schema import OBSERVATION_KEY, VLA_ACTION_KEY
from torchrl_dvla.memory import EnvironmentPool, RowFields, RowLayout, RowWriter, SharedArena
from torchrl_dvla.testing import Latency, emulate_latency
from torchrl_dvla.weight_update import AsyncWeightUpdater, WeightReader
from torchrl_dvla.weight_update.slot_writer import SlotWriter

ARRANGEMENTS = (
    *("full", "one_lane_after_another"),
    *("shared_lock_and_queue", "one_pool", "remote_inference"),
)
MIX = replace(MIXES[EQUAL], image_size=128)
WEIGHT_BYTES = 128 << 20
#: Of the emulated link, each way.
ONE_WAY_S, BYTES_PER_S = 1e-3, 125e6


def large_policy() -> TinyVLA:
    """The policy of ``overlap.py``, with parameters that it does not compute with."""
    policy = make_policy(MIX)
    policy.others = nn.ParameterList(torch.rand(1024, 1024) for _ in range(WEIGHT_BYTES >> 22))
    return policy


def wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Have ``around(method, ...)`` called for a method of the package in this process."""
    method = getattr(owner, name)
    if hasattr(method, "__wrapped__"):  # by another environment of the worker
        return

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    setattr(owner, name, call)


# -- planes that share a lock ----------------------------------------------------------------------
class OneLock(threading.local):
    """A lock of all processes and threads that know its file; not re-entrant."""

    def __init__(self, path: str) -> None:  # in every thread: what excludes others is an open file
        self._file = open(path)  # noqa: SIM115

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *exc_info: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


def share_lock(path: str) -> None:
    """Have all that moves rows or weights in this process hold the one lock."""
    lock = OneLock(path)

    def hold(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with lock:
            return method(*args, **kwargs)

    for owner, names in (
        (RowWriter, ("write", "write_from")),
        (RowFields, ("gather", "scatter")),
        (GroupQueue, ("admit", "finish", "complete")),
        (AsyncWeightUpdater, ("publish",)),
    ):
        for name in names:
            wrap(owner, name, hold)
    wrap(WeightReader, "adopt_into", functools.partial(hold, copy=True))


def make_env_with_lock(path: str, mix: Mix, draws: Draws) -> Any:
    share_lock(path)  # in the worker
    return make_env(mix, draws)


def policy_with_lock(path: str, policy: TinyVLA) -> TinyVLA:
    share_lock(path)  # in the inference process
    return policy


# -- no pools --------------------------------------------------------------------------------------
def give_back(arena: SharedArena, tensor: torch.Tensor) -> None:
    """Give the memory of a tensor back to the system, but for its first and last few bytes."""
    start, size = tensor.data_ptr() - arena.tensor(0, (1,)).data_ptr(), mmap.PAGESIZE
    first, end = -(-start // size) * size, (start + tensor.nbytes) // size * size
    if end > first:
        arena._map.madvise(mmap.MADV_REMOVE, first, end - first)


def without_pools() -> None:
    """Take memory when it is used, and give it back, in this process."""

    def make(method: Callable[..., None], pool: EnvironmentPool, *args: Any) -> None:
        method(pool, *args)
        give_back(pool._arena, pool._arena.tensor(0, (pool.nbytes,)))  # zeros stay zeros

    def release(method: Callable[..., None], pool: EnvironmentPool, page: int) -> None:
        method(pool, page)
        rows = slice(page * pool.rows_per_page, (page + 1) * pool.rows_per_page)
        for field in pool._rows.values(True, True) if pool._is_open else ():
            give_back(pool._arena, field[rows])

    def fill_slot(
        method: Callable[..., None], writer: SlotWriter, slot: int, fill: Callable[[Any], None]
    ) -> None:
        def fill_fresh(views: Any) -> None:
            for run in views.runs.values():
                give_back(writer._segment._arena, run)
            fill(views)

        method(writer, slot, fill_fresh)

    wrap(EnvironmentPool, "__init__", make)
    wrap(EnvironmentPool, "_release", release)
    wrap(SlotWriter, "_fill_slot", fill_slot)
    wrap(RowFields, "gather", lambda method, rows, index, out=None: method(rows, index))


# -- a policy on another node ----------------------------------------------------------------------
class Link:
    """One direction of the emulated link: messages take turns, and then they travel."""

    def __init__(self) -> None:
        self._free_s = 0.0

    async def carry(self, layout: RowLayout, node: str) -> None:
        """The fields of one row below ``node``."""
        fields = (field for key, field in layout.items() if key[0] == node)
        nbytes = sum(shape.numel() * dtype.itemsize for shape, dtype in fields)
        now_s = time.monotonic()
        self._free_s = max(self._free_s, now_s) + nbytes / BYTES_PER_S
        await asyncio.sleep(self._free_s + ONE_WAY_S - now_s)


def decide_over_link() -> None:
    """Have every decision of this process's collector cross the link."""
    there, back = Link(), Link()

    async def decide(method: Callable[..., Any], batcher: DecisionBatcher, *args: Any) -> int:
        await there.carry(batcher._pool.layout, OBSERVATION_KEY)
        version: int = await method(batcher, *args)
        await back.carry(batcher._pool.layout, VLA_ACTION_KEY)
        return version

    wrap(DecisionBatcher, "decide", decide)


# -- measuring -------------------------------------------------------------------------------------
class Turn(NamedTuple):
    """One turn of an arrangement."""

    learned_per_s: float
    publish_s: list[float]
    learner_waits: float
    #: At seconds of its own time, MB.
    memory: list[tuple[float, float]]

    def __str__(self) -> str:
        publish_s = spread(self.publish_s, 3)
        waits, memory = f"{self.learner_waits:.0%}", f"{self.memory[-1][1]:.1f} MB"
        return f"{self.learned_per_s:.1f} decisions/s, {publish_s=}, {waits=}, {memory}"


class Meter:
    """Turns of a loop."""

    loop: Loop

    def __init__(self) -> None:
        self._run_s = self._start_s = 0.0
        self._memory: list[tuple[float, float]] = []

    def learn(self, batch: TensorDictBase) -> int:
        """Sample the memory of all processes, which has the time of an emulated update."""
        run_s = self._run_s + time.monotonic() - self._start_s
        self._memory.append((run_s, sample()["bytes"] / 1e6))
        return len(batch)

    def take(self, min_s: float) -> Turn:
        """One turn of at least ``min_s``, from the end of an update to that of another."""
        loop, waited_s = self.loop, self.loop.collector.stats()["buffer/wait_s"]
        loop.publish_s, self._memory, self._start_s = [], [], time.monotonic()
        repeat = loop.run(min_s)
        waited_s, seconds = loop.collector.stats()["buffer/wait_s"] - waited_s, repeat.elapsed_s
        self._run_s += seconds
        rate = repeat.num_learned / seconds
        return Turn(rate, loop.publish_s, waited_s / seconds, self._memory)


@contextmanager
def arrangement(name: str) -> Iterator[Callable[[float], Turn]]:
    """A loop with what ``name`` says switched off, in a process of its own."""
    torch.set_num_threads(1)  # the learner's process has one lane's worth to do
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE, as in collector_soak.py
    mix, policy, meter, options = MIX, large_policy(), Meter(), {}
    with ExitStack() as stack:
        if name == "one_lane_after_another":
            mix, options = replace(MIX, envs_per_worker=3), {"sequential": True}
        elif name == "shared_lock_and_queue":
            path = stack.enter_context(tempfile.NamedTemporaryFile()).name
            share_lock(path)
            options = {
                "make_env": functools.partial(make_env_with_lock, path),
                "policy_factory": functools.partial(policy_with_lock, path, policy),
            }
        elif name == "one_pool":
            without_pools()
        elif name == "remote_inference":
            decide_over_link()
        learn = emulate_latency(meter.learn, Latency(0, per_row_s=mix.learn_row_s))
        meter.loop = stack.enter_context(running(mix, policy=policy, learn=learn, **options))
        yield meter.take


def summary(turns: list[Turn], full: list[Turn]) -> dict[str, Any]:
    rates, rates_of_full = ([turn.learned_per_s for turn in side] for side in (turns, full))
    times, memory = np.array([one for turn in turns for one in turn.memory]).T
    found: dict[str, Any] = {
        "learned_per_s": spread(rates, 1),
        "ratio_vs_full": paired_ratio(rates, rates_of_full),
        "publish_s": spread((seconds for turn in turns for seconds in turn.publish_s), 4),
        "learner_waits": spread((turn.learner_waits for turn in turns), 3),
        "memory_mb": round(memory[-1], 1),
    }
    if len(times) >= 12:  # --quick takes too few for a trend
        trend = describe(times - times[0], memory, tolerance=0.01)
        found["growth_mb_per_minute"] = trend["per_minute"]
        found |= {"growth_interval": trend["interval"], "grows": trend["grows"]}
    return found


def main() -> None:
    args = arguments(__doc__, "short turns, no trend of the memory")
    num_rounds, min_s = (3, 1.0) if args.quick else (6, 7.0)
    turns = in_turns(
        {name: (arrangement, name) for name in ARRANGEMENTS},
        lambda number: (min_s,),
        num_rounds,
        num_warm_ups=1,  # fills the pipeline
    )
    result = {
        "latencies": "emulated",
        "arrangements": {name: summary(turns[name], turns["full"]) for name in ARRANGEMENTS},
        "stated": asdict(MIX),
        "weight_bytes": WEIGHT_BYTES,
        "link": {"one_way_s": ONE_WAY_S, "bytes_per_s": BYTES_PER_S},
        "rounds": num_rounds,
    }
    report("ablations", result, args.quick)


if __name__ == "__main__":
    main()
