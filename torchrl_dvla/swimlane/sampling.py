# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The sampling lane: environment workers, started, replaced and ended."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import Any

import cloudpickle
from torchrl.envs import EnvBase

from torchrl_dvla.swimlane.child import Child
from torchrl_dvla.swimlane.env_worker import run_env_worker
from torchrl_dvla.swimlane.messages import EnvSpecs, Failed, Orders, Reset, Step, Stop, pack

__all__ = ["SamplingLane"]


class SamplingLane:
    """The environment workers of one node.

    The lane knows processes and pipes; which rollout runs where is the coordinator's business.

    Args:
        factories (Mapping): environment factory by task name; sent to the workers by cloudpickle.
        num_workers (int): processes.

    Keyword Args:
        envs_per_worker (int): rollouts that one worker holds open at once, so that it can simulate
            one while another waits for its decision.
        num_threads (int): intra-op torch threads of a worker.
        env_vars (Mapping, optional): environment variables of the workers.
        start_method (str): how the processes are started.
        pin_workers (bool): keep each worker on one of the cores that this process may run on, in
            turn. Where the system knows no such thing, nothing happens.
    """

    def __init__(
        self,
        factories: Mapping[str, Callable[[], EnvBase]],
        num_workers: int,
        *,
        envs_per_worker: int = 1,
        num_threads: int = 1,
        env_vars: Mapping[str, str] | None = None,
        start_method: str = "forkserver",
        pin_workers: bool = False,
    ) -> None:
        self._payload = cloudpickle.dumps(dict(factories))
        self.tasks = tuple(factories)
        #: The task whose environment a new worker builds before it reports.
        self.first_task = self.tasks[0]
        #: What all environments speak; known after :meth:`wait_ready`.
        self.specs: EnvSpecs | None = None
        self._args = (envs_per_worker, num_threads, dict(env_vars or {}))
        self._start_method = start_method
        self._pin_workers = pin_workers
        self._resets: list[list[Reset]] = [[] for _ in range(num_workers)]
        self._steps: list[list[Step]] = [[] for _ in range(num_workers)]
        self.workers: list[Child] = []
        try:
            for index in range(num_workers):
                self.workers.append(self._spawn(index))
        except BaseException:
            self.stop(0.0)
            raise

    def _spawn(self, index: int) -> Child:
        worker = Child(
            run_env_worker,
            (self._payload, self.first_task, *self._args),
            name=f"dvla-env-{index}",
            start_method=self._start_method,
        )
        if self._pin_workers:
            _keep_on_core(worker.pid, index)
        return worker

    def wait_ready(self, timeout_s: float) -> EnvSpecs:
        """Wait until every worker has built its environment.

        Args:
            timeout_s (float): seconds for all of them together.

        Returns:
            The specs that all workers agree on.

        Raises:
            RuntimeError: with the worker's traceback if an environment cannot be built, once for
                all workers; or if the specs differ.
            TimeoutError: if a worker is not ready in time.
        """
        deadline_s = time.monotonic() + timeout_s
        specs: dict[int, EnvSpecs] = {}
        while len(specs) < len(self.workers):
            waiting = {
                worker.connection: index
                for index, worker in enumerate(self.workers)
                if index not in specs
            }
            ready = wait(list(waiting), max(0.0, deadline_s - time.monotonic()))
            if not ready:
                names = [self.workers[index].name for index in waiting.values()]
                raise TimeoutError(
                    f"start_timeout_s must cover the construction of an environment, {names} took "
                    f"more than {timeout_s:g} s. Raise it, or find out where the constructor hangs."
                )
            for connection in ready:
                index = waiting[connection]  # type: ignore[index]
                specs[index] = self.receive_specs(index)
        first = specs[0]
        for index, other in specs.items():
            if other != first:
                raise RuntimeError(
                    "All workers must build environments with the same specs, got "
                    f"{first} from worker 0 and {other} from worker {index}. Make create_env_fn "
                    "deterministic."
                )
        self.specs = first
        return first

    def receive_specs(self, index: int) -> EnvSpecs:
        """The first message of worker ``index``.

        Raises:
            RuntimeError: with the traceback if its environment could not be built.
        """
        message = self.receive(index)
        if isinstance(message, EnvSpecs):
            return message
        raise RuntimeError(f"create_env_fn failed in {self.workers[index].name}:\n{message}")

    def receive(self, index: int) -> Any:
        """The next message of worker ``index``; a string that says how it ended if it is gone."""
        worker = self.workers[index]
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(5.0)
            return f"{worker.name} {worker.exit_description()}."
        return message.traceback if isinstance(message, Failed) else message

    def send(self, index: int, message: Any) -> None:
        """Send to worker ``index``; a dead worker is found out by :meth:`receive`."""
        try:
            self.workers[index].connection.send(message)
        except OSError:
            pass

    def order(self, index: int, order: Reset | Step) -> None:
        """Have worker ``index`` do something; it is told by :meth:`flush`."""
        if isinstance(order, Reset):
            self._resets[index].append(order)
        else:
            self._steps[index].append(order)

    def flush(self) -> None:
        """Tell every worker its orders, in one message."""
        for index, (resets, steps) in enumerate(zip(self._resets, self._steps)):
            if resets or steps:
                self.send(index, Orders(pack(steps), pack(resets)))
                self._resets[index], self._steps[index] = [], []

    def replace(self, index: int) -> None:
        """End worker ``index`` for certain and start another in its place."""
        self._resets[index], self._steps[index] = [], []
        self.workers[index].kill()
        self.workers[index] = self._spawn(index)

    def stop(self, grace_s: float) -> None:
        """End all workers: ask all, then kill those that are still there after ``grace_s``."""
        deadline_s = time.monotonic() + grace_s
        for index in range(len(self.workers)):
            self.send(index, Stop())
        for worker in self.workers:
            worker.process.join(max(0.0, deadline_s - time.monotonic()))
            worker.kill()


def _keep_on_core(pid: int, index: int) -> None:
    """The process has one thread yet; those that it starts inherit its core."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))  # what a container or launcher leaves to this run
        with contextlib.suppress(OSError):  # it may have died already, which its pipe will tell
            os.sched_setaffinity(pid, {cores[index % len(cores)]})
