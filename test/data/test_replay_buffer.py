# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PooledReplayBuffer: TorchRL's own before it is bound, whole groups afterwards."""

from __future__ import annotations

import copy
import functools
import gc
import operator
import pickle
from itertools import chain, count, islice
from multiprocessing.synchronize import SemLock
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.data.replay_buffers import samplers
from torchrl.data.replay_buffers.checkpointers import TensorStorageCheckpointer
from torchrl.data.replay_buffers.samplers import PromptGroupSampler
from torchrl.data.replay_buffers.writers import RoundRobinWriter
from torchrl.envs.transforms import RenameTransform

from torchrl_dvla.data import PooledReplayBuffer
from torchrl_dvla.memory import ModelPool, RowLayout

from .conftest import LAYOUT


def xs(batch):
    return batch["x"].flatten().tolist()


def rows(num_rows, start=0):
    x = torch.arange(start, start + num_rows).unsqueeze(-1)
    return TensorDict({"x": x.float(), "policy_version": x // 4}, [num_rows])


# -- one update ---------------------------------------------------------------------------------
def test_an_update_hands_out_every_row_once_and_publishing_frees_them(make_plane):
    plane = make_plane(shuffle=False)
    plane.add(2)
    assert len(plane.buffer) == 10
    batches = []
    for batch in plane.buffer:
        assert [group.group_id for group in plane.buffer.cohort] == [0, 1]
        assert batch["language_instruction"] == [
            ["open", "close"][key] for key in batch["group_id"].flatten().tolist()
        ]
        batches.append((xs(batch), batch["advantage"].flatten().tolist()))
    # Rollouts of 3 and 2 rows with returns 1 and 0; the last minibatch is the smaller one.
    assert batches == [
        ([0, 1, 2, 3], [0.5, 0.5, 0.5, -0.5]),
        ([4, 5, 6, 7], [-0.5, 0.5, 0.5, 0.5]),
        ([8, 9], [-0.5, -0.5]),
    ]
    assert len(plane.buffer) == 10, "in hand until the update is published"
    assert plane.publish() == 1
    assert len(plane.buffer) == 0
    assert plane.pool.num_free_pages == 40
    assert [group.group_id for group in plane.buffer.cohort] == [0, 1]  # for the metrics


def test_each_row_of_an_update_knows_how_many_decisions_its_rollout_has(make_plane):
    plane = make_plane(num_epochs=2)
    plane.add(2)
    sizes = [3, 3, 3, 2, 2, 3, 3, 3, 2, 2]  # of the rollout of each row, by its x
    for batch in plane.buffer:
        assert batch["num_decisions"].shape == (len(batch), 1)
        assert batch["num_decisions"].flatten().tolist() == [sizes[x] for x in xs(batch)]


def test_minibatches_of_whole_rollouts_by_hand(make_plane):
    plane = make_plane(shuffle=False, whole_rollouts=True, batch_size=5)
    plane.add(2, sizes=(3, 2))
    assert plane.update() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    plane.publish()
    plane.add(2, sizes=(3, 4))
    # Of 3, 4, 3 and 4 rows no two fit into 5.
    assert plane.update() == [[10, 11, 12], [13, 14, 15, 16], [17, 18, 19], [20, 21, 22, 23]]


def test_whole_rollouts_come_in_seeded_permutations_and_an_update_is_taken_up_again(make_plane):
    options = {"whole_rollouts": True, "batch_size": 6, "num_epochs": 2}
    first, other, again = (make_plane(seed=seed, **options) for seed in (0, 1, 0))
    rollouts = [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    seen = []
    for plane in (first, other):
        plane.add(2)
        seen.append(plane.update())
        rows = list(chain(*seen[-1]))
        assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
        assert max(len(batch) for batch in seen[-1]) <= 6
        for batch in seen[-1]:
            assert all(set(batch) >= set(one) for one in rollouts if set(batch) & set(one))
    assert seen[0] != seen[1]
    again.add(2)
    update = iter(again.buffer)
    begun = [xs(next(update)) for _ in range(2)]
    state = copy.deepcopy(again.buffer.state_dict())
    resumed = make_plane(**options)
    resumed.buffer.load_state_dict(state)
    assert begun + resumed.update() == seen[0]
    with pytest.raises(ValueError, match="whole_rollouts must be True, as in the checkpoint, got"):
        make_plane(**{**options, "whole_rollouts": False}).buffer.load_state_dict(state)
    state["_plan"]["rollout_sizes"] = [3, 2, 2, 3]
    with pytest.raises(ValueError, match="rollout_sizes' must be the .* in the learner's hand"):
        make_plane(**options).buffer.load_state_dict(state)


def test_a_checkpoint_of_before_there_were_whole_rollouts_is_read(make_plane):
    plane = make_plane(shuffle=False)
    plane.add(2)
    update = iter(plane.buffer)
    next(update)
    state = copy.deepcopy(plane.buffer.state_dict())
    del state["_plan"]["rollout_sizes"]
    resumed = make_plane(shuffle=False)
    resumed.buffer.load_state_dict(state)
    assert resumed.update() == [[4, 5, 6, 7], [8, 9]]


def test_a_minibatch_that_cannot_hold_the_longest_rollout_is_refused(make_plane):
    plane = make_plane(whole_rollouts=True, batch_size=3)
    plane.add(2, sizes=(3, 4))
    with pytest.raises(ValueError, match="batch_size must be at least 4, the decisions of the lon"):
        plane.update()
    with pytest.raises(ValueError, match="whole_rollouts must be true or false, got 1"):
        PooledReplayBuffer(whole_rollouts=1)


def test_epochs_are_seeded_permutations(make_plane):
    first, again, other = (make_plane(num_epochs=2, seed=seed) for seed in (0, 0, 1))
    seen = []
    for one in (first, again, other):
        one.add(2)
        seen.append(one.update())
        epochs = [list(chain(*seen[-1][:3])), list(chain(*seen[-1][3:]))]
        assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
        assert epochs[0] != epochs[1]
        assert [len(batch) for batch in seen[-1]] == [4, 4, 2] * 2
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    first.publish()
    first.add(2)
    assert [[x - 10 for x in batch] for batch in first.update()] != seen[0]  # updates differ too


def test_nothing_is_allocated_and_a_batch_lives_until_the_second_next(make_plane):
    plane = make_plane(shuffle=False)
    staged = set()
    for _ in range(4):
        plane.add(2)
        staged |= {batch["x"].data_ptr() for batch in plane.buffer}
        plane.publish()
    assert len(staged) == 2
    plane.add(2)
    update = iter(plane.buffer)
    first = next(update)
    next(update)
    assert xs(first) == [40, 41, 42, 43]
    next(update)
    assert xs(first) == [48, 49, 42, 43]


def test_a_minibatch_of_all_rows_and_no_named_semaphore(make_plane, monkeypatch):
    created = []
    monkeypatch.setattr(SemLock, "__init__", lambda self, *args, **kwargs: created.append(args))
    plane = make_plane(batch_size=100)
    plane.add(2)
    assert [len(batch) for batch in plane.update()] == [10]
    assert created == []


def test_the_learner_may_write_to_a_batch(plane):
    for _ in range(2):
        plane.add(2)
        for batch in plane.buffer:
            assert "loss" not in batch
            batch["loss"] = torch.zeros(batch.batch_size)
        plane.publish()


# -- leaving an update --------------------------------------------------------------------------
def test_an_update_that_was_left_goes_on_with_its_next_minibatch(make_plane):
    plane = make_plane(shuffle=False)
    plane.add(2)
    for batch in plane.buffer:
        assert xs(batch) == [0, 1, 2, 3]
        break
    gc.collect()
    plane.add(2)
    assert plane.update() == [[4, 5, 6, 7], [8, 9]]
    plane.publish()
    assert plane.update() == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]


def test_an_update_that_was_left_at_its_last_minibatch_ends_at_once(make_plane):
    plane = make_plane(shuffle=False)
    plane.add(2)
    for batch in plane.buffer:
        if xs(batch) == [8, 9]:
            break
    gc.collect()
    assert plane.update() == []
    with pytest.raises(RuntimeError, match=r"call update_policy_weights_\(\) after each update"):
        plane.update()
    plane.publish()


def test_an_update_that_was_left_may_be_published(make_plane):
    plane = make_plane(shuffle=False)
    plane.add(4)
    for _ in plane.buffer:
        break
    plane.publish()
    assert plane.update()[0] == [10, 11, 12, 13]


def test_an_error_in_a_transform_loses_no_minibatch(make_plane):
    calls = []

    def fail_once(batch):
        calls.append(xs(batch))
        if len(calls) == 2:
            raise ArithmeticError
        return batch

    plane = make_plane(transform=fail_once, shuffle=False)
    plane.add(2)
    with pytest.raises(ArithmeticError):
        plane.update()
    assert len(plane.buffer) == 10
    assert plane.update() == [[4, 5, 6, 7], [8, 9]]
    assert calls[0] == [0, 1, 2, 3], "that one was handed out"


def test_publishing_in_the_middle_of_the_loop_is_refused_at_the_next_minibatch(plane):
    plane.add(4)
    update = iter(plane.buffer)
    next(update)
    plane.publish()
    with pytest.raises(RuntimeError, match="published, .* before its last minibatch"):
        next(update)
    assert len(plane.update()) == 3


def test_one_loop_at_a_time(plane):
    plane.add(2)
    loop = iter(plane.buffer)
    next(loop)
    with pytest.raises(RuntimeError, match="iterated already"):
        next(iter(plane.buffer))
    loop.close()
    assert len(plane.update()) == 2


def test_an_update_waits_for_its_cohort_and_tells_the_track(plane):
    notes = []

    class Track:
        def waiting(self, reason):
            notes.append(reason)

        def span(self, name):
            notes.append(name)
            return plane.groups.lock  # any context

    plane.buffer._track = Track()
    with pytest.raises(TimeoutError, match="Nothing is being collected"):
        plane.update()
    plane.add(2)
    next(iter(plane.buffer))
    assert notes == ["no_batch", "elsewhere", "no_batch", "gather", "learn", "elsewhere"]


def test_a_closed_buffer_says_why(plane):
    plane.add(3)
    update = iter(plane.buffer)
    next(update)
    plane.groups.close("the collector was shut down")
    for call in (
        lambda: next(update),
        plane.update,
        plane.buffer.sample,
        lambda: plane.buffer[0],
        plane.buffer.state_dict,
    ):
        with pytest.raises(RuntimeError, match="was closed: the collector was shut down"):
            call()


# -- binding ------------------------------------------------------------------------------------
def test_a_buffer_is_bound_once_and_empty(make_plane):
    bound = make_plane()
    assert bound.buffer.is_bound and bound.buffer.pool is bound.pool
    with pytest.raises(RuntimeError, match="bound to a collector already"):
        bound.buffer.bind(bound.groups)
    filled = PooledReplayBuffer(batch_size=2)
    filled.extend(rows(3))
    with pytest.raises(RuntimeError, match="holds 3 rows and cannot be bound"):
        filled.bind(bound.groups)
    filled.empty()
    filled.bind(bound.groups)
    whole = PooledReplayBuffer()
    whole.bind(bound.groups)  # for who takes whole cohorts
    with pytest.raises(ValueError, match="batch_size must be given to learn from groups"):
        next(iter(whole))
    with pytest.raises(ValueError, match="prefetch must be 0 to learn from groups, got 2"):
        PooledReplayBuffer(batch_size=2, prefetch=2).bind(bound.groups)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SamplerWithoutReplacement", {"sampler": SamplerWithoutReplacement()}),
        ("SliceSampler", {"sampler": samplers.SliceSampler(slice_len=2, traj_key="x")}),
        ("StreamingSliceSampler", {"sampler": samplers.StreamingSliceSampler(slice_len=2)}),
        ("PromptGroupSampler", {"sampler": PromptGroupSampler(num_groups=2, group_key="group_id")}),
        ("ConsumingSampler", {"consume_after_n_samples": 1}),
    ],
)
def test_samplers_that_cannot_follow_groups_that_leave_are_refused(make_plane, name, options):
    buffer = PooledReplayBuffer(batch_size=2, **options)
    with pytest.raises(TypeError, match=f"got a {name}: it keeps state by position"):
        buffer.bind(make_plane().groups)


SETTINGS = {
    "storage": (LazyTensorStorage(4), lambda buffer: buffer.set_storage(LazyTensorStorage(4))),
    "writer": (RoundRobinWriter(), lambda buffer: buffer.set_writer(RoundRobinWriter())),
    "shared": (True, None),
    "checkpointer": (TensorStorageCheckpointer(), None),
    "dim_extend": (1, None),
    "save hooks": (None, lambda buffer: buffer.register_save_hook(id)),
    "load hooks": (None, lambda buffer: buffer.register_load_hook(id)),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_without_effect_on_a_bound_buffer_is_refused(plane, setting):
    given, call = SETTINGS[setting]
    refused = f"{setting} must be left out to learn from groups"
    buffers = [] if given is None else [PooledReplayBuffer(batch_size=2, **{setting: given})]
    if call is not None:
        buffers.append(PooledReplayBuffer(batch_size=2))
        call(buffers[-1])
        with pytest.raises(RuntimeError, match=refused):
            call(plane.buffer)
    for buffer in buffers:
        with pytest.raises(ValueError, match=refused):
            buffer.bind(plane.groups)


def test_a_batch_is_written_anew_once_its_copies_to_devices_have_run(make_plane, monkeypatch):
    calls: list[str] = []
    numbers = count()

    class Stream:
        def record_event(self):
            number = next(numbers)
            calls.append(f"record {number}")
            return SimpleNamespace(synchronize=lambda: calls.append(f"wait {number}"))

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: device)  # on the second
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    plane = make_plane()
    plane.add(2)
    assert len(list(plane.buffer)) == 3  # on two stagings: the third is written where the first was
    # Event n is behind all that was done with the n-th batch, counted from 1.
    assert calls == ["record 0", "record 1", "wait 0", "record 2", "wait 1"]


def test_staging_batches_come_from_the_model_pool_that_is_given(make_plane):
    size = 2 * ModelPool.nbytes_for(LAYOUT, 4)
    model_pool = ModelPool(size)
    make_plane(model_pool=model_pool).add(2)
    assert model_pool.used_by_name() == {"staging batches": size}
    with pytest.raises(RuntimeError, match="model_bytes must hold staging batches"):
        make_plane(model_pool=model_pool)
    model_pool.close()


# -- a bound buffer as TorchRL's ----------------------------------------------------------------
def test_rows_are_read_by_position_oldest_group_first(make_plane):
    plane = make_plane(groups=1, lag=3)
    groups = [plane.admit() for _ in range(3)]
    for number in (2, 0, 1):  # rows 0-4 are of the youngest group
        plane.sample(groups[number])
    buffer = plane.buffer
    order = [*range(5, 15), *range(5)]
    assert xs(buffer[:]) == order
    for index in (slice(1, 8, 3), slice(None, None, -1)):
        assert xs(buffer[index]) == order[index]
    mask = torch.arange(15) % 2 == 0
    for index in (mask, [4, 2], range(3), torch.tensor([14, 0])):
        expected = torch.tensor(order)[torch.as_tensor(list(index))].tolist()
        assert xs(buffer[index]) == expected
    assert xs(buffer[-1]) == xs(buffer[(14,)]) == [4]
    assert buffer[3]["language_instruction"] == "open"
    assert buffer["x"].flatten().tolist() == order
    assert 14 in buffer.storage and 15 not in buffer.storage
    with pytest.raises(IndexError):
        buffer[15]
    plane.update()
    plane.publish()
    assert xs(buffer[:]) == order[5:], "positions move up"


def test_what_is_read_is_a_copy(plane):
    plane.add()
    read = [plane.buffer[1:3], plane.buffer[:], plane.buffer[torch.tensor([1, 2])], plane.buffer[1]]
    plane.pool.rows["x"].zero_()
    assert [xs(data) for data in read] == [[1, 2], [0, 1, 2, 3, 4], [1, 2], [1]]


def test_random_samples_are_whole_rows_and_follow_the_groups(make_plane):
    plane = make_plane(groups=1, lag=1, sampler=samplers.RandomSampler(), batch_size=64)
    with pytest.raises(RuntimeError, match="empty storage"):
        plane.buffer.sample()
    plane.add(2)
    plane.update()
    plane.publish()
    batch, info = plane.buffer.sample(return_info=True)
    assert set(xs(batch)) == {5, 6, 7, 8, 9}
    assert torch.equal(batch["image"][:, 0, 0, 0].long(), batch["x"].flatten())
    assert xs(plane.buffer[info["index"]]) == xs(batch)
    assert batch["language_instruction"] == ["close"] * 64
    assert plane.buffer.can_sample()


def test_staleness_aware_samples_copy_no_image_to_choose(make_plane):
    sampler = samplers.StalenessAwareSampler(max_staleness=0)
    plane = make_plane(groups=1, lag=2, sampler=sampler, batch_size=16)
    plane.admit()
    plane.add()
    plane.update()
    plane.publish()
    plane.add()
    plane.sample(plane.groups.running[0])  # admitted at version 0, sampled at version 1
    sampler.consumer_version = 1
    assert (plane.buffer.sample()["policy_version"] == 1).all()
    assert "image" not in plane.buffer.storage._storage
    sampler.consumer_version = 2
    with pytest.raises(RuntimeError):
        plane.buffer.sample()


def test_rows_come_from_the_collector(plane):
    plane.add()
    buffer, row = plane.buffer, plane.buffer[0]
    for write in (
        lambda: buffer.add(row),
        lambda: buffer.extend(row.unsqueeze(0)),
        lambda: buffer.set_("x", 0),
        lambda: buffer.set_at_("x", 0, 0),
        lambda: buffer.update_({"x": 0}),
        lambda: buffer.__setitem__(0, row),
        lambda: buffer.write_all(row.unsqueeze(0)),
        lambda: buffer.storage.set(0, row),
        buffer.empty,
        buffer.storage._empty,
    ):
        with pytest.raises(RuntimeError, match="its rows come from the collector"):
            write()
    assert xs(buffer[:]) == [0, 1, 2, 3, 4]
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(buffer.storage)


def test_fields_shape_and_counts_of_a_bound_buffer(make_plane):
    plane = make_plane(collate_fn=lambda rows: rows.select("x", "group_id"))
    plane.add(2)
    buffer, storage = plane.buffer, plane.buffer.storage
    assert storage["x"].flatten().tolist() == xs(buffer[:]) == list(range(10))
    assert storage["image"].shape == (10, 3, 8, 8) and storage.shape == (10,)
    assert storage[torch.tensor([[4, 2], [0, 9]])]["x"].squeeze(-1).tolist() == [[4, 2], [0, 9]]
    assert storage.contains(-10) is True and storage.contains(10) is False
    with pytest.raises(KeyError, match="'y'"):
        storage["y"]
    for call in (storage.dump, storage.loads, storage.register_save_hook):
        with pytest.raises(NotImplementedError, match="of the buffer"):
            call("a path")
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            copied(buffer)
    assert [len(found) for found in buffer.query(trajectory_key="group_id")] == [5, 5]
    assert set(next(iter(buffer)).keys()) == set(buffer.sample().keys()) == {"x", "group_id"}
    assert buffer.write_count == buffer.stats()["write_count"] == 10
    plane.update()
    plane.publish()
    plane.add()
    assert (buffer.write_count, len(buffer)) == (15, 5)


def test_statistics_and_shutdown(plane):
    plane.add(2)
    stats = plane.buffer.stats()
    assert (stats["size"], stats["capacity"], stats["groups_stored"]) == (10, 80, 2)
    plane.buffer.shutdown()
    plane.update()
    plane.publish()
    with pytest.raises(RuntimeError, match="was closed: it was shut down"):
        plane.update()


# -- before it is bound -------------------------------------------------------------------------
def test_it_is_torchrls_buffer_until_it_is_bound():
    """The same calls on both buffers give the same numbers, wrap-around included."""
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    ours = PooledReplayBuffer(max_size=10, batch_size=4, generator=one)
    theirs = ReplayBuffer(storage=LazyTensorStorage(10), batch_size=4, generator=other)
    for data in (rows(6), rows(3, 6), rows(4, 9)):
        assert torch.equal(ours.extend(data), theirs.extend(data))
        assert (ours[:] == theirs[:]).all()
        assert (ours.sample() == theirs.sample()).all()
    assert ours.add(rows(1, 50)[0]) == theirs.add(rows(1, 50)[0])
    for buffer in (ours, theirs):
        buffer[0:2] = rows(2, 90)
        buffer.set_at_("x", torch.full((1, 1), 3.0), torch.tensor([4]))
    assert (ours[:] == theirs[:]).all()
    assert ours.write_count == theirs.write_count == 14
    assert ours.stats() == theirs.stats()
    assert all((a == b).all() for a, b in zip(islice(ours, 3), islice(theirs, 3), strict=True))
    empty = PooledReplayBuffer(batch_size=4)
    with pytest.raises(RuntimeError, match="shared must be given to the constructor"):
        ours.share()
    assert PooledReplayBuffer(shared=True).share().shared
    for use in (lambda: next(iter(empty)), lambda: ours.cohort, lambda: ours.pool):
        with pytest.raises(RuntimeError, match=r"must be bound to a collector .* call sample\(\)"):
            use()


@pytest.mark.parametrize("on_disk", [False, True])
def test_samplers_transforms_and_checkpoints_before_it_is_bound(tmp_path, on_disk):
    options = {"transform": RenameTransform(["x"], ["y"]), "batch_size": 4, "max_size": 12}
    buffer, other = (
        PooledReplayBuffer(sampler=SamplerWithoutReplacement(), **options) for _ in range(2)
    )
    buffer.extend(rows(12))
    first = buffer.sample()["y"].flatten().tolist()
    if on_disk:
        buffer.dumps(tmp_path / "buffer")
        other.loads(tmp_path / "buffer")
    else:
        other.load_state_dict(buffer.state_dict())
    rest = [other.sample()["y"].flatten().tolist() for _ in range(2)]
    assert sorted(chain(first, *rest)) == list(range(12))


# -- checkpoints of a bound buffer --------------------------------------------------------------
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("taken_after", [0, 1, 4, 6])
def test_a_resumed_run_sees_every_minibatch_once(make_plane, tmp_path, on_disk, taken_after):
    """Checkpoints before, in the middle of each epoch of, and after an update."""
    old = make_plane(num_epochs=2)
    groups = old.add(4)
    loop = iter(old.buffer)
    seen = [xs(batch) for batch in islice(loop, taken_after)]
    state = old.buffer.state_dict()
    if on_disk:
        old.buffer.dumps(tmp_path / "buffer")
        assert [file.name for file in (tmp_path / "buffer").iterdir()] == ["groups.pt"]
    rest = [xs(batch) for batch in loop]

    new = make_plane(num_epochs=2, num_pages=24)
    new.pool.lease("someone else")  # page numbers differ from the run before
    if on_disk:
        new.buffer.loads(tmp_path / "buffer")
    else:
        new.buffer.load_state_dict(state)
    assert new.update() == rest
    assert len(seen) + len(rest) == 6
    for run in (old, new):
        assert run.publish() == 1
    assert new.update() == old.update()
    for ours, theirs in zip(new.buffer.cohort, groups[2:], strict=True):
        assert ours.state_dict() == theirs.state_dict()
    new.publish()
    assert new.buffer.stats()["updates"] == 2
    assert new.pool.num_free_pages == 23


def test_state_is_plain_data(plane):
    plane.add(3)
    loop = iter(plane.buffer)
    next(loop)

    def check(value, path="state"):
        if isinstance(value, dict):
            for key, item in value.items():
                assert type(key) in (str, int), path
                check(item, f"{path}.{key}")
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                check(item, f"{path}[{number}]")
        else:
            assert value is None or type(value) in (torch.Tensor, str, int, float, bool), path

    check(plane.buffer.state_dict())
    loop.close()


def test_checkpoints_that_do_not_fit_change_nothing(make_plane):
    old = make_plane()
    old.add()
    state = old.buffer.state_dict()
    other = make_plane(groups=3)
    other.add()
    with pytest.raises(ValueError, match="'groups_per_update' is 3 instead of 2"):
        other.buffer.load_state_dict(state)
    assert xs(other.buffer[:]) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="batch_size must equal the checkpoint's 4, got 3"):
        make_plane(batch_size=3).buffer.load_state_dict(state)
    with pytest.raises(ValueError, match="must come from a buffer that was not bound"):
        PooledReplayBuffer(batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="must come from a buffer that was bound"):
        old.buffer.load_state_dict(PooledReplayBuffer(batch_size=4).state_dict())
    layout = RowLayout({"x": ((2,), torch.int64), "advantage": ((1,), torch.float32)})
    other = make_plane(layout=layout)
    with pytest.raises(ValueError, match="must come from the same specs"):
        other.buffer.load_state_dict(state)
    assert other.pool.num_free_pages == 40


NAN = float("nan")
# fmt: off
DAMAGE = {
    "_storage": ["text"],
    "_storage.fields": [[]],
    "_storage.fields.0": [torch.zeros(4, 1, dtype=torch.int64), torch.zeros(5, 1)],
    "_storage.fields.2": [torch.full((5, 1), 2)],  # an instruction that there is not
    "_storage.fields.3": [torch.full((5, 1), NAN)],
    "_sampler": [None],
    "_writer._cursor": [-1, 2**80],
    "_transforms": [{}, {"transforms.0._extra_state": {"texts": [1]}}],
    "_batch_size": ["text", torch.ones(3)],
    "_rng": [5],
    "_plan": [[]],
    "_plan.position": [-1],
    "_plan.num_rows": [4],
    "_plan.batch_size": [0],
    "_plan.foreign": [1],
    "_groups": [None],
    "_groups.version": [-1, 1.0],
    "_groups.max_policy_lag": ["text"],
    "_groups.num_admitted": [0],
    "_groups.num_rollouts": [1],
    "_groups.schedule": [{"cursor": NAN, "seed": 0}],
    "_groups.schedule.cursor": [NAN],
    "_groups.counts": [{}],
    "_groups.counts.updates": [NAN],
    "_groups.drops": [{"late": [0, 1.0]}],
    "_groups.reopened": [[["nowhere", 0, -1]], [["task", "x", -1]]],
    "_groups.groups.0": [7],
    "_groups.groups.0.deadline": [9],
    "_groups.groups.0.state": ["lost", "complete"],
    "_groups.groups.0.kept": [[0, 2], [0, 0], []],
    "_groups.groups.0.advantages": [[0.5], [0.5, NAN]],
    "_groups.groups.0.spec": [["task", 5, -1]],
    "_groups.groups.0.candidates.0.num_rows": [2, 10**15],
    "_groups.groups.0.candidates.0.episode_return": [NAN],
    "_groups.groups.0.candidates.0.finished": [False],
    "_groups.groups.0.candidates.0.first_policy_version": [3],
    "_groups.groups.0.candidates.0.pages": [[0]],
}
# fmt: on


@pytest.mark.parametrize("entry", DAMAGE)
def test_a_foreign_entry_is_refused_and_changes_nothing(make_plane, entry):
    old, new = make_plane(groups=1), make_plane(groups=1)
    old.add()
    next(iter(old.buffer))
    *parents, last = (int(part) if part.isdecimal() else part for part in entry.split("."))
    for value in DAMAGE[entry]:
        state = copy.deepcopy(old.buffer.state_dict())
        functools.reduce(operator.getitem, parents, state)[last] = value
        with pytest.raises(ValueError, match="damaged|must (equal|fit|be those)"):
            new.buffer.load_state_dict(state)
        assert new.pool.num_free_pages == 40 and not new.groups.stored and len(new.table) == 2
    new.buffer.load_state_dict(old.buffer.state_dict())
    assert [len(rows) for rows in new.update()] == [1]  # the second minibatch of five rows


def test_a_pool_that_was_closed_is_not_read_as_zeros(plane):
    plane.add()
    plane.pool.close()
    for use in (
        plane.buffer.sample,
        plane.buffer.state_dict,
        lambda: len(plane.buffer),
        lambda: plane.buffer[:],
        lambda: next(iter(plane.buffer)),
    ):
        with pytest.raises(RuntimeError, match="pool was closed by its owner"):
            use()
