# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every sampler of TorchRL's on groups whose pages lie anywhere, and after some have left."""

from __future__ import annotations

import threading

import pytest
import torch
from torchrl.data import (
    PrioritizedSampler,
    RandomSampler,
    RoundRobinWriter,
    SamplerWithoutReplacement,
    SliceSampler,
    StalenessAwareSampler,
    StreamingSliceSampler,
)
from torchrl.data.replay_buffers.sample_units import Sequence
from torchrl.data.replay_buffers.samplers import (
    PrioritizedSliceSampler,
    PromptGroupSampler,
    SliceSamplerWithoutReplacement,
)

from torchrl_dvla.data import GroupRecord, PooledReplayBuffer, RolloutRecord
from torchrl_dvla.memory import EnvironmentPool, ModelPool, RowLayout

LAYOUT = RowLayout(
    {
        "x": ((1,), torch.int64),
        "image": ((3, 8, 8), torch.uint8),
        "policy_version": ((1,), torch.int64),
        "episode": ((), torch.int64),
        "group_id": ((1,), torch.int64),
        ("next", "done"): ((1,), torch.bool),
        ("next", "reward"): ((1,), torch.float32),
    }
)


class Groups:
    """Groups of two rollouts on pages in reverse order; row ``x`` is 100 * rollout + decision."""

    def __init__(self, pool):
        self.pool = pool
        self.rollout = 0

    def make(self, group_id, sizes=(3, 2), version=0):
        rollouts = []
        for size in sizes:
            leased = [self.pool.lease("w", self.rollout) for _ in range(-(-size // 2))]
            pages = self.pool.seal(leased[::-1], size)
            at = self.pool.row_index(pages, size)
            rows = self.pool.rows
            rows["x"][at] = (100 * self.rollout + torch.arange(size)).unsqueeze(-1)
            rows["image"][at] = self.rollout
            rows["policy_version"][at] = version
            rows["episode"][at] = self.rollout
            rows["group_id"][at] = group_id
            rows["next", "done"][at] = (torch.arange(size) == size - 1).unsqueeze(-1)
            rows["next", "reward"][at] = float(self.rollout % 2)
            rollouts.append(
                RolloutRecord(
                    self.rollout, group_id, pages, size, 1.0, True, size, version, version
                )
            )
            self.rollout += 1
        members = tuple(rollouts)
        return GroupRecord(group_id, "", 0, -1, members, torch.zeros(len(members)), members)


@pytest.fixture
def pool():
    with EnvironmentPool(LAYOUT, num_pages=16, rows_per_page=2) as pool:
        for page in [pool.lease("other") for _ in range(5)][::2]:
            pool.free([page])  # so that pages are handed out in no order
        yield pool
        pool.check()


@pytest.fixture
def groups(pool):
    return Groups(pool)


def make(pool, sampler=None, batch_size=6, **options):
    return PooledReplayBuffer(pool=pool, sampler=sampler, batch_size=batch_size, **options)


def xs(batch):
    return batch["x"].flatten().tolist()


def consistent(batch):
    """Every field of each row is of one and the same rollout."""
    rollout = batch["x"].flatten() // 100
    return (
        torch.equal(batch["image"][:, 0, 0, 0].long(), rollout)
        and torch.equal(batch["episode"], rollout)
        and torch.equal(batch["next", "reward"].flatten(), (rollout % 2).float())
    )


def test_random(pool, groups):
    buffer = make(pool, RandomSampler(), batch_size=64)
    for group_id in range(3):
        buffer.extend(groups.make(group_id))
    buffer.evict(1)
    batch, info = buffer.sample(return_info=True)
    assert set(xs(batch)) == {0, 1, 2, 100, 101, 400, 401, 402, 500, 501}
    assert consistent(batch)
    assert xs(buffer[info["index"]]) == xs(batch)


def test_without_replacement_goes_on_after_an_eviction(pool, groups):
    buffer = make(pool, SamplerWithoutReplacement(), batch_size=5)
    for group_id in range(3):
        buffer.extend(groups.make(group_id))
    first = xs(buffer.sample())
    buffer.evict(0)
    left = {200, 201, 202, 300, 301, 400, 401, 402, 500, 501} - set(first)
    rest = xs(buffer.sample(len(left)))
    assert sorted(rest) == sorted(left)  # what was seen does not come again
    assert len(set(xs(buffer.sample(10)))) == 10  # the next pass


def test_without_replacement_when_only_seen_rows_stay(pool, groups):
    buffer = make(pool, SamplerWithoutReplacement(shuffle=False), batch_size=5)
    for group_id in range(2):
        buffer.extend(groups.make(group_id))
    assert xs(buffer.sample()) == [0, 1, 2, 100, 101]
    buffer.evict(1)
    assert xs(buffer.sample()) == [0, 1, 2, 100, 101]


def test_slices_stay_within_a_rollout(pool, groups):
    for find in ({"traj_key": "episode"}, {"end_key": ("next", "done")}):
        for cache_values in (False, True):
            sampler = SliceSampler(slice_len=2, cache_values=cache_values, **find)
            buffer = make(pool, sampler, batch_size=8)
            for group_id in range(3):
                buffer.extend(groups.make(group_id, sizes=(3, 2)))
                buffer.sample()
            buffer.evict(1)
            for _ in range(5):
                steps = buffer.sample()["x"].view(4, 2)
                assert (steps[:, 1] - steps[:, 0] == 1).all()
            buffer.empty()


def test_slices_in_a_full_pool_do_not_wrap_around(pool, groups):
    buffer = make(pool, SliceSampler(slice_len=2, traj_key="episode"), batch_size=8, max_size=5)
    buffer.extend(groups.make(0, sizes=(3, 2)))
    assert len(buffer) == buffer.storage.max_size
    steps = torch.cat([buffer.sample()["x"].view(4, 2) for _ in range(10)])
    assert (steps[:, 1] - steps[:, 0] == 1).all()


def test_samplers_copy_no_image(pool, groups):
    buffer = make(pool, SliceSampler(slice_len=2, traj_key="episode"), batch_size=8)
    buffer.extend(groups.make(0))
    assert "image" not in buffer._view[:]
    assert "image" in buffer.sample()
    assert buffer._view.get(("next", "done")).flatten().tolist() == [0, 0, 1, 0, 1]


def test_slices_without_replacement(pool, groups):
    sampler = SliceSamplerWithoutReplacement(slice_len=2, traj_key="episode")
    buffer = make(pool, sampler, batch_size=4)
    for group_id in range(2):
        buffer.extend(groups.make(group_id, sizes=(2, 2)))
    seen = xs(buffer.sample()) + xs(buffer.sample())
    assert sorted(seen) == [0, 1, 100, 101, 200, 201, 300, 301]
    buffer.evict(0)
    assert sorted(xs(buffer.sample())) == [200, 201, 300, 301]


def test_staleness_aware(pool, groups):
    sampler = StalenessAwareSampler(max_staleness=1)
    buffer = make(pool, sampler, batch_size=16)
    for group_id in range(3):
        buffer.extend(groups.make(group_id, version=group_id))
    sampler.consumer_version = 3
    assert (buffer.sample()["policy_version"] == 2).all()
    buffer.evict(0)
    assert (buffer.sample()["policy_version"] == 2).all()


def test_groups_of_a_prompt(pool, groups):
    sampler = PromptGroupSampler(num_groups=2, group_key="group_id")
    buffer = make(pool, sampler, batch_size=8)
    for group_id in range(3):
        buffer.extend(groups.make(group_id))
    buffer.sample()
    buffer.evict(1)
    batch = buffer.sample()
    assert batch["group_id"].flatten().bincount().tolist() == [4, 0, 4]
    assert consistent(batch)


def test_sequences_as_sample_unit(pool, groups):
    unit = Sequence(length=2, done_key=("next", "done"), episode_boundary="stop")
    buffer = make(pool, RandomSampler(), batch_size=8, sample_unit=unit)
    buffer.extend(groups.make(0))
    buffer.extend(groups.make(1))
    buffer.evict(0)
    steps = buffer.sample()["x"].view(8, 2)
    assert (steps[:, 1] - steps[:, 0] == 1).all()


def test_priorities_move_with_their_rows(pool, groups, segment_trees):
    buffer = make(pool, PrioritizedSampler(32, alpha=1.0, beta=1.0), batch_size=16)
    for group_id in range(3):
        index = buffer.extend(groups.make(group_id))
    buffer.update_priority(torch.arange(15), torch.full((15,), 1e-6))
    buffer.update_priority(index[:1], torch.tensor([1.0]))
    assert set(xs(buffer.sample())) == {400}
    buffer.evict(1)
    batch, info = buffer.sample(return_info=True)
    assert set(xs(batch)) == {400}
    assert set(torch.as_tensor(info["index"]).tolist()) == {5}
    buffer.evict(0)
    assert set(xs(buffer.sample())) == {400}
    buffer.extend(groups.make(3))  # new rows begin with the highest priority so far
    assert set(xs(buffer.sample(256))) >= {400, 600, 601, 602, 700, 701}


def test_the_highest_priority_leaves_with_its_group(pool, groups, segment_trees):
    sampler = PrioritizedSampler(32, alpha=0.5, beta=1.0, max_priority_within_buffer=True)
    buffer = make(pool, sampler)
    for group_id in range(2):
        buffer.extend(groups.make(group_id))
    buffer.update_priority(torch.arange(10), torch.tensor([9.0] * 5 + [4.0] * 5))
    assert float(sampler.default_priority) == 9.0
    buffer.evict(0)
    assert float(sampler.default_priority) == pytest.approx(4.0, rel=1e-4)


def test_prioritized_slices(pool, groups, segment_trees):
    sampler = PrioritizedSliceSampler(32, alpha=1.0, beta=1.0, slice_len=2, traj_key="episode")
    buffer = make(pool, sampler, batch_size=8)
    for group_id in range(3):
        buffer.extend(groups.make(group_id))
    buffer.update_priority(torch.arange(15), torch.full((15,), 1e-6))
    buffer.update_priority(torch.tensor([11]), torch.tensor([1.0]))
    buffer.evict(1)
    assert buffer.sample()["x"].view(4, 2).tolist() == [[401, 402]] * 4


def test_a_consumed_group_gives_its_pages_back(pool, groups):
    buffer = make(pool, batch_size=4, consume_after_n_samples=2)
    free = pool.num_free_pages
    for group_id in range(2):
        buffer.extend(groups.make(group_id))
    seen = []
    while len(buffer):
        batch = buffer.sample()
        assert consistent(batch)
        seen += xs(batch)
    assert sorted(seen) == sorted([0, 1, 2, 100, 101, 200, 201, 202, 300, 301] * 2)
    assert pool.num_free_pages == free
    assert buffer.stats()["groups_stored"] == 0
    buffer.extend(groups.make(2))
    assert len(buffer) == 5
    assert set(xs(buffer.sample(5))) == {400, 401, 402, 500, 501}


def test_counts_move_with_their_rows(pool, groups):
    buffer = make(pool, batch_size=5, consume_after_n_samples=2)
    for group_id in range(3):
        buffer.extend(groups.make(group_id))
    first = xs(buffer.sample(15))
    assert len(set(first)) == 15
    buffer.extend(groups.make(3))
    buffer.evict(1)
    seen = []
    while len(buffer):
        seen += xs(buffer.sample())
    once = [0, 1, 2, 100, 101, 400, 401, 402, 500, 501]
    assert sorted(seen) == sorted(once + [600, 601, 602, 700, 701] * 2)


def test_handles_age_when_positions_move(pool, groups):
    buffer = make(pool, writer=RoundRobinWriter(compilable=True, track_generations=True))
    for group_id in range(2):
        buffer.extend(groups.make(group_id))
    _, info = buffer.sample(return_info=True)
    assert torch.equal(info["index_generation"], buffer.writer.generations_of(info["index"]))
    buffer.evict(1)
    moved = buffer.writer.generations_of(info["index"]) != info["index_generation"]
    assert torch.equal(moved, info["index"] >= 5)
    with pytest.raises(RuntimeError, match="not supported by PooledStorage"):
        buffer.update_if_present(index=info["index"], generation=info["index_generation"], patch={})


def test_samplers_of_single_slots_are_refused_by_name(pool, groups):
    group = groups.make(0)
    with pytest.raises(TypeError, match="must not be a StreamingSliceSampler for groups"):
        make(pool, StreamingSliceSampler(slice_len=2)).extend(group)
    fragmented = SliceSampler(slice_len=2, fragmented=True, traj_key="episode", step_key="x")
    with pytest.raises(TypeError, match="must not be a fragmented SliceSampler for groups"):
        make(pool, fragmented).extend(group)
    assert [pool.state(page).name for page in group.pages] == ["SEALED"] * 3


# -- staging ------------------------------------------------------------------------------------


def test_samples_are_staged(pool, groups):
    buffer = make(pool, SamplerWithoutReplacement(shuffle=False), batch_size=2, num_staging=2)
    buffer.extend(groups.make(0, sizes=(4, 4)))
    first = buffer.sample()
    second = buffer.sample()
    assert (xs(first), xs(second)) == ([0, 1], [2, 3])
    third = buffer.sample()
    assert third["image"].data_ptr() == first["image"].data_ptr()
    assert (xs(first), xs(third)) == ([100, 101], [100, 101])
    buffer.sample()
    assert buffer.sample(5)["x"].shape == (5, 1)  # more than a staging batch holds: new memory
    first["loss"] = torch.zeros(2)
    assert "loss" not in buffer.sample()


def test_prefetched_batches_live_as_long(pool, groups):
    sampler = SamplerWithoutReplacement()
    buffer = make(pool, sampler, batch_size=2, num_staging=2, prefetch=3)
    buffer.extend(groups.make(0, sizes=(8, 8)))
    previous, expected = None, None
    seen = []
    for _ in range(40):
        batch = buffer.sample()
        if previous is not None:
            assert xs(previous) == expected
        previous, expected = batch, xs(batch)
        seen += expected
        assert consistent(batch)
    assert sorted(seen[:16]) == [*range(8), *range(100, 108)]
    buffer.shutdown()


def test_staging_batches_come_from_the_model_pool_that_is_given(pool, groups):
    size = ModelPool.nbytes_for(LAYOUT, 2)
    model_pool = ModelPool(2 * size)
    buffer = make(pool, None, batch_size=2, num_staging=2, model_pool=model_pool)
    assert model_pool.used_by_name() == {"staging batches": 2 * size}
    buffer.extend(groups.make(0))
    firsts = [arena.tensor(0, (1,)).data_ptr() for _, arena in model_pool._arenas]
    pointer = buffer.sample()["x"].data_ptr()
    assert any(first <= pointer < first + size for first in firsts)
    with pytest.raises(RuntimeError, match="model_bytes must hold staging batches"):
        make(pool, None, batch_size=2, num_staging=1, model_pool=model_pool)
    model_pool.close()


def test_staging_needs_a_batch_size(pool):
    with pytest.raises(ValueError, match="batch_size must be given .* to stage batches"):
        PooledReplayBuffer(pool=pool, num_staging=2)
    with pytest.raises(ValueError, match="num_staging must be at least 1, got 0"):
        PooledReplayBuffer(pool=pool, groups_per_update=1, batch_size=2, num_staging=0)


# -- waiting ------------------------------------------------------------------------------------


def test_a_sample_waits_for_groups_that_are_fresh(pool, groups):
    sampler = StalenessAwareSampler(max_staleness=0)
    buffer = make(pool, sampler, batch_size=2, min_groups=1, timeout_s=0.0)
    buffer.extend(groups.make(0, version=0))
    assert xs(buffer.sample())
    sampler.consumer_version = 1
    assert not buffer.can_sample()
    with pytest.raises(
        TimeoutError, match=r"timeout_s=0: 0 of min_groups=1 groups are fresh, 1 older"
    ):
        buffer.sample()
    buffer.extend(groups.make(1, version=1))
    assert buffer.can_sample()
    assert (buffer.sample()["policy_version"] == 1).all()


def test_a_waiting_sample_is_woken(pool, groups):
    buffer = make(pool, batch_size=2, min_groups=2, timeout_s=60.0)
    buffer.extend(groups.make(0))
    batches = []
    learner = threading.Thread(target=lambda: batches.append(buffer.sample()))
    learner.start()
    buffer.extend(groups.make(1))
    learner.join(60)
    assert len(batches) == 1
    buffer.evict(0)
    buffer.close("the run is over")
    with pytest.raises(RuntimeError, match="the run is over"):
        buffer.sample()


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_pass_goes_on_after_a_checkpoint(pool, groups, tmp_path, on_disk):
    buffer = make(pool, SamplerWithoutReplacement(), batch_size=4)
    for group_id in range(3):
        buffer.extend(groups.make(group_id))
    buffer.evict(1)
    first = xs(buffer.sample())
    with EnvironmentPool(LAYOUT, num_pages=9, rows_per_page=2) as other_pool:
        other = make(other_pool, SamplerWithoutReplacement(), batch_size=4)
        if on_disk:
            buffer.dumps(tmp_path / "buffer")
            other.loads(tmp_path / "buffer")
        else:
            other.load_state_dict(buffer.state_dict())
        assert sorted(first + xs(other.sample()) + xs(other.sample(2))) == sorted(xs(buffer[:]))
        other.evict(2)
        assert xs(other[:]) == [0, 1, 2, 100, 101]
