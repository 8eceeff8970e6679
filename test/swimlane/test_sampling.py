# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Environment workers as processes: where they run."""

from __future__ import annotations

import functools
import os

import pytest

from torchrl_dvla.collectors import WorkerConfig
from torchrl_dvla.swimlane import SamplingLane
from torchrl_dvla.testing import CountingChunkEnv

make_env = functools.partial(CountingChunkEnv, chunk_size=4, action_dim=2)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no processes")
@pytest.mark.parametrize("pin_workers", [False, True])
def test_workers_stay_on_the_cores_of_this_process(pin_workers):
    allowed = os.sched_getaffinity(0)
    expected = [{core} if pin_workers else allowed for core in sorted(allowed)]
    lane = SamplingLane({"default": make_env}, len(allowed) + 1, pin_workers=pin_workers)
    try:
        lane.wait_ready(60.0)
        lane.replace(0)
        found = [os.sched_getaffinity(worker.pid) for worker in lane.workers]
        assert found == [*expected, expected[0]]
        assert os.sched_getaffinity(0) == allowed
    finally:
        lane.stop(3.0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no processes")
def test_a_core_that_this_process_may_not_use_is_not_used(monkeypatch):
    affinity_of = os.sched_getaffinity
    last = max(affinity_of(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {last})
    lane = SamplingLane({"default": make_env}, 2, pin_workers=True)
    try:
        assert [affinity_of(worker.pid) for worker in lane.workers] == [{last}] * 2
    finally:
        lane.stop(3.0)


def test_pinned_workers_have_one_thread():
    with pytest.raises(ValueError, match="num_threads must be 1 with pin_workers, got 2"):
        WorkerConfig(pin_workers=True, num_threads=2)
