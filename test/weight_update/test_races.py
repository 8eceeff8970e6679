# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every order of the protocol's steps, walked one by one.

Writer and reader run in two threads of which one moves at a time, from one gate to the next. The
locks, the shared words and the copies are the real ones, wrapped in gates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from torchrl_dvla.weight_update import WeightStore

from .stepping import step_reader, step_writer, stop_deferred_writer


class TwoParts(nn.Module):
    """Two weights that are copied in two pieces."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.full((16,), value))
        self.second = nn.Parameter(torch.full((16,), value))

    def values(self) -> set[float]:
        return {v for p in self.parameters() for v in p.tolist()}


class Stepper:
    """Runs ``body`` in a thread that stops at each gate until it is told to go on."""

    def __init__(self, body: Callable[[Callable[[str], None]], None]) -> None:
        self.steps: list[str] = []
        self.is_done = False
        self._is_abandoned = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(body,), daemon=True)
        self._thread.start()

    def _gate(self, step: str) -> None:
        self.steps.append(step)
        self._stopped.release()
        assert self._go.acquire(timeout=30.0)
        if self._is_abandoned:
            raise Abandoned

    def _run(self, body: Callable[[Callable[[str], None]], None]) -> None:
        assert self._go.acquire(timeout=30.0)
        try:
            body(self._gate)
        except BaseException as error:
            self._error = error
        self.is_done = True
        self._stopped.release()

    def step(self) -> None:
        self._go.release()
        assert self._stopped.acquire(timeout=30.0)
        if self.is_done:
            self._thread.join()
            if self._error is not None and not self._is_abandoned:
                raise self._error

    def abandon(self) -> None:
        """Let the body end where it is."""
        self._is_abandoned = True
        self.finish()

    def finish(self) -> None:
        while not self.is_done:
            self.step()


class Abandoned(BaseException):
    """Unwinds a body that is not walked to its end."""


class Race:
    """Two publishes against one adoption, with slot 0 held so that the latest slot is reused.

    Slot 0 holds version 0 (pinned by somebody else), slot 1 version 1 (latest), slot 2 is free:
    version 2 goes to slot 2 and version 3 back to slot 1, unless the reader is there.
    """

    def __init__(self) -> None:
        self.store = WeightStore(TwoParts())
        stop_deferred_writer(self.store)
        self.other = self.store.reader("other")
        self.other.pin()
        self.store.publish(TwoParts(1.0))
        self.reader = self.store.reader("reader")
        self.reader.has_update()  # attaches
        self.served = TwoParts(-1.0)
        self.adopted = -1
        self.writer_side = Stepper(self._write)
        self.reader_side = Stepper(self._read)

    def _write(self, gate: Callable[[str], None]) -> None:
        step_writer(self.store, gate)
        for value in (2.0, 3.0):
            self.store.publish(TwoParts(value))

    def _read(self, gate: Callable[[str], None]) -> None:
        step_reader(self.reader, gate)
        self.adopted = self.reader.adopt_into(self.served)

    def check(self) -> None:
        if self.adopted >= 0:
            assert self.served.values() == {float(self.adopted)}, (
                f"version {self.adopted} reads {self.served.values()} after "
                f"{self.writer_side.steps} | {self.reader_side.steps}"
            )

    def close(self) -> None:
        self.writer_side.abandon(), self.reader_side.abandon()
        self.reader.close(), self.other.close(), self.store.close()


def run_schedule(writer_steps_before_each: list[int], prepare: Callable[[Race], None]) -> None:
    """The reader's step k comes after ``writer_steps_before_each[k]`` steps of the writer."""
    race = Race()
    prepare(race)
    try:
        for count in writer_steps_before_each:
            for _ in range(count):
                if not race.writer_side.is_done:
                    race.writer_side.step()
                race.check()
            if not race.reader_side.is_done:
                race.reader_side.step()
            race.check()
        while not (race.writer_side.is_done and race.reader_side.is_done):
            for side in (race.writer_side, race.reader_side):
                if not side.is_done:
                    side.step()
                race.check()
        assert race.adopted >= 1
    finally:
        race.close()


def spread(num_reader_steps: int, num_writer_steps: int) -> Iterator[list[int]]:
    """All ways to put at most ``num_writer_steps`` before each of the reader's steps."""
    if num_reader_steps == 0:
        yield []
        return
    for count in range(num_writer_steps + 1):
        for rest in spread(num_reader_steps - 1, num_writer_steps - count):
            yield [count, *rest]


def schedules() -> Iterator[list[int]]:
    """Every order of the adoption's four steps and two publishes of 7 gates and an end.

    What comes before the reader's first step only decides which version is the latest then.
    """
    for before in (0, 7):
        for rest in spread(3, 15 - before):
            yield [before, *rest]


def test_the_writer_takes_the_documented_steps():
    race = Race()
    race.writer_side.finish()
    publish = ["claimed", "marked", "copying", "copying", "written", "unlocked", "visible"]
    assert race.writer_side.steps == publish * 2
    race.reader_side.finish()
    assert race.reader_side.steps == ["latest read", "slot locked", "pinned"]
    assert race.adopted == 3
    race.close()


def test_no_order_of_steps_reads_a_mix():
    count = 0
    for schedule in schedules():
        run_schedule(schedule, lambda race: None)
        count += 1
    assert count == 816 + 165  # C(15 + 3, 3) + C(8 + 3, 3)


def test_the_same_search_finds_the_mix_when_the_reader_does_not_lock():
    def break_the_reader(race: Race) -> None:
        race.reader._locks.try_shared = lambda byte: True  # type: ignore[union-attr]

    with pytest.raises(AssertionError, match="reads"):
        for schedule in schedules():
            run_schedule(schedule, break_the_reader)


def test_what_was_latest_is_only_a_hint():
    race = Race()
    race.reader_side.step()  # has read that slot 1 is the latest, and waits
    race.writer_side.finish()  # slot 1 now holds version 3
    race.reader_side.finish()
    assert race.reader_side.steps == ["latest read", "slot locked", "pinned"]
    assert race.adopted == 3
    race.check()
    race.close()


def test_a_reader_that_is_refused_finds_a_newer_latest_at_once():
    race = Race()
    race.reader_side.step()
    while race.writer_side.steps[-2:] != ["marked", "copying"] or len(race.writer_side.steps) < 9:
        race.writer_side.step()  # into the middle of writing version 3 to slot 1
    race.reader_side.finish()
    assert race.reader_side.steps == ["latest read", "latest read", "slot locked", "pinned"]
    assert race.adopted == 2
    race.check()
    race.close()


class Killed(BaseException):
    """Stands for SIGKILL: no clean-up of the writer runs after it."""


@pytest.mark.parametrize("step", ["claimed", "marked", "copying", "written", "unlocked", "visible"])
def test_a_writer_that_dies_leaves_the_last_whole_version(step):
    store = WeightStore(TwoParts())
    early, late = store.reader("early"), store.reader("late")
    early_module, late_module = TwoParts(-1.0), TwoParts(-1.0)
    early.adopt_into(early_module)
    store.publish(TwoParts(1.0))

    def die(name: str) -> None:
        if name == step:
            store._writer.locks.close()  # what the kernel does
            store._writer.locks.unlock = lambda byte: None  # type: ignore[method-assign]
            raise Killed

    step_writer(store, die)
    with pytest.raises(Killed):
        store.publish(TwoParts(2.0))
    assert early_module.values() == {0.0}
    visible = 2 if step == "visible" else 1
    for reader, module in ((early, early_module), (late, late_module)):
        assert reader.adopt_into(module) == visible
        assert module.values() == {float(visible)}
        assert not reader._is_writer_alive()


def test_the_deferred_writer_gives_way_to_the_next_publish():
    store = WeightStore(TwoParts())
    stop_deferred_writer(store)
    readers = [store.reader(index) for index in range(2)]
    modules = [TwoParts(), TwoParts()]
    readers[0].adopt_into(modules[0])
    store.publish(TwoParts(1.0))
    readers[1].adopt_into(modules[1])
    store.publish(TwoParts(2.0))
    store.publish(TwoParts(3.0))
    assert (store.version, store.visible_version) == (3, 2)
    writer, steps = store._writer, list[str]()
    assert not writer._move_deferred()  # no slot is free
    readers[0].unpin()
    step_writer(store, steps.append)
    writer._preempt.set()  # as a publish does before it asks for the mutex
    assert not writer._move_deferred()
    assert steps == ["claimed", "marked", "copying", "unlocked"]  # half a version
    assert (store.version, store.visible_version) == (3, 2)
    assert store.publish(TwoParts(4.0)) == 4
    assert store.visible_version == 4
    assert store.stats().num_coalesced == 1
    assert readers[0].adopt_into(modules[0]) == 4
    assert modules[0].values() == {4.0}
    store.close()
