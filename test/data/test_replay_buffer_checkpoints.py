# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Saving and restoring a PooledReplayBuffer in the middle of a run."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("taken_after", [0, 1, 4])
def test_a_resumed_run_sees_every_minibatch_once(plane, tmp_path, on_disk, taken_after):
    """Checkpoint before, in the middle of the first and of the second epoch of an update."""
    old = plane(num_epochs=2)
    old.admit_and_extend(0, 1, 2, 3)
    loop = iter(old.buffer)
    seen = [batch["x"].flatten().tolist() for batch in islice(loop, taken_after)]
    if on_disk:
        old.buffer.dumps(tmp_path / "buffer")
    state = old.buffer.state_dict()
    rest = [batch["x"].flatten().tolist() for batch in loop]

    new = plane(num_epochs=2, num_pages=24)
    new.pool.lease("someone else")  # page numbers differ from the run before
    if on_disk:
        new.buffer.loads(tmp_path / "buffer")
    else:
        new.buffer.load_state_dict(state)
    assert new.update() == rest
    assert len(seen) + len(rest) == 6
    for run in (old, new):
        assert run.admission.advance() == 1
    assert new.update() == old.update()
    assert new.buffer.stats()["updates"] == 2
    assert new.pool.num_free_pages == 23


def test_groups_in_flight_are_named_and_forgotten(plane):
    old = plane()
    old.admit_and_extend(0)
    old.admit_and_extend(1, returns=(0.0, 0.0))
    assert old.admission.admit(2)
    new = plane()
    new.buffer.load_state_dict(old.buffer.state_dict())
    assert new.buffer.lost_in_flight == [2]
    assert new.admission.num_in_flight == 0
    assert new.buffer.drop_counts() == old.buffer.drop_counts()
    new.admit_and_extend(3)
    assert len(new.update()) == 3
    assert new.buffer.cohort[0].candidates[0] == replace(
        old.buffer._queue.groups[0].candidates[0], pages=[]
    )


def test_state_is_plain_data(plane):
    plane = plane()
    plane.admit_and_extend(0, 1)
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


def test_checkpoints_that_do_not_fit(plane):
    old = plane()
    old.admit_and_extend(0)
    with pytest.raises(ValueError, match="groups_per_update must equal the checkpoint's 2, got 3"):
        plane(groups=3).buffer.load_state_dict(old.buffer.state_dict())
