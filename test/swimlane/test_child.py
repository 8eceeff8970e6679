# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Child processes: their stack while they hang, and their certain end."""

from __future__ import annotations

import ctypes
import os
import signal
from multiprocessing import forkserver
from pathlib import Path

import cloudpickle
import pytest

from torchrl_dvla.swimlane.child import _PR_SET_PDEATHSIG, Child
from torchrl_dvla.swimlane.env_worker import run_env_worker
from torchrl_dvla.testing.faults import Fault, strike


@pytest.fixture
def hung_child(tmp_path):
    """Starts a worker and returns once its constructor is about to hang."""
    children = []

    def start(kind, *, is_tied_to_parent=True):
        gate = str(tmp_path / kind)
        os.mkfifo(gate)

        def constructor_that_hangs():
            if not is_tied_to_parent:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
            open(gate, "w").close()
            strike([Fault(kind, "constructor")], "constructor", 0, [])

        payload = cloudpickle.dumps({"task": constructor_that_hangs})
        children.append(Child(run_env_worker, (payload, "task", 1, 1, {}), name="dvla-env-0"))
        with open(gate) as opened:
            opened.read()  # ends when the child has closed its side
        return children[-1]

    yield start
    for child in children:
        child.kill()
        assert not child.process.is_alive()


def test_the_stack_of_a_hung_child_names_where_it_hangs(hung_child):
    child = hung_child("hang")
    first = child.stack(timeout_s=5.0)
    assert "constructor_that_hangs" in first and "run_env_worker" in first
    assert "constructor_that_hangs" in child.stack(timeout_s=5.0), "it can be asked again"
    assert child.process.is_alive()


def test_a_child_that_blocks_signals_has_no_stack_but_an_end(hung_child):
    child = hung_child("stall")
    # Asked until the block is in place: before it, the stack still comes.
    while "no stack" not in (answer := child.stack()):
        assert "constructor_that_hangs" in answer
    child.kill()
    assert child.exit_description() == "was ended by SIGKILL"


def test_a_dead_child_has_no_stack():
    child = Child(run_env_worker, (cloudpickle.dumps({}), "task", 1, 1, {}), name="dvla-env-0")
    child.process.join(60.0)
    assert child.exit_description() == "exited with code 1"
    assert "no stack" in child.stack()
    child.kill()


def test_the_end_of_a_child_is_certain_without_the_fork_server(hung_child):
    child = hung_child("hang", is_tied_to_parent=False)
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGKILL)
    child.process.join()  # from the fork server's end multiprocessing infers the child's
    child.kill()
    status = Path(f"/proc/{child.pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
