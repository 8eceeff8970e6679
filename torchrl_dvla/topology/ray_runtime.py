# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Ray as the runtime of a cluster: members, one actor a node, bytes in its object store.

The driver is the learner's process. It joins a cluster that is running, or starts one on this
machine that nobody outside can reach. What belongs to the cluster, and who may join it, is Ray's
business. Weights go another way, see :mod:`~torchrl_dvla.weight_update.chain`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torchrl_dvla.collectors import InferenceConfig, WorkerConfig
from torchrl_dvla.topology.nodes import Machine, NodeLostError

__all__ = ["LOOPBACK", "RayNode", "RayRuntime", "import_ray", "stay_private"]

_log = logging.getLogger("torchrl_dvla")

LOOPBACK = "127.0.0.1"
#: Seconds for Ray to end an actor, and for a cluster to answer.
_KILL_S, _CONNECT_S = 5.0, 30.0
#: Calls that a node serves at once: a report that waits, a version on its way, grants.
_CONCURRENCY = 8


def import_ray() -> Any:
    """The module.

    Raises:
        ImportError: with the pip line, if it is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ImportError(
            'A placement of several nodes needs Ray: pip install "torchrl-dvla[ray]"'
        ) from error
    return ray


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep the program's signal handlers: Ray sets its own, in the main thread, at every start."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def stay_private() -> None:
    """Have a cluster that this process starts listen on loopback alone, and ask for a token.

    Processes of Ray's read the token when they start: others on this machine cannot join.
    """
    from ray._private import ray_constants

    # Else the driver takes the address of the machine for its own.
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # This process has read its environment when Ray was imported.
    compiled: Any = importlib.import_module("ray._raylet")
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


class NodeActor:
    """Process of a node: a :class:`~torchrl_dvla.topology.node_loop.NodeLoop` behind one method."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Ray hides all GPUs from an actor that asked for none of its own.
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            del os.environ["CUDA_VISIBLE_DEVICES"]
        # Ray's script for workers is no module that our processes may import as theirs.
        vars(sys.modules["__main__"]).pop("__file__", None)
        from torchrl_dvla.topology.node_loop import NodeLoop

        self._node = NodeLoop(*args, **kwargs)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the node's loop."""
        return getattr(self._node, method)(*args)


class RayNode:
    """Handle of one start of a node, see :class:`~torchrl_dvla.topology.cluster_loop.NodeHandle`.

    Args:
        actor: Ray's handle.
        machine_id (str): the node of Ray's that it runs on.
    """

    def __init__(self, actor: Any, machine_id: str) -> None:
        self._actor, self._machine_id = actor, machine_id
        self._pid: int | None = None
        self._hangs = False

    async def call(self, method: str, *args: Any, timeout_s: float | None) -> Any:
        """Call a method of the node's loop; raises NodeLostError."""
        ray = import_ray()
        try:
            async with asyncio.timeout(timeout_s):
                result = await self._actor.call.remote(method, *args)
        except ray.exceptions.RayError as error:  # also what its own socket waited for too long
            raise NodeLostError(_reason(error)) from error
        except TimeoutError:
            self._hangs = True
            raise NodeLostError(f"{method} took more than {timeout_s} s.") from None
        if method == "facts":
            self._pid = result.pid
        return result

    def kill(self) -> None:
        """End the actor's process, and so all of its own, even if it is stopped."""
        ray = import_ray()
        with contextlib.suppress(Exception):  # whatever is left of a cluster that breaks down
            ray.kill(self._actor)
        if self._pid is None or not self._hangs:
            return
        # A process that is stopped does not obey Ray.
        with contextlib.suppress(Exception):
            end = ray.remote(num_cpus=0, max_retries=0)(_end_process)
            where = _affinity(self._machine_id)
            ray.get(end.options(scheduling_strategy=where).remote(self._pid), timeout=_KILL_S)


def _end_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _affinity(machine_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(machine_id, soft=False)


def _reason(error: Exception) -> str:
    """What happened, without Ray's own stack."""
    cause = getattr(error, "cause", None)
    return f"{type(cause or error).__name__}: {cause or error}"


class RayRuntime:
    """The cluster, see :class:`~torchrl_dvla.topology.cluster_loop.NodeRuntime`.

    Args:
        hosts (sequence of str): of the nodes; if the cluster is to be started here, how many.
        num_cores (sequence of int): what each of them asks for.

    Keyword Args:
        address (str, optional): ``"host:port"`` of a running cluster, or ``"auto"`` for the one of
            this machine. Defaults to the one that this process has joined already, or to one that
            is started here, with a node of Ray's for each of ours, on the loopback interface.
        object_store_bytes (int): of each node of Ray's that is started here.

    Raises:
        ImportError: if Ray is not installed.
        TimeoutError: if the address does not answer.
        ValueError: if nodes on other machines are asked for and there is no cluster.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        num_cores: Sequence[int],
        *,
        address: str | None = None,
        object_store_bytes: int,
    ) -> None:
        self._ray = import_ray()
        self._cluster: Any = None
        self._is_ours = False
        if self._ray.is_initialized():
            if address not in (None, "auto"):
                raise ValueError(
                    "address must be None in a process that has joined a cluster, got "
                    f"{address!r}. Call ray.shutdown() before."
                )
        elif address is not None:
            self._join(address)
        else:
            self._start_here(hosts, num_cores, object_store_bytes)

    def _join(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        if address != "auto":
            if not host or not port.isdigit():
                raise ValueError(
                    f'address must be "host:port" or "auto", got {address!r}. `ray start --head` '
                    "prints it."
                )
            # Ray retries for a minute or more, and then ends the process.
            try:
                socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
            except OSError as error:
                raise TimeoutError(
                    f"address must be that of a running cluster, got {address!r}, which does not "
                    f"answer within {_CONNECT_S:g} s: {error}. Start it with `ray start --head`, "
                    "and see that this machine may reach it."
                ) from error
        with handlers_kept():
            self._init(address)

    def _start_here(
        self, hosts: Sequence[str], num_cores: Sequence[int], object_store_bytes: int
    ) -> None:
        here = {"localhost", LOOPBACK, socket.gethostname()}
        if elsewhere := sorted(set(hosts) - here):
            raise ValueError(
                f"placement must have nodes of this machine only without an address, got "
                f"{elsewhere}. Start Ray on all of them (`ray start`), and pass address='auto'."
            )
        from ray.cluster_utils import Cluster

        stay_private()
        common = {"node_ip_address": LOOPBACK, "object_store_memory": object_store_bytes}
        checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000}
        checks |= {"health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
        head = {"num_cpus": num_cores[0], "include_dashboard": False, "_system_config": checks}
        with handlers_kept():
            self._cluster = Cluster(initialize_head=True, head_node_args=head | common)
            self._others = [
                functools.partial(self._cluster.add_node, num_cpus=cores, **common)
                for cores in num_cores[1:]
            ]
            self._started = [add() for add in self._others]
            self._init(self._cluster.address)

    def _init(self, address: str) -> None:
        # Nodes report what they log; what Ray logs, pages of it for a lost node, is in its files.
        self._ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        self._ray._private.worker._worker_logs_enabled = False
        self._is_ours = True

    def use(
        self, factories: bytes, inference: InferenceConfig, policy_factory: bytes | None
    ) -> None:
        """Say what every node is made of; the factories go to each node once."""
        self._factories = self._ray.put(factories)
        self._inference, self._policy_factory = inference, policy_factory

    def machines(self) -> Mapping[str, Machine]:
        """The members that are alive, by Ray's id of the node."""
        leaving = self._ray._private.state.state.get_draining_nodes()
        return {
            node["NodeID"]: Machine(
                node["NodeManagerHostname"],
                node["Resources"].get("CPU", 0.0),
                node["NodeID"] in leaving,
            )
            for node in self._ray.nodes()
            if node["Alive"]
        }

    async def start(self, machine_id: str, workers: WorkerConfig) -> RayNode:
        """Start a node's actor; raises NodeLostError."""
        hosts = [n["NodeManagerAddress"] for n in self._ray.nodes() if n["NodeID"] == machine_id]
        if not hosts:
            raise NodeLostError("its machine has left the cluster.")
        actor = (
            self._ray.remote(NodeActor)
            .options(
                num_cpus=workers.num_workers,
                max_concurrency=_CONCURRENCY,
                max_restarts=0,
                scheduling_strategy=_affinity(machine_id),
            )
            .remote(self._factories, workers, self._inference, self._policy_factory, host=hosts[0])
        )
        return RayNode(actor, machine_id)

    def put(self, value: bytes) -> Any:
        """Make bytes available to all nodes for as long as what is returned lives."""
        return self._ray.put(value)

    def kill_machine(self) -> Callable[[], None]:
        """Kill the last node of a cluster that was started here; returns what adds it again.

        Raises:
            RuntimeError: if none was.
        """
        if self._cluster is None or not self._others:
            raise RuntimeError("Only a node of a cluster that was started here may be killed.")
        self._cluster.remove_node(self._started.pop(), allow_graceful=False)

        def add_again() -> None:
            with handlers_kept():
                self._started.append(self._others[-1]())

        return add_again

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here; safe to call twice."""
        if self._is_ours:
            self._is_ours = False
            self._ray.shutdown()
            self._ray._private.worker._worker_logs_enabled = True
            if self._cluster is not None:
                self._cluster.shutdown()
