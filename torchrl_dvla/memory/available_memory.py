# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Memory that is left on the machine, and sizes in bytes as text."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torchrl_dvla.validation import Range, check

__all__ = [
    "available_bytes",
    "cgroup_folders",
    "format_bytes",
    "parse_bytes",
    "shareable_bytes",
    "shared_folder",
]

_UNITS = {"b": 0, "kb": 1, "mb": 2, "gb": 3, "tb": 4, "kib": 1, "mib": 2, "gib": 3, "tib": 4}
_UNITS |= {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def available_bytes() -> int | None:
    """Memory that this process can still take without swapping, in bytes.

    The least of what the kernel calls available and what the control groups of this process (the
    limit of a container) leave. Anonymous shared memory counts against both; asking the kernel for
    more than this is answered by the out-of-memory killer, not by an error, so pools ask here
    first.

    Returns:
        int or None: bytes, or ``None`` where the kernel does not say.
    """
    found = [size for size in (_meminfo_available(), *_cgroup_available()) if size is not None]
    return min(found) if found else None


def shared_folder() -> str | None:
    """Where shared memory needs a file system: ``None`` where the kernel gives it without one.

    Memory from ``memfd_create`` is not limited by the size of ``/dev/shm``, which containers set to
    64 MB. Only where the kernel has no such call is shared memory an unlinked file there.
    """
    if hasattr(os, "memfd_create"):
        return None
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def shareable_bytes() -> tuple[int | None, str]:
    """Memory that one more pool can take, and, if it is a file system that limits it, which.

    Returns:
        tuple: bytes, or ``None`` where it is not known, and ``""`` or ``" in /dev/shm"``.
    """
    available, folder = available_bytes(), shared_folder()
    if folder is not None:
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize
        if available is None or free < available:
            return free, f" in {folder}"
    return available, ""


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> list[int]:
    found = []
    for folder in cgroup_folders("memory"):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            free = _read_int(folder / limit), _read_int(folder / usage)
            if free[0] is not None and free[1] is not None:
                found.append(max(0, free[0] - free[1] + _reclaimable(folder)))
    return found


def cgroup_folders(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of the control groups that bind this process, its own first, up to the topmost.

    Args:
        controller (str): ``"memory"`` or ``"cpu"``: version 1 has a hierarchy for each.
        root (Path): where ``proc`` and ``sys`` are.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = top / path.lstrip("/")
        # Inside a container the path in /proc may name a folder of the host: take the root then.
        # A limit may be set on any ancestor, so walk up.
        if not folder.is_dir():
            folder = top
        for level in (folder, *folder.parents):
            yield level
            if level == top:
                break


def _reclaimable(folder: Path) -> int:
    """Page cache that the kernel drops before it calls the group full."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stats = dict(line.split()[:2] for line in lines if line.strip())
    return int(stats.get("inactive_file", stats.get("total_inactive_file", 0)))


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def format_bytes(size: float) -> str:
    """``size`` in the largest binary unit that keeps it at least 1.

    Examples:
        >>> format_bytes(0), format_bytes(1536), format_bytes(3 * 2**30)
        ('0 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_bytes(size: int | str, name: str = "size") -> int:
    """Bytes from a number or a string such as ``"512MB"`` or ``"1.5 GiB"`` (binary units).

    Args:
        size (int or str): the size.
        name (str): what it is called in the error.

    Raises:
        ValueError: if *size* is negative or not a size.

    Examples:
        >>> parse_bytes("1.5 KiB"), parse_bytes(7)
        (1536, 7)
    """
    parsed = check(name, size, int | str)
    if isinstance(parsed, str):
        text = parsed.strip().lower().replace("_", "")
        number = text.rstrip("bikmgt ")
        unit = text[len(number) :].strip()
        try:
            parsed = int(float(number) * 1024 ** _UNITS[unit])
        except (KeyError, ValueError, OverflowError):
            raise ValueError(
                f"{name} must be a number of bytes or a string like '512MB', got {size!r}. "
                "Units are B, KB, MB, GB, TB."
            ) from None
    return check(name, parsed, int, Range(0, remedy="Give the bytes to reserve."))
