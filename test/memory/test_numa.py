# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Placement on memory nodes: a fake machine with two, and the real system call on this one."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform

import pytest
import torch

from torchrl_dvla.memory import EnvironmentPool, RowLayout, SharedArena, numa

LAYOUT = RowLayout({"x": ((1,), torch.int64)})
_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}.get(platform.machine())
_MPOL_F_ADDR = 2


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two sockets of four threads, and a node 2 that has CPUs and no memory."""
    for node, cpus in {0: "0-1,4-5", 1: "2-3,6-7", 2: "8"}.items():
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    (tmp_path / "has_memory").write_text("0-1\n")
    monkeypatch.setattr(numa, "_SYSFS", tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    made = []

    def fake(number, address, nbytes, mode, mask, bits):
        made.append({"nbytes": nbytes, "mode": mode, "mask": list(mask), "bits": bits})
        return 0

    monkeypatch.setattr(numa, "_syscall", fake)
    return made


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0\n", [0]), ("0-2", [0, 1, 2]), ("0,2-3,7\n", [0, 2, 3, 7]), ("", [])],
)
def test_kernel_lists(text, numbers):
    assert numa.parse_list(text) == numbers


@pytest.mark.parametrize(("cpu", "node"), [(0, 0), (5, 0), (6, 1), (8, None), (99, None)])
def test_the_node_of_the_calling_cpu(machine, monkeypatch, cpu, node):
    monkeypatch.setattr(numa, "_current_cpu", lambda: cpu)
    assert numa.memory_nodes() == [0, 1]
    assert numa.current_node() == node
    assert numa.pool_node() == node


def test_a_pool_lies_on_the_node_that_is_asked_for_or_on_that_of_the_caller(
    machine, calls, monkeypatch
):
    monkeypatch.setattr(numa, "_current_cpu", lambda: 3)
    with EnvironmentPool(LAYOUT, 4, 4) as pool:
        assert pool.numa_node == 1
        assert calls == [{"nbytes": pool.nbytes, "mode": 1, "mask": [2], "bits": 65}]
    with EnvironmentPool(LAYOUT, 4, 4, numa_node=0) as pool:
        assert pool.numa_node == 0
        assert calls[1]["mask"] == [1]
    with pytest.raises(ValueError, match=r"numa_node must be one of \[0, 1\], got 2"):
        EnvironmentPool(LAYOUT, 4, 4, numa_node=2)


def test_nodes_beyond_one_word_of_the_mask(calls):
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4096)
    assert numa.place(fd, 4096, 67)
    os.close(fd)
    assert calls == [{"nbytes": 4096, "mode": 1, "mask": [0, 8], "bits": 129}]


def test_the_policy_is_set_before_a_page_exists(machine, monkeypatch):
    pages = []
    monkeypatch.setattr(numa, "_current_cpu", lambda: 0)
    monkeypatch.setattr(
        "torchrl_dvla.memory.arena.place",
        lambda fd, nbytes, node: pages.append((os.fstat(fd).st_size, os.fstat(fd).st_blocks)),
    )
    with EnvironmentPool(LAYOUT, 4, 4) as pool:
        assert pages == [(pool.nbytes, 0)]  # its length, and no block of it
        pool.rows["x"].fill_(1)


def test_one_node_or_an_unknown_machine_is_left_alone(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(numa, "_SYSFS", tmp_path)
    assert numa.memory_nodes() == []
    EnvironmentPool(LAYOUT, 1, 1).close()
    (tmp_path / "has_memory").write_text("0\n")
    EnvironmentPool(LAYOUT, 1, 1, numa_node=0).close()
    assert calls == []
    monkeypatch.setattr(numa.platform, "machine", lambda: "vax")
    assert not numa.place(-1, 4096, 0)


def test_a_kernel_that_refuses_costs_only_speed(machine, monkeypatch, caplog):
    monkeypatch.setattr(numa, "_current_cpu", lambda: 0)
    monkeypatch.setattr(numa, "_syscall", lambda *args: errno.EPERM)
    with caplog.at_level(logging.WARNING, "torchrl_dvla"):
        with EnvironmentPool(LAYOUT, 4, 4) as pool:
            pool.rows["x"].fill_(1)
    assert "memory node 0 (mbind: Operation not permitted). Containers need" in caplog.text


@pytest.mark.skipif(_GET_MEMPOLICY is None, reason="the number of the system call is not known")
def test_the_real_call_sticks_to_the_memory_and_not_to_the_map():
    fd = os.memfd_create("probe")
    os.ftruncate(fd, 4096)
    if not numa.place(fd, 4096, 0):
        pytest.skip("this container forbids mbind")
    os.close(fd)
    arena = SharedArena(8192, numa_node=0)
    # A map of its own, as another process has one: the policy must be there too.
    other = mmap.mmap(os.dup(arena._fd), 8192)
    for offset in (0, 4096):
        address = ctypes.addressof(ctypes.c_char.from_buffer(other)) + offset
        mode, mask = ctypes.c_int(-1), (ctypes.c_ulong * 16)()
        failed = ctypes.CDLL(None, use_errno=True).syscall(
            ctypes.c_long(_GET_MEMPOLICY),
            ctypes.byref(mode),
            mask,
            ctypes.c_ulong(1024),
            ctypes.c_void_p(address),
            ctypes.c_ulong(_MPOL_F_ADDR),
        )
        assert (failed, mode.value, mask[0]) == (0, 1, 1)
    arena.close()
