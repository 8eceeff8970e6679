# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from torchrl_dvla.recording import from_plain, rng_state, set_rng_state, to_plain


def _through_disk(value, tmp_path):
    torch.save(to_plain(value), tmp_path / "state.pt")
    return from_plain(torch.load(tmp_path / "state.pt", weights_only=True))


def test_containers_survive_a_load_that_executes_nothing(tmp_path):
    value = {"a": 1, 2: (1.5, [None, True]), "deque": deque(["x"]), "f": np.float64(0.25)}
    assert _through_disk(value, tmp_path) == {
        "a": 1,
        2: (1.5, [None, True]),
        "deque": ["x"],
        "f": 0.25,
    }


def test_arrays_keep_their_type(tmp_path):
    for dtype in ("uint8", "uint32", "int64", "float32"):
        array = np.arange(4, dtype=dtype)
        loaded = _through_disk(array, tmp_path)
        assert loaded.dtype == array.dtype
        assert (loaded == array).all()


def test_tensordicts_keep_strings_and_batch_size(tmp_path):
    td = TensorDict(
        {
            "observation": {"image": torch.arange(6, dtype=torch.uint8).view(2, 3)},
            "text": NonTensorStack("push", "pull"),
            "one": NonTensorData("same", batch_size=[2]),
        },
        batch_size=[2],
    )
    loaded = _through_disk(td, tmp_path)
    assert loaded.batch_size == (2,)
    assert loaded["observation", "image"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["text"] == ["push", "pull"]
    assert loaded["one"] == "same"


def test_a_view_is_saved_without_the_storage_behind_it(tmp_path):
    pool = torch.zeros(1_000_000)
    torch.save(to_plain({"row": pool[3:5]}), tmp_path / "row.pt")
    assert (tmp_path / "row.pt").stat().st_size < 10_000


def test_objects_are_refused_with_their_path():
    with pytest.raises(TypeError, match=r"state\.collector\[1\] must be .* got object\. Let the"):
        to_plain({"collector": [1, object()]})


def test_generators_continue(tmp_path):
    import random

    state = _through_disk(rng_state(), tmp_path)
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    set_rng_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first
