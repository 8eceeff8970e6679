# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from torchrl_dvla.weight_update import release as release_module
from torchrl_dvla.weight_update.release import Releaser


class Gated:
    """A release that waits for the test, and notes that it was run."""

    def __init__(self, version: int, ran: list[int], error: BaseException | None = None) -> None:
        self.version, self.ran, self.error = version, ran, error
        self.begun, self.may_end = threading.Event(), threading.Event()

    def run(self) -> None:
        self.begun.set()
        assert self.may_end.wait(30.0)
        self.ran.append(self.version)
        if self.error is not None:
            raise self.error


@pytest.fixture
def releaser() -> Iterator[Releaser]:
    releaser = Releaser()
    yield releaser
    releaser.close()
    assert releaser._thread is None


def test_one_runs_and_one_waits(releaser: Releaser) -> None:
    ran: list[int] = []
    first, second, third = (Gated(version, ran) for version in (1, 2, 3))
    releaser.submit(first)
    assert first.begun.wait(30.0)
    assert (releaser.newest, releaser.withdraw()) == (1, None)  # it has begun: too late
    releaser.submit(second)
    assert releaser.newest == 2
    assert releaser.withdraw() is second
    releaser.submit(third)
    for release in (first, third):
        release.may_end.set()
    releaser.finish()
    assert (ran, releaser.newest) == ([1, 3], -1)


def test_an_error_is_raised_once_and_ends_nothing(releaser: Releaser) -> None:
    ran: list[int] = []
    bad, good = Gated(1, ran, ValueError("1")), Gated(2, ran)
    bad.may_end.set(), good.may_end.set()
    releaser.submit(bad)
    with pytest.raises(ValueError, match="1"):
        releaser.finish()
    releaser.submit(good)
    releaser.finish()
    assert ran == [1, 2]


def test_an_error_that_nobody_saw_becomes_a_warning() -> None:
    releaser = Releaser()
    bad = Gated(1, [], ValueError("weights must be finite"))
    bad.may_end.set()
    releaser.submit(bad)
    with pytest.warns(RuntimeWarning, match="in vain: weights must be finite"):
        releaser.close()


def test_a_thread_with_nothing_to_do_ends_and_the_next_begins(
    releaser: Releaser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_module, "_LINGER_S", 0.0)
    ran: list[int] = []
    for version in (1, 2):
        release = Gated(version, ran)
        release.may_end.set()
        releaser.submit(release)
        thread = releaser._thread
        releaser.finish()
        if thread is not None:  # else it has ended already
            thread.join(30.0)
        assert releaser._thread is None
    assert ran == [1, 2]


def test_listeners_are_called_after_each_release(releaser: Releaser) -> None:
    seen: list[bool] = []
    called = threading.Semaphore(0)

    def listen() -> None:
        seen.append(releaser.is_idle)
        called.release()
        raise RuntimeError("listener")

    releaser.add_listener(listen)
    release = Gated(1, [])
    releaser.submit(release)
    assert not releaser.is_idle
    release.may_end.set()
    assert called.acquire(timeout=30.0)
    assert seen == [True]
    with releaser._changed:
        assert releaser._changed.wait_for(lambda: releaser._error is not None, timeout=30.0)
    with pytest.raises(RuntimeError, match="listener"):
        releaser.finish()
