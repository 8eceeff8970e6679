# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.

"""Weights that a thread looks at while they are copied, and after ``publish`` has returned."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchrl_dvla.weight_update import WeightReader, WeightStore, finite, writer
from torchrl_dvla.weight_update.copying import WeightCopier
from torchrl_dvla.weight_update.finite import CopyLook, Sight

NAN = float("nan")


class Parts(nn.Module):
    """Five weights that are copied in five pieces; the last one may differ from the others."""

    def __init__(self, value: float = 0.0, last: float | None = None) -> None:
        super().__init__()
        values = [value] * 4 + [value if last is None else last]
        self.parts = nn.ParameterList(nn.Parameter(torch.full((16,), v)) for v in values)


class Gate:
    """Stops the thread that has looked at a version, until the test lets it go on."""

    def __init__(self) -> None:
        self.looked, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self.is_open = True
        self.threads: list[str] = []

    def __call__(self, step: str) -> None:
        if step in ("looked", "offered"):
            self.threads.append(threading.current_thread().name)
        if step == "looked" and not self.is_open:
            self.looked.release()
            assert self._go.acquire(timeout=30.0)

    def await_look(self) -> None:
        assert self.looked.acquire(timeout=30.0)

    def release(self) -> None:
        self.is_open = True
        self._go.release()


@pytest.fixture(autouse=True)
def look_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_LOOK_AT_ONCE_BYTES", 0)


def make_store() -> WeightStore:
    store = WeightStore(Parts())
    store._writer._copier = WeightCopier(store.layout, piece_bytes=64)
    assert len(store._writer._copier._pieces) == 5
    return store


@pytest.fixture
def store() -> Iterator[WeightStore]:
    with make_store() as store:
        yield store


@pytest.fixture
def gate(store: WeightStore) -> Iterator[Gate]:
    gate = Gate()
    store.set_gate(gate)
    yield gate
    gate.release()


_NUMBERS = itertools.count()


def values_in(store: WeightStore) -> set[float]:
    """What a reader that comes now would act with."""
    reader = store.reader(f"look {next(_NUMBERS)}")
    values = values_of(reader)
    reader.close()
    return values


def values_of(reader: WeightReader) -> set[float]:
    _, weights = reader.pin()
    return {v for index in range(5) for v in weights["parts", str(index)].tolist()}


def await_refusal(store: WeightStore) -> None:
    releaser = store._writer.releaser
    with releaser._changed:
        assert releaser._changed.wait_for(lambda: releaser._error is not None, timeout=30.0)


def test_publish_returns_before_the_look_has_ended(store: WeightStore, gate: Gate) -> None:
    gate.is_open = False
    assert store.publish(Parts(1.0)) == 1
    gate.await_look()
    assert (store.version, store.offered_version, values_in(store)) == (1, 0, {0.0})
    assert store.stats().num_publishes == 1  # the one that the store was made with
    gate.release()
    store.finish()
    assert (store.version, store.offered_version, values_in(store)) == (1, 1, {1.0})
    assert gate.threads == ["dvla-weight-release"] * 2
    stats = store.stats()
    assert (stats.num_publishes, stats.bytes_total) == (2, 2 * 5 * 16 * 4)


def test_without_the_check_it_is_offered_at_once() -> None:
    gate = Gate()
    with WeightStore(Parts(), check_finite=False) as store:
        store.set_gate(gate)
        assert store.publish(Parts(NAN)) == 1
        assert store.offered_version == 1
    assert gate.threads == ["MainThread"]


@pytest.mark.parametrize("who", ["finish", "wait", "publish"])
def test_what_is_not_finite_is_refused_by_the_next_call(store: WeightStore, who: str) -> None:
    reader = store.reader("reader")
    store.publish(Parts(1.0)), store.finish()
    assert values_of(reader) == {1.0}
    assert store.publish(Parts(2.0, last=NAN)) == 2
    await_refusal(store)
    assert (store.version, store.offered_version, values_in(store)) == (1, 1, {1.0})
    with pytest.raises(ValueError, match=r"in parts.4 \(16 of 16 elements\) of version 2"):
        getattr(store, who)()
    assert store.stats().num_refused == 1
    assert store.publish(Parts(3.0)) == 2  # no reader ever saw the number
    store.finish()
    assert values_of(reader) == values_in(store) == {3.0}
    reader.close()


def test_a_version_is_taken_while_the_last_one_is_in_use_everywhere(
    store: WeightStore, gate: Gate
) -> None:
    """Version 2 is looked at, 1 is offered, and 0 is pinned: there is no fourth slot for 3."""
    old = store.reader("old")
    _, old_weights = old.pin()
    store.publish(Parts(1.0)), store.finish()
    gate.is_open = False
    store.publish(Parts(2.0))
    gate.await_look()
    publishing = threading.Thread(target=store.publish, args=(Parts(3.0),))
    publishing.start()  # waits for the store's own thread, though for no reader
    gate.release()
    publishing.join(timeout=30.0)
    assert not publishing.is_alive()
    store.finish()
    # Version 2 is offered, 0 is pinned still, and 1 was free again.
    assert (store.offered_version, values_in(store)) == (3, {3.0})
    assert old_weights["parts", "0"].eq(0.0).all()
    stats = store.stats()
    assert (stats.num_coalesced, stats.num_deferred) == (0, 0)
    assert stats.num_publishes == 4
    old.close()


def test_a_refused_version_does_not_hurt_a_deferred_one(store: WeightStore) -> None:
    p, q = store.reader("p"), store.reader("q")
    values_of(p)
    store.publish(Parts(1.0)), store.finish()
    values_of(q)
    store.publish(Parts(2.0)), store.finish()
    store.publish(Parts(3.0)), store.finish()  # p and q keep the other slots: put aside
    assert (store.version, store.offered_version, store.stats().num_deferred) == (3, 2, 1)
    # What would be written over version 3 is looked at before, by the learner.
    with pytest.raises(ValueError, match="of version 4"):
        store.publish(Parts(NAN))
    assert store.version == 3
    p.unpin()
    assert q.wait(3, timeout_s=30.0) == 3
    assert values_in(store) == {3.0}
    # With slots free again, what is refused in one of them leaves version 3 in its own.
    store.publish(Parts(NAN))
    with pytest.raises(ValueError, match="of version 4"):
        store.finish()
    assert (store.version, values_in(store)) == (3, {3.0})
    p.close(), q.close()


def test_a_version_put_aside_is_looked_at_there(store: WeightStore) -> None:
    p, q = store.reader("p"), store.reader("q")
    values_of(p)
    store.publish(Parts(1.0)), store.finish()
    values_of(q)
    store.publish(Parts(2.0)), store.finish()
    store.publish(Parts(3.0, last=NAN))
    with pytest.raises(ValueError, match="parts.4 .* of version 3"):
        store.finish()
    p.unpin()
    assert (store.version, store.offered_version, store.stats().num_deferred) == (2, 2, 0)
    assert store.publish(Parts(4.0)) == 3
    store.finish()
    assert values_in(store) == {4.0}
    p.close(), q.close()


def test_the_older_version_that_is_moved_meanwhile_does_not_come_back(
    store: WeightStore, gate: Gate
) -> None:
    p, q = store.reader("p"), store.reader("q")
    values_of(p)
    store.publish(Parts(1.0)), store.finish()
    values_of(q)
    store.publish(Parts(2.0)), store.finish()
    store._writer._start_flusher = lambda: None  # type: ignore[method-assign]
    store.publish(Parts(3.0)), store.finish()  # aside
    store.pause()
    p.unpin()
    gate.is_open = False
    store.publish(Parts(4.0))
    gate.await_look()  # version 4 is in slot 0, locked and not offered
    q.unpin()
    with store._writer._mutex:  # the flusher moves version 3 to slot 1, and is paused
        slot = store._writer._claim()
        assert slot == 1  # not the one that is being looked at, which is locked by the same holder
        store._writer._claimed = slot
        assert store._writer._flush_into(slot)
    gate.release()
    store.finish()
    store.resume()
    assert (store.offered_version, values_in(store)) == (4, {4.0})
    locks = store._segment.locks.open()
    assert [locks.is_held_by_others(1 + slot) for slot in range(3)] == [False] * 3
    locks.close(), p.close(), q.close()


def test_a_paused_store_shows_it_later(store: WeightStore) -> None:
    store.pause()
    store.publish(Parts(1.0)), store.finish()
    assert (store.version, store.offered_version) == (1, 0)
    with pytest.raises(ValueError, match="of version 2"):
        store.publish(Parts(NAN))  # would be written over version 1
    store.resume()
    assert (store.offered_version, values_in(store)) == (1, {1.0})


def test_closing_offers_what_was_published(store: WeightStore, gate: Gate) -> None:
    reader = store.reader("reader")
    assert values_of(reader) == {0.0}
    gate.is_open = False
    store.publish(Parts(1.0))
    gate.await_look()
    closing = threading.Thread(target=store.close)
    closing.start()
    gate.release()
    closing.join(timeout=30.0)
    assert not closing.is_alive()
    assert values_of(reader) == {1.0}
    assert store._writer.releaser._thread is None
    reader.close()


def test_closing_warns_of_what_was_refused(store: WeightStore) -> None:
    store.publish(Parts(NAN))
    with pytest.warns(RuntimeWarning, match="in vain: weights must be finite"):
        store.close()


def test_a_process_that_publishes_and_ends_has_published() -> None:
    context = multiprocessing.get_context("fork")
    store = make_store()
    reader = store.reader("reader")
    words = torch.zeros(1).share_memory_()

    def read() -> None:
        assert reader.wait(1, timeout_s=30.0) == 1
        words[0] = values_of(reader).pop()

    process = context.Process(target=read)
    process.start()
    store.publish(Parts(7.0))
    store.close()
    process.join(30.0)
    assert (process.exitcode, words.item()) == (0, 7.0)


class Killed(BaseException):
    """Stands for SIGKILL: no clean-up of the writer runs after it."""


def test_a_writer_that_dies_between_copy_and_offer_leaves_the_last_whole_version() -> None:
    store = make_store()
    early = store.reader("early")
    assert values_of(early) == {0.0}
    store.publish(Parts(1.0)), store.finish()

    def die(step: str) -> None:
        if step == "looked":
            store._writer.locks.close()  # what the kernel does
            raise Killed

    store.set_gate(die)
    store.publish(Parts(2.0))
    with pytest.raises(Killed):
        store.finish()
    late = store.reader("late")
    assert values_of(early) == values_of(late) == {1.0}
    assert not late.is_writer_alive()


def test_a_copy_that_fails_is_given_up(store: WeightStore) -> None:
    class Broken(RuntimeError):
        pass

    def fail(step: str) -> None:
        if step == "copying":
            raise Broken

    store.set_gate(fail)
    with pytest.raises(Broken):
        store.publish(Parts(1.0))
    store.set_gate(lambda step: None)
    store.finish()  # nothing to say: publish has raised it
    assert (store.version, store.offered_version, values_in(store)) == (0, 0, {0.0})
    assert store.publish(Parts(2.0)) == 1
    store.finish()
    assert values_in(store) == {2.0}


@pytest.mark.parametrize("bad", [None, 0, 3, 4])
@pytest.mark.parametrize("num_pieces", [1, 4, 5])
def test_the_look_follows_the_copy(num_pieces: int, bad: int | None) -> None:
    pieces = [torch.zeros(3) for _ in range(num_pieces)]
    look, verdict = CopyLook([Sight([piece]) for piece in pieces]), []
    following = threading.Thread(target=lambda: verdict.append(look.run()))
    following.start()
    for index, piece in enumerate(pieces):
        piece[1] = NAN if index == bad else 1.0
        assert not look.note_piece()
    assert following.is_alive() or verdict == []  # not before it was told that the copy has ended
    look.end()
    following.join(timeout=30.0)
    assert verdict == [bad is None or bad >= num_pieces]


class Seen(list[int]):
    """Which pieces were looked at, in a stand-in for ``is_finite`` that stops at one of them."""

    def __init__(self, last: int) -> None:
        self._last, self.has_come = last, threading.Event()

    def __call__(self, memory: torch.Tensor) -> bool:
        self.append(int(memory[0]))
        if self[-1] == self._last:
            self.has_come.set()
        return True


def test_the_look_at_a_source_goes_ahead_of_the_copy_but_not_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_pieces = 12
    monkeypatch.setattr(finite, "_AHEAD_PIECES", 4)
    monkeypatch.setattr(finite, "_REPORT_PIECES", 2)
    seen = Seen(last=3)
    monkeypatch.setattr(finite, "is_finite", seen)
    look = CopyLook([Sight([torch.tensor([-k])], [torch.tensor([k])]) for k in range(num_pieces)])
    running = threading.Thread(target=look.run)
    running.start()
    assert seen.has_come.wait(30.0)  # four pieces, and nothing was copied yet
    assert seen == [0, 1, 2, 3]
    seen._last = 5
    seen.has_come.clear()
    look.note_piece()
    look.note_piece()
    assert seen.has_come.wait(30.0)
    assert seen == [0, 1, 2, 3, 4, 5]
    look.end()
    running.join(30.0)
    # The learner may write into its weights again: the rest is looked at where it was written.
    assert seen == [0, 1, 2, 3, 4, 5, -6, -7, -8, -9, -10, -11]


def test_a_source_that_may_have_changed_under_the_look_is_not_believed() -> None:
    written, source = torch.tensor([NAN]), torch.tensor([NAN])
    look = CopyLook([Sight([written], [source])])
    real, seen = finite.is_finite, []

    def overtaken(memory: torch.Tensor) -> bool:
        if memory is source:  # publish returns while the thread is here, and the learner goes on
            look.end()
            source.zero_()
        seen.append(memory)
        return real(memory)

    with mock.patch.object(finite, "is_finite", overtaken):
        assert not look.run()
    assert [memory is source for memory in seen] == [True, False]


def test_a_learner_that_goes_on_at_once_does_not_hide_what_it_published() -> None:
    writer._LOOK_AT_ONCE_BYTES = 0
    real, looking, may_look = finite.is_finite, threading.Event(), threading.Event()

    def late(memory: torch.Tensor) -> bool:
        looking.set()
        assert may_look.wait(30.0)
        return real(memory)

    def await_look(step: str) -> None:
        assert step != "copying" or looking.wait(30.0)

    policy = nn.Linear(4, 4)
    with WeightStore(policy) as store, mock.patch.object(finite, "is_finite", late):
        store.set_gate(await_look)
        with torch.no_grad():
            policy.weight[0, 0] = NAN
        version = store.publish(policy)
        with torch.no_grad():
            policy.weight[0, 0] = 0.0
        policy(torch.ones(4)).sum().backward()
        may_look.set()
        with pytest.raises(ValueError, match=f"weight .1 of 16 elements. of version {version}"):
            store.finish()


def test_the_look_ahead_ends_with_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    look = CopyLook([Sight([torch.tensor([-k])], [torch.tensor([k])]) for k in range(2)])
    seen, asked = Seen(last=1), []
    monkeypatch.setattr(finite, "is_finite", seen)

    class Reports:
        def get(self) -> int:
            asked.append(list(seen))
            return 2

    monkeypatch.setattr(look, "_reports", Reports())
    assert look.run()
    assert asked == [[0, 1]]  # all was looked at, and the version was not whole yet


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["good", "bad", "good"]).map(lambda kind: ("publish", kind)),
            st.tuples(st.just("adopt"), st.integers(0, 1)),
            st.tuples(st.just("unpin"), st.integers(0, 1)),
            st.sampled_from([("finish", ""), ("pause", ""), ("resume", "")]),
        ),
        max_size=24,
    )
)
def test_no_order_of_calls_shows_what_is_not_finite(calls: list[tuple[str, object]]) -> None:
    writer._LOOK_AT_ONCE_BYTES = 0
    value = 0.0
    accepted = [0.0]  # in the order of publishing
    pending: float | None = None
    with make_store() as store:
        readers = [store.reader(index) for index in range(2)]

        def call(action: Callable[[], object], published: float | None) -> None:
            """``action`` settles what was published before, and takes ``published``."""
            nonlocal pending
            was, pending = pending, None
            try:
                action()
            except ValueError:
                # Its own weights were looked at at once, if those before were not to blame.
                assert was != was or published != published
            else:
                assert was is None or was == was
                pending = published
            if was is not None and was == was:
                accepted.append(was)

        for kind, argument in calls:
            if kind == "publish":
                value += 1.0
                weights = Parts(value) if argument == "good" else Parts(value, last=NAN)
                call(
                    lambda weights=weights: store.publish(weights),  # type: ignore[misc]
                    value if argument == "good" else NAN,
                )
            elif kind == "adopt":
                (seen,) = values_of(readers[argument])  # type: ignore[call-overload]
                assert seen == seen
            elif kind == "unpin":
                readers[argument].unpin()  # type: ignore[call-overload]
            elif kind == "finish":
                call(store.finish, None)
            else:
                getattr(store, kind)()
        call(store.finish, None)
        store.resume()
        for reader in readers:
            reader.unpin()
        reader = store.reader("last")
        assert reader.wait(store.version, timeout_s=30.0) == store.version
        assert values_of(reader) == {accepted[-1]}
        reader.close()
        for reader in readers:
            reader.close()
