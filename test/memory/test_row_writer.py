# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_dvla.memory import EnvironmentPool, RowLayout, RowWriter

LAYOUT = RowLayout(
    {
        ("observation", "image"): ((3, 2, 2), torch.uint8),
        ("observation", "state"): ((2,), torch.float32),
        "pad": ((4,), torch.bool),
    }
)
OBSERVATION = [("observation", "image"), ("observation", "state")]


def observation(value):
    image = torch.full((3, 2, 2), value, dtype=torch.uint8)
    return TensorDict({"observation": {"image": image, "state": torch.full((2,), float(value))}})


@pytest.fixture
def pool():
    with EnvironmentPool(LAYOUT, num_pages=3, rows_per_page=2) as pool:
        yield pool
        pool.check()


def test_rows_are_written_in_place_and_seen_by_all(pool):
    view = pickle.loads(pickle.dumps(pool.worker_view()))
    first, second = pool.lease("w"), pool.lease("w")
    writer = RowWriter(view, OBSERVATION)
    assert writer.keys == OBSERVATION
    pointer = pool.rows["observation", "image"].data_ptr()
    writer.write_from(1, first.generation, observation(7))
    writer.write_from(2, second.generation, observation(9))
    assert pool.rows["observation", "image"][:, 0, 0, 0].tolist() == [0, 7, 9, 0, 0, 0]
    assert pool.rows["observation", "state"].sum(-1).tolist() == [0, 14, 18, 0, 0, 0]
    assert pool.rows["observation", "image"].data_ptr() == pointer


def test_values_come_in_the_order_of_the_keys_and_a_scalar_fills_its_field(pool):
    page = pool.lease("w")
    writer = RowWriter(pool.worker_view(), ["pad", ("observation", "state")])
    writer.write(0, page.generation, [True, np.array([1.0, 2.0])])
    assert pool.rows["pad"][:2].tolist() == [[True] * 4, [False] * 4]
    assert pool.rows["observation", "state"][0].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        writer.write(0, page.generation, [True])


@pytest.mark.parametrize(
    ("index", "written"),
    [([2, 0], [6, 5]), ([0, 1, 2], [5, 4, 6]), ([1], [4])],
)
def test_rows_of_a_batch_are_written_at_once(pool, index, written):
    leases = [pool.lease("w") for _ in index]
    rows, generations = [2 * page + 1 for page in leases], [page.generation for page in leases]
    batch = torch.stack([observation(value) for value in (5, 4, 6)])
    RowWriter(pool.worker_view(), OBSERVATION).write_from(rows, generations, batch, index)
    assert pool.rows["observation", "image"][rows, 2, 1, 1].tolist() == written
    assert pool.rows["observation", "state"][rows].tolist() == [[value] * 2 for value in written]
    assert pool.rows["observation", "image"].sum() == 12 * sum(written), "no other row"
    pads = [[True, False, False, False]] * len(rows)
    RowWriter(pool.worker_view(), ["pad"]).write(rows, generations, [pads])
    assert pool.rows["pad"][rows].tolist() == pads and pool.rows["pad"].sum() == len(rows)


def test_a_batch_with_one_wrong_row_writes_nothing(pool):
    first, second = pool.lease("w"), pool.lease("w")
    writer = RowWriter(pool.worker_view(), OBSERVATION)
    batch = torch.stack([observation(value) for value in (5, 4)])
    with pytest.raises(RuntimeError, match="Row 2 must lie in a leased page, got page 1, .* anew"):
        writer.write_from([0, 2], [first.generation, second.generation + 1], batch, [0, 1])
    with pytest.raises(IndexError, match="row must be between 0 and 5, got 6"):
        writer.write_from([0, 6], [first.generation, 0], batch, [0, 1])
    batch["observation", "state"][1, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        writer.write_from([0, 2], [first.generation, second.generation], batch, [0, 1])
    with pytest.raises(
        ValueError, match=r"must be \[2, 2\] torch.float32 in every row, got \[2, 3"
    ):
        batch["observation", "state"] = torch.zeros(2, 3)
        writer.write_from([0, 2], [first.generation, second.generation], batch, [0, 1])
    assert not pool.rows["observation", "image"].any()
    batch["observation", "state"] = torch.full((2, 2), torch.nan)
    batch["observation", "state"][1] = 4.0
    writer.write_from([2], [second.generation], batch, [1])  # the other one may be anything
    assert pool.rows["observation", "state"][2].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("end", ["seal", "store", "free", "reclaim", "release"])
def test_a_row_whose_lease_has_ended_is_refused_and_nothing_is_written(pool, end):
    page = pool.lease("w")
    writer = RowWriter(pickle.loads(pickle.dumps(pool.worker_view())), OBSERVATION)
    writer.write_from(0, page.generation, observation(1))
    word = {"seal": "sealed", "store": "stored", "release": "leased anew"}.get(end, "free")
    if end in ("seal", "store"):
        pool.seal([page], 1)
    if end == "store":
        pool.store([page])
    if end == "free":
        pool.free([page])
    if end in ("reclaim", "release"):
        pool.reclaim("w")
    if end == "release":
        assert int(pool.lease("other")) == page
    message = f"Row 0 must lie in a leased page, got page 0, which is {word}.*stop writing"
    with pytest.raises(RuntimeError, match=message):
        writer.write_from(0, page.generation, observation(5))
    assert pool.rows["observation", "image"].unique().tolist() == [0, 1]


def test_rows_that_do_not_exist_are_refused(pool):
    page = pool.lease("w")
    writer = RowWriter(pool.worker_view(), ["pad"])
    for row in (-1, 6):  # -1 would be the last row to numpy
        with pytest.raises(IndexError, match=f"row must be between 0 and 5, got {row}"):
            writer.write(row, page.generation, [True])


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (torch.ones(1), r"\[1\] torch.float32"),  # would be broadcast
        (torch.ones(3), r"\[3\] torch.float32"),
        (torch.ones(2, dtype=torch.float64), r"\[2\] torch.float64"),  # would be rounded
    ],
)
def test_a_tensor_that_is_not_what_the_spec_says_is_refused_by_name(pool, state, found):
    page = pool.lease("w")
    writer = RowWriter(pool.worker_view(), OBSERVATION)
    wrong = observation(3)
    wrong["observation", "state"] = state
    with pytest.raises(ValueError, match=rf"'state'\) must be \[2\] torch.float32 .* got {found}"):
        writer.write_from(0, page.generation, wrong)
    assert not pool.rows["observation", "image"].any(), "not even the fields before it"


def test_missing_keys_are_named(pool):
    page = pool.lease("w")
    with pytest.raises(KeyError, match="keys must be fields of the row, got \\['reward'\\]"):
        RowWriter(pool.worker_view(), ["pad", "reward"])
    writer = RowWriter(pool.worker_view(), OBSERVATION)
    with pytest.raises(KeyError, match="state"):
        writer.write_from(0, page.generation, observation(1).exclude(("observation", "state")))


def test_a_closed_pool_refuses_late_writers(pool):
    other = EnvironmentPool(LAYOUT, 1, 1)
    page = other.lease("w")
    writer = RowWriter(pickle.loads(pickle.dumps(other.worker_view())), ["pad"])
    other.close()
    with pytest.raises(RuntimeError, match="page 0, which is free"):
        writer.write(0, page.generation, [True])
