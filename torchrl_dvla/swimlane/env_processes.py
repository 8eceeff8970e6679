# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The environment workers of one node as processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import Any

from torchrl.envs import EnvBase

from torchrl_dvla.swimlane.env_worker import run_env_worker
from torchrl_dvla.swimlane.managed_process import ManagedProcess, pickled
from torchrl_dvla.swimlane.messages import EnvSpecs, Failed, Stop

__all__ = ["EnvProcesses"]


class EnvProcesses:
    """The environment workers of one node: started, replaced and ended.

    It knows processes and pipes; which rollout runs in which worker is the collector's business.

    Args:
        factories (Mapping): environment factory by task name; sent to the workers by cloudpickle.
        num_workers (int): processes.

    Keyword Args:
        envs_per_worker (int): environments of one worker, so that it can simulate one while another
            waits for its decision.
        max_tasks (int, optional): tasks of which each of them is kept built; all by default.
        num_threads (int): intra-op torch threads of a worker.
        env_vars (Mapping, optional): environment variables of the workers.
        start_method (str): how the processes are started.
    """

    def __init__(
        self,
        factories: Mapping[str, Callable[[], EnvBase]],
        num_workers: int,
        *,
        envs_per_worker: int = 1,
        max_tasks: int | None = None,
        num_threads: int = 1,
        env_vars: Mapping[str, str] | None = None,
        start_method: str = "forkserver",
    ) -> None:
        self._payload = pickled(dict(factories), "create_env_fn")
        self.tasks = tuple(factories)
        #: The task whose environment a new worker builds before it sends its specs.
        self.first_task = self.tasks[0]
        self._envs = envs_per_worker, max_tasks
        self._options: dict[str, Any] = {
            "num_threads": num_threads,
            "env_vars": env_vars,
            "start_method": start_method,
        }
        #: What :meth:`wait_ready` has found.
        self.specs: EnvSpecs
        self.workers: list[ManagedProcess] = []
        try:
            for index in range(num_workers):
                self.workers.append(self._start(index))
        except BaseException:
            self.stop(0.0)
            raise

    def _start(self, index: int) -> ManagedProcess:
        args = (self._payload, self.first_task, *self._envs)
        return ManagedProcess(run_env_worker, args, name=f"dvla-env-{index}", **self._options)

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
            waiting: dict[Any, int] = {
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
                specs[waiting[connection]] = self.receive_specs(waiting[connection])
        self.specs = first = specs[0]
        for index, other in specs.items():
            if other != first:
                raise RuntimeError(
                    "All workers must build environments with the same specs, got "
                    f"{first} from worker 0 and {other} from worker {index}. Make create_env_fn "
                    "deterministic."
                )
        return first

    def receive_specs(self, index: int) -> EnvSpecs:
        """The first message of worker ``index``.

        Raises:
            RuntimeError: with the traceback if its environment could not be built.
        """
        message = self.receive(index)
        if isinstance(message, EnvSpecs):
            return message
        worker = self.workers[index]
        if message == worker.describe_end():  # without a traceback of its own
            raise RuntimeError(
                f"{message} It ended before it called create_env_fn: processes import the script "
                "anew. Build the collector under `if __name__ == '__main__':`, in a file, not from "
                "standard input; what the process printed is above."
            )
        raise RuntimeError(f"create_env_fn failed in {worker.name}:\n{message}")

    def receive(self, index: int) -> Any:
        """The next message of worker ``index``; a string that says how it ended if it has."""
        worker = self.workers[index]
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            return worker.describe_end()
        return message.traceback if isinstance(message, Failed) else message

    def send(self, index: int, message: Any) -> None:
        """Send to worker ``index``; that it is dead shows in :meth:`receive`."""
        with contextlib.suppress(OSError):
            self.workers[index].connection.send(message)

    def replace(self, index: int) -> None:
        """End worker ``index`` for certain and start another in its place."""
        self.workers[index].kill()
        self.workers[index] = self._start(index)

    def stop(self, grace_s: float) -> None:
        """End all workers: ask all, then kill those that are still there after ``grace_s``."""
        deadline_s = time.monotonic() + grace_s
        for index in range(len(self.workers)):
            self.send(index, Stop())
        with contextlib.ExitStack() as kills:  # each is made, whatever becomes of the others
            for worker in self.workers:
                worker.process.join(max(0.0, deadline_s - time.monotonic()))
                kills.callback(worker.kill)
