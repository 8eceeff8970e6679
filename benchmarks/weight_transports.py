# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How fast does one version reach every node: by our chain, torch.distributed, or Ray's store?

    python benchmarks/weight_transports.py [--quick] [--emulated-mbit 1000]

One sender and 1 to 8 receivers, each a process of its own. A transfer is over when every receiver
has the bytes in a buffer of its own, as a node has them in a slot of its store.

chain      what the package does: every receiver passes each bucket on to the next one while the
           one after comes in, over a connection that is made for the transfer and authenticated
           (``send_along_chain``, ``ChainReceiver``). Without digests, which the others lack.
gloo chain the same with ``torch.distributed``'s ``send`` and ``recv`` over Gloo.
broadcast  ``torch.distributed.broadcast`` over Gloo, in buckets.
ray        ``ray.put`` once; each receiver, an actor on a node of Ray's of its own, gets the object
           and copies it.
ray relay  Ray's object store, bucket by bucket: each receiver copies a bucket, puts it into its own
           node's store and tells the next one.

On the loopback interface, where each transport is bound by copies and cores; and, with
``--emulated-mbit``, between network namespaces of this machine whose links are *emulated*: so many
Mbit/s each way, without a delay (``tc``; it needs root). Ray's nodes have addresses of their own
there.

``seconds`` by receivers, megabytes and transport; ``chain_over_fastest`` is a median within one
repeat. Transports take turns. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _machine import arguments, log, report, spread

from torchrl_dvla.weight_update import ChainReceiver, send_along_chain

BUCKET_BYTES = 4 << 20
GLOO = ("chain", "gloo chain", "broadcast")
TRANSPORTS = (*GLOO, "ray", "ray relay")
KEY = b"known to all of them"
LIMIT_S = 300.0
#: Of a relay: a call of Ray's and two copies are paid for each.
RELAY_BYTES = 16 << 20
#: Receivers and megabytes; the largest has to fit in memory twice a receiver.
FULL = [(n, size) for n in (1, 2, 4, 8) for size in (4, 64, 256)] + [(2, 1024)]
QUICK = [(1, 4), (2, 64)]
_BRIDGE = "dvlabr"
_PORT = 29_411


# -- hosts ---------------------------------------------------------------------------------------


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def hosts(number: int, mbit: int | None) -> Iterator[list[tuple[list[str], str]]]:
    """Prefix of a command, and address, of each host; all on loopback without ``mbit``."""
    if mbit is None:
        yield [([], "127.0.0.1")] * number
        return
    names = [f"dvla{index}" for index in range(number)]
    shape = f"rate {mbit}mbit burst 256kb latency 50ms".split()
    try:
        _run("ip", "link", "add", _BRIDGE, "type", "bridge")
        _run("ip", "link", "set", _BRIDGE, "up")
        for index, name in enumerate(names):
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", f"{name}b", "type", "veth", "peer", "eth0", "netns", name)
            _run("ip", "link", "set", f"{name}b", "master", _BRIDGE, "up")
            inside = ["ip", "netns", "exec", name]
            _run(*inside, "ip", "addr", "add", f"10.77.0.{index + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run(*inside, "ip", "link", "set", device, "up")
            # Both ways: what the host sends, and what the bridge sends to it.
            _run(*inside, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *shape)
            _run("tc", "qdisc", "add", "dev", f"{name}b", "root", "tbf", *shape)
        yield [(["ip", "netns", "exec", name], f"10.77.0.{i + 1}") for i, name in enumerate(names)]
    finally:
        for name in names:
            # Agents of Ray's may stay for a while, and keep a namespace with its link.
            for what in (["link", "del", f"{name}b"], ["netns", "del", name]):
                subprocess.run(["ip", *what], capture_output=True)
        subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True)


# -- torch.distributed -----------------------------------------------------------------------------


def _buckets(buffer: torch.Tensor) -> Sequence[torch.Tensor]:
    return buffer.split(BUCKET_BYTES)


def _own_chain(
    buffer: torch.Tensor, receiver: ChainReceiver, following: tuple[str, int] | None
) -> None:
    if dist.get_rank():
        with receiver.receive(KEY, following, LIMIT_S) as fill:
            fill([buffer.numpy()])
    elif following is not None:
        send_along_chain([buffer.numpy()], following, KEY, LIMIT_S)


def _broadcast(buffer: torch.Tensor) -> None:
    works = [dist.broadcast(bucket, 0, async_op=True) for bucket in _buckets(buffer)]
    for work in works:
        work.wait()


def _chain(buffer: torch.Tensor) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    sent = []
    for bucket in _buckets(buffer):
        if rank:
            dist.recv(bucket, rank - 1)
        if rank + 1 < world:
            sent.append(dist.isend(bucket, rank + 1))
    for work in sent:
        work.wait()


def gloo_worker(rank: int, world: int, address: str, host: str) -> None:
    """One rank: told by rank 0, on its standard input, what to transfer."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{_PORT}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=LIMIT_S),
    )
    done = torch.zeros(1)
    receiver = ChainReceiver(host)
    addresses: list[Any] = [None] * world
    dist.all_gather_object(addresses, receiver.address)
    following = addresses[rank + 1] if rank + 1 < world else None
    transfers = {
        "chain": functools.partial(_own_chain, receiver=receiver, following=following),
        "gloo chain": _chain,
        "broadcast": _broadcast,
    }
    while True:
        order: list[Any] = [json.loads(sys.stdin.readline()) if rank == 0 else None]
        dist.broadcast_object_list(order, 0)
        if order[0] is None:
            break
        transport, size = order[0]
        buffer = torch.full((size << 20,), 7 if rank == 0 else 0, dtype=torch.uint8)
        dist.barrier()
        start_s = time.monotonic()
        transfers[transport](buffer)
        dist.all_reduce(done)  # every receiver has it
        if rank == 0:
            print(json.dumps(time.monotonic() - start_s), flush=True)
        assert int(buffer[0]) == int(buffer[-1]) == 7
    receiver.close()
    dist.destroy_process_group()


class Gloo:
    """A group of ranks, one a host."""

    def __init__(self, places: Sequence[tuple[list[str], str]]) -> None:
        address = places[0][1]
        self._ranks = []
        for rank, (prefix, own) in enumerate(places):
            command = [
                *prefix,
                sys.executable,
                __file__,
                "--worker",
                f"{rank},{len(places)},{address},{own}",
            ]
            interface = "lo" if own == "127.0.0.1" else "eth0"
            self._ranks.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=dict(os.environ, GLOO_SOCKET_IFNAME=interface),
                    text=True,
                )
            )

    def transfer(self, transport: str, size: int) -> float:
        """Seconds until all have so many megabytes."""
        first = self._ranks[0]
        assert first.stdin is not None and first.stdout is not None
        first.stdin.write(json.dumps([transport, size]) + "\n")
        first.stdin.flush()
        return float(json.loads(first.stdout.readline()))

    def close(self) -> None:
        """End the ranks."""
        first = self._ranks[0]
        assert first.stdin is not None
        first.stdin.write("null\n")
        first.stdin.close()
        for rank in self._ranks:
            rank.wait(60)


# -- Ray -------------------------------------------------------------------------------------------


class Receiver:
    """Buffer of one node."""

    def __init__(self) -> None:
        self._buffer = np.zeros(0, np.uint8)

    def size(self, size: int) -> None:
        """Have a buffer of so many megabytes, its pages there."""
        self._buffer = np.zeros(size << 20, np.uint8)
        self._buffer[:] = 0

    async def take(self, references: Sequence[Any]) -> int:
        """Get an object and copy it, as a node does into a slot."""
        np.copyto(self._buffer, await references[0])
        return int(self._buffer[-1])

    async def relay(self, references: Sequence[Any], start: int, others: Sequence[Any]) -> int:
        """Get a bucket, copy it, and have the others do so from here; how many have it then."""
        import ray

        bucket = await references[0]
        own = self._buffer[start : start + len(bucket)]
        np.copyto(own, bucket)
        del bucket
        if not others:
            return int(own[-1] == 7)
        reference = ray.put(own)
        return 1 + await others[0].relay.remote([reference], start, others[1:])


def ray_worker(num_receivers: int, address: str) -> None:
    """The sender, in the namespace of the head."""
    import ray

    ray.init(address=f"{address}:{_PORT + 1}", log_to_driver=False)
    remote = ray.remote(num_cpus=0)(Receiver)
    receivers = [
        remote.options(resources={f"host{i + 1}": 1}).remote() for i in range(num_receivers)
    ]
    while (order := json.loads(sys.stdin.readline())) is not None:
        transport, size = order
        ray.get([receiver.size.remote(size) for receiver in receivers])
        source = np.full(size << 20, 7, np.uint8)
        start_s = time.monotonic()
        if transport == "ray":
            reference = ray.put(source)
            found = ray.get([receiver.take.remote([reference]) for receiver in receivers])
            assert found == [7] * num_receivers
            del reference
        else:
            counts = [
                receivers[0].relay.remote(
                    [ray.put(source[start : start + RELAY_BYTES])], start, receivers[1:]
                )
                for start in range(0, len(source), RELAY_BYTES)
            ]
            assert set(ray.get(counts)) == {num_receivers}
        print(json.dumps(time.monotonic() - start_s), flush=True)
    ray.shutdown()


class Ray:
    """A cluster with a node a host."""

    def __init__(self, places: Sequence[tuple[list[str], str]], store_bytes: int) -> None:
        self._processes = []
        address = places[0][1]
        for index, (prefix, own) in enumerate(places):
            command = [
                *prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
                "--num-cpus=1", f"--node-ip-address={own}", "--disable-usage-stats",
                f"--object-store-memory={store_bytes}",
                f"--resources={json.dumps({f'host{index}': 1})}",
            ]  # fmt: skip
            if index == 0:
                command += ["--head", f"--port={_PORT + 1}", "--include-dashboard=false"]
            else:
                command += [f"--address={address}:{_PORT + 1}"]
            self._processes.append(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            # The head has to be there for the others, and two at once take the same sockets.
            time.sleep(8.0 if index == 0 else 5.0)
        worker = [sys.executable, __file__, "--ray-worker", f"{len(places) - 1},{address}"]
        self._sender = subprocess.Popen(
            [*places[0][0], *worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def transfer(self, transport: str, size: int) -> float:
        """Seconds until all have so many megabytes."""
        assert self._sender.stdin is not None and self._sender.stdout is not None
        self._sender.stdin.write(json.dumps([transport, size]) + "\n")
        self._sender.stdin.flush()
        return float(json.loads(self._sender.stdout.readline()))

    def close(self) -> None:
        """End the cluster."""
        assert self._sender.stdin is not None
        self._sender.stdin.write("null\n")
        self._sender.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._sender.wait(60)
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)


# -- all of it -------------------------------------------------------------------------------------


def measure(cases: Sequence[tuple[int, int]], num_repeats: int, mbit: int | None) -> dict[str, Any]:
    """Seconds by case and transport."""
    result: dict[str, Any] = {}
    for num_receivers in sorted({receivers for receivers, _ in cases}):
        sizes = [size for receivers, size in cases if receivers == num_receivers]
        with hosts(num_receivers + 1, mbit) as places, contextlib.ExitStack() as stack:
            store_bytes = max(128, 2 * max(sizes) + 64) << 20
            ray = Ray(places, store_bytes)
            stack.callback(ray.close)
            gloo = Gloo(places)
            stack.callback(gloo.close)
            transfer: dict[str, Callable[[str, int], float]] = {
                name: gloo.transfer if name in GLOO else ray.transfer for name in TRANSPORTS
            }
            for size in sizes:
                found: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
                for repeat in range(num_repeats + 1):
                    order = TRANSPORTS if repeat % 2 else TRANSPORTS[::-1]
                    for name in order:
                        seconds = transfer[name](name, size)
                        if repeat:  # the first is for warming up
                            found[name].append(seconds)
                fastest = [min(values) for values in zip(*found.values(), strict=True)]
                key = f"{num_receivers} x {size} MB"
                result[key] = {name: spread(values, 3) for name, values in found.items()}
                over = [a / b for a, b in zip(found["chain"], fastest, strict=True)]
                result[key]["chain_over_fastest"] = round(statistics.median(over), 2)
                log(f"{key}: {result[key]}")
    return result


def main() -> None:
    args = arguments(__doc__ or "", "two cases, two repeats", emulated_mbit=int)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    run = functools.partial(measure, QUICK if args.quick else FULL, 2 if args.quick else 5)
    result: dict[str, Any] = {"loopback": run(None)}
    if args.emulated_mbit:
        result[f"emulated_{args.emulated_mbit}_mbit"] = run(args.emulated_mbit)
    report("weight_transports", result, args.quick, "ray")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--worker")
    parser.add_argument("--ray-worker")
    roles, _ = parser.parse_known_args()
    if roles.worker:
        number, count, where, own_host = roles.worker.split(",")
        gloo_worker(int(number), int(count), where, own_host)
    elif roles.ray_worker:
        number, where = roles.ray_worker.split(",")
        ray_worker(int(number), where)
    else:
        main()
