# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pickle

import pytest
import torch
from tensordict import TensorDict

from torchrl_dvla.data import PooledStorage
from torchrl_dvla.memory import EnvironmentPool, RowLayout

LAYOUT = RowLayout({"x": ((1,), torch.int64), ("next", "image"): ((2, 2), torch.uint8)})


@pytest.fixture
def pool():
    with EnvironmentPool(LAYOUT, num_pages=6, rows_per_page=2) as pool:
        pool.rows["x"].copy_(torch.arange(12).unsqueeze(-1) + 100)
        yield pool
        pool.check()


def rows(*values):
    x = torch.tensor(values).unsqueeze(-1)
    image = x.to(torch.uint8).view(-1, 1, 1).expand(-1, 2, 2)
    return TensorDict({"x": x, "next": {"image": image}}, [len(values)])


def sealed(pool, *sizes):
    pages = []
    for rollout_id, size in enumerate(sizes):
        leased = [pool.lease("w", rollout_id) for _ in range(-(-size // 2))]
        pages.append(pool.seal(leased, size))
    return pages


def xs(data):
    return data["x"].flatten().tolist()


def test_adopted_pages_are_dense_positions_and_no_tensor_moves(pool):
    storage = PooledStorage(pool)
    pages = sealed(pool, 3, 1)  # rows 0 1 2 and 4
    pointer = pool.rows["x"].data_ptr()
    assert storage.adopt(7, pages, [3, 1]).tolist() == [0, 1, 2, 3]
    assert pool.stats()["pages_stored"] == 3
    assert pool.rows["x"].data_ptr() == pointer
    assert len(storage) == 4
    assert xs(storage[:]) == [100, 101, 102, 104]
    assert xs(storage[torch.tensor([3, 0])]) == [104, 100]
    assert storage[-1]["x"].tolist() == [104]
    assert storage.segments() == {7: 4}
    assert storage.segment_rows(7).tolist() == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="key must be new, got 7"):
        storage.adopt(7, sealed(pool, 1), [1])


def test_what_is_read_is_a_copy(pool):
    storage = PooledStorage(pool)
    storage.adopt(0, sealed(pool, 4), [4])
    read = [storage[1:3], storage[:], storage[torch.tensor([1, 2])], storage[::-1], storage[1]]
    pool.rows["x"].zero_()
    assert [xs(data) for data in read] == [
        [101, 102],
        [100, 101, 102, 103],
        [101, 102],
        [103, 102, 101, 100],
        [101],
    ]


def test_fields_are_written_by_position(pool):
    storage = PooledStorage(pool)
    storage.adopt(0, sealed(pool, 3, 1), [3, 1])
    storage.set_field("x", torch.tensor([[7]]), index=-1)
    storage.set_field(("next", "image"), torch.tensor(5), index=[0, 2])
    assert xs(storage[:]) == [100, 101, 102, 7]
    assert storage[:]["next", "image"][:, 0, 0].tolist()[::2] == [5, 5]
    storage.set(torch.tensor([1, 3]), rows(1, 2))  # rows of a group may be overwritten
    assert xs(storage[:]) == [100, 1, 102, 2]
    assert pool.rows["x"][3] == 103  # between the rollouts nothing was touched
    with pytest.raises(KeyError, match="key must be a field of the row layout, got 'y'"):
        storage.set_field("y", torch.tensor(0))


def test_eviction_frees_pages_and_moves_positions_up(pool):
    storage = PooledStorage(pool)
    for key in (1, 2, 3):
        storage.adopt(key, sealed(pool, 3), [3])
    storage.evict(2)
    assert xs(storage[:]) == [100, 101, 102, 108, 109, 110]
    assert storage.segments() == {1: 3, 3: 3}
    assert storage.segment_rows(3).tolist() == [8, 9, 10]
    assert pool.num_free_pages == 2
    storage.evict(1)
    storage.evict(3)
    assert len(storage) == 0
    assert xs(storage[:]) == []
    with pytest.raises(KeyError, match="Group 3 is not stored"):
        storage.evict(3)


def test_rows_by_value_are_a_ring(pool):
    storage = PooledStorage(pool, max_size=5)
    storage.set(range(3), rows(1, 2, 3))
    assert pool.stats()["pages_stored"] == 2  # pages are leased as they are needed
    storage.set(torch.tensor([3, 4, 0]), rows(4, 5, 6))
    assert xs(storage[:]) == [6, 2, 3, 4, 5]
    storage.set(1, rows(9)[0])
    assert storage[1]["next", "image"].tolist() == [[9, 9], [9, 9]]
    assert storage._is_full
    storage._empty()
    assert pool.num_free_pages == 6
    with pytest.raises(IndexError, match="within 5 rows"):
        storage.set(5, rows(1)[0])


def test_groups_and_rows_by_value_do_not_mix(pool):
    storage = PooledStorage(pool)
    storage.adopt(0, sealed(pool, 1), [1])
    with pytest.raises(RuntimeError, match="holds groups and cannot take rows by value"):
        storage.set(range(2), rows(1, 2))
    storage._empty()
    storage.set(range(1), rows(1))
    pages = sealed(pool, 1)
    with pytest.raises(RuntimeError, match="holds rows given by value and cannot adopt"):
        storage.adopt(0, pages, [1])
    pool.free(pages[0])


def test_fields_must_match_by_name(pool):
    storage = PooledStorage(pool)
    with pytest.raises(KeyError, match=r"missing \['x'\] and unknown \['text'\]"):
        data = rows(1, 2).exclude("x").set_non_tensor("text", "hello")
        storage.set(range(2), data)
    with pytest.raises(
        ValueError, match=r"'x' must be \[1\] torch.int64, got \[1, 1\] torch.int64"
    ):
        storage.set(range(2), rows(1, 2).update({"x": torch.ones(2, 1, 1, dtype=torch.int64)}))
    with pytest.raises(ValueError, match=r"'x' must be \[1\] torch.int64, got \[1\] torch.float32"):
        storage.set(range(2), rows(1, 2).update({"x": torch.ones(2, 1)}))
    assert len(storage) == 0
    storage.set(range(2), rows(1, 2).set("index", torch.arange(2)))  # samples may come back
    assert len(storage) == 2


def test_unsealed_and_foreign_pages_are_refused_and_nothing_changes(pool):
    storage = PooledStorage(pool)
    page = pool.lease("w")
    with pytest.raises(RuntimeError, match="is leased and cannot be stored"):
        storage.adopt(0, [[page]], [1])
    with EnvironmentPool(LAYOUT, 6, 2) as other:
        with pytest.raises(RuntimeError, match="belongs to another pool"):
            storage.adopt(0, sealed(other, 1), [1])
    assert len(storage) == 0
    assert storage.segments() == {}


def test_a_pool_without_pages_says_so(pool):
    storage = PooledStorage(pool)
    for _ in range(5):
        pool.lease("someone else")
    with pytest.raises(RuntimeError, match="No free page is left"):
        storage.set(range(3), rows(1, 2, 3))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("by_value", [False, True])
def test_checkpoints(pool, tmp_path, on_disk, by_value):
    storage = PooledStorage(pool)
    if by_value:
        storage.set(range(5), rows(1, 2, 3, 4, 5))
    else:
        storage.adopt(3, sealed(pool, 3, 1), [3, 1])
        storage.adopt(4, sealed(pool, 2), [2])
    with EnvironmentPool(LAYOUT, num_pages=9, rows_per_page=2) as other_pool:
        other_pool.lease("someone")
        other = PooledStorage(other_pool)
        if on_disk:
            storage.dumps(tmp_path / "storage")
            other.loads(tmp_path / "storage")
        else:
            other.load_state_dict(storage.state_dict())
        assert xs(other[:]) == xs(storage[:])
        assert other.segments() == storage.segments()
        if not by_value:
            assert [len(pages) for pages in other.segment_pages(3)] == [2, 1]
            other.evict(3)
            assert xs(other[:]) == [106, 107]
        other._empty()
        assert other_pool.num_free_pages == 8
        other_pool.check()


def test_checkpoints_of_an_empty_storage(pool, tmp_path):
    storage = PooledStorage(pool)
    storage.dumps(tmp_path / "storage")
    storage.set(range(2), rows(1, 2))
    storage.loads(tmp_path / "storage")
    assert len(storage) == 0


def test_a_checkpoint_of_other_specs_changes_nothing(pool):
    storage = PooledStorage(pool)
    storage.set(range(2), rows(1, 2))
    with EnvironmentPool(RowLayout({"x": ((2,), torch.int64)}), 6, 2) as other_pool:
        other = PooledStorage(other_pool)
        other.set(range(1), TensorDict({"x": torch.ones(1, 2, dtype=torch.int64)}, [1]))
        with pytest.raises(ValueError, match="must come from the same specs"):
            other.load_state_dict(storage.state_dict())
        assert len(other) == 1
    small = PooledStorage(pool, max_size=1)
    with pytest.raises(ValueError, match="2 rows must fit in max_size, got 1"):
        small.load_state_dict(storage.state_dict())


@pytest.mark.parametrize("by_value", [False, True])
def test_a_checkpoint_that_finds_no_room_changes_nothing(pool, by_value):
    storage = PooledStorage(pool)
    if by_value:
        storage.set(range(5), rows(1, 2, 3, 4, 5))
    else:
        storage.adopt(3, sealed(pool, 3, 1), [3, 1])
    with EnvironmentPool(LAYOUT, num_pages=4, rows_per_page=2) as small_pool:
        small = PooledStorage(small_pool)
        small.set(range(2), rows(8, 9))
        taken = [small_pool.lease("someone") for _ in range(2)]
        with pytest.raises(ValueError, match="3 pages must fit in those that are free or .* got 2"):
            small.load_state_dict(storage.state_dict())
        assert xs(small[:]) == [8, 9]
        assert small_pool.num_free_pages == 1
        small_pool.check()
        small_pool.free(taken[:1])  # with the storage's own page these are three
        small.load_state_dict(storage.state_dict())
        assert xs(small[:]) == xs(storage[:])
        assert small_pool.num_free_pages == 0
        small_pool.check()


def test_size_and_pickle(pool):
    with pytest.raises(ValueError, match="max_size must be between 1 and the pool's 12"):
        PooledStorage(pool, max_size=13)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(PooledStorage(pool))
