# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Processes of a run: their stack while they hang, and their certain end."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import cloudpickle
import pytest

from torchrl_dvla.swimlane import ManagedProcess, managed_process
from torchrl_dvla.swimlane.env_worker import run_env_worker
from torchrl_dvla.swimlane.managed_process import _PR_SET_PDEATHSIG, STOP_SIGNALS
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
    server = fork_server()
    os.kill(server, signal.SIGKILL)
    process.process.join()  # from the fork server's end multiprocessing infers the process's
    process.kill()
    assert has_ended(process.pid)


def test_a_process_that_the_kernel_keeps_is_an_error_every_time(hung_process, monkeypatch):
    process = hung_process("hang")
    monkeypatch.setattr(managed_process, "_REST_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "pidfd_send_signal", lambda handle, number: None)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="dvla-env-0 must end when it is killed"):
                process.kill()
    os.kill(process.pid, signal.SIGKILL)
    process.process.join()


def has_ended(pid):
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def fork_server():
    return forkserver._forkserver._forkserver_pid


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_no_process_ends_by_a_request_but_the_programs_that_it_has_started(tmp_path, number):
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def constructor():
        program = subprocess.Popen(["sleep", "1000"])
        open(gate, "w").close()
        open(gate).close()
        program.send_signal(number)
        raise RuntimeError(f"the program ended with {program.wait()}")

    args = (cloudpickle.dumps({"task": constructor}), "task", 1)
    process = ManagedProcess(run_env_worker, args, name="dvla-env-0")
    try:
        os.kill(process.pid, number)
        open(gate).close()
        os.kill(process.pid, number)
        os.kill(fork_server(), number)
        open(gate, "w").close()
        assert f"the program ended with -{number:d}" in process.connection.recv().traceback
    finally:
        process.kill()


@pytest.mark.parametrize("then", ["end", "start"])
def test_a_fork_server_that_does_not_answer_is_replaced(hung_process, monkeypatch, caplog, then):
    process, server = hung_process("hang", is_tied_to_parent=False), fork_server()
    os.kill(server, signal.SIGSTOP)
    monkeypatch.setattr(managed_process, "_ANSWER_S", 0.5)
    if then == "end":
        process.process.kill()
        process.kill()
        assert has_ended(process.pid)
    other = ManagedProcess(run_env_worker, (cloudpickle.dumps({}), "task", 1), name="dvla-env-1")
    assert "KeyError" in other.connection.recv().traceback
    other.kill()
    assert fork_server() != server and has_ended(server)
    assert caplog.text.count(f"The fork server (process {server}) does not answer") == 1


def test_what_is_large_gets_time_to_be_sent(monkeypatch, caplog):
    monkeypatch.setattr(managed_process, "_SLOWEST_PIPE", 0.01)  # bytes a second
    for answer_s in (10.0, 0.0):  # at the second the fork server is known to answer
        with monkeypatch.context() as context:
            context.setattr(managed_process, "_ANSWER_S", answer_s)
            process = ManagedProcess(run_env_worker, (cloudpickle.dumps({}), "t", 1), name="env")
        assert "KeyError" in process.connection.recv().traceback
        process.kill()
    assert "does not answer" not in caplog.text


def test_a_fork_server_that_never_answers_is_an_error(monkeypatch):
    def start(process):
        raise EOFError

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", start)
    with pytest.raises(RuntimeError, match="dvla-env-0 must be started by a fork server, got none"):
        ManagedProcess(run_env_worker, (b"", "task", 1), name="dvla-env-0")


def test_a_message_that_stops_in_the_middle_is_an_error(monkeypatch):
    monkeypatch.setattr(managed_process, "_REST_S", 1.0)
    ours, theirs = multiprocessing.Pipe()
    managed_process._limit_messages(ours)
    os.write(theirs.fileno(), b"\0\0\0\7half")  # of seven bytes
    with pytest.raises(BlockingIOError):
        ours.recv()
    with pytest.raises(BlockingIOError):
        ours.send_bytes(bytes(1 << 24))
    theirs.send(1)


HUNG = """
import os, threading
from multiprocessing import forkserver
from torchrl_dvla.swimlane import ManagedProcess

def hang(connection):
    connection.send(1)
    threading.Event().wait()

if __name__ == "__main__":
    process = ManagedProcess(hang, (), name="dvla-env-0")
    process.connection.recv()
    print(process.pid, forkserver._forkserver._forkserver_pid, flush=True)
    process.connection.recv()
"""


def test_a_parent_that_is_killed_leaves_neither_hung_processes_nor_files(tmp_path, short_path):
    script, folder = tmp_path / "script.py", short_path
    script.write_text(HUNG)
    env = dict(os.environ, TMPDIR=str(folder))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=env) as parent:
        handles = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        assert list(folder.iterdir())
        parent.kill()
    assert all(multiprocessing.connection.wait([handle], 60.0) for handle in handles)
    assert list(folder.iterdir()) == []


def test_the_learner_may_be_process_1_as_in_a_container():
    container = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if subprocess.run(["sh", "-c", f"{' '.join(container)} true"]).returncode:
        pytest.skip("this machine allows no process namespaces")
    code = """from torchrl_dvla.swimlane import ManagedProcess, env_worker
args = env_worker.run_env_worker, (b"}.", "task", 1)
process = ManagedProcess(*args, name="p", start_method="spawn")
print(process.connection.recv().traceback)"""
    assert b"KeyError" in subprocess.check_output([*container, sys.executable, "-c", code])


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


def test_a_script_that_stops_nothing_ends_with_its_processes(tmp_path, run_python):
    script = tmp_path / "script.py"
    script.write_text(EXITING)
    done = run_python(script)
    assert done.returncode == 1 and "ValueError: a mistake in the script" in done.stderr
    pids = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert pids and all(has_ended(pid) for pid in pids), "one that was started during the exit too"
