# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import contextlib

import pytest
import torch

from torchrl_dvla.memory import ModelPool, RowLayout, SharedArena, limits

LAYOUT = RowLayout({"image": ((3, 4, 4), torch.uint8), "state": ((2,), torch.float32)})


def test_one_block_is_cut_into_tensors():
    pool = ModelPool(1024)
    a = pool.empty((4,), torch.float32)
    b = pool.empty((100,), torch.uint8, name="staging")
    assert b.data_ptr() - a.data_ptr() == 256
    assert pool.stats() == {
        "reserved_bytes": 1024,
        "used_bytes": 512,
        "peak_bytes": 512,
        "internal_waste": 1 - 116 / 512,
    }
    assert pool.used_by_name() == {"tensor": 256, "staging": 256}
    with pytest.raises(RuntimeError, match=r"must hold weights of 1\.0 KiB .* to at least 1536"):
        pool.empty((256,), name="weights")
    assert pool.stats()["used_bytes"] == 512
    pool.close()
    with pytest.raises(RuntimeError, match="Raise model_bytes"):
        pool.empty((1,))


def test_rows_for_staging_come_from_the_budget():
    # 5 rows: 240 -> 256 and 40 -> 256
    assert ModelPool.nbytes_for(LAYOUT, 5) == 512
    pool = ModelPool(512)
    rows = pool.rows(LAYOUT, 5, "staging")
    assert rows.batch_size == (5,)
    assert rows["image"].shape == (5, 3, 4, 4)
    assert rows["state"].data_ptr() - rows["image"].data_ptr() == 256
    assert pool.used_by_name() == {"staging": 512}
    with pytest.raises(RuntimeError, match="model_bytes must hold rows"):
        pool.rows(LAYOUT, 1)
    pool.close()


def test_an_empty_budget_holds_nothing_and_a_large_one_is_refused(monkeypatch):
    pool = ModelPool(0)
    with pytest.raises(RuntimeError, match="to at least 256"):
        pool.empty((1,))
    pool.close()
    monkeypatch.setattr(limits, "available_bytes", lambda: 1000)
    with pytest.raises(RuntimeError, match="only 1000 B are free"):
        ModelPool(1001)


def test_a_pool_of_the_host_is_page_locked_where_cuda_is(monkeypatch):
    pinned = []
    monkeypatch.setattr(SharedArena, "pin", lambda arena: pinned.append(arena.nbytes))
    ModelPool(4096).close()
    assert pinned == [4096]


class FakeCuda:
    """What ModelPool uses of torch.cuda: a pool that counts what is allocated inside of it."""

    def __init__(self, monkeypatch):
        self.active = None
        self.devices = []
        empty = torch.empty

        class MemPool:
            def __init__(self):
                self.segments = []

            def snapshot(self, include_traces=True):
                assert not include_traces, "traces are slow"
                return self.segments

        @contextlib.contextmanager
        def use_mem_pool(mem_pool, device=None):
            self.active = mem_pool
            self.devices.append(device)
            try:
                yield
            finally:
                self.active = None

        def fake_empty(*args, device=None, **kwargs):
            tensor = empty(*args, **kwargs)
            if device is not None and torch.device(device).type == "cuda":
                assert self.active is not None, "allocated outside of the pool"
                self.active.segments.append({"allocated_size": -(-tensor.nbytes // 512) * 512})
            return tensor

        monkeypatch.setattr(torch.cuda, "MemPool", MemPool)
        monkeypatch.setattr(torch.cuda, "use_mem_pool", use_mem_pool)
        monkeypatch.setattr(torch, "empty", fake_empty)


def test_on_cuda_everything_is_allocated_inside_the_pool_of_its_device(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    pool = ModelPool(2048, device="cuda:1")
    pool.empty((2, 2))
    assert cuda.devices == [torch.device("cuda:1")]
    assert pool.stats()["used_bytes"] == 512  # what CUDA took, not what was asked
    with pytest.raises(RuntimeError, match="to at least 2304"):
        pool.empty((512,))
    assert cuda.devices == [torch.device("cuda:1")], "refused before CUDA was asked"


def test_on_cuda_a_library_that_outgrows_the_budget_is_noticed(monkeypatch):
    FakeCuda(monkeypatch)
    pool = ModelPool(2048, device="cuda")
    with pool.use():
        torch.empty((400,), dtype=torch.uint8, device="cuda")
    assert pool.stats()["used_bytes"] == 512
    with pytest.raises(RuntimeError, match=r"model_bytes must hold .* got 2048 for 2560"):
        with pool.use():
            torch.empty((2048,), dtype=torch.uint8, device="cuda")
    with ModelPool(16).use():  # elsewhere it changes nothing
        pass
