# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Saved states are read without running code, and compared with what they are loaded into."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from torchrl_dvla.saved_state import COUNT, MaybeAbsent, Number, form_of, form_problems, read_state

MASK = torch.tensor([0.0, -math.inf])


class Payload:
    """Makes a file when it is unpickled by whoever runs what a pickle says."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize(
    ("own", "state", "problems"),
    [
        ({"a": 1, "b": 0.5}, {"a": 2, "b": 7}, []),
        ({"a": 1}, {"a": 2.5}, ["'s.a' must be a whole number in [0, inf], got 2.5"]),
        (-1, -7, ["'s' must be a whole number in [-1, inf], got -7"]),
        (0.1, math.nan, ["'s' must be a finite number in [0, inf], got nan"]),
        (0.1, True, ["'s' must be a finite number in [0, inf], got True"]),
        (0.1, 10**400, ["'s' must be a finite number in [0, inf], got 1000"]),
        (math.inf, -3, []),
        (None, True, []),
        (None, 0.5, ["'s' must be bool | None, got 0.5"]),
        ("adam", "sgd", ["'s' must be 'adam', got 'sgd'"]),
        ("", "anything", []),
        ({}, {"a": [1]}, []),
        ({"a": 1}, {"b": 1}, ["'s.a' is missing", "'s.b' is unknown"]),
        ({"a": 1}, "a", ["'s' must be a mapping, got 'a'"]),
        ((1, 2), [1, -2], ["'s.1' must be a whole number in [0, inf], got -2"]),
        ((1, 2), (1,), ["'s' must have 2 items, got 1"]),
        (torch.ones(2), torch.ones(2, 1), ["'s' must be float32 [2], got float32 [2, 1]"]),
        (torch.ones(2), torch.ones(2).double(), ["'s' must be float32 [2], got float64 [2]"]),
        (torch.ones(2), MASK, ["'s' must be finite, got NaN or infinity"]),
        (MASK, MASK, []),
        (torch.ones(2), [1.0, 1.0], ["'s' must be float32 [2], got [1.0, 1.0]"]),
    ],
)
def test_a_state_is_compared_with_an_objects_own(own, state, problems):
    found = form_problems(form_of(own), state, "s")
    assert len(found) == len(problems)
    assert all(line.startswith(start) for line, start in zip(found, problems))


def test_an_entry_that_older_versions_did_not_write():
    form = {"a": COUNT, "b": MaybeAbsent(COUNT)}
    assert form_problems(form, {"a": 1}, "s") == form_problems(form, {"a": 1, "b": 2}, "s") == []
    assert form_problems(form, {"b": 2}, "s") == ["'s.a' is missing"]
    (problem,) = form_problems(form, {"a": 1, "b": -2}, "s")
    assert problem.startswith("'s.b' must be a whole number in [0, inf], got -2")


def test_forms_of_any_length():
    form = {str: [(bool, COUNT, Number(optional=True))]}
    assert form_problems(form, {"a": [], "b": [(True, 3, None), [False, 0, -1.5]]}, "s") == []
    state = {"a": [(None, -1, "x")], 3: []}
    assert len(form_problems(form, state, "s")) == 4


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_nothing_that_is_read_runs_code(tmp_path, write):
    write({"a": Payload(tmp_path / "ran")}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt' must be a whole .* got .*else: ") as info:
        read_state(tmp_path / "state.pt")
    assert not (tmp_path / "ran").exists()
    assert "safe_globals" not in str(info.value) and "weights_only" not in str(info.value)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"PK\x03\x04", b"\x80\x02.", bytes(999), b"PK\x03\x04" + bytes(5000)]
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole file of tensors, numbers and text, got"):
        read_state(tmp_path / "state.pt")
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "none.pt")
