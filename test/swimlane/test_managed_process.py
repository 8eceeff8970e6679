# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Processes of a run: their stack while they hang, and their certain end."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import cloudpickle
import pytest

from torchrl_dvla.swimlane import ManagedProcess
from torchrl_dvla.swimlane.env_worker import run_env_worker
from torchrl_dvla.swimlane.managed_process import _PR_SET_PDEATHSIG
from torchrl_dvla.testing.faults import Fault, strike


@pytest.fixture
def hung_process(tmp_path):
    """Starts a worker and returns once its constructor is about to hang."""
    started = []

    def start(kind, *, is_tied_to_parent=True):
        gate = str(tmp_path / kind)
        os.mkfifo(gate)

        def constructor_that_hangs():
            if not is_tied_to_parent:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
            open(gate, "w").close()
            strike([Fault(kind, "constructor")], "constructor", 0, [])

        payload = cloudpickle.dumps({"task": constructor_that_hangs})
        started.append(ManagedProcess(run_env_worker, (payload, "task", 1), name="dvla-env-0"))
        with open(gate) as opened:
            opened.read()  # ends when the process has closed its side
        return started[-1]

    yield start
    for process in started:
        process.kill()
        assert not process.process.is_alive()


def test_the_stack_of_a_hung_process_names_where_it_hangs(hung_process):
    process = hung_process("hang")
    first = process.stack(timeout_s=5.0)
    assert "constructor_that_hangs" in first and "run_env_worker" in first
    assert "constructor_that_hangs" in process.stack(timeout_s=5.0), "it can be asked again"
    assert process.process.is_alive()


def test_a_process_that_blocks_signals_has_no_stack_but_an_end(hung_process):
    process = hung_process("stall")
    # Asked until the block is in place: before it, the stack still comes.
    while "no stack" not in (answer := process.stack()):
        assert "constructor_that_hangs" in answer
    process.kill()
    assert process.exit_description() == "was ended by SIGKILL"


def test_a_dead_process_has_no_stack():
    args = (cloudpickle.dumps({}), "task", 1)
    process = ManagedProcess(run_env_worker, args, name="dvla-env-0")
    process.process.join(60.0)
    assert process.exit_description() == "exited with code 1"
    assert "no stack" in process.stack()
    process.kill()


def test_the_end_of_a_process_is_certain_without_the_fork_server(hung_process):
    process = hung_process("hang", is_tied_to_parent=False)
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGKILL)
    process.process.join()  # from the fork server's end multiprocessing infers the process's
    process.kill()
    assert has_ended(process.pid)


def has_ended(pid):
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def test_sigterm_ends_no_process_but_the_programs_that_it_has_started(tmp_path):
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def constructor():
        program = subprocess.Popen(["sleep", "1000"])
        open(gate, "w").close()
        open(gate).close()
        program.terminate()
        raise RuntimeError(f"the program ended with {program.wait()}")

    args = (cloudpickle.dumps({"task": constructor}), "task", 1)
    process = ManagedProcess(run_env_worker, args, name="dvla-env-0")
    try:
        os.kill(process.pid, signal.SIGTERM)
        open(gate).close()
        os.kill(process.pid, signal.SIGTERM)
        open(gate, "w").close()
        assert "the program ended with -15" in process.connection.recv().traceback
    finally:
        process.kill()


EXITING = """
import threading
from torchrl_dvla.swimlane import ManagedProcess

def wait(connection):
    connection.recv()

def start():
    process = ManagedProcess(wait, (), name="dvla-env-0")
    print(process.pid, flush=True)
    return process

def keep_one_alive():
    try:
        while True:
            start().process.join()
    except RuntimeError as error:
        print(error, flush=True)

if __name__ == "__main__":
    process = start()
    threading.Thread(target=keep_one_alive, daemon=True).start()
    raise ValueError("a mistake in the script")
"""


def test_a_script_that_stops_nothing_ends_with_its_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(EXITING)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300.0)
    assert done.returncode == 1 and "ValueError: a mistake in the script" in done.stderr
    pids = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert pids and all(has_ended(pid) for pid in pids), "one that was started during the exit too"
