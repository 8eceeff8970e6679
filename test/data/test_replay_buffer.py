# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PooledReplayBuffer over whole groups."""

from __future__ import annotations

import gc
import threading
from itertools import chain
from multiprocessing.synchronize import SemLock

import pytest
import torch
from torchrl.data import SamplerWithoutReplacement

from torchrl_dvla.data import PooledReplayBuffer
from torchrl_dvla.memory import EnvironmentPool


def test_an_update_hands_out_every_row_once_and_evicts(plane):
    plane = plane(shuffle=False)
    plane.admit_and_extend(0, 1)
    assert len(plane.buffer) == 10
    batches = []
    for batch in plane.buffer:
        assert [group.group_id for group in plane.buffer.cohort] == [0, 1]
        assert batch["language_instruction"] == [
            ["open", "close"][key] for key in batch["group_id"].flatten().tolist()
        ]
        batches.append((batch["x"].flatten().tolist(), batch["advantage"].flatten().tolist()))
    # Rollouts of 3 and 2 rows with returns 1 and 0; the last minibatch is the smaller one.
    assert batches == [
        ([0, 1, 2, 3], [0.5, 0.5, 0.5, -0.5]),
        ([4, 5, 6, 7], [-0.5, 0.5, 0.5, 0.5]),
        ([8, 9], [-0.5, -0.5]),
    ]
    assert len(plane.buffer) == 0
    assert plane.pool.num_free_pages == 32
    assert [group.group_id for group in plane.buffer.cohort] == [0, 1]  # for the metrics
    assert plane.admission.num_unlearned == 0
    assert plane.admission.advance() == 1


def test_epochs_are_seeded_permutations(plane):
    first, again, other = plane(num_epochs=2), plane(num_epochs=2), plane(num_epochs=2, seed=1)
    seen = []
    for one in (first, again, other):
        one.admit_and_extend(0, 1)
        seen.append(one.update())
        epochs = [list(chain(*seen[-1][:3])), list(chain(*seen[-1][3:]))]
        assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
        assert epochs[0] != epochs[1]
        assert [len(batch) for batch in seen[-1]] == [4, 4, 2] * 2
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    first.admission.advance()
    first.admit_and_extend(2, 3)
    assert [[x - 10 for x in batch] for batch in first.update()] != seen[0]  # updates differ too


def test_extending_moves_no_tensor_and_sampling_allocates_no_plane(plane):
    plane = plane()
    pointers = {key: plane.pool.rows.get(key).data_ptr() for key in plane.pool.layout}
    staged = set()
    for start in (0, 2, 4, 6):
        plane.admit_and_extend(start, start + 1)
        staged |= {batch["x"].data_ptr() for batch in plane.buffer}
        plane.admission.advance()
    assert {key: plane.pool.rows.get(key).data_ptr() for key in plane.pool.layout} == pointers
    assert len(staged) == 2  # the ring of staging batches


def test_a_batch_lives_until_the_second_next(plane):
    plane = plane(shuffle=False)
    plane.admit_and_extend(0, 1)
    iterator = iter(plane.buffer)
    first = next(iterator)
    next(iterator)
    assert first["x"].flatten().tolist() == [0, 1, 2, 3]
    next(iterator)
    assert first["x"].flatten().tolist() == [8, 9, 2, 3]


def test_it_creates_no_named_semaphore(plane, monkeypatch):
    created = []
    monkeypatch.setattr(SemLock, "__init__", lambda self, *args, **kwargs: created.append(args))
    plane = plane()
    plane.admit_and_extend(0, 1)
    plane.update()
    assert created == []


def test_learner_may_write_to_a_batch(plane):
    plane = plane()
    plane.admit_and_extend(0, 1)
    for batch in plane.buffer:
        batch["loss"] = torch.zeros(batch.batch_size)
    plane.admission.advance()
    plane.admit_and_extend(2, 3)
    assert all("loss" not in batch for batch in plane.buffer)


def test_oldest_groups_first_and_stragglers_last(plane):
    plane = plane(groups=1, lag=1, shuffle=False)
    assert plane.admission.admit(0)
    plane.admit_and_extend(1)
    assert plane.update() == [[0, 1, 2, 3], [4]]
    plane.admission.advance()
    plane.admit_and_extend(2)
    with pytest.raises(TimeoutError, match=r"1 finished, 1 in flight \[0\].*Groups \[0\] can wait"):
        plane.update()
    plane.buffer.extend(plane.group(0))
    assert plane.update() == [[10, 11, 12, 13], [14]]


def test_leaving_the_loop_ends_the_update(plane):
    plane = plane()
    plane.admit_and_extend(0, 1)
    for _ in plane.buffer:
        break
    gc.collect()
    assert plane.pool.num_free_pages == 32
    assert plane.admission.num_unlearned == 0
    plane.admission.advance()
    plane.admit_and_extend(2, 3)
    assert sorted(chain(*plane.update())) == list(range(10, 20))


def test_an_error_in_a_transform_keeps_the_cohort(plane):
    calls = []

    def fail_once(batch):
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError
        return batch

    plane = plane(transform=fail_once, shuffle=False)
    plane.admit_and_extend(0, 1)
    with pytest.raises(ArithmeticError):
        plane.update()
    assert len(plane.buffer) == 10
    assert plane.update() == [[8, 9]]


def test_one_loop_at_a_time(plane):
    plane = plane()
    plane.admit_and_extend(0, 1)
    loop = iter(plane.buffer)
    next(loop)
    with pytest.raises(RuntimeError, match="iterated already"):
        next(iter(plane.buffer))
    with pytest.raises(RuntimeError, match="being learned from"):
        plane.buffer.evict(0)
    loop.close()


# -- waiting ------------------------------------------------------------------------------------


def test_dropped_groups_are_counted_and_explained(plane):
    plane = plane()
    plane.admit_and_extend(0, 1, 2, returns=(1.0, 1.0))
    plane.admit_and_extend(3, returns=(0.0, 0.0), sizes=(1, 1))
    assert plane.buffer.drop_counts() == {
        "no contrast: all rollouts returned 1": {"count": 3, "mean_length": 20.0},
        "no contrast: all rollouts returned 0": {"count": 1, "mean_length": 8.0},
    }
    assert plane.admission.num_unlearned == 0
    with pytest.raises(
        TimeoutError,
        match=r"0 finished, 0 in flight \[\], 4 dropped .* \(3 x 'no contrast.*easier or harder",
    ):
        plane.update()
    stats = plane.buffer.stats()
    assert (stats["groups_dropped"], stats["groups_kept"], stats["groups_stored"]) == (4, 0, 0)
    assert stats["dropped/no contrast: all rollouts returned 1/mean_length"] == 20.0


def test_every_wait_has_its_reason(plane):
    idle = plane()
    with pytest.raises(TimeoutError, match=r"Nothing is being collected: start the collector"):
        idle.update()
    idle.admission.admit(0)
    with pytest.raises(TimeoutError, match=r"1 in flight \[0\].*raise timeout_s"):
        idle.update()
    unpublished = plane(groups=1, lag=0)
    unpublished.admit_and_extend(0)
    unpublished.update()
    with pytest.raises(TimeoutError, match=r"call update_policy_weights_\(\) after each update"):
        unpublished.update()


def test_a_waiting_learner_is_woken_by_the_last_group(plane):
    plane = plane(timeout_s=60.0)
    plane.admit_and_extend(0)
    assert plane.admission.admit(1)
    batches = []
    learner = threading.Thread(target=lambda: batches.extend(plane.update()))
    learner.start()
    plane.buffer.extend(plane.group(1))
    learner.join(60)
    assert sorted(chain(*batches)) == list(range(10))
    assert plane.buffer.stats()["wait_s"] >= plane.buffer.stats()["last_wait_s"] >= 0


def test_a_waiting_learner_sleeps_on_while_groups_are_too_few(plane, monkeypatch):
    plane = plane(groups=3, timeout_s=60.0)
    arrived, looked = plane.buffer._queue._arrived, threading.Event()
    wake, wakes = arrived.notify_all, []
    monkeypatch.setattr(arrived, "notify_all", lambda: (wakes.append(len(plane.buffer)), wake()))
    select = plane.admission.select
    monkeypatch.setattr(plane.admission, "select", lambda ids: (looked.set(), select(ids))[1])
    batches = []
    learner = threading.Thread(target=lambda: batches.extend(plane.update()))
    learner.start()
    assert looked.wait(60)  # it holds the lock until it sleeps
    plane.admit_and_extend(0, 1)
    assert wakes == []
    plane.admit_and_extend(2)
    assert wakes
    learner.join(60)
    assert sum(len(batch) for batch in batches) == 15


def test_a_waiting_learner_is_woken_when_the_straggler_is_given_up(plane):
    plane = plane(groups=1, lag=0, timeout_s=60.0)
    plane.admission.admit(0)
    batches = []
    learner = threading.Thread(target=lambda: batches.extend(plane.update()))
    learner.start()
    plane.buffer.extend(plane.assembler.abandon(0, "environment failed"))
    plane.admit_and_extend(1)
    learner.join(60)
    assert sum(len(batch) for batch in batches) == 5
    assert plane.buffer.drop_counts() == {"environment failed": {"count": 1, "mean_length": 0.0}}


def test_close_wakes_a_waiting_learner_with_the_cause(plane):
    plane = plane(timeout_s=None)
    cause = ValueError("the simulator is gone")
    errors = []

    def learn():
        try:
            plane.update()
        except RuntimeError as error:
            errors.append(error)

    learner = threading.Thread(target=learn)
    learner.start()
    plane.buffer.close("collection failed", cause)
    learner.join(60)
    assert str(errors[0]) == "The replay buffer was closed: collection failed"
    assert errors[0].__cause__ is cause


def test_what_is_complete_is_still_learned_after_close(plane):
    plane = plane()
    plane.admit_and_extend(0, 1)
    plane.buffer.close()
    assert len(plane.update()) == 3
    with pytest.raises(RuntimeError, match="collection ended"):
        plane.update()


# -- bad input ----------------------------------------------------------------------------------


def test_unknown_foreign_and_repeated_groups(plane):
    plane = plane()
    group = plane.group(0)
    with pytest.raises(KeyError, match="admit"):
        plane.buffer.extend(group)
    plane.admission.admit(0)
    with EnvironmentPool(plane.pool.layout, 4, 2) as other:
        stranger = PooledReplayBuffer(pool=other, batch_size=2)
        with pytest.raises(RuntimeError, match="belongs to another pool"):
            stranger.extend(group)
    plane.buffer.extend(group)
    with pytest.raises(ValueError, match="key must be new, got 0"):
        plane.buffer.extend(group)
    assert len(plane.buffer) == 5
    assert plane.buffer.stats()["groups_stored"] == 1


def test_constructor_arguments(plane):
    pool = plane().pool
    with pytest.raises(ValueError, match="batch_size must be given"):
        PooledReplayBuffer(pool=pool, groups_per_update=1)
    with pytest.raises(ValueError, match="num_epochs must be at least 1, got 0"):
        PooledReplayBuffer(pool=pool, groups_per_update=1, batch_size=1, num_epochs=0)
    buffer = PooledReplayBuffer(pool=pool, groups_per_update=3, max_policy_lag=2, batch_size=1)
    assert (buffer.admission.groups_per_update, buffer.admission.max_policy_lag) == (3, 2)


def test_groups_without_admission_can_be_sampled_and_evicted(plane):
    plane = plane()
    buffer = PooledReplayBuffer(
        pool=plane.pool, sampler=SamplerWithoutReplacement(shuffle=False), batch_size=5
    )
    assert buffer.extend(plane.group(0)).tolist() == [0, 1, 2, 3, 4]
    assert buffer.extend(plane.group(1)).tolist() == [5, 6, 7, 8, 9]
    buffer.evict(0)
    assert buffer.sample()["x"].flatten().tolist() == [5, 6, 7, 8, 9]
    buffer.empty()
    assert plane.pool.num_free_pages == 32


def test_empty_lets_others_begin(plane):
    plane = plane()
    plane.admit_and_extend(0, 1, 2, 3)
    assert not plane.admission.may_admit
    plane.buffer.empty()
    assert len(plane.buffer) == 0
    assert plane.admission.num_unlearned == 0
    plane.admit_and_extend(4, 5)
    assert len(plane.update()) == 3


def test_collector_and_learner_threads(plane):
    """A collector and a learner race for 40 updates on a pool with room for two groups too few."""
    plane = plane(num_pages=16, groups=2, lag=2, timeout_s=60.0)
    pages_per_group = 4
    stop = threading.Event()
    errors = []

    def collect():
        try:
            group_id = 0
            while not stop.is_set():
                if not plane.admission.wait_admissible(0.05):
                    continue
                if not plane.pool.reserve(pages_per_group, timeout_s=0.05):
                    continue
                assert plane.admission.admit(group_id)
                sizes = (1 + group_id % 4, 1 + group_id // 4 % 4)
                group = plane.group(group_id, sizes, returns=(1.0, float(group_id % 5 == 0)))
                plane.pool.unreserve(pages_per_group - sum(-(-size // 2) for size in sizes))
                plane.buffer.extend(group)
                group_id += 1
        except BaseException as error:
            errors.append(error)
            plane.buffer.close("the collector failed", error)

    collector = threading.Thread(target=collect)
    collector.start()
    seen: list[int] = []
    try:
        for version in range(40):
            for batch in plane.buffer:
                seen += batch["x"].flatten().tolist()
            for group in plane.buffer.cohort:
                assert group.group_id % 5 != 0
            assert plane.admission.advance() == version + 1
    finally:
        stop.set()
        collector.join(60)
    assert errors == []
    assert len(seen) == len(set(seen))  # no row was handed out twice
    stats = plane.buffer.stats()
    assert stats["updates"] == 40
    assert stats["groups_kept"] == 80 + stats["groups_stored"]
    assert plane.pool.stats()["peak_bytes"] <= 16 * plane.pool.page_bytes
