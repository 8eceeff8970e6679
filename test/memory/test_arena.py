# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import gc
import os
import pickle
import tempfile
import types

import pytest
import torch

from torchrl_dvla.memory import SharedArena, arena, available_bytes, available_memory, parse_bytes

from .. import named_memory


def test_views_share_bytes_and_begin_zeroed():
    shared = SharedArena(4096)
    a = shared.tensor(0, (4,), torch.int32)
    b = shared.tensor(4, (2, 2), torch.int16)
    assert a.tolist() == [0, 0, 0, 0]
    a[1] = 0x00020001
    assert b.tolist() == [[1, 2], [0, 0]]
    for offset in (4092, -4):
        with pytest.raises(ValueError, match="must stay within"):
            shared.tensor(offset, (2,), torch.float32)
    with pytest.raises(ValueError, match="multiple of 4"):
        shared.tensor(2, (1,), torch.float32)
    shared.close()


def test_a_pickled_arena_maps_the_same_bytes():
    shared = SharedArena(64)
    other = pickle.loads(pickle.dumps(shared))
    assert shared.is_owner
    assert not other.is_owner
    shared.tensor(0, (8,), torch.int64)[3] = 7
    assert other.tensor(0, (8,), torch.int64)[3] == 7
    # The copy's end is no end for the owner.
    other.close()
    assert shared.tensor(0, (8,), torch.int64)[3] == 7
    shared.close()


def test_close_frees_physical_memory_under_live_views():
    def shared_kib():
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("RssShmem")).split()[1])

    before = shared_kib()
    shared = SharedArena(32 << 20)
    view = shared.tensor(0, (32 << 20,)).fill_(1)
    assert shared_kib() - before >= 32 << 10
    shared.close()
    shared.close()
    assert shared_kib() - before < 1 << 10
    assert view[12345] == 0  # a late reader sees zeros and does not crash
    with pytest.raises(RuntimeError, match="closed"):
        shared.tensor(0, (1,))
    with pytest.raises(RuntimeError, match="cannot be sent"):
        pickle.dumps(shared)


def test_file_descriptor_is_closed_by_the_finalizer():
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    shared = SharedArena(64)
    assert len(os.listdir("/proc/self/fd")) > before
    del shared
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_little_memory_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(available_memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(RuntimeError, match=r"got 2097152 .2.0 MiB.: only 1.0 MiB are free. Lower"):
        SharedArena(2 << 20)


def test_a_full_file_system_is_the_same_error(monkeypatch):
    def full(fd, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arena.os, "posix_fallocate", full)
    with pytest.raises(RuntimeError, match=r"No space left on device\. Lower the byte budget"):
        SharedArena(64)


def test_without_memfd_an_unlinked_file_serves(monkeypatch):
    monkeypatch.delattr(arena.os, "memfd_create")
    before = named_memory.named()
    shared = SharedArena(64)
    shared.tensor(0, (64,))[:] = 3
    assert named_memory.left_behind(before) == set()
    shared.close()


def test_a_small_dev_shm_matters_only_where_memory_needs_a_name(monkeypatch):
    # What docker gives: 64 MiB, of which the least is used already.
    status = types.SimpleNamespace(f_bavail=16, f_frsize=4096)
    monkeypatch.setattr(available_memory.os, "statvfs", lambda folder: status)
    SharedArena(1 << 20).close()  # memfd_create does not ask /dev/shm
    monkeypatch.delattr(arena.os, "memfd_create")
    monkeypatch.setattr(available_memory.os, "access", lambda folder, mode: True)
    message = r"got 1048576 \(1.0 MiB\): only 64.0 KiB are free in /dev/shm\. Lower the byte budget"
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match=message):
        SharedArena(1 << 20)
    assert set(os.listdir("/proc/self/fd")) == descriptors
    # The machine's memory may be the tighter limit all the same.
    monkeypatch.setattr(available_memory, "available_bytes", lambda: 1024)
    with pytest.raises(RuntimeError, match=r"only 1.0 KiB are free\. Lower"):
        SharedArena(1 << 20)
    monkeypatch.setattr(available_memory.os, "access", lambda folder, mode: False)
    assert available_memory.shared_folder() == tempfile.gettempdir()


def test_an_arena_of_a_dead_or_reused_descriptor_is_refused():
    shared = SharedArena(64)
    make, (pid, fd, (device, inode), nbytes) = shared.__reduce__()
    with pytest.raises(RuntimeError, match="is gone"):
        make(pid, fd, (device, inode + 1), nbytes)
    with pytest.raises(RuntimeError, match="cannot be opened"):
        make(2**22 + 1, fd, (device, inode), nbytes)
    shared.close()


class FakeCudart:
    def __init__(self):
        self.code, self.registered = 0, {}

    def cudaHostRegister(self, pointer, nbytes, flags):
        self.registered[pointer] = nbytes
        return self.code

    def cudaGetErrorString(self, code):
        return f"error {code}"

    def cudaHostUnregister(self, pointer):
        del self.registered[pointer]
        return 0


@pytest.fixture
def cudart(monkeypatch):
    fake = FakeCudart()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


def test_without_cuda_nothing_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shared = SharedArena(128)
    assert not shared.pin()
    shared.close()


@pytest.mark.parametrize("end", ["close", "drop"])
def test_pinning_registers_the_whole_arena_once_and_ends_with_it(cudart, end):
    shared = SharedArena(128)
    view = shared.tensor(0, (128,)).fill_(7)
    assert shared.pin()
    assert shared.pin()
    assert cudart.registered == {view.data_ptr(): 128}
    if end == "close":
        shared.close()
    else:
        del shared
        gc.collect()
        assert view.sum().item() == 7 * 128  # unregistered before its views go
    assert cudart.registered == {}


def test_a_refused_pin_names_the_remedy(cudart):
    cudart.code = 2
    with pytest.raises(RuntimeError, match=r"cudaHostRegister: error 2\).*ulimit -l"):
        SharedArena(128).pin()


def test_available_bytes_takes_the_tightest_limit(monkeypatch):
    monkeypatch.setattr(available_memory, "_meminfo_available", lambda: 100)
    monkeypatch.setattr(available_memory, "_cgroup_available", lambda: [70, 80])
    assert available_bytes() == 70
    monkeypatch.setattr(available_memory, "_meminfo_available", lambda: None)
    monkeypatch.setattr(available_memory, "_cgroup_available", list)
    assert available_bytes() is None


def test_cgroup_limits_count_reclaimable_cache(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert available_memory._read_int(tmp_path / "memory.max") == 1000
    assert available_memory._reclaimable(tmp_path) == 300
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory._read_int(tmp_path / "memory.max") is None


def test_sizes():
    assert parse_bytes("2GB") == 2 * 2**30
    assert parse_bytes("0.5 mib") == 2**19
    assert parse_bytes("64b") == parse_bytes("64") == 64
    for text in ("12 parsecs", "GB", "-3"):
        with pytest.raises(ValueError, match="size must be"):
            parse_bytes(text)
