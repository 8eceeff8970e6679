# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import os
import pickle
import signal

import pytest

from torchrl_dvla.weight_update.segment import LockFile


def test_readers_share_and_a_writer_excludes():
    file = LockFile()
    first, second, writer = file.open(), file.open(), file.open()
    assert first.try_shared(3)
    assert second.try_shared(3)
    assert not writer.try_exclusive(3)
    assert writer.try_exclusive(4)  # each byte is its own lock
    first.unlock(3)
    assert not writer.try_exclusive(3)
    second.close()  # closing releases
    assert writer.try_exclusive(3)
    assert not first.try_shared(3)
    assert first.is_held_by_others(3)
    assert not writer.is_held_by_others(3)  # its own locks are not "others"


def test_a_forked_child_does_not_keep_the_parents_locks():
    file = LockFile()
    holder, other = file.open(), file.open()
    assert holder.try_exclusive(0)
    ready, wait = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b"f" if holder.is_open else b"c")
        os.read(wait[0], 1)
        os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"c"  # the child's copy of the descriptor is closed
        assert not other.try_exclusive(0)  # which took nothing from the parent
        holder.close()
        assert other.try_exclusive(0)  # though the child still lives
    finally:
        os.write(wait[1], b"x")
        os.waitpid(pid, 0)
        for fd in (*ready, *wait):
            os.close(fd)


def test_the_kernel_frees_the_locks_of_a_killed_process():
    file = LockFile()
    ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        handle = file.open()
        os.write(ready[1], b"y" if handle.try_exclusive(7) else b"n")
        signal.pause()
    assert os.read(ready[0], 1) == b"y"
    handle = file.open()
    assert not handle.try_shared(7)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert handle.try_exclusive(7)
    for fd in ready:
        os.close(fd)


def test_it_travels_to_a_running_process_of_the_same_user():
    file = LockFile()
    twin = pickle.loads(pickle.dumps(file))
    assert file.open().try_exclusive(1)
    holder, seeker = file.open(), twin.open()
    assert holder.try_exclusive(1)
    assert not seeker.try_exclusive(1)


def test_a_closed_file_says_so():
    file = LockFile()
    file.close()
    with pytest.raises(RuntimeError, match="closed"):
        file.open()
