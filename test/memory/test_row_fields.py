# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_dvla.memory.row_access import RowFields


@pytest.fixture
def rows():
    return TensorDict(
        {
            "scalar": torch.arange(6),
            "half": torch.arange(18.0).view(6, 3).bfloat16(),
            "flags": torch.arange(12).view(6, 2) % 3 == 0,
            "next": {"image": torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2)},
        },
        [6],
    )


@pytest.mark.parametrize("index", [[5, 0, 5], [2], []])
def test_gather_is_a_copy_of_every_field(rows, index):
    number = torch.tensor(index, dtype=torch.int64)
    expected = rows[number]
    gathered = RowFields(rows).gather(number)
    assert gathered.batch_size == (len(index),)
    assert (gathered == expected).all()
    rows.zero_()
    assert (gathered == expected).all()


def test_gather_into_a_batch_fills_its_first_rows(rows):
    batch = rows[:4].clone().zero_()
    view = RowFields(rows).gather(torch.tensor([5, 3]), RowFields(batch))
    assert batch["scalar"].tolist() == [5, 3, 0, 0]
    assert view["scalar"].tolist() == [5, 3]
    assert view["next", "image"].data_ptr() == batch["next", "image"].data_ptr()


def test_only_the_chosen_fields_move(rows):
    fields = RowFields(rows, ["scalar", ("next", "image")])
    assert set(fields.gather(torch.tensor([1])).keys(True, True)) == {"scalar", ("next", "image")}
    fields.scatter(torch.tensor([1, 0]), rows[4:].clone())
    assert rows["scalar"].tolist() == [5, 4, 2, 3, 4, 5]
    assert rows["half"][:2].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_scatter_casts_and_expands(rows):
    fields = RowFields(rows, ["half"])
    values = TensorDict({"half": torch.tensor([[7.0], [8.0]]).double()}, [2])
    fields.scatter(torch.tensor([4, 1]), values)
    assert rows["half"][[4, 1]].tolist() == [[7, 7, 7], [8, 8, 8]]


@pytest.mark.parametrize("index", [[6], [-1], [0, 9]])
def test_rows_that_do_not_exist(rows, index):
    fields = RowFields(rows)
    with pytest.raises(IndexError, match="index must be within the 6 rows"):
        fields.gather(torch.tensor(index))
    with pytest.raises(IndexError, match="index must be within the 6 rows"):
        fields.scatter(torch.tensor(index), rows[: len(index)])
    assert rows["scalar"].tolist() == [0, 1, 2, 3, 4, 5]
