# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A node for the benchmarks of the weight plane: one learner, and processes that serve its policy.

The processes come from a fork server that has imported everything, so that eight of them start in a
second. All schemes meet the same policy and the same loop, except for TorchRL's own inference
servers, which bring their loop along.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules.inference_server import MPTransport, ProcessInferenceServer
from torchrl.weight_update import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from torchrl_dvla.weight_update import AsyncWeightUpdater

#: A decision on an accelerator, emulated: it takes this long and holds no core.
EMULATED_DECISION_S = 0.005
VERSION, DECISIONS, FIRST_USE_NS = range(3)
#: Run the layers; emulate a decision; compare all weights.
ORDERS = ("compute", "emulate", "check")

SCHEMES: dict[str, Callable[[], WeightSyncScheme]] = {
    "dvla": AsyncWeightUpdater,
    "multiprocess": MultiProcessWeightSyncScheme,
    "shared": SharedMemWeightSyncScheme,
}


def fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    folder = str(Path(__file__).parent)  # the server looks for modules on this path alone
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in path:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, *path]))
    context.set_forkserver_preload(["_weight_node"])
    return context


def width_of(megabytes: int) -> int:
    """Larger models have larger layers: of 1, 4 or 16 MiB.

    TorchRL's schemes send a file descriptor for each tensor, of which a process takes some 250.
    """
    return 512 if megabytes <= 64 else 1024 if megabytes <= 512 else 2048


class Policy(nn.Module):
    """A stack of square layers, every weight of which is the number of its version."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        width = width_of(megabytes)
        num_layers = (megabytes << 20) // (4 * width * width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))
        self.requires_grad_(False)

    def version(self) -> int:
        """In every scheme the last weight is written last."""
        return int(self.layers[-1].weight[-1, -1])

    def forward(
        self, inputs: torch.Tensor, order: str = "compute", on_begin: Callable[[int], None] = id
    ) -> bool:
        """One decision; in the order ``check`` it says whether all weights were of one version."""
        version = self.version()
        on_begin(version)
        if order == "check":
            extremes = [torch.aminmax(layer.weight) for layer in self.layers]
            return {float(v) for pair in extremes for v in pair} == {float(version)}
        if order == "emulate":
            # Not even one layer: of 16 MiB, in eight readers, it would hold one and a half cores.
            time.sleep(EMULATED_DECISION_S)
            return True
        for layer in self.layers:
            inputs = layer(inputs)
        return True


def make_policy(megabytes: int, *, meta: bool = False) -> Policy:
    """A policy without the seconds that random initial weights take."""
    with torch.device("meta"):
        policy = Policy(megabytes)
    return policy if meta else policy.to_empty(device="cpu").requires_grad_(False)


def set_version(policy: Policy, version: int) -> Policy:
    for parameter in policy.parameters():
        parameter.fill_(float(version))
    return policy


def memory_bytes(field: str, mapping: str = "") -> int:
    """A field of this process's memory map, summed over the mappings of that name."""
    total, is_wanted = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if not line.split()[0].endswith(":"):  # the head of a mapping
                is_wanted = mapping in line
            elif is_wanted and line.startswith(f"{field}:"):
                total += int(line.split()[1]) * 1024
    return total


# -- the readers -----------------------------------------------------------------------------------


def serve(
    connection: Connection,
    scheme: WeightSyncScheme,
    words: torch.Tensor,
    index: int,
    megabytes: int,
) -> None:
    """Follow orders, and say in ``words[index]`` what is served, since when, and how often."""
    torch.set_num_threads(1)
    inputs = torch.zeros(4, width_of(megabytes))
    nn.Linear(inputs.shape[-1], 512)(inputs)  # the library's own workspaces are not weights
    row = words[index].numpy()
    before = memory_bytes("Anonymous")
    policy = make_policy(megabytes, meta=True)  # every scheme brings the first weights
    scheme.init_on_receiver(model_id="policy", model=policy, worker_idx=index)
    scheme.connect(worker_idx=index)
    policy(inputs)
    connection.send(memory_bytes("Anonymous") - before)

    def begin(version: int) -> None:
        if version != row[VERSION]:
            row[FIRST_USE_NS] = time.monotonic_ns()
            row[VERSION] = version

    while (order := connection.recv()) != "stop":
        num_reads = num_torn = 0
        while not connection.poll(0):
            num_torn += not policy(inputs, order, begin)
            num_reads += 1
            row[DECISIONS] += 1
        connection.recv()
        connection.send((num_reads, num_torn))
    scheme.shutdown()


def copy_for_worker(index: int, weights: TensorDict) -> TensorDict:
    return weights.clone()


class Node:
    """The learner and its readers under one scheme."""

    def __init__(self, name: str, num_readers: int, megabytes: int) -> None:
        context = fork_server()
        self.name = name
        self.megabytes = megabytes
        self.num_readers = num_readers
        self.policy = set_version(make_policy(megabytes), 0)
        self.version = 0
        self.words = torch.zeros(num_readers, 3, dtype=torch.int64).share_memory_()
        self.scheme = SCHEMES[name]()
        # Given the model on the CPU, TorchRL's schemes hand readers the learner's own parameters:
        # its training shows through before anything is sent. With a buffer of its own (for each
        # worker, where the scheme is to send copies) there is something to compare.
        self._weights = TensorDict.from_module(self.policy).data
        options: dict[str, Any] = {"model": self.policy, "num_workers": num_readers}
        if name == "multiprocess":
            options = {
                "weights": self._weights,
                "num_workers": num_readers,
                "device_map_fn": copy_for_worker,
            }
        elif name == "shared":
            options = {
                "weights": self._weights.clone(),
                "devices": [torch.device("cpu")] * num_readers,
            }
        self.scheme.init_on_sender(model_id="policy", ctx=context, **options)
        pipes = [context.Pipe() for _ in range(num_readers)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(
                target=serve, args=(theirs, self.scheme, self.words, index, megabytes), daemon=True
            )
            for index, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that a reader that fails is heard
        self.scheme.connect()
        self._reader_bytes = [pipe.recv() for pipe in self._pipes]

    def train(self) -> None:
        """Give the learner's weights the next number."""
        self.version += 1
        set_version(self.policy, self.version)

    def publish(self, num_readers: int | None = None) -> None:
        """What the learner calls to give its weights away."""
        if isinstance(self.scheme, AsyncWeightUpdater):
            self.scheme.publish()
        else:
            ids = None if num_readers is None else list(range(num_readers))
            self.scheme.send(weights=self._weights, worker_ids=ids)

    def adopt_s(self, num_readers: int | None = None) -> float:
        """Seconds from the call of publish until the last reader begins to act with the version."""
        words = self.words[:num_readers]
        self.train()
        start_ns = time.monotonic_ns()
        self.publish(num_readers)
        deadline = time.monotonic() + 60.0
        while int(words[:, VERSION].min()) < self.version:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Version {self.version} is not served: {self.words}.")
            time.sleep(5e-4)
        return (int(words[:, FIRST_USE_NS].max()) - start_ns) / 1e9

    def resident_bytes(self) -> int:
        """What the slots take, and what all readers have added of their own."""
        for _ in range(4):  # every slot has been written
            self.train()
            self.publish()
        # The pages of the slots are shared, so they are counted once, where all of them are mapped.
        return memory_bytes("Rss", "memfd:torchrl_dvla") + sum(self._reader_bytes)

    @contextmanager
    def ordered(self, order: str, num_readers: int | None = None) -> Iterator[list[int]]:
        """The readers follow the order meanwhile; the list then has their reads and torn reads."""
        pipes = self._pipes[:num_readers]
        counts: list[int] = []
        for pipe in pipes:
            pipe.send(order)
        yield counts
        for pipe in pipes:
            pipe.send("enough")
        answers = [pipe.recv() for pipe in pipes]
        counts += [sum(answer[0] for answer in answers), sum(answer[1] for answer in answers)]

    def torn(self: Any, seconds: float) -> dict[str, int]:
        """Reads that found two versions in one model, under a learner that never rests."""
        with self.ordered("check") as counts:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                self.train()
                self.publish()
        return {"num_reads": counts[0], "torn_reads": counts[1]}

    def close(self) -> None:
        # First the scheme: TorchRL's flush queues that only a living reader empties.
        self.scheme.shutdown()
        for pipe in self._pipes:
            pipe.send("stop")
        for process in self._processes:
            process.join(timeout=20.0)
            if process.is_alive():
                process.kill()
                process.join()


# -- TorchRL's inference servers -------------------------------------------------------------------


class Answer(nn.Module):
    """A policy for a server: one decision as the request orders it, and whether it was whole."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.policy = set_version(make_policy(megabytes), 0)
        self.inputs = torch.zeros(4, width_of(megabytes))

    def forward(self, order: torch.Tensor) -> torch.Tensor:
        is_whole = self.policy(self.inputs, ORDERS[int(order.reshape(-1)[0])])
        return torch.full((order.shape[0], 1), is_whole, dtype=torch.bool)


def make_server_policy(megabytes: int) -> TensorDictModule:
    torch.set_num_threads(1)
    return TensorDictModule(Answer(megabytes), in_keys=["order"], out_keys=["is_whole"])


def ask(connection: Connection, clients: list[Any]) -> None:
    """A process that keeps every server busy, as ordered, from a thread for each."""
    is_done = threading.Event()

    def ask_one(client: Any, order: str) -> tuple[int, int]:
        num_reads = num_torn = 0
        while not is_done.is_set():
            request = TensorDict({"order": torch.tensor([ORDERS.index(order)])}, batch_size=[])
            num_torn += not bool(client(request)["is_whole"])
            num_reads += 1
        return num_reads, num_torn

    with ThreadPoolExecutor(len(clients)) as threads:
        while (order := connection.recv()) != "stop":
            is_done.clear()
            answers = [threads.submit(ask_one, client, order) for client in clients]
            connection.recv()
            is_done.set()
            counts = [answer.result() for answer in answers]
            connection.send((sum(c[0] for c in counts), sum(c[1] for c in counts)))


class ServerNode:
    """A ``ProcessInferenceServer`` for each reader, updated by its own ``update_model_weights``.

    All servers are updated at once, from a thread each, which is faster than one after the other.
    One more process asks them all the time. A version counts as used when the last update returns.
    """

    name = "process_server"

    def __init__(self, num_readers: int, megabytes: int) -> None:
        context = fork_server()
        self.megabytes = megabytes
        self.num_readers = num_readers
        self.policy = set_version(make_policy(megabytes), 0)
        self.version = 0
        names = {f"module.policy.{name}": p.data for name, p in self.policy.named_parameters()}
        self._weights = TensorDict(names, []).unflatten_keys(".")
        transports = [MPTransport(ctx=context) for _ in range(num_readers)]
        clients = [transport.client() for transport in transports]
        self.servers = [
            ProcessInferenceServer(
                policy_factory=functools.partial(make_server_policy, megabytes),
                transport=transport,
                mp_context=context,
            )
            for transport in transports
        ]
        self._pipe, theirs = context.Pipe()
        self._asker = context.Process(target=ask, args=(theirs, clients), daemon=True)
        self._asker.start()
        theirs.close()
        self._threads = ThreadPoolExecutor(num_readers)
        list(self._threads.map(lambda server: server.start(), self.servers))

    def train(self) -> None:
        self.version += 1
        set_version(self.policy, self.version)

    def publish(self) -> None:
        list(self._threads.map(lambda s: s.update_model_weights(self._weights), self.servers))

    def adopt_s(self) -> float:
        self.train()
        start = time.monotonic()
        self.publish()
        return time.monotonic() - start

    @contextmanager
    def ordered(self, order: str) -> Iterator[list[int]]:
        """As :meth:`Node.ordered`."""
        counts: list[int] = []
        self._pipe.send(order)
        yield counts
        self._pipe.send("enough")
        counts += self._pipe.recv()

    torn = Node.torn

    def close(self) -> None:
        self._pipe.send("stop")
        self._asker.join(timeout=20.0)
        list(self._threads.map(lambda server: server.shutdown(), self.servers))
        self._threads.shutdown()
        if self._asker.is_alive():
            self._asker.kill()
            self._asker.join()
