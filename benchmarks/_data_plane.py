# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The job of ``data_plane.py``, and who does it: this project and TorchRL's arrangements."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from multiprocessing.connection import Pipe, wait
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

BATCH, ROWS = 64, 1024
IMAGE = (3, 256, 256)
#: A rollout of LIBERO has up to 65 decisions of 8 env steps.
NUM_FRAMES, DECISIONS, GROUP, PAGE_ROWS = 16, 64, 4, 16


def frames(seed: int = 0) -> list[TensorDict]:
    """What the simulator has drawn."""
    generator = torch.Generator().manual_seed(seed)

    def image() -> torch.Tensor:
        return torch.randint(0, 256, IMAGE, dtype=torch.uint8, generator=generator)

    return [
        TensorDict({"image": image(), "wrist": image(), "state": torch.rand(8)}, [])
        for _ in range(NUM_FRAMES)
    ]


def row_layout() -> Any:
    from torchrl_dvla.data import decision_layout

    observation = {("observation", key): (value.shape, value.dtype) for key, value in example()}
    return decision_layout(observation, chunk_size=8, action_dim=7)


def example() -> list[tuple[str, torch.Tensor]]:
    return [
        ("image", torch.zeros(IMAGE, dtype=torch.uint8)),
        ("wrist", torch.zeros(IMAGE, dtype=torch.uint8)),
        ("state", torch.zeros(8)),
    ]


ROW_BYTES = 2 * 3 * 256 * 256 + 8 * 4 + 8 * 7 * (8 + 4 + 4)


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


def state_policy() -> Policy:
    """The policy of a server, which stamps versions itself."""
    return Policy(stamps=False)


# -- this project ----------------------------------------------------------------------------------


class Copied:
    """Bytes that copying calls have moved in this process."""

    def __init__(self) -> None:
        self.nbytes = 0

    def wrap(self, owner: Any, name: str, nbytes: Any) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.nbytes += nbytes(*args, **kwargs)
            return function(*args, **kwargs)

        setattr(owner, name, counted)


def work(connection: Any, view: Any, count: bool) -> None:
    """An environment worker: gets pages, fills their rows, says so."""
    from torchrl_dvla.memory import RowWriter
    from torchrl_dvla.swimlane.messages import Stop

    decided = [*(("vla_action", key) for key in Policy().outputs), "policy_version"]
    seen = [("observation", key) for key, _ in example()]
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
    try:
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
    except (EOFError, OSError):
        pass


class Dvla:
    """Pool, workers, a collecting thread, and the learner's buffer."""

    def __init__(self, settings: dict[str, int], count: bool = False) -> None:
        from torchrl_dvla.data import Admission, GroupAssembler, PooledReplayBuffer
        from torchrl_dvla.memory import EnvironmentPool
        from torchrl_dvla.swimlane import ManagedProcess

        layout = row_layout()
        # Two groups an update and a lag of one: up to four groups of 256 rows are on their way.
        self.pool = EnvironmentPool(layout, ROWS // PAGE_ROWS, PAGE_ROWS)
        self.admission = Admission(2, 1)
        self.assembler = GroupAssembler(self.pool, group_size=GROUP, normalise_std=False)
        self.buffer = PooledReplayBuffer(
            pool=self.pool, admission=self.admission, batch_size=BATCH, timeout_s=60.0
        )
        self.workers = [
            ManagedProcess(work, (self.pool.worker_view(), count), name="env")
            for _ in range(settings["workers"])
        ]
        self.copied = dict.fromkeys(range(len(self.workers)), 0)
        self.woken, self.waker = Pipe(duplex=False)
        self.admission.add_listener(lambda: self.waker.send_bytes(b"."))
        self.is_open = True
        self.thread = threading.Thread(target=self.collect, daemon=True)
        self.thread.start()

    def collect(self) -> None:
        """Lease, send handles, seal, assemble, extend."""
        from torchrl_dvla.data import RolloutRecord

        open_rollouts: list[list[Any]] = [[] for _ in self.workers]
        group, left, total, num_pages = -1, 0, 0, DECISIONS // PAGE_ROWS
        while self.is_open:
            for number, worker in enumerate(self.workers):
                while worker.connection.poll(0):
                    self.copied[number] = worker.connection.recv()
                    rollout, owner, pages = open_rollouts[number].pop(0)
                    pages = self.pool.seal(pages, DECISIONS)
                    record = RolloutRecord(
                        rollout, owner, pages, DECISIONS, float(rollout % 2), True, 8 * DECISIONS
                    )
                    if (done := self.assembler.add(record)) is not None:
                        self.buffer.extend(done)
                while len(open_rollouts[number]) < 2:
                    if not left:
                        if not self.admission.may_admit or not self.pool.reserve(GROUP * num_pages):
                            break
                        self.admission.admit(group + 1)
                        group, left = group + 1, GROUP
                    pages = [self.pool.lease(total, total) for _ in range(num_pages)]
                    worker.connection.send(pages)
                    open_rollouts[number].append((total, group, pages))
                    total, left = total + 1, left - 1
            if self.woken in wait([self.woken, *(w.connection for w in self.workers)]):
                self.woken.recv_bytes()

    def take(self, seconds: float) -> tuple[int, float]:
        """Rows in batches, and the seconds they took."""
        start_s, rows = time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - start_s) < seconds:
            for batch in self.buffer:
                rows += batch.shape[0]
            self.admission.advance()
        return rows, elapsed_s

    def close(self) -> None:
        self.is_open = False
        self.waker.send_bytes(b".")
        self.thread.join(10.0)
        for worker in self.workers:
            worker.stop(5.0)
        self.pool.close()


# -- TorchRL ---------------------------------------------------------------------------------------


def make_env() -> Any:
    """An environment of TorchRL's whose step hands out references to its frames."""
    from torchrl.data import Composite, Unbounded
    from torchrl.envs import EnvBase

    class FrameEnv(EnvBase):
        def __init__(self) -> None:
            super().__init__()
            leaves = {k: Unbounded(v.shape, dtype=v.dtype) for k, v in example()}
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
        storage = (
            LazyMemmapStorage(ROWS, scratch_dir=self.scratch.name)
            if name == "memmap"
            else LazyTensorStorage(ROWS)
        )
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
                policy_factory=state_policy,
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
