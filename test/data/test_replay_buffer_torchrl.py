# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PooledReplayBuffer as an ordinary TorchRL replay buffer."""

from __future__ import annotations

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.data import (
    LazyTensorStorage,
    PrioritizedSampler,
    RandomSampler,
    ReplayBuffer,
    SamplerWithoutReplacement,
    SliceSampler,
    StalenessAwareSampler,
)
from torchrl.envs.transforms import Compose, DoubleToFloat, RenameTransform

from torchrl_dvla.data import InstructionTable, PooledReplayBuffer
from torchrl_dvla.memory import EnvironmentPool, RowLayout

LAYOUT = RowLayout(
    {
        "x": ((1,), torch.float32),
        "policy_version": ((1,), torch.int64),
        "trajectory": ((), torch.int64),
        ("next", "done"): ((1,), torch.bool),
    }
)


@pytest.fixture
def pool():
    with EnvironmentPool(LAYOUT, num_pages=8, rows_per_page=3) as pool:
        yield pool
        pool.check()


def rows(num_rows, start=0):
    number = torch.arange(start, start + num_rows).unsqueeze(-1)
    return TensorDict(
        {
            "x": number.float(),
            "policy_version": number // 4,
            "trajectory": number.squeeze(-1) // 5,
            "next": {"done": number % 5 == 4},
        },
        [num_rows],
    )


def test_it_behaves_like_torchrls(pool):
    """The same calls on both buffers give the same numbers, wrap-around included."""
    ours = PooledReplayBuffer(
        pool=pool, max_size=10, batch_size=4, generator=torch.Generator().manual_seed(0)
    )
    theirs = ReplayBuffer(
        storage=LazyTensorStorage(10), batch_size=4, generator=torch.Generator().manual_seed(0)
    )
    for data in (rows(6), rows(3, 6), rows(4, 9)):
        assert torch.equal(ours.extend(data), theirs.extend(data))
        assert len(ours) == len(theirs)
        assert (ours[:] == theirs[:]).all()
        assert (ours.sample() == theirs.sample()).all()
    assert ours.add(rows(1, 50)[0]) == theirs.add(rows(1, 50)[0])
    assert (ours[:] == theirs[:]).all()
    assert (ours[2] == theirs[2]).all()
    assert (ours[torch.tensor([1, 7])] == theirs[torch.tensor([1, 7])]).all()
    ours[0:2], theirs[0:2] = rows(2, 90), rows(2, 90)
    assert (ours[:] == theirs[:]).all()
    assert ours.write_count == theirs.write_count == 14
    assert ours.stats()["size"] == 10
    ours.empty()
    assert len(ours) == 0
    assert pool.num_free_pages == 8
    assert ours.extend(rows(2)).tolist() == [0, 1]


def test_indexing_and_writing_as_torchrl(pool):
    """By row, mask, slice and key, on a ring whose physical order is not its own."""
    held = [pool.lease("other") for _ in range(3)]
    pool.free(held[::2])
    ours = PooledReplayBuffer(pool=pool, max_size=10)
    theirs = ReplayBuffer(storage=LazyTensorStorage(10))
    for buffer in (ours, theirs):
        buffer.extend(rows(9))
        buffer.set_("x", torch.arange(9.0).flip(0).unsqueeze(-1))
        buffer.set_("policy_version", torch.full((9, 1), 3))
        buffer.set_at_("trajectory", torch.tensor([7, 8]), torch.tensor([0, 4]))
        buffer.update_({"x": buffer["x"] + 1})
        buffer[3] = rows(1, 70)[0]
        buffer[torch.tensor([5, 6])] = rows(2, 80)
        buffer[1:3] = rows(2, 90)
    assert (ours[:] == theirs[:]).all()
    mask = torch.arange(9) % 2 == 0
    for index in (mask, slice(1, 8, 3), [4, 2], range(3), -1, (2,)):
        assert (ours[index] == theirs[index]).all(), index
    for key in ("x", ("next", "done")):
        assert torch.equal(ours[key], theirs[key])
    ours["next", "done"] = torch.ones(9, 1, dtype=torch.bool)  # TorchRL's writes to a copy
    assert ours["next", "done"].all()
    with pytest.raises(IndexError):
        ours[9]
    pool.free(held[1:2])


def test_without_replacement(pool):
    buffer = PooledReplayBuffer(
        pool=pool, sampler=SamplerWithoutReplacement(drop_last=True), batch_size=4
    )
    buffer.extend(rows(12))
    batches = list(buffer)
    seen = torch.cat([batch["x"] for batch in batches]).flatten().tolist()
    assert sorted(seen) == list(range(12))  # batches do not share memory


def test_random(pool):
    buffer = PooledReplayBuffer(pool=pool, sampler=RandomSampler(), batch_size=64)
    buffer.extend(rows(3))
    assert set(buffer.sample()["x"].flatten().tolist()) == {0.0, 1.0, 2.0}
    assert buffer.sample(2).batch_size == (2,)


def test_prioritized(pool, segment_trees):
    buffer = PooledReplayBuffer(
        pool=pool, sampler=PrioritizedSampler(24, alpha=1.0, beta=1.0), batch_size=16
    )
    index = buffer.extend(rows(6))
    buffer.update_priority(index, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
    batch, info = buffer.sample(return_info=True)
    assert torch.as_tensor(info["index"]).float().mean() == pytest.approx(2.0, abs=0.5)
    assert (batch["x"] == 2).float().mean() > 0.9


@pytest.mark.parametrize("key", ["trajectory", None])
def test_slices(pool, key):
    find = {"traj_key": key} if key else {"end_key": ("next", "done")}
    sampler = SliceSampler(num_slices=3, **find)
    buffer = PooledReplayBuffer(pool=pool, sampler=sampler, batch_size=9)
    buffer.extend(rows(15))
    slices = buffer.sample().view(3, 3)
    steps = slices["x"].squeeze(-1)
    assert torch.equal(steps - steps[:, :1], torch.arange(3.0).expand(3, 3))
    assert (slices["trajectory"] == slices["trajectory"][:, :1]).all()


def test_staleness_aware(pool):
    sampler = StalenessAwareSampler(max_staleness=0)
    buffer = PooledReplayBuffer(pool=pool, sampler=sampler, batch_size=8)
    buffer.extend(rows(12))
    sampler.consumer_version = 2
    assert (buffer.sample()["policy_version"] == 2).all()


def test_consume_after_n_samples(pool):
    buffer = PooledReplayBuffer(pool=pool, consume_after_n_samples=1, batch_size=2)
    buffer.extend(rows(6))
    seen = [value for _ in range(3) for value in buffer.sample()["x"].flatten().tolist()]
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    assert len(buffer) == 0
    buffer.extend(rows(2, 20))
    assert sorted(buffer.sample()["x"].flatten().tolist()) == [20, 21]


def test_prefetch(pool):
    buffer = PooledReplayBuffer(
        pool=pool, sampler=SamplerWithoutReplacement(), prefetch=2, batch_size=4
    )
    buffer.extend(rows(12))
    seen = torch.cat([buffer.sample()["x"] for _ in range(3)]).flatten().tolist()
    assert sorted(seen) == list(range(12))
    buffer.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        buffer.sample()


def test_transforms_run_both_ways(pool):
    rename = RenameTransform(in_keys=["x"], out_keys=["y"], in_keys_inv=["x"], out_keys_inv=["y"])
    buffer = PooledReplayBuffer(pool=pool, transform=rename, batch_size=2)
    buffer.extend(rows(4).rename_key_("x", "y"))
    assert "y" in buffer.sample()
    double = PooledReplayBuffer(
        pool=pool, transform=Compose(DoubleToFloat(in_keys_inv=["x"])), batch_size=2
    )
    double.extend(rows(4).set("x", torch.ones(4, 1, dtype=torch.float64)))
    assert double.sample()["x"].dtype is torch.float32


def test_strings_travel_by_id():
    layout = RowLayout({"x": ((1,), torch.float32), "instruction_id": ((1,), torch.int64)})
    table = InstructionTable(["unused"])
    with EnvironmentPool(layout, 4, 2) as pool:
        buffer = PooledReplayBuffer(pool=pool, instructions=table, batch_size=2)
        texts = ["open", "close", "open"]
        buffer.extend(
            TensorDict(
                {
                    "x": torch.arange(3.0).unsqueeze(-1),
                    "language_instruction": NonTensorStack(*texts),
                },
                [3],
            )
        )
        assert pool.rows["instruction_id"][:3].flatten().tolist() == [1, 2, 1]
        batch = buffer.sample(8)
        by_row = [texts[int(x)] for x in batch["x"]]
        assert batch["language_instruction"] == by_row
        assert buffer[1]["language_instruction"] == "close"
        with pytest.raises(KeyError, match=r"unknown .*language_instruction"):
            PooledReplayBuffer(pool=pool).extend(
                TensorDict(
                    {"x": torch.ones(1, 1), "language_instruction": NonTensorStack("a")}, [1]
                )
            )


@pytest.mark.parametrize("on_disk", [False, True])
def test_checkpoints(pool, tmp_path, on_disk):
    buffer = PooledReplayBuffer(
        pool=pool, sampler=SamplerWithoutReplacement(), batch_size=4, max_size=10
    )
    buffer.extend(rows(13))
    first = buffer.sample()["x"].flatten().tolist()
    with EnvironmentPool(LAYOUT, 4, 3) as other_pool:
        other = PooledReplayBuffer(
            pool=other_pool, sampler=SamplerWithoutReplacement(), batch_size=4, max_size=10
        )
        if on_disk:
            buffer.dumps(tmp_path / "buffer")
            other.loads(tmp_path / "buffer")
        else:
            other.load_state_dict(buffer.state_dict())
        assert (other[:] == buffer[:]).all()
        # The sampler goes on where it was: no row of the first batch comes again.
        assert not set(first) & set(other.sample()["x"].flatten().tolist())
        assert torch.equal(other.extend(rows(1)), buffer.extend(rows(1)))
