# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How many bytes of decisions a second get from environment processes into a learner's batches?

    python benchmarks/data_plane.py [--quick] [--tune]

A decision is two 256x256x3 uint8 cameras, proprioception, 8x7 tokens, chunk and log-probs, reward
and flags: 0.4 MB. **The job**, the same for every arrangement: processes that have frames (16
pre-rendered ones each, drawing costs nothing) and the outputs of a policy (constants, the policy
costs nothing) hand decisions over; another process, the learner's, takes as many rows in batches of
64. Counted are rows in batches. Every decision crosses a process boundary once, is kept in a buffer
of 400 MB that was touched before, and is part of one batch (ours: each exactly once; the
others: as many rows as were written, drawn at random, which is their cheapest sampler).

``dvla``          environment workers write pages of 16 rows by ``RowWriter`` and are sent page
                  handles, nothing else; groups of 4 rollouts of 64 decisions pass a
                  ``GroupQueue``; the learner iterates a ``PooledReplayBuffer`` bound to it
``lazy``          TorchRL's process-backed ``Collector``, whose workers write to the shared
                  ``LazyTensorStorage`` that the learner samples
``memmap``        the same with ``LazyMemmapStorage``, in memory (/dev/shm) where there is room
``async``         TorchRL's ``AsyncBatchedCollector``: process slots, chunked transitions, a
                  ``LazyTensorStorage`` in the learner's process
                  (the policy's request is proprioception alone)

``memcpy`` is one stream of the same bytes, from and to memory of 400 MB in blocks of a batch, while
all others stand still. ``docs/source/guide/benchmarks.md`` tells how the rivals were set up; the
grid of ``--tune`` gave the ``SETTINGS`` of ``lazy``. The last line of stdout is one JSON object:

bytes_per_s, memcpy_bytes_per_s   medians over the repeats
fraction_of_memcpy                of ``dvla``; median of the ratio within one repeat
fraction_of_memcpy_pair           the same over one of two such streams that run at once, as the
                                  worker's and the learner's copies do: what the memory leaves
torchrl_bytes_per_s               of each rival
ratio_vs_best_torchrl             ``dvla`` over the best of them in the same repeat
copies_per_frame                  bytes that copying calls moved, over bytes of the batches, counted
                                  in ``dvla``'s processes by wrapping those calls
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Pipe, wait
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _machine import arguments, paired_ratio, report, spread
from _turns import in_turns
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from torchrl_dvla import GroupConfig, PooledReplayBuffer
from torchrl_dvla.data import Group, GroupQueue, InitStateSchedule, decision_layout
from torchrl_dvla.memory import EnvironmentPool, RowWriter, WorkerView, row_access
from torchrl_dvla.swimlane import ManagedProcess
from torchrl_dvla.swimlane.messages import Stop

RIVALS = ("lazy", "memmap", "async")
#: Workers; rows of a message to the learner (rivals); threads of the learner.
SETTINGS: dict[str, dict[str, int]] = {
    "dvla": {"workers": 1, "rows": 64, "threads": 1},
    "lazy": {"workers": 1, "rows": 64, "threads": 2},
    "memmap": {"workers": 1, "rows": 64, "threads": 1},
    "async": {"workers": 1, "rows": 64, "threads": 1},
}

BATCH, ROWS = 64, 1024
IMAGE = (3, 256, 256)
#: A rollout of LIBERO has up to 65 decisions of 8 env steps.
NUM_FRAMES, DECISIONS, GROUP, PAGE_ROWS = 16, 64, 4, 16
EXAMPLE = [
    ("image", torch.zeros(IMAGE, dtype=torch.uint8)),
    ("wrist", torch.zeros(IMAGE, dtype=torch.uint8)),
    ("state", torch.zeros(8)),
]
LAYOUT = decision_layout(
    {("observation", key): (value.shape, value.dtype) for key, value in EXAMPLE},
    chunk_size=8,
    action_dim=7,
)
#: What counts as moved of a row, the same for all.
ROW_BYTES = 2 * 3 * 256 * 256 + 8 * 4 + 8 * 7 * (8 + 4 + 4)


def frames(seed: int = 0) -> list[TensorDict]:
    """What the simulator has drawn."""
    generator = torch.Generator().manual_seed(seed)

    def image() -> torch.Tensor:
        return torch.randint(0, 256, IMAGE, dtype=torch.uint8, generator=generator)

    return [
        TensorDict({"image": image(), "wrist": image(), "state": torch.rand(8)}, [])
        for _ in range(NUM_FRAMES)
    ]


class Policy(TensorDictModuleBase):
    """Constants. What it is said to read decides what a transport carries to it."""

    def __init__(self, stamps: bool = True) -> None:
        super().__init__()
        self.in_keys = [("observation", "state")]
        self.out_keys = [("vla_action", key) for key in ("tokens", "log_probs", "chunk")]
        self.stamps = stamps
        if stamps:
            self.out_keys += ["policy_version"]
        self.outputs = {
            "tokens": torch.zeros(8, 7, dtype=torch.int64),
            "log_probs": torch.zeros(8, 7),
            "chunk": torch.zeros(8, 7),
        }

    def forward(self, tensordict: TensorDict) -> TensorDict:
        size = tensordict.batch_size
        outputs = {key: value.expand(*size, 8, 7) for key, value in self.outputs.items()}
        tensordict["vla_action"] = TensorDict(outputs, size)
        if self.stamps:
            tensordict["policy_version"] = torch.zeros(*size, 1, dtype=torch.int64)
        return tensordict


# -- this project ----------------------------------------------------------------------------------
class Copied:
    """Bytes that copying calls have moved in this process."""

    def __init__(self) -> None:
        self.nbytes = 0

    def wrap(self, owner: Any, name: str, nbytes: Callable[..., int]) -> None:
        function = getattr(owner, name)

        def counted(*args: Any) -> Any:
            self.nbytes += nbytes(*args)
            return function(*args)

        setattr(owner, name, counted)


def work(connection: Any, view: WorkerView, count: bool) -> None:
    """An environment worker: gets pages, fills their rows, says so."""
    decided = [*(("vla_action", key) for key in Policy().outputs), "policy_version"]
    seen = [("observation", key) for key, _ in EXAMPLE]
    flags = ["done", "terminated", "truncated", "success"]
    outcome = [("next", "reward"), *(("next", flag) for flag in flags), "action_is_pad"]
    policy = {("vla_action", key): value.numpy() for key, value in Policy().outputs.items()}
    policy["policy_version"] = np.zeros(1, np.int64)
    values = [
        [frame[key].numpy() for _, key in seen] + [policy[key] for key in decided]
        for frame in frames()
    ]
    writer = RowWriter(view, seen + decided)
    closer = RowWriter(view, ["decision_index", *outcome])
    copied = Copied()
    if count:
        copied.wrap(
            RowWriter,
            "write",
            lambda self, row, generation, values: sum(field[row].nbytes for field in self._fields),
        )
    with contextlib.suppress(EOFError, OSError):
        while not isinstance(pages := connection.recv(), Stop):
            for decision in range(DECISIONS):
                number, offset = divmod(decision, view.rows_per_page)
                page = pages[number]
                row = page * view.rows_per_page + offset
                writer.write(row, page.generation, values[decision % NUM_FRAMES])
                done = decision == DECISIONS - 1
                outcomes = [decision, 0.0, done, done, False, False, False]
                closer.write(row, page.generation, outcomes)
            connection.send(copied.nbytes)


class Dvla:
    """Pool, workers, a collecting thread, and the learner's buffer."""

    def __init__(self, settings: dict[str, int], count: bool) -> None:
        # Two groups an update and a lag of one: up to four groups of 256 rows are on their way. A
        # group is admitted only if one more rollout would find room.
        num_pages = DECISIONS // PAGE_ROWS
        self.pool = EnvironmentPool(LAYOUT, ROWS // PAGE_ROWS + num_pages, PAGE_ROWS)
        config = GroupConfig(GROUP, groups_per_update=2, max_policy_lag=1, advantage="mean")
        schedule = InitStateSchedule()
        self.groups = GroupQueue(config, self.pool, schedule, pages_per_rollout=num_pages)
        self.buffer = PooledReplayBuffer(batch_size=BATCH, timeout_s=60.0)
        self.buffer.bind(self.groups)
        self.workers = [
            ManagedProcess(work, (self.pool.worker_view(), count), name="env")
            for _ in range(settings["workers"])
        ]
        self.gathered, self.written = Copied(), dict.fromkeys(range(len(self.workers)), 0)
        if count:
            self.gathered.wrap(row_access, "_take", lambda source, numbers, out: out.nbytes)
        self.woken, self.waker = Pipe(duplex=False)
        self.groups.add_listener(lambda: self.waker.send_bytes(b"."))
        self.is_open = True
        self.thread = threading.Thread(target=self.collect, daemon=True)
        self.thread.start()
        self.groups.set_paused(False)

    def collect(self) -> None:
        """Admit, lease, send handles, finish, complete."""
        under_way: list[list[Any]] = [[] for _ in self.workers]
        running: dict[int, Group] = {}
        waiting: list[Any] = []
        while self.is_open:
            for number, worker in enumerate(self.workers):
                while worker.connection.poll(0):
                    self.written[number] = worker.connection.recv()
                    rollout = under_way[number].pop(0)
                    group = running[rollout.group_id]
                    for decision in range(DECISIONS):
                        paid = float(rollout.rollout_id % 2 and decision == 0)
                        rollout.record(policy_version=0, reward=paid, success=True, num_env_steps=8)
                    self.groups.finish(rollout)
                    if all(rollout.finished for rollout in group.rollouts):
                        self.groups.complete(running.pop(group.group_id))
                while len(under_way[number]) < 2:
                    if not waiting:
                        admitted = self.groups.admit()
                        if isinstance(admitted, str):
                            break
                        running[admitted.group_id] = admitted
                        waiting = list(admitted.rollouts)
                    rollout = waiting.pop(0)
                    for _ in range(self.groups.pages_per_rollout):
                        rollout.pages.append(self.pool.lease(rollout.rollout_id))
                    worker.connection.send(rollout.pages)
                    under_way[number].append(rollout)
            if self.woken in wait([self.woken, *(w.connection for w in self.workers)]):
                self.woken.recv_bytes()

    def take(self, seconds: float) -> tuple[int, float]:
        """Rows in batches, and the seconds they took."""
        start_s, rows = time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - start_s) < seconds:
            for batch in self.buffer:
                rows += batch.shape[0]
            with self.groups.publishing():
                pass  # the weights are another benchmark's
        return rows, elapsed_s

    def copied_bytes(self) -> int:
        """Bytes that writing and gathering have moved so far."""
        return self.gathered.nbytes + sum(self.written.values())

    def close(self) -> None:
        self.is_open = False
        self.waker.send_bytes(b".")
        self.thread.join(10.0)
        for worker in self.workers:
            worker.stop(5.0)
        self.groups.close("the benchmark ends")
        self.pool.close()


# -- TorchRL ---------------------------------------------------------------------------------------
def make_env() -> Any:
    """An environment of TorchRL's whose step hands out references to its frames."""
    from torchrl.data import Composite, Unbounded
    from torchrl.envs import EnvBase

    class FrameEnv(EnvBase):
        def __init__(self) -> None:
            super().__init__()
            leaves = {k: Unbounded(v.shape, dtype=v.dtype) for k, v in EXAMPLE}
            self.observation_spec = Composite(observation=Composite(**leaves))
            self.action_spec = Composite(vla_action=Composite(chunk=Unbounded((8, 7))))
            self.reward_spec = Unbounded((1,))
            self.frames, self.time = frames(), 0
            self.flags = [torch.tensor([False]), torch.tensor([True])]

        def _reset(self, tensordict: Any = None) -> TensorDict:
            self.time += 1
            done, seen = self.flags[0], self.frames[self.time % NUM_FRAMES]
            return TensorDict({"observation": seen, "done": done, "terminated": done}, [])

        def step_and_maybe_reset(self, tensordict: TensorDict) -> tuple[TensorDict, TensorDict]:
            done = self.flags[self.time % DECISIONS == 0]
            outcome = {"reward": torch.zeros(1), "done": done, "terminated": done}
            return tensordict.set("next", TensorDict(outcome, [])), self._reset()

        def _step(self, tensordict: TensorDict) -> TensorDict:
            return self._reset().set("reward", torch.zeros(1))

        def _set_seed(self, seed: int | None) -> None:
            pass

    return FrameEnv()


class TorchRL:
    """A replay buffer that one of TorchRL's collectors fills all the time."""

    def __init__(self, name: str, settings: dict[str, int]) -> None:
        from torchrl.collectors import AsyncBatchedCollector, Collector
        from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

        workers, rows = settings["workers"], settings["rows"]
        is_shared = name in ("lazy", "memmap")
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.scratch = tempfile.TemporaryDirectory(prefix="data_plane-", dir=folder)
        storage: Any = LazyTensorStorage(ROWS)
        if name == "memmap":
            storage = LazyMemmapStorage(ROWS, scratch_dir=self.scratch.name)
        self.buffer = ReplayBuffer(storage=storage, batch_size=BATCH, shared=is_shared)
        if is_shared:
            # Made from a row, not from the specs, which would add the next observation.
            env = make_env()
            row, _ = env.step_and_maybe_reset(Policy()(env.reset()))
            row["collector"] = TensorDict({"traj_ids": torch.tensor(0)}, [])
            self.buffer.extend(row.unsqueeze(0))
            self.buffer.empty()
            self.collector = Collector(
                [make_env] * workers,
                Policy(),
                backend="process",
                sync=False,
                frames_per_batch=rows,
                total_frames=-1,
                replay_buffer=self.buffer,
            )
        else:
            self.collector = AsyncBatchedCollector(
                [make_env] * workers,
                policy_factory=functools.partial(Policy, stamps=False),  # its server stamps
                frames_per_batch=rows * workers,
                transition_chunk_size=rows,
                total_frames=-1,
                env_backend="multiprocessing",
                transport="auto",
                replay_buffer=self.buffer,
                max_batch_size=workers,
                server_timeout=0.001,
            )
        self.collector.start()
        while self.buffer.write_count < ROWS + BATCH:
            time.sleep(0.05)

    def take(self, seconds: float) -> tuple[int, float]:
        """Rows in batches, never more than were written meanwhile, and the seconds they took."""
        start_s, rows, written = time.perf_counter(), 0, self.buffer.write_count
        while (elapsed_s := time.perf_counter() - start_s) < seconds:
            if self.buffer.write_count - written >= rows + BATCH:
                rows += self.buffer.sample().shape[0]
            else:
                time.sleep(0)  # let the thread or process run that writes
        return rows, elapsed_s

    def close(self) -> None:
        # A worker may be in the middle of a message; what it had to say is not needed any more.
        with contextlib.suppress(RuntimeError, TimeoutError, OSError):
            self.collector.async_shutdown(timeout=10.0)
        self.scratch.cleanup()


# -- turns -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def build(
    name: str, settings: dict[str, int], count: bool = False
) -> Iterator[Callable[[float], dict[str, float]]]:
    """An arrangement that has warmed up, and the call that measures it."""
    torch.set_num_threads(settings["threads"])
    side: Any = Dvla(settings, count) if name == "dvla" else TorchRL(name, settings)
    side.take(1.0)  # touches what the learner's side touches

    def measure(seconds: float) -> dict[str, float]:
        before = side.copied_bytes() if count else 0
        rows, elapsed_s = side.take(seconds)
        moved = side.copied_bytes() - before if count else 0
        return {"rows": rows, "bytes_per_s": rows * ROW_BYTES / elapsed_s, "moved_bytes": moved}

    try:
        yield measure
    finally:
        side.close()


class Memcpy:
    """Streams of plain copies, each between two blocks of its own that no cache holds."""

    def __init__(self, num_streams: int) -> None:
        self.streams = [
            [np.ones(ROWS * ROW_BYTES, np.uint8) for _ in range(2)] for _ in range(num_streams)
        ]

    def take(self, seconds: float) -> dict[str, float]:
        with ThreadPoolExecutor(len(self.streams)) as pool:  # copying drops the interpreter lock
            rates = pool.map(lambda stream: self._copy(*stream, seconds), self.streams)
            return {"bytes_per_s": min(rates)}

    def _copy(self, source: np.ndarray, target: np.ndarray, seconds: float) -> float:
        block, start_s, copied = BATCH * ROW_BYTES, time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - start_s) < seconds:
            at = copied % (source.nbytes - block + 1) // 64 * 64
            ctypes.memmove(target.ctypes.data + at, source.ctypes.data + at, block)
            copied += block
        return copied / elapsed_s


def tune(seconds: float, repeats: int) -> None:
    """The rates of every setting of each rival, in turns."""
    for name in RIVALS:
        grid = [
            {"workers": workers, "rows": rows, "threads": threads}
            for workers in (1, 2)
            for rows in (16, 64)
            for threads in (1, 2)
        ]
        sides = {str(settings): (build, name, settings) for settings in grid}
        for settings, turns in in_turns(sides, lambda number: (seconds,), repeats).items():
            rates = spread(turn["bytes_per_s"] / 1e9 for turn in turns)
            print(f"{name} {settings}: {rates} GB/s", flush=True)


def copies_per_frame() -> float:
    """Bytes moved over bytes in batches, counted."""
    job = {"counting": (build, "dvla", SETTINGS["dvla"], True)}
    (counted,) = in_turns(job, lambda number: (1.0,), 1)["counting"]
    return round(counted["moved_bytes"] / (counted["rows"] * LAYOUT.row_bytes), 2)


def main() -> None:
    args = arguments(__doc__, "short turns, under a minute", tune=False)
    if args.tune:
        tune(1.0, 3)
        return
    seconds, repeats = (0.8, 5) if args.quick else (4.0, 7)
    copies = copies_per_frame()
    turns = in_turns(
        {name: (build, name, SETTINGS[name]) for name in ("dvla", *RIVALS)},
        lambda number: (seconds,),
        repeats,
        beside={"memcpy": Memcpy(1), "memcpy_pair": Memcpy(2)},
    )
    rates = {name: [turn["bytes_per_s"] for turn in found] for name, found in turns.items()}
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}
    memcpy = paired_ratio(rates["dvla"], rates["memcpy"])
    best = [max(turn) for turn in zip(*(rates[name] for name in RIVALS))]
    ratio = paired_ratio(rates["dvla"], best)
    result = {
        "bytes_per_s": medians["dvla"],
        "memcpy_bytes_per_s": medians["memcpy"],
        "fraction_of_memcpy": memcpy["median"],
        "fraction_spread": memcpy,
        "fraction_of_memcpy_pair": paired_ratio(rates["dvla"], rates["memcpy_pair"])["median"],
        "torchrl_bytes_per_s": {name: medians[name] for name in RIVALS},
        "ratio_vs_best_torchrl": ratio["median"],
        "ratio_spread": ratio,
        "copies_per_frame": copies,
        "gb_per_s": {n: spread(value / 1e9 for value in values) for n, values in rates.items()},
        "settings": SETTINGS,
    }
    report("data_plane", result, args.quick, "tensordict")


if __name__ == "__main__":
    main()
