# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import faulthandler
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from torchrl_dvla.recording import GracefulStop, StopRequested, signals
from torchrl_dvla.swimlane.managed_process import STOP_SIGNALS

TIMEOUT_S = 20


@pytest.fixture
def unhandled():
    """Signals as a program finds them, whoever started the tests."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize("number", [signal.SIGINT, *STOP_SIGNALS])
def test_a_signal_sets_a_flag_and_calls_back_from_another_thread(number):
    with GracefulStop() as stop:
        early, late, threads = threading.Event(), threading.Event(), []
        stop.on_request(lambda: (threads.append(threading.current_thread()), early.set()))
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == number.name
        assert early.wait(TIMEOUT_S)
        # Never the interrupted thread: it may hold the lock that the callback wants.
        assert threads[0] is not threading.main_thread()
        stop.on_request(late.set)
        assert late.is_set()


@pytest.mark.usefixtures("unhandled")
def test_who_handles_a_signal_already_keeps_it(tmp_path):
    heard = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    with (tmp_path / "stacks").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        try:
            with GracefulStop() as stop:
                for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                    os.kill(os.getpid(), number)
                assert not stop.requested
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    assert heard == [signal.SIGUSR2] and "test_who" in (tmp_path / "stacks").read_text()


def test_an_interruptible_region_is_left_and_not_entered_again():
    with GracefulStop() as stop:
        with pytest.raises(StopRequested, match="SIGINT"):
            with stop.interruptible():
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(TIMEOUT_S)
        with pytest.raises(StopRequested, match="SIGINT"):
            with stop.interruptible():
                raise AssertionError("entered")
    assert not issubclass(StopRequested, Exception), "no except clause takes it for a failure"


def test_a_second_signal_interrupts(monkeypatch):
    now_s = [10.0]
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    with GracefulStop(patience_s=2.0) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        now_s[0] = 11.9
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher forwarded the same request
        assert stop.requested
        now_s[0] = 12.0
        with pytest.raises(KeyboardInterrupt, match="second request"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_previous_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStop():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert not [t for t in threading.enumerate() if t.name == "graceful-stop"]


def test_it_belongs_to_the_main_thread():
    entered = ThreadPoolExecutor(1).submit(lambda: GracefulStop().__enter__())
    message = "^GracefulStop must be entered in the main thread, got 'T"
    with pytest.raises(ValueError, match=message):
        entered.result(TIMEOUT_S)
