# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Emulated hosts on one machine, with limited bandwidth and a delay between them.

Each host is a network namespace of the Linux kernel with one interface. Its bandwidth is limited by
the kernel's token bucket (``tc ... tbf``). The delay is made here, by a process that forwards
packets from one interface to another and holds each of them for a while: not every kernel is built
with ``netem``, which would do it. Figures obtained with it are those of an emulated network and
must say so; real are the TCP stack, its windows and everything above.

Namespaces have no names and interfaces no address outside them: runs cannot collide, and nothing is
left behind, whatever dies.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from torchrl_dvla.testing.remote import die_with_parent

__all__ = ["EmulatedNetwork"]

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
#: Jumbo packets, so that the process in the middle has few of them to forward.
_MTU_BYTES = 16_000
_DESTINATION = 19  # last byte of the destination in an IPv4 header
_FORK = multiprocessing.get_context("fork")


class EmulatedNetwork:
    """A network of hosts that are processes of this machine.

    Args:
        num_hosts (int): from 1 to 250.

    Keyword Args:
        bytes_per_s (float): what each host can send.
        delay_s (float): latency of a packet, one way.

    Raises:
        RuntimeError: if this machine does not allow it, see :meth:`obstacle`.

    Examples:
        >>> from torchrl_dvla.testing import Remote
        >>> with EmulatedNetwork(2, bytes_per_s=1e7, delay_s=0.01) as network:  # doctest: +SKIP
        ...     Remote(Server, network.address(1), before=lambda: network.enter(1))
    """

    def __init__(self, num_hosts: int, *, bytes_per_s: float, delay_s: float) -> None:
        self._namespaces: list[int] = []
        self._devices: list[int] = []
        self._wire: multiprocessing.context.ForkProcess | None = None
        self._is_cut = _FORK.RawArray("b", num_hosts)
        try:
            for host in range(num_hosts):
                self._add(host, bytes_per_s)
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            reason = getattr(error, "stderr", None) or error
            raise RuntimeError(f"No network can be emulated here: {reason}") from error
        self._wire = _FORK.Process(target=self._forward, args=(os.getpid(), delay_s), daemon=True)
        self._wire.start()

    @staticmethod
    def obstacle() -> str:
        """Why this machine cannot emulate a network; empty if it can."""
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                return f"`{tool}` is missing (Debian: iproute2)"
        if not Path("/dev/net/tun").exists():
            return "/dev/net/tun is missing"
        try:
            EmulatedNetwork(1, bytes_per_s=1e6, delay_s=0.0).close()
        except RuntimeError as error:
            return str(error)
        return ""

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return f"10.77.0.{host + 1}"

    def enter(self, host: int) -> None:
        """Move the calling thread to ``host``; what it opens or forks from now on is there."""
        _call("setns", self._namespaces[host], _CLONE_NEWNET)

    def cut(self, host: int, is_cut: bool = True) -> None:
        """Lose every packet to and from ``host``, or (``is_cut=False``) no longer."""
        self._is_cut[host] = is_cut

    def close(self) -> None:
        """Stop forwarding packets. A host lives on for as long as a process is in it."""
        if self._wire is not None:
            self._wire.kill()
            self._wire.join()
            self._wire = None
        for end in (*self._namespaces, *self._devices):
            os.close(end)
        self._namespaces, self._devices = [], []

    def _add(self, host: int, bytes_per_s: float) -> None:
        with _new_namespace():
            self._namespaces.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            self._devices.append(device)
            flags = struct.pack("16sH22x", b"eth0", _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(device, _TUNSETIFF, flags)
            _run("ip", "link", "set", "dev", "lo", "up")
            _run("ip", "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            _run("ip", "link", "set", "dev", "eth0", "mtu", str(_MTU_BYTES), "up")
            # Four milliseconds at full speed are let through at once, as a kernel's timer needs.
            burst = max(4 * _MTU_BYTES, int(bytes_per_s / 250))
            _run(
                *("tc", "qdisc", "add", "dev", "eth0", "root", "tbf"),
                *("rate", f"{int(8 * bytes_per_s)}bit", "burst", f"{burst}b", "latency", "500ms"),
            )

    def _forward(self, parent: int, delay_s: float) -> None:
        """The wire: forwards each packet to its destination ``delay_s`` after it came."""
        die_with_parent(parent)
        poll = select.poll()
        for device in self._devices:
            poll.register(device, select.POLLIN)
        waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
        while True:
            left_ms = 1000 * max(waiting[0][0] - time.monotonic(), 0.0) if waiting else None
            ready = [fd for fd, _ in poll.poll(left_ms)]
            now_s = time.monotonic()
            for device in ready:
                sender = self._devices.index(device)
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        packet = os.read(device, 1 << 16)
                        host = packet[_DESTINATION] - 1
                        is_known = packet[0] >> 4 == 4 and host < len(self._devices)
                        if is_known and not (self._is_cut[host] or self._is_cut[sender]):
                            waiting.append((now_s + delay_s, self._devices[host], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, device, packet = waiting.popleft()
                with contextlib.suppress(OSError):  # a full queue drops packets, as elsewhere
                    os.write(device, packet)

    def __enter__(self) -> EmulatedNetwork:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@contextlib.contextmanager
def _new_namespace() -> Iterator[None]:
    """A new network namespace for the calling thread, until the end of the block."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _call("unshare", _CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", home, _CLONE_NEWNET)
    finally:
        os.close(home)


def _call(function: str, *args: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
