# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchrl_dvla.memory import PageLedger, PageState


def test_states_of_a_page():
    ledger = PageLedger(3, rows_per_page=4, row_bytes=10)
    a, b = ledger.lease("worker 0", 7), ledger.lease("worker 0", 7)
    assert (a, b) == (0, 1)
    assert ledger.seal([a, b], num_rows=5) == [0, 1]
    assert ledger.stats()["internal_waste"] == 1 - 5 / 8
    ledger.store([a, b])
    assert ledger.stats()["pages_stored"] == 2
    ledger.free([a, b])
    stats = ledger.stats()
    assert stats["pages_free"] == 3
    assert stats["internal_waste"] == 0.0
    assert stats["internal_waste_total"] == 1 - 5 / 8
    assert (stats["used_bytes"], stats["peak_bytes"], stats["reserved_bytes"]) == (0, 80, 120)
    ledger.check()


def test_pages_leased_ahead_come_back_when_the_rollout_is_sealed():
    ledger = PageLedger(3, rows_per_page=2)
    pages = [ledger.lease("worker", 0) for _ in range(3)]
    assert ledger.seal(pages, num_rows=2) == [0]
    assert ledger.num_free_pages == 2
    with pytest.raises(RuntimeError, match=r"Page 1 was freed since its lease"):
        ledger.free(pages)
    assert ledger.state(0) is PageState.SEALED  # an error changes nothing
    ledger.check()


def test_errors_name_the_page_and_its_state():
    ledger = PageLedger(4, rows_per_page=2)
    page = ledger.lease("worker")
    with pytest.raises(RuntimeError, match="Page 0 is leased and cannot be stored"):
        ledger.store([page])
    ledger.free([page])
    with pytest.raises(RuntimeError, match="Page 0 was freed since its lease"):
        ledger.free([page])
    with pytest.raises(RuntimeError, match="Page 0 is free and cannot be freed"):
        ledger.free([0])
    with pytest.raises(RuntimeError, match="belongs to another pool"):
        PageLedger(4, 2).free([page])
    with pytest.raises(ValueError, match="between 0 and 3, got 4"):
        ledger.free([4])
    a, b = ledger.lease("worker 0", 0), ledger.lease("worker 1", 1)
    with pytest.raises(RuntimeError, match="several rollouts"):
        ledger.seal([a, b], 3)
    with pytest.raises(RuntimeError, match="pages must differ"):
        ledger.seal([a, a], 3)
    for num_rows in (0, 3):
        with pytest.raises(ValueError, match="num_rows must be between 1 and the 2"):
            ledger.seal([a], num_rows)
    states = [PageState.LEASED, PageState.LEASED, PageState.FREE, PageState.FREE]
    assert [ledger.state(number) for number in range(4)] == states
    ledger.check()  # nothing is lost


def test_an_old_lease_cannot_touch_its_page_once_that_is_leased_anew():
    ledger = PageLedger(1, rows_per_page=2)
    old = ledger.lease("first")
    ledger.reclaim("first")
    new = ledger.lease("second")
    assert int(old) == int(new)
    for move in (lambda: ledger.seal([old], 1), lambda: ledger.free([old])):
        with pytest.raises(RuntimeError, match="freed since its lease"):
            move()
    assert ledger.seal([pickle.loads(pickle.dumps(new))], 1) == [new]


def test_reserved_pages_are_kept_for_their_leases():
    ledger = PageLedger(3, rows_per_page=2)
    assert ledger.reserve(2)
    assert ledger.num_free_pages == 1
    assert not ledger.reserve(2)
    ledger.lease("outsider", reserved=False)
    with pytest.raises(RuntimeError, match=r"No free page is left: 2 free \(2 reserved\)"):
        ledger.lease("outsider", reserved=False)
    ledger.lease("insider")
    ledger.lease("insider")
    with pytest.raises(RuntimeError, match="No free page"):
        ledger.lease("insider")
    ledger.check()
    with pytest.raises(ValueError, match="between 0 and the 0 reserved"):
        ledger.unreserve(1)
    with pytest.raises(ValueError, match="between 0 and the pool's 3, got 4"):
        ledger.reserve(4)


def test_reclaim_takes_only_what_was_being_written_and_can_reserve_it_again():
    ledger = PageLedger(4, rows_per_page=2)
    done = ledger.lease("worker", 0)
    ledger.seal([done], 2)
    ledger.reserve(2)
    ledger.lease("worker", 1)
    assert ledger.reclaim("worker", keep_reserved=True) == [1]
    assert ledger.state(done) is PageState.SEALED
    assert ledger.stats()["pages_reserved"] == 2
    assert ledger.reclaim("worker") == []
    assert ledger.reclaim("nobody") == []
    assert ledger.stats()["pages_reclaimed"] == 1
    ledger.check()


def test_a_waiting_reserve_is_woken_by_free_and_its_wait_is_counted():
    ledger = PageLedger(1, rows_per_page=1)
    page = ledger.lease("worker")
    waiter = ThreadPoolExecutor(1).submit(ledger.reserve, 1, timeout_s=30)
    ledger.free([page])
    assert waiter.result(30) is True
    ledger.unreserve(1)
    ledger.lease("worker")
    assert not ledger.reserve(1)
    assert ledger.stats()["page_wait_s"] > 0
