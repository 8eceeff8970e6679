# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import multiprocessing
import pickle
import signal
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torchrl.envs import TransformedEnv

from torchrl_dvla.testing import CountingChunkEnv, Fault, FaultInjector, FaultyEnvFactory
from torchrl_dvla.testing.faults import InjectedFault

TIMEOUT_S = 120


def faulty(*faults: Fault) -> TransformedEnv:
    return TransformedEnv(CountingChunkEnv(), FaultInjector(faults))


def test_raises_at_the_stated_decision():
    env = faulty(Fault("raise", "step", at=2))
    reset = env.reset()
    action = env.full_action_spec.zero()
    for _ in range(2):
        env.step(reset.clone().update(action))
    with pytest.raises(InjectedFault, match="injected at step 2"):
        env.step(reset.clone().update(action))
    env.step(reset.clone().update(action))  # once only


def test_raises_at_every_reset_from_the_stated_one_and_in_the_constructor():
    env = faulty(Fault("raise", "reset", at=1, repeat=True))
    env.reset()
    for count in (1, 2):
        with pytest.raises(InjectedFault, match=f"injected at reset {count}"):
            env.reset()
    with pytest.raises(InjectedFault, match="constructor"):
        FaultyEnvFactory(CountingChunkEnv, [Fault("raise", "constructor")])()


def test_once_path_spares_the_replacement(tmp_path: Path):
    mark = tmp_path / "spent"
    fault = Fault("raise", "reset", once_path=str(mark))
    factory = FaultyEnvFactory(partial(CountingChunkEnv, chunk_size=2), [fault])
    with pytest.raises(InjectedFault):
        factory().reset()
    assert mark.exists()
    assert factory().reset()["action_is_pad"].shape == (2,)


def test_no_fault_no_change():
    env, reference = faulty(), CountingChunkEnv()
    for one in (env, reference):
        one.set_seed(3)
    assert (env.reset() == reference.reset()).all()


def test_leak_stays_resident():
    env = faulty(Fault("leak", "reset", repeat=True, leak_bytes=1 << 23))
    pages = []
    for _ in range(5):
        env.reset()
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert (pages[-1] - pages[0]) * 4096 > 3 << 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "melt", "place": "step"}, "kind must be one of"),
        ({"kind": "kill", "place": "close"}, "place must be one of"),
        ({"kind": "kill", "place": "step", "at": -1}, "must not be negative"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Fault(**options)


# -- faults that need a process of their own -------------------------------------------------------
def work(factory: FaultyEnvFactory, connection: Connection) -> None:
    """Report each stage; on SIGTERM report that Python still runs."""
    signal.signal(signal.SIGTERM, lambda *_: connection.send("handled"))
    env = factory()
    connection.send("built")
    tensordict = env.reset()
    connection.send("reset")
    env.step(tensordict.update(env.full_action_spec.zero()))
    connection.send("stepped")


@pytest.fixture
def start():
    processes = []

    def started(fault: Fault):
        context = multiprocessing.get_context("fork")
        parent, child = context.Pipe(duplex=False)
        factory = FaultyEnvFactory(CountingChunkEnv, [fault])
        processes.append(context.Process(target=work, args=(factory, child), daemon=True))
        processes[-1].start()
        child.close()
        return processes[-1], parent

    yield started
    for process in processes:
        process.kill()
        process.join(TIMEOUT_S)
        assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("place", "reached"), [("constructor", []), ("reset", ["built"]), ("step", ["built", "reset"])]
)
def test_kill(start, place, reached):
    process, connection = start(Fault("kill", place))
    for stage in reached:
        assert connection.recv() == stage
    with pytest.raises(EOFError):
        connection.recv()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL


def test_configuration_survives_pickling_into_a_spawned_process():
    factory = FaultyEnvFactory(CountingChunkEnv, [Fault("raise", "step", at=1)])
    copy = pickle.loads(pickle.dumps(factory))
    assert copy.faults == factory.faults
    with pytest.raises(InjectedFault, match="step 1"):
        copy().rollout(2, break_when_any_done=False)
    # A spawned process cannot import this file: the factory itself is what runs there.
    factory = FaultyEnvFactory(CountingChunkEnv, [Fault("kill", "constructor")])
    process = multiprocessing.get_context("spawn").Process(target=factory)
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL


def test_hang_lets_signal_handlers_run(start):
    process, connection = start(Fault("hang", "step"))
    assert [connection.recv() for _ in range(2)] == ["built", "reset"]
    process.terminate()
    assert connection.poll(TIMEOUT_S)
    assert connection.recv() == "handled"
    assert process.is_alive()


def test_stall_lets_nothing_run(start):
    process, connection = start(Fault("stall", "step"))
    assert [connection.recv() for _ in range(2)] == ["built", "reset"]
    status = Path(f"/proc/{process.pid}/status")
    # In C for good once signals are blocked and the process sleeps; nothing tells us but /proc.
    while True:
        text = status.read_text()
        blocked = int(text.split("SigBlk:")[1].split()[0], 16)
        if blocked & (1 << (signal.SIGTERM - 1)) and "State:\tS" in text:
            break
        assert not connection.poll(0.01)
    process.terminate()
    assert not connection.poll(0.3)
    assert process.is_alive()
