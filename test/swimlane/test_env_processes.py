# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import functools
import threading

import pytest

from torchrl_dvla.swimlane import EnvProcesses
from torchrl_dvla.testing import CountingChunkEnv

make_env = functools.partial(CountingChunkEnv, chunk_size=4, action_dim=2)


@pytest.fixture
def start():
    started = []

    def start(factories, num_workers=2):
        started.append(EnvProcesses(factories, num_workers))
        return started[-1]

    yield start
    for processes in started:
        processes.stop(3.0)
        assert not any(worker.process.is_alive() for worker in processes.workers)


def test_a_worker_is_replaced_by_one_with_the_same_specs(start):
    processes = start({"default": make_env})
    specs = processes.wait_ready(60.0)
    first, second = processes.workers
    processes.replace(0)
    assert processes.receive_specs(0) == specs
    assert processes.workers[0].pid != first.pid and processes.workers[1] is second
    assert not first.process.is_alive()


def test_how_a_worker_ended_is_its_last_event(start):
    processes = start({"default": make_env})
    processes.wait_ready(60.0)
    processes.workers[1].process.kill()
    assert processes.receive(1) == "dvla-env-1 was ended by SIGKILL."
    processes.send(1, None)  # that a worker is gone is no error of the sender


def test_a_factory_that_cannot_be_sent_is_named(start):
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"create_env_fn must be such that .*cannot pickle.*lock"):
        start({"default": lambda: lock})
