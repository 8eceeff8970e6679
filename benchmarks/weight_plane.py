# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What does it cost to give new weights to everybody on a node?

    python benchmarks/weight_plane.py [--quick] [--megabytes 10] [--readers 8]

Reader processes serve a policy all the time (a stack of square linear layers, batch 4) while the
learner publishes. The same loop runs under ``dvla`` (this project's ``AsyncWeightUpdater``) and
TorchRL's own ways: ``multiprocess`` and ``shared`` (``MultiProcessWeightSyncScheme``,
``SharedMemWeightSyncScheme``) and ``process_server`` (``ProcessInferenceServer`` with its
``update_model_weights``). Readers serve in two ways: ``emulate``, a decision of 5 ms on a device
that is not there, so that cores are left for the weights; and ``compute``, the layers on the CPU,
so that eight readers and a learner share the cores there are.

The last line of stdout is one JSON object. Where a figure is measured for several models and
ways of serving, the key of the issue is the *worst* of them and ``by_model`` has them all:

stall_over_copy           learner's time in ``publish``, which copies and checks for NaN and
                          infinity, over one ``copy_`` of as many bytes
ratio_vs_whole_versions   adoption time of ``multiprocess`` and of ``process_server``, the smaller,
                          over ours (larger is better): from the call of publish until the last
                          reader begins a decision with the new weights
ratio_vs_shared_mem       our adoption time over that of ``shared``, which writes under its readers'
                          feet
torn_reads                reads of ours that mixed two versions, of ``num_reads``; ``reads`` has all
                          schemes. ``weight_soak.py`` is the long run
resident_over_model       memory of the slots and what all readers have added of their own, over the
                          model's; the learner's own model is not counted

``docs/source/guide/benchmarks.md`` tells how the rivals were set up.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _machine import arguments, log, memory_bytes, report, spread
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules.inference_server import MPTransport, ProcessInferenceServer
from torchrl.weight_update import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from torchrl_dvla.memory import available_bytes
from torchrl_dvla.weight_update import AsyncWeightUpdater, WeightStore

#: A decision on an accelerator, emulated: it takes this long and holds no core.
EMULATED_DECISION_S = 0.005
VERSION, FIRST_USE_NS = range(2)
#: Run the layers; emulate a decision; compare all weights.
ORDERS = ("compute", "emulate", "check")

SCHEMES: dict[str, Callable[[], WeightSyncScheme]] = {
    "dvla": AsyncWeightUpdater,
    "multiprocess": MultiProcessWeightSyncScheme,
    "shared": SharedMemWeightSyncScheme,
}


def fork_server() -> Any:
    """A context whose processes start in no time: their server has imported this very file."""
    context, here = multiprocessing.get_context("forkserver"), Path(__file__)
    path = os.environ.get("PYTHONPATH", "")  # where the server looks for modules
    if str(here.parent) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here.parent), path]))
    context.set_forkserver_preload([here.stem])
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


# -- the readers -----------------------------------------------------------------------------------
def serve(
    connection: Connection,
    scheme: WeightSyncScheme,
    words: torch.Tensor,
    index: int,
    megabytes: int,
) -> None:
    """Follow orders, and say in ``words[index]`` what is served, and since when."""
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
        self.policy = set_version(make_policy(megabytes), 0)
        self.version = 0
        self.words = torch.zeros(num_readers, 2, dtype=torch.int64).share_memory_()
        self.scheme = SCHEMES[name]()
        # Given the model on the CPU, TorchRL's schemes hand readers the learner's own parameters:
        # its training shows through before anything is sent. With a buffer of its own (for each
        # worker, where the scheme is to send copies) there is something to compare.
        self._weights = TensorDict.from_module(self.policy).data
        options: dict[str, Any] = {"model": self.policy, "num_workers": num_readers}
        if name == "multiprocess":
            options = {"weights": self._weights, "num_workers": num_readers}
            options["device_map_fn"] = copy_for_worker
        elif name == "shared":
            devices = [torch.device("cpu")] * num_readers
            options = {"weights": self._weights.clone(), "devices": devices}
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

    def publish(self) -> None:
        """What the learner calls to give its weights away."""
        if isinstance(self.scheme, AsyncWeightUpdater):
            self.scheme.publish()
        else:
            self.scheme.send(weights=self._weights)

    def adopt_s(self) -> float:
        """Seconds from the call of publish until the last reader begins to act with the version."""
        words = self.words
        self.train()
        start_ns = time.monotonic_ns()
        self.publish()
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
    def ordered(self, order: str) -> Iterator[list[int]]:
        """The readers do as told meanwhile; the list then holds their reads and torn reads."""
        counts: list[int] = []
        for pipe in self._pipes:
            pipe.send(order)
        yield counts
        for pipe in self._pipes:
            pipe.send("enough")
        answers = [pipe.recv() for pipe in self._pipes]
        counts += [sum(answer[0] for answer in answers), sum(answer[1] for answer in answers)]

    def torn(self, seconds: float) -> dict[str, int]:
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
        self.end_processes()

    def end_processes(self) -> None:
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


class ServerNode(Node):
    """A ``ProcessInferenceServer`` for each reader, updated by its own ``update_model_weights``.

    All servers are told at once, from a thread each, which is faster than one after the other. One
    more process asks them without rest. A version counts as used when the last update returns.
    """

    def __init__(self, name: str, num_readers: int, megabytes: int) -> None:
        context = fork_server()
        self.name = name
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
        ours, theirs = context.Pipe()
        asker = context.Process(target=ask, args=(theirs, clients), daemon=True)
        self._pipes, self._processes = [ours], [asker]
        asker.start()
        theirs.close()
        self._threads = ThreadPoolExecutor(num_readers)
        list(self._threads.map(lambda server: server.start(), self.servers))

    def publish(self) -> None:
        list(self._threads.map(lambda s: s.update_model_weights(self._weights), self.servers))

    def adopt_s(self) -> float:
        self.train()
        start = time.monotonic()
        self.publish()
        return time.monotonic() - start

    def close(self) -> None:
        self.end_processes()
        list(self._threads.map(lambda server: server.shutdown(), self.servers))
        self._threads.shutdown()


# -- measuring -------------------------------------------------------------------------------------
def measure_stall(megabytes: int, repeats: int) -> dict[str, Any]:
    """Ratio to a plain copy, in turns. No reader: who reads is the next question."""
    policy = set_version(make_policy(megabytes), 1)
    flat = torch.ones(megabytes << 18)
    # Several targets in turn, as the store has slots: one alone might stay in the cache.
    num_targets = 3 if megabytes <= 512 else 1
    targets = itertools.cycle([torch.zeros_like(flat) for _ in range(num_targets)])
    with WeightStore(policy) as store:
        calls = {"copy_s": lambda: next(targets).copy_(flat), "stall_s": store.publish}
        times: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
        for _ in range(repeats + 3):
            random.shuffle(names)  # else a scheduler's time slice may always end in the same call
            for name in names:
                start_s = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - start_s)
    copies, stalls = times["copy_s"][3:], times["stall_s"][3:]
    return {
        "stall_over_copy": statistics.median(stalls) / statistics.median(copies),
        "stall_over_copy_spread": spread(a / b for a, b in zip(stalls, copies, strict=True)),
        "stall_s": statistics.median(stalls),
        "copy_s": statistics.median(copies),
    }


def measure_adoption(nodes: list[Node], order: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Median adoption times of each round, scheme by scheme; the readers of the others rest."""
    times: dict[str, list[float]] = {node.name: [] for node in nodes}
    for number in range(rounds):
        random.shuffle(nodes)
        for node in nodes:
            with node.ordered(order):
                node.adopt_s()
                times[node.name].append(statistics.median(node.adopt_s() for _ in range(repeats)))
        log(f"adoption, {order}: round {number + 1} of {rounds}")
    ours = times["dvla"]
    out: dict[str, Any] = {"adopt_s": {name: spread(v, 4) for name, v in times.items()}}
    for name, theirs in times.items():
        if name == "shared":
            out["ratio_vs_shared"] = spread(a / b for a, b in zip(ours, theirs, strict=True))
        elif name != "dvla":
            out[f"ratio_vs_{name}"] = spread(b / a for a, b in zip(ours, theirs, strict=True))
    return out


def measure_model(megabytes: int, num_readers: int, quick: bool) -> dict[str, Any]:
    """Everything about one size of model, in the time and the memory that it leaves."""
    is_small, is_large = megabytes <= 64, megabytes > 512
    out: dict[str, Any] = {"megabytes": megabytes}
    log(f"{megabytes} MB: stall")
    out.update(measure_stall(megabytes, 40 if is_small else 5 if is_large else 15))
    nodes: list[Node] = []
    try:
        dvla = Node("dvla", num_readers, megabytes)
        nodes.append(dvla)
        out["resident_over_model"] = dvla.resident_bytes() / (megabytes << 20)
        rounds = 5 if quick or not is_small else 11
        names = ["shared"] if is_large else ["shared", "multiprocess", "process_server"]
        kinds = {"process_server": ServerNode}
        nodes += [kinds.get(name, Node)(name, num_readers, megabytes) for name in names]
        log(f"{megabytes} MB: {num_readers} readers under each scheme")
        repeats = 5 if is_small else 2
        out["emulate"] = measure_adoption(nodes, "emulate", rounds, repeats)
        if not is_large:
            out["compute"] = measure_adoption(nodes, "compute", 5, 2 if quick else repeats)
        if is_small:
            out["reads"] = {node.name: node.torn(1.5 if quick else 5.0) for node in nodes}
    finally:
        for node in nodes:
            node.close()
    # A run that is ended early has not measured in vain.
    log(json.dumps(out))
    return out


def worst(models: list[dict[str, Any]], serving: tuple[str, ...]) -> dict[str, float | None]:
    """The keys of the issue, over all models (and ways of serving); None for what none measured."""
    out: dict[str, float | None] = {
        key: max(model[key] for model in models)
        for key in ("stall_over_copy", "resident_over_model")
    }
    parts = [model[way] for model in models for way in serving if way in model]
    out["ratio_vs_shared_mem"] = max(part["ratio_vs_shared"]["median"] for part in parts)
    whole: list[float] = []
    for name in ("multiprocess", "process_server"):
        key = f"ratio_vs_{name}"
        ratios = [part[key]["median"] for part in parts if key in part]
        out[key] = min(ratios, default=None)
        whole += ratios
    out["ratio_vs_whole_versions"] = min(whole, default=None)
    return out


def main() -> None:
    args = arguments(__doc__, "10 MB only, under a minute", megabytes=int, readers=8)
    torch.set_num_threads(1)
    models: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    sizes = [args.megabytes] if args.megabytes else [10] if args.quick else [10, 300, 2048]
    for megabytes in sizes:
        free = available_bytes()
        # The most at one time: our four copies and another scheme's three, or the copies of all.
        need = (8 if megabytes > 512 else 4 + 4 * args.readers) * (megabytes << 20)
        if free is not None and free < need:
            skipped[str(megabytes)] = f"needs {need >> 30} GiB, {free >> 30} are free"
            continue
        models.append(measure_model(megabytes, args.readers, args.quick))
    if not models:
        sys.exit(f"No model fits into memory: {skipped}")
    result: dict[str, Any] = {"readers": args.readers}
    result.update(worst(models, ("emulate", "compute")))
    result["emulate_only"] = worst(models, ("emulate",))
    reads = models[0].get("reads", {})
    result["torn_reads"] = reads.get("dvla", {}).get("torn_reads")
    result.update(reads=reads, by_model=models, skipped=skipped)
    result["emulated"] = "decisions of 5 ms on a device that is not there, in all parts `emulate`"
    report("weight_plane", result, args.quick)


if __name__ == "__main__":
    main()
