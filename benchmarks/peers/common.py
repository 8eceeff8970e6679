# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the scripts of all libraries have in common: settings in, one JSON line out, the clock."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from environment import STEP_S

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Clock:
    """Decisions learned from in a stretch of time, from the end of an update to that of another.

    It starts with the first update that ends after the warm-up, so the start of processes does not
    count, and whole cycles of sampling and learning lie in the stretch.

    Args:
        warm_up_s (float): seconds after the first update that do not count.
        seconds (float): least length of the stretch.
    """

    def __init__(self, warm_up_s: float, seconds: float) -> None:
        self._warm_up_s, self._seconds = warm_up_s, seconds
        self._first_s: float | None = None
        self._start: tuple[float, dict[int, float], float] | None = None
        self._decisions = self._updates = 0
        self.result: dict[str, Any] | None = None

    @property
    def has_started(self) -> bool:
        """Whether the warm-up is over."""
        return self._start is not None

    def learned(self, decisions: int) -> bool:
        """Count the decisions of an update that is over; true once the stretch is."""
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
        if self._start is None:
            if now_s >= self._first_s + self._warm_up_s:
                self._start = now_s, _cpu_s(), _busy_s()
            return False
        self._decisions += decisions
        self._updates += 1
        duration_s = now_s - self._start[0]
        if duration_s < self._seconds:
            return False
        if self.result is None:
            _, before, busy_s = self._start
            after, busy_s = _cpu_s(), _busy_s() - busy_s
            cpu_s = {pid: spent - before.get(pid, 0.0) for pid, spent in after.items()}
            self.result = {
                "decisions_per_s": self._decisions / duration_s,
                "share_of_env_limit": self._decisions / duration_s * STEP_S / (os.cpu_count() or 1),
                "decisions": self._decisions,
                "updates": self._updates,
                "seconds": duration_s,
                "cpu_s": sum(cpu_s.values()),
                "cpu_s_of_others": max(0.0, busy_s - sum(cpu_s.values())),
                "cpu_s_of_processes": sorted(round(s, 2) for s in cpu_s.values())[-5:],
            }
        return True


def settings() -> dict[str, Any]:
    """What ``peers.py`` asks for, from the command line."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def report(clock: Clock, *packages: str, **more: Any) -> None:
    """Print the result as one JSON line on the stdout that the script was started with.

    Args:
        clock (Clock): it has run down.
        *packages: whose versions are told.
        **more: told beside it.
    """
    if clock.result is None:
        raise RuntimeError("The library ended before the clock did.")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    print(json.dumps({**clock.result, **more, "versions": versions}), flush=True)


def _busy_s() -> float:
    """CPU seconds so far of all that runs on this machine."""
    user, nice, system = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / _TICKS_PER_S


def _cpu_s() -> dict[int, float]:
    """CPU seconds so far of this process and of all those below it, by number."""
    parents, spent = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        spent[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    found: set[int] = set()
    new = {os.getpid()}
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in found} - found
    return {pid: spent[pid] for pid in found if pid in spent}
