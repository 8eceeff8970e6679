# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Readers and writers in processes of their own, some of which are killed."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_dvla.weight_update import WeightReader, WeightStore

# Forked children start in milliseconds. Spawned ones are tested with TorchRL's collectors.
_FORK = multiprocessing.get_context("fork")


class Constant(nn.Module):
    """Weights that all have one value; ``num_kib`` of them, in five tensors."""

    def __init__(self, value: float, num_kib: int = 80) -> None:
        super().__init__()
        shape = (num_kib * 256 // 5,)
        self.parts = nn.ParameterList(torch.full(shape, value) for _ in range(5))

    @torch.no_grad()
    def count(self) -> None:
        torch._foreach_add_(list(self.parts), 1.0)

    def is_whole(self, value: float) -> bool:
        """Whether every element is ``value``, read twice with other work between."""
        return all(bool((part == value).all()) for _ in range(2) for part in self.parts)


@contextlib.contextmanager
def running(target: Callable[..., None], *args: Any) -> Iterator[tuple[ForkProcess, Connection]]:
    ours, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_guarded, args=(target, theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _guarded(target: Callable[..., None], connection: Connection, *args: Any) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        target(connection, *args)


def receive(connection: Connection) -> Any:
    assert connection.poll(60.0), "the child did not answer within 60 s"
    return connection.recv()


def read_all_the_time(connection: Connection, reader: WeightReader) -> None:
    module = Constant(-1.0)
    num_adoptions = num_torn = num_backwards = 0
    previous = -1
    connection.send("ready")
    while not connection.poll():
        version = reader.adopt_into(module)
        num_adoptions += version != previous
        num_backwards += version < previous
        num_torn += not module.is_whole(float(version))
        previous = version
    connection.send((num_adoptions, num_torn, num_backwards))


def test_no_torn_reads_under_a_writer_that_never_pauses():
    learner = Constant(0.0)
    with WeightStore(learner) as store, contextlib.ExitStack() as stack:
        readers = [store.reader(index) for index in range(2)]
        children = [stack.enter_context(running(read_all_the_time, one)) for one in readers]
        for _, connection in children:
            assert receive(connection) == "ready"
        deadline = time.monotonic() + 60.0
        while any(stats.num_adoptions < 150 for stats in store.adoption_stats().values()):
            assert time.monotonic() < deadline, store.adoption_stats()
            learner.count()
            assert store.publish() == learner.parts[0][0].item()
        for _, connection in children:
            connection.send("stop")
            num_adoptions, num_torn, num_backwards = receive(connection)
            assert num_adoptions >= 150
            assert (num_torn, num_backwards) == (0, 0)


def pin_and_idle(connection: Connection, reader: WeightReader) -> None:
    connection.send(reader.pin()[0])
    signal.pause()


def test_a_killed_reader_frees_its_pin():
    with WeightStore(Constant(0.0, num_kib=1)) as store:
        with running(pin_and_idle, store.reader("a")) as (first, first_connection):
            assert receive(first_connection) == 0
            store.publish()
            with running(pin_and_idle, store.reader("b")) as (_, second_connection):
                assert receive(second_connection) == 1
                store.publish(), store.publish()
                assert (store.version, store.visible_version) == (3, 2)  # both pins are in the way
                assert store._registry.dead() == []
                first.kill()
                first.join()
                late = store.reader("late")
                assert late.wait(3, timeout_s=30.0) == 3
                with pytest.raises(RuntimeError, match=r"\['a'\] died"):
                    store.wait(timeout_s=0.0)
                store.release("a")
                assert store.reader("a").reader_slot == 0  # it and its name are free again


def test_readers_killed_anywhere_leave_nothing_behind():
    generator = random.Random(0)
    learner = Constant(0.0, num_kib=20)
    with WeightStore(learner) as store:
        for index in range(12):
            with running(read_all_the_time, store.reader(index)) as (process, connection):
                assert receive(connection) == "ready"
                for _ in range(generator.randrange(1, 200)):
                    learner.count()
                    store.publish()
                process.kill()
                process.join()
            store.release(index)
        num_deferred = store.stats().num_deferred
        for _ in range(4):  # every slot is free: one reader at a time never deferred anything
            store.publish()
        assert store.stats().num_deferred == num_deferred == 0
        assert store.adopted_versions() == {}


def write_all_the_time(connection: Connection, reports: Connection) -> None:
    learner = Constant(0.0)
    store = WeightStore(learner)
    reader = store.reader("orphan")
    late = store.reader("late")
    if os.fork() == 0:  # a reader that outlives this writer
        connection.close()
        with contextlib.suppress(EOFError, BrokenPipeError):
            report_versions(reports, reader, late)
        os._exit(0)
    reports.close()
    connection.send("ready")
    while True:
        learner.count()
        store.publish()


def report_versions(reports: Connection, reader: WeightReader, late: WeightReader) -> None:
    module, late_module = Constant(-1.0), Constant(-1.0)
    reader.adopt_into(module)
    reports.send(os.getpid())
    while not reports.poll():
        version = reader.adopt_into(module)
        if not module.is_whole(float(version)):
            reports.send(f"torn version {version}")
    version = reader.adopt_into(module)
    late_version = late.adopt_into(late_module)
    reports.send(
        (
            version == late_version,
            module.is_whole(float(version)) and late_module.is_whole(float(late_version)),
            reader._is_writer_alive(),
        )
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_writer_leaves_the_last_whole_version(seed):
    ours, theirs = _FORK.Pipe()
    try:
        with running(write_all_the_time, theirs) as (writer, connection):
            theirs.close()
            assert receive(connection) == "ready"
            orphan_pid = receive(ours)
            # No event says where in a publish the writer is: any moment is as good a time to die.
            writer.join(timeout=random.Random(seed).uniform(0.05, 0.2))
            writer.kill()
            writer.join()
            ours.send("the writer is dead")
            assert receive(ours) == (True, True, False)
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan_pid, signal.SIGKILL)
    finally:
        ours.close()


def use_the_parents(connection: Connection, store: WeightStore, reader: WeightReader) -> None:
    errors = []
    adopt = functools.partial(reader.adopt_into, Constant(0.0))
    for call in (store.publish, lambda: store.reader("b"), adopt):
        try:
            call()
        except RuntimeError as error:
            errors.append(str(error))
    store.close()
    connection.send(errors)


def test_a_forked_child_is_neither_the_writer_nor_the_reader():
    with WeightStore(Constant(0.0)) as store:
        reader, module = store.reader("a"), Constant(-1.0)
        reader.adopt_into(module)
        with running(use_the_parents, store, reader) as (process, connection):
            publish, new_reader, adopt = receive(connection)
            process.join()
        assert "forked child" in publish
        assert "forked child" in new_reader
        assert "in use by another process" in adopt
        for value in range(1, 6):  # nothing was lost here
            store.publish(Constant(float(value)))
        assert module.is_whole(0.0)
        assert reader.adopt_into(module) == 5
