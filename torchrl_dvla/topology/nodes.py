# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A node of a cluster, as the learner sees it: its state, its far end, and what starts it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from torchrl_dvla.collectors import WorkerConfig
from torchrl_dvla.data import Group
from torchrl_dvla.topology.node_messages import Grant, NodeFacts

__all__ = [
    "Machine",
    "Node",
    "NodeHandle",
    "NodeLostError",
    "NodeRuntime",
    "NodeState",
    "apart",
    "difference",
    "in_thread",
    "start_node",
    "stop_nodes",
]

T = TypeVar("T")


class NodeLostError(Exception):
    """A node ended, hangs, cannot be reached, or its loop ended with an error."""


class NodeState(enum.Enum):
    """What becomes of a node; only a healthy one is granted groups."""

    #: Being started: its environments are built.
    RESTARTING = "restarting"
    #: Started; it gets the newest version before its first sample.
    STALE = "stale"
    HEALTHY = "healthy"
    #: Lost, or there is no machine for it.
    DEAD = "dead"


class Machine(NamedTuple):
    """A member of the cluster, as Ray sees it."""

    host: str
    num_cores: float
    #: Whether it is about to leave: it finishes what it has and gets nothing more.
    is_leaving: bool = False


class NodeHandle(Protocol):
    """The far end of a node that was started once; another start has another handle."""

    async def call(self, method: str, *args: Any, timeout_s: float | None) -> Any:
        """Call a method of its :class:`~torchrl_dvla.topology.node_loop.NodeLoop`.

        Without ``timeout_s`` the call has limits of its own.

        Raises:
            NodeLostError: if the node is gone, does not answer in time, or raises.
        """

    def kill(self) -> None:
        """End the node for certain; may block for seconds."""


class NodeRuntime(Protocol):
    """Who belongs to the cluster, and how bytes reach it: Ray."""

    def machines(self) -> Mapping[str, Machine]:
        """The members that are alive, by an id that is never used twice."""

    async def start(self, machine_id: str, workers: WorkerConfig) -> NodeHandle:
        """Start a node there; raises NodeLostError."""

    def put(self, value: bytes) -> Any:
        """Make bytes available to all nodes for as long as what is returned lives."""

    def kill_machine(self) -> Callable[[], None]:
        """Kill a member, to see what comes of it; returns what adds another like it."""

    def close(self) -> None:
        """End whatever was started."""


@dataclass(eq=False)
class Node:
    """A node of the placement: its state, and what it has been granted.

    Args:
        name (str): in tracks, metrics and the log.
        host (str): the machine that it is meant for; it may run on another one if that is gone.
        workers (WorkerConfig): its sampling lane.
    """

    name: str
    host: str
    workers: WorkerConfig
    state: NodeState = NodeState.RESTARTING
    machine_id: str | None = None
    handle: NodeHandle | None = None
    facts: NodeFacts | None = None
    #: Its clock, as seconds to add to get the learner's.
    clock_s: float = 0.0
    #: Whether it has slots for versions, and the weights that travel once; the version in them.
    has_begun: bool = False
    has_frozen: bool = False
    version: int = -1
    #: What was found wrong with it elsewhere, for which it counts as lost.
    problem: str = ""
    #: Seed of its tokens, of this start; ``None`` until it is granted a group.
    seed: int | None = None
    is_leaving: bool = False
    num_losses: int = 0
    granted: dict[int, tuple[Group, int]] = field(default_factory=dict)
    unsent: list[Grant] = field(default_factory=list)
    #: Tasks that kept failing elsewhere and that it has yet to hear of.
    failing: list[str] = field(default_factory=list)
    tracks: set[tuple[str, str]] = field(default_factory=set)

    def capacity(self, num_candidates: int) -> int:
        """Groups that it holds at once: those that fill its environments, and one ahead."""
        per_env = self.facts.specs.num_rollouts if self.facts else 1
        num_envs = self.workers.num_workers * self.workers.envs_per_worker * per_env
        return -(-num_envs // num_candidates) + 1


def difference(node: Node, first: Node) -> str:
    """In what a node is not like the first one, with the remedy; "" if they are alike."""
    assert node.facts is not None and first.facts is not None
    if node.facts.specs != first.facts.specs:
        return (
            f"Environments of all nodes must have the same specs, got {first.facts.specs} on "
            f"{first.name} and {node.facts.specs} on {node.name}. Make create_env_fn "
            "deterministic, and install the same versions."
        )
    ours, theirs = first.facts.versions, node.facts.versions
    names = [name for name in ours if ours[name] != theirs.get(name)]
    if names:
        listed = ", ".join(f"{name} {ours[name]} and {theirs.get(name)}" for name in names)
        return (
            f"All nodes must have the same packages, got {listed} on {first.name} and {node.name}."
            " Install the same versions."
        )
    return ""


async def start_node(node: Node, runtime: NodeRuntime) -> None:
    """Start a node on its machine, and learn what it is like.

    Raises:
        NodeLostError: if it cannot be started.
    """
    assert node.machine_id is not None
    node.handle = await runtime.start(node.machine_id, node.workers)
    sent_s = time.monotonic()
    facts = await node.handle.call("facts", timeout_s=node.workers.start_timeout_s)
    node.facts = facts
    node.clock_s = (sent_s + time.monotonic()) / 2 - facts.now_s


def stop_nodes(nodes: Sequence[Node], grace_s: float) -> None:
    """End nodes in order: ask all of them, then end those that do not answer in time."""

    async def stop(handle: NodeHandle) -> None:
        with contextlib.suppress(NodeLostError):
            await handle.call("stop", grace_s, timeout_s=grace_s + 5.0)
        await in_thread(handle.kill)

    async def stop_all() -> None:
        await asyncio.gather(*[stop(node.handle) for node in nodes if node.handle is not None])

    apart(asyncio.run, stop_all()).result()
    for node in nodes:
        node.handle = None


def apart(function: Callable[..., T], *args: Any) -> Future[T]:
    """Call a function in a thread of its own; executors refuse work while a script is ending."""
    future: Future[T] = Future()

    def run() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

    threading.Thread(target=run, name="dvla-apart", daemon=True).start()
    return future


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """The result of a function that blocks, called :func:`apart`."""
    return await asyncio.wrap_future(apart(function, *args))
