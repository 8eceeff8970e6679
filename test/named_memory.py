# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Shared memory that has a name, and so outlives whoever forgets it.

Other programs, other tests among them, make and remove names at the same time: only what
nobody else holds can be a test's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path("/dev/shm")
#: What multiprocessing, torch and this package name; semaphores ("sem.") are mapped under another.
PATTERN = re.compile(r"mp-|psm_|torch_|torchrl_dvla-")


def named() -> set[str]:
    """Names of this user's shared memory that may be a test's."""
    found = set()
    for entry in os.scandir(FOLDER) if FOLDER.is_dir() else ():
        try:
            if PATTERN.match(entry.name) and entry.stat().st_uid == os.getuid():
                found.add(entry.name)
        except OSError:
            continue  # removed meanwhile
    return found


def left_behind(before: Iterable[str]) -> set[str]:
    """Names beside those ``before`` that no other process holds: nobody else will remove them."""
    left = named() - set(before)
    for process in Path("/proc").glob("[0-9]*") if left else ():
        if process.name != str(os.getpid()):
            left -= _held_by(process)
    return left & named()  # whoever made one for a moment has removed it by now


def _held_by(process: Path) -> set[str]:
    """Names that a process has open or mapped: first those open, for they are mapped next."""
    paths = []
    try:
        for descriptor in os.listdir(process / "fd"):
            try:
                paths.append(os.readlink(process / "fd" / descriptor))
            except OSError:
                continue  # closed meanwhile
        maps = (process / "maps").read_text().splitlines()
        paths += [line.split(None, 5)[-1] for line in maps]
    except OSError:
        pass  # gone, or another user's
    start = f"{FOLDER}/"
    return {path.strip().removeprefix(start) for path in paths if path.startswith(start)}
