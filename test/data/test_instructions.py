# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pickle

import pytest
import torch
from tensordict import TensorDict

from torchrl_dvla.data import InstructionTable, InstructionTransform


def test_ids_are_stable_and_count_up():
    table = InstructionTable(["a"])
    assert [table.id(text) for text in ("b", "a", "c", "b")] == [1, 0, 2, 1]
    assert table.stack(torch.tensor([[2], [0]]), torch.Size([2])).tolist() == ["c", "a"]
    assert table.since(1) == {1: "b", 2: "c"}
    assert len(table) == 3
    assert pickle.loads(pickle.dumps(table)).text(2) == "c"


def test_unknown_ids_and_other_types():
    table = InstructionTable(["a"])
    for number in (1, -1):
        with pytest.raises(KeyError, match=f"instruction_id {number} is not among the 1 known"):
            table.text(number)
    with pytest.raises(TypeError, match="text must be a string, got list"):
        table.id(["a"])


def test_a_checkpoint_must_agree():
    table = InstructionTable(["a", "b"])
    table.load_state_dict({"texts": ["a", "b", "c"]})
    assert table.id("c") == 2
    table.load_state_dict({"texts": ["a"]})
    assert len(table) == 3
    with pytest.raises(ValueError, match="got 'a' where it has 'z'"):
        table.load_state_dict({"texts": ["z"]})


def test_transform():
    table = InstructionTable(["open", "close"])
    transform = InstructionTransform(table)
    batch = transform(TensorDict({"instruction_id": torch.tensor([[1], [0], [1]])}, [3]))
    assert batch["language_instruction"] == ["close", "open", "close"]
    single = transform(TensorDict({"instruction_id": torch.tensor([1])}, []))
    assert single["language_instruction"] == "close"
    square = transform(TensorDict({"instruction_id": torch.tensor([[[0]], [[1]]])}, [2, 1]))
    assert square["language_instruction"] == [["open"], ["close"]]
    assert set(transform(TensorDict({"x": torch.ones(2)}, [2])).keys()) == {"x"}


def test_batches_share_no_entry():
    table = InstructionTable(["open", "close"])
    transform = InstructionTransform(table)
    ids = torch.tensor([[1], [0], [1]])
    first, second = (transform(TensorDict({"instruction_id": ids}, [3])) for _ in range(2))
    entries = [first.get("language_instruction")[row] for row in range(3)]
    assert entries[0] is entries[2]  # as the docstring says
    first["language_instruction"][0] = "push"
    assert second["language_instruction"] == ["close", "open", "close"]
    assert table.text(1) == "close"
