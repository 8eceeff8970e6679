# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A run is ended by kill -9, and resumed: nothing is left, and nothing is learned from twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from multiprocessing import connection
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("resumable_run.py")
ROOT = SCRIPT.parents[2]


class Run:
    """The script in a process of its own; its children can be told by a mark."""

    def __init__(self, folder, num_updates):
        self.mark = f"DVLA_TEST_RUN={uuid.uuid4().hex}"
        key, value = self.mark.split("=")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(num_updates)],
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path, **{key: value}),
            stdout=subprocess.PIPE,
            text=True,
        )
        self.told = []

    def read(self, until=lambda message: False):
        for line in self.process.stdout:
            self.told.append(json.loads(line))
            if until(self.told[-1]):
                break

    def kill(self):
        self.process.kill()
        self.process.wait()

    def children(self):
        """Open descriptors on the processes of the run that are alive, by process id."""
        found = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environ.read_bytes().split(b"\0"):
                    pid = int(environ.parent.name)
                    found[pid] = os.pidfd_open(pid)
            except OSError:
                continue  # gone, or another user's
        found.pop(self.process.pid, None)
        return found

    def all(self, key):
        return [message for message in self.told if key in message]


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """A run that is killed in the middle of update 8, and the one that goes on from update 6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    first, second = Run(folder, 1000), None
    try:
        first.read(until=lambda message: message.get("update") == 7)
        children = first.children()
        first.kill()
        first.num_children = len(children)
        first.survivors = [pid for pid, fd in children.items() if not connection.wait([fd], 10.0)]
        first.read()  # what it had still said
        second = Run(folder, 10)
        second.read()
        second.code = second.process.wait()
    finally:
        for run in (first, second):
            if run is not None:
                run.kill()
                run.process.stdout.close()
    return first, second


@pytest.mark.slow
class TestKilledAndResumed:
    def test_no_process_outlives_the_learner(self, killed_and_resumed):
        first, _ = killed_and_resumed
        assert first.num_children >= 4, "a fork server, two workers, an inference process"
        assert first.survivors == []

    def test_it_goes_on_from_the_last_checkpoint(self, killed_and_resumed):
        first, second = killed_and_resumed
        assert second.code == 0 and second.told[-1] == {"ended": 10}
        (resumed,) = second.all("resumed")
        saved = first.all("saved")[-1]
        assert resumed["resumed"] == saved["saved"]
        assert [m["update"] for m in second.all("update")] == list(range(saved["saved"] + 1, 11))

    def test_cursor_partial_groups_and_random_states_come_back(self, killed_and_resumed):
        first, second = killed_and_resumed
        (resumed,) = second.all("resumed")
        saved = first.all("saved")[-1]
        assert resumed["random"] == saved["random"]
        resumed["queue"].pop("groups")
        assert resumed["queue"] == saved["queue"]
        assert resumed["version"] == resumed["resumed"]
        assert resumed["queue"]["reopened"], "groups were under way"

    def test_nothing_is_learned_from_twice(self, killed_and_resumed):
        first, second = killed_and_resumed
        saved = first.all("saved")[-1]["saved"]
        kept = [m for m in first.all("update") if m["update"] <= saved] + second.all("update")
        ids = [rollout_id for message in kept for rollout_id in message["ids"]]
        assert len(ids) == len(set(ids)) == 2 * 3 * 10
        scenes = [tuple(scene) for message in kept for scene in message["scenes"]]
        assert len(scenes) == len(set(scenes)), "a scene was begun twice"

    def test_the_lag_stays_within_its_bound(self, killed_and_resumed):
        for run in killed_and_resumed:
            assert all(0 <= message["lag"] <= 2 for message in run.all("update"))

    def test_stored_groups_are_learned_after_the_resume(self, killed_and_resumed):
        first, second = killed_and_resumed
        stored = {tuple(scene) for scene in first.all("saved")[-1]["stored"]}
        learned = {tuple(scene) for m in second.all("update") for scene in m["scenes"]}
        assert stored <= learned
