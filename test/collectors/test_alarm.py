# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import os
import selectors
import threading

from torchrl_dvla.collectors.alarm import Alarm


def test_another_thread_ends_the_sleep():
    alarm = Alarm()
    with selectors.DefaultSelector() as selector:
        selector.register(alarm, selectors.EVENT_READ)
        thread = threading.Thread(target=alarm.ring)
        thread.start()
        assert selector.select(30.0)
        thread.join()
    alarm.close()


def test_ringing_never_waits_and_one_look_is_enough():
    alarm = Alarm()
    for _ in range(100_000):  # more than a pipe holds
        alarm.ring()
    with selectors.DefaultSelector() as selector:
        selector.register(alarm, selectors.EVENT_READ)
        num_looks = 0
        while selector.select(0.0):
            alarm.silence()
            num_looks += 1
    assert 1 <= num_looks <= 32
    alarm.silence()  # nothing rings: it does not wait
    alarm.close()


def test_after_its_end_it_touches_no_descriptor_of_others():
    alarm = Alarm()
    alarm.close()
    read, write = os.pipe()  # gets the numbers that the alarm had
    alarm.ring(), alarm.close()
    os.write(write, b"y")
    assert os.read(read, 2) == b"y"
    os.close(read), os.close(write)


def test_a_collector_gives_it_back(make_collector):
    collector = make_collector()
    alarm = collector._coordinator._alarm
    collector.shutdown()
    assert alarm.is_closed
    collector.pause().__enter__()  # rings; nobody sleeps any more
