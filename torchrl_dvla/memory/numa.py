# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which memory node a pool's pages come from.

On a machine with several sockets each has memory of its own, and reading another's takes longer. A
pool is one arena that many processes map, so where its pages lie is decided once, before they are
allocated, by a policy on the arena's file (``mbind`` on shared memory belongs to the memory, not to
the process that calls it).

The node is *preferred*, not demanded: when it is full, the kernel takes pages from its neighbours.
A demand would end the run there with the out-of-memory killer.

This was written against the kernel's documentation. It is tested with fakes, and the system call
itself on a machine with one node; it was not run on a machine with several.

Reference:
    ``set_mempolicy(2)``, ``mbind(2)`` and the kernel's Documentation/admin-guide/mm/
    numa_memory_policy.rst
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
from pathlib import Path

__all__ = ["current_node", "memory_nodes", "parse_list", "place", "pool_node"]

_log = logging.getLogger("torchrl_dvla")

_SYSFS = Path("/sys/devices/system/node")
#: Number of the system call: the C library has no function for it, libnuma does, which is not
#: everywhere.
_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235, "ppc64le": 259, "s390x": 268}
_MPOL_PREFERRED = 1
_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def parse_list(text: str) -> list[int]:
    """The numbers of a kernel list.

    Examples:
        >>> parse_list("0-2,5"), parse_list("")
        ([0, 1, 2, 5], [])
    """
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def memory_nodes() -> list[int]:
    """The nodes that have memory; empty where the kernel does not say."""
    try:
        return parse_list((_SYSFS / "has_memory").read_text())
    except (OSError, ValueError):
        return []


def current_node() -> int | None:
    """The node of the CPU that the calling thread runs on at this moment, if it has memory.

    A thread that may run anywhere can be elsewhere in the next moment: pin the process (``numactl
    --cpunodebind``, ``os.sched_setaffinity``) where it matters.
    """
    try:
        cpu = _current_cpu()
        for node in memory_nodes():
            if cpu in parse_list((_SYSFS / f"node{node}" / "cpulist").read_text()):
                return node
    except (OSError, ValueError):
        pass
    return None


def pool_node(numa_node: int | None = None) -> int | None:
    """The node for a pool: ``numa_node``, or that of the calling thread; ``None`` with one node.

    Args:
        numa_node (int, optional): a node that has memory.

    Raises:
        ValueError: if the machine has no such node.
    """
    nodes = memory_nodes()
    if numa_node is not None and nodes and numa_node not in nodes:
        raise ValueError(
            f"numa_node must be one of {nodes}, got {numa_node}. These nodes have memory; leave it "
            "out for that of the calling process."
        )
    if len(nodes) < 2:
        return None
    return current_node() if numa_node is None else numa_node


def place(fd: int, nbytes: int, node: int) -> bool:
    """Let the pages of a shared-memory file come from ``node``; call it before any exists.

    Args:
        fd (int): the file, at least ``nbytes`` long.
        nbytes (int): bytes from its beginning.
        node (int): the preferred node.

    Returns:
        bool: whether the kernel agreed. Containers often forbid the call; then pages lie wherever
        the kernel puts them, which is slower and otherwise the same, and a warning says so.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    mask = (ctypes.c_ulong * (node // _BITS + 1))()
    mask[node // _BITS] = 1 << node % _BITS
    mapping = mmap.mmap(fd, nbytes)
    try:
        start = ctypes.c_char.from_buffer(mapping)
        # The kernel reads one bit less than it is told.
        code = _syscall(
            number, ctypes.addressof(start), nbytes, _MPOL_PREFERRED, mask, len(mask) * _BITS + 1
        )
        del start  # it holds the mapping open
    finally:
        mapping.close()
    if code:
        _log.warning(
            "The pool could not be placed on memory node %d (mbind: %s). Containers need the "
            "capability SYS_NICE for it; without, only speed is lost.",
            node,
            os.strerror(code),
        )
    return not code


def _current_cpu() -> int:
    return int(ctypes.CDLL(None).sched_getcpu())


def _syscall(
    number: int, address: int, nbytes: int, mode: int, mask: ctypes.Array[ctypes.c_ulong], bits: int
) -> int:
    """``mbind``; 0, or the error number."""
    failed = ctypes.CDLL(None, use_errno=True).syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_int(mode),
        mask,
        ctypes.c_ulong(bits),
        ctypes.c_uint(0),
    )
    return ctypes.get_errno() if failed else 0
