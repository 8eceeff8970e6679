# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
import torch

from torchrl_dvla.memory import RowLayout, SharedArena

LAYOUT = RowLayout(
    {
        ("observation", "image"): ((3, 2, 2), torch.uint8),
        ("vla_action", "chunk"): ((2, 3), torch.float32),
        ("next", "done"): ((1,), torch.bool),
        "group_id": ((1,), torch.int64),
    }
)


def test_sizes():
    assert LAYOUT.row_bytes == 12 + 24 + 1 + 8
    # 5 rows: 60 -> 64, 120 -> 128, 5 -> 64, 40 -> 64: each field begins on a cache line
    assert LAYOUT.nbytes(5) == 64 + 128 + 64 + 64


def test_rows_are_contiguous_disjoint_views():
    arena = SharedArena(LAYOUT.nbytes(5))
    rows = LAYOUT.rows(arena, 5)
    assert rows.batch_size == (5,)
    spans = []
    for key, (shape, dtype) in LAYOUT.items():
        field = rows.get(key)
        assert field.shape == (5, *shape)
        assert field.dtype is dtype
        assert field.is_contiguous()
        assert field.data_ptr() % 64 == 0
        spans.append((field.data_ptr(), field.data_ptr() + field.nbytes))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    # Locked: an assignment writes into shared memory, it never replaces a field.
    pointer = rows["group_id"].data_ptr()
    rows["group_id"][3] = 9
    rows[4] = rows[3]
    assert rows["group_id"].flatten().tolist() == [0, 0, 0, 9, 9]
    with pytest.raises(RuntimeError, match="locked"):
        rows["group_id"] = torch.zeros(5, 1, dtype=torch.int64)
    assert rows["group_id"].data_ptr() == pointer
    arena.close()


def test_bad_fields():
    with pytest.raises(ValueError, match="at least one"):
        RowLayout({})
    with pytest.raises(TypeError, match=r"'text' must have a torch\.dtype.*side table"):
        RowLayout({"text": ((1,), str)})
    for dtype in (torch.complex64, torch.quint8, torch.bfloat16, torch.bits8, None, [torch.int8]):
        with pytest.raises(TypeError, match="'x' must have a torch.dtype among bool, uint8"):
            RowLayout({"x": ((1,), dtype)})
    for key in (3, "", (), ("observation", 3), None):
        with pytest.raises(TypeError, match="must be named by a string"):
            RowLayout({key: ((1,), torch.int8)})
    for keys in (("a", ("a",)), ("a", ("a", "b")), (("a", "b"), ("a", "b", "c"))):
        with pytest.raises(ValueError, match="must be named once"):
            RowLayout(dict.fromkeys(keys, ((1,), torch.int8)))
    with pytest.raises(ValueError, match=f"at most {2**30} bytes, got {2**80} with field 'x'"):
        RowLayout({"x": ((2**40, 2**40), torch.int8)})
    for shape in ((0, 3), (-1, 3), (1.5, 3), ("3",)):
        with pytest.raises(ValueError, match=r"'chunk' must have a static shape"):
            RowLayout({"chunk": (shape, torch.float32)})


def test_signature_is_that_of_the_content():
    assert pickle.loads(pickle.dumps(LAYOUT)).signature == LAYOUT.signature
    assert RowLayout(dict(LAYOUT)).signature == LAYOUT.signature
    wider = RowLayout({**LAYOUT, "group_id": ((2,), torch.int64)})
    assert wider.signature != LAYOUT.signature
    turned = RowLayout({key: LAYOUT[key] for key in reversed(list(LAYOUT))})
    assert turned.signature != LAYOUT.signature
