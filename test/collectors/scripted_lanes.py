# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A collection loop on lanes that answer by script, in the test's own process."""

from __future__ import annotations

import asyncio
import time
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import torch

from torchrl_dvla.collectors import EpisodeSpec, InferenceConfig, InitStateSchedule, WorkerConfig
from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.collectors.loop import CollectionLoop
from torchrl_dvla.collectors.metrics import CollectionCounters
from torchrl_dvla.data import GroupConfig, GroupQueue, InstructionTable, decision_layout
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import Timeline
from torchrl_dvla.swimlane.messages import (
    EnvSpecs,
    Infer,
    Inferred,
    Refused,
    ResetDone,
    Snapshot,
    StepDone,
    WorkerCommands,
    WorkerEvents,
)

LAYOUT = decision_layout(
    {("observation", "state"): ((2,), torch.float32)}, chunk_size=2, action_dim=1
)
SPECS = EnvSpecs((), 2, 1)


class ScriptedWorkers:
    """Environment workers that answer each command when the test says so, or at once.

    Args:
        num_workers (int): workers.
        num_decisions (int): length of every rollout.
        tasks (tuple of str): tasks.
        rollouts_per_env (int): batch size of the environments.
    """

    def __init__(
        self,
        num_workers: int,
        num_decisions: int,
        tasks: tuple[str, ...],
        rollouts_per_env: int = 1,
    ) -> None:
        self.num_decisions, self.tasks, self.first_task = num_decisions, tasks, tasks[0]
        self.specs = SPECS._replace(num_rollouts=rollouts_per_env)
        self.hold = False
        self.new_instruction: str | None = None
        self.fail_tasks: set[str] = set()
        #: Of each step from now on, whether what it returned is refused.
        self.refusals: list[bool] = []
        #: Indices of the steps of each message that has some.
        self.steps: list[list[int]] = []
        #: Commands that were sent, as ``(worker, command)``; those that are not answered yet.
        self.sent: list[tuple[int, Any]] = []
        self.held: list[tuple[int, Any]] = []
        self.num_replaced, self._reward = 0, 1.0
        self._left: dict[tuple[int, int], int] = {}
        self._tasks: dict[tuple[int, int], str] = {}
        self._theirs: list[Any] = [None] * num_workers
        self.workers: list[Any] = [None] * num_workers
        for index in range(num_workers):
            self._start(index)

    def _start(self, index: int) -> None:
        ours, self._theirs[index] = Pipe()
        self.workers[index] = SimpleNamespace(
            connection=ours,
            name=f"worker {index}",
            started_s=time.monotonic(),
            stack=lambda: "the stack",
            private_bytes=lambda: 0,
        )

    def send(self, index: int, message: Any) -> None:
        if not isinstance(message, WorkerCommands):
            return
        if message.steps:
            self.steps.append([command.env_index for command in message.steps])
        for command in (*message.steps, *message.resets):
            self.sent.append((index, command))
            self.held.append((index, command))
        if not self.hold:
            self.answer()

    def answer(self, *positions: int) -> None:
        """Answer the commands at these positions of :attr:`held`, by default all of them."""
        chosen = [self.held[position] for position in positions] or list(self.held)
        for index, command in chosen:
            if self._theirs[index].closed:
                continue  # it has crashed
            self.held.remove((index, command))
            key = index, command.env_index
            if hasattr(command, "seed"):
                self._left[key], self._tasks[key] = self.num_decisions, command.task
                event: Any = ResetDone(
                    command.env_index, command.task, init_state_hash=1000 + command.seed
                )
            else:
                self._left[key] -= 1
                # Sums of few of them differ.
                self._reward = 2.0 * self._reward if self._reward < 1e9 else 1.0
                done = self._left[key] == 0
                # No two rollouts return the same: every group is kept.
                event = StepDone(
                    command.env_index, done, False, self._reward, 2, self.new_instruction
                )
            if isinstance(event, StepDone) and self.refusals and self.refusals.pop(0):
                event = Refused(command.env_index, "NaN")
            if self._tasks[key] in self.fail_tasks:
                self.crash(index)
                continue
            self._theirs[index].send(WorkerEvents([event], []))

    def release(self) -> None:
        """Answer all commands from now on."""
        self.hold = False
        self.answer()

    def crash(self, index: int) -> None:
        """End a worker."""
        self._theirs[index].close()

    def receive(self, index: int) -> Any:
        try:
            return self.workers[index].connection.recv()
        except EOFError:
            return "It crashed."

    def replace(self, index: int) -> None:
        self.num_replaced += 1
        self.held = [entry for entry in self.held if entry[0] != index]
        self.workers[index].connection.close()
        self._start(index)
        self._theirs[index].send(self.specs)

    def stop(self, grace_s: float) -> None:
        del grace_s
        for worker, theirs in zip(self.workers, self._theirs, strict=True):
            worker.connection.close()
            theirs.close()


class ScriptedInference:
    """Inference processes that decide at once, or when the test says so."""

    def __init__(self) -> None:
        self.version, self.hold, self.num_started = 0, False, 0
        self.has_snapshot = False
        #: What the processes were sent, in order; requests that are not answered yet.
        self.sent: list[Any] = []
        self.held: list[Infer] = []

    def start(self) -> Any:
        ours, self._theirs = Pipe()
        self.num_started += 1
        return SimpleNamespace(
            connection=SimpleNamespace(
                fileno=ours.fileno, recv=ours.recv, poll=ours.poll, send=self._send
            ),
            started_s=float(self.num_started),
            stack=lambda: "the stack",
            describe_end=lambda: "It crashed.",
            stop=lambda grace_s=0.0: (ours.close(), self._theirs.close()),
        )

    def _send(self, message: Any) -> None:
        if isinstance(message, (Infer, Snapshot)):
            self.sent.append(message)
        if isinstance(message, Snapshot):
            self.has_snapshot = not message.is_over
        if isinstance(message, Infer):
            assert self.has_snapshot or not message.use_snapshot, "no weights of an evaluation"
            self.held.append(message)
            if not self.hold:
                self.answer()

    def answer(self) -> None:
        """Answer the request."""
        self.held.clear()
        self._theirs.send(Inferred(self.version, 0.0, 0.0))

    def crash(self) -> None:
        """End the process; the next one begins anew."""
        self.held.clear()
        self._theirs.close()

    @property
    def rows(self) -> list[list[int]]:
        """The batches."""
        return [message.rows for message in self.sent if isinstance(message, Infer)]


class Bench:
    """The loop, run by the test's own event loop."""

    def __init__(
        self,
        *,
        num_pages: int = 32,
        num_workers: int = 2,
        num_decisions: int = 2,
        rollouts_per_env: int = 1,
        tasks: tuple[str, ...] = ("task",),
        lockstep: bool = False,
        hold: bool = False,
        hold_inference: bool = False,
        fail_tasks: tuple[str, ...] = (),
        new_instruction: str | None = None,
        refusals: tuple[bool, ...] = (),
        inference: InferenceConfig = InferenceConfig(max_wait_s=0.0),
        workers: dict[str, Any] | None = None,
        **group: Any,
    ) -> None:
        self.pool = EnvironmentPool(LAYOUT, num_pages, rows_per_page=1)
        settings = {"group_size": 2, "groups_per_update": 1, "max_policy_lag": 0, **group}
        self.groups = GroupQueue(
            GroupConfig(**settings),
            self.pool,
            InitStateSchedule(tasks),
            pages_per_rollout=num_decisions,
        )
        self.processes = ScriptedWorkers(num_workers, num_decisions, tasks, rollouts_per_env)
        self.processes.hold, self.processes.fail_tasks = hold, set(fail_tasks)
        self.processes.new_instruction = new_instruction
        self.processes.refusals = list(refusals)
        self.inference = ScriptedInference()
        self.inference.hold = hold_inference
        self.counters = CollectionCounters()
        config = WorkerConfig(
            **{"num_workers": num_workers, "max_decisions": num_decisions, **(workers or {})}
        )
        self.loop: Any = CollectionLoop(
            self.processes,  # type: ignore[arg-type]
            self.inference.start,
            self.groups,
            InstructionTable(),
            timeline=Timeline(),
            counters=self.counters,
            seed=0,
            lockstep=lockstep,
            workers=config,
            inference=inference,
            on_error=lambda error: None,
        )
        self.groups.set_paused(False)

    async def __aenter__(self) -> Bench:
        self._main = asyncio.create_task(self.loop._main())
        await self.quiet()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._main.cancel()
        await asyncio.wait([self._main])
        self.loop._close()
        self.pool.close()

    async def quiet(self) -> None:
        """Let the loop go on until it waits for the lanes."""
        for _ in range(200):
            await asyncio.sleep(0)

    async def until(self, condition: Any) -> None:
        """Wait for something that takes the loop a moment."""
        async with asyncio.timeout(3.0):
            while not condition():
                await asyncio.sleep(1e-3)

    def evaluate(self, *specs: EpisodeSpec) -> Evaluation:
        evaluation = Evaluation(specs, greedy=True, num_frames_episodes=0)
        self.loop.add_evaluation(evaluation)
        return evaluation

    async def error(self) -> str:
        """What the loop ends with."""
        await self.until(self._main.done)
        error = self._main.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return str(error)

    def resets(self) -> list[int]:
        """Seed of every rollout that was begun."""
        return [c.seed for _, c in self.processes.sent if hasattr(c, "seed")]

    def publish(self) -> None:
        self.groups.wait_cohort(0.0)
        with self.groups.publishing():
            pass
