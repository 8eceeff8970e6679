# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The machine: cores, memory, shared memory, open files, folders."""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

from torchrl_dvla.doctor.findings import Finding, Status

_MB = 1 << 20
_GB = 1 << 30

#: A LIBERO worker process holds 1.6 to 2.4 GB: meshes, textures and the renderer's buffers.
LIBERO_WORKER_BYTES = 2 * _GB + _GB // 2
#: Two workers, and as much again for the learner, the inference lane and the page cache.
COMFORTABLE_BYTES = 3 * LIBERO_WORKER_BYTES
#: torch.multiprocessing keeps what it shares under /dev/shm; containers get 64 MB of it by default.
COMFORTABLE_DEV_SHM_BYTES = 256 * _MB
#: Pipes, semaphores, arenas and event files of a dozen workers.
COMFORTABLE_OPEN_FILES = 1024


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GB:.1f} GB" if num_bytes >= _GB else f"{num_bytes / _MB:.0f} MB"


# -- readings -----------------------------------------------------------------------------------
def usable_cores(root: Path = Path("/")) -> float:
    """Cores this process may use: its affinity, or less where a control group grants less."""
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # not on Linux
        cores = float(os.cpu_count() or 1)
    for folder in _cgroup_folders(root):
        quota = _read(folder / "cpu.max").split()
        if len(quota) == 2 and quota[0] != "max":
            cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def _cgroup_folders(root: Path) -> list[Path]:
    base = root / "sys/fs/cgroup"
    folders = [base]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own = base / controllers / path.lstrip("/")
        # A limit set on any folder above binds too.
        folders += [own, *(p for p in own.parents if base in p.parents)]
    return list(dict.fromkeys(folders))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def dev_shm_free(path: str = "/dev/shm") -> int | None:
    """Free bytes under /dev/shm; ``None`` where there is none."""
    try:
        stats = os.statvfs(path)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize


def try_memfd(num_bytes: int = 16 * _MB) -> str | None:
    """Allocates anonymous shared memory for a moment; returns what went wrong, if anything did."""
    try:
        fd = os.memfd_create("doctor")
    except (AttributeError, OSError) as error:
        return str(error)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(fd)
    return None


# -- judgements ---------------------------------------------------------------------------------
def check_cores(num_cores: float) -> list[Finding]:
    """Simulation and learning can overlap."""
    detail = f"{num_cores:g} usable"
    if num_cores >= 2:
        return [Finding("cores", Status.OK, detail)]
    return [
        Finding(
            "cores",
            Status.WARN,
            detail + ": the lanes take turns instead of overlapping",
            "Give the machine or container 2 cores or more (docker run --cpus=2).",
        )
    ]


def check_memory(available_bytes: int | None) -> list[Finding]:
    """There is room for two LIBERO workers beside the learner."""
    name = "memory"
    if available_bytes is None:
        return [Finding(name, Status.WARN, "cannot be read here", "Keep 8 GB free for LIBERO.")]
    detail = f"{_size(available_bytes)} available"
    if available_bytes >= COMFORTABLE_BYTES:
        return [Finding(name, Status.OK, detail)]
    each = _size(LIBERO_WORKER_BYTES)
    if available_bytes >= 2 * LIBERO_WORKER_BYTES:
        return [
            Finding(
                name,
                Status.WARN,
                f"{detail}; a LIBERO worker takes up to {each}",
                "Run fewer workers (collector.num_workers=1), or free some memory.",
            )
        ]
    return [
        Finding(
            name,
            Status.FAIL,
            f"{detail}, too little for one LIBERO worker ({each}) and the learner",
            "Free memory, raise the container's limit (docker run --memory=8g), or use --quick.",
        )
    ]


def check_shared_memory(dev_shm_bytes: int | None, memfd_error: str | None) -> list[Finding]:
    """Both kinds of shared memory work: anonymous (the pools) and /dev/shm (PyTorch's own).

    Args:
        dev_shm_bytes (int or None): free bytes under /dev/shm.
        memfd_error (str or None): why anonymous shared memory could not be allocated.
    """
    findings = []
    if memfd_error is None:
        findings.append(Finding("anonymous memory", Status.OK, "memfd works"))
    else:
        findings.append(
            Finding(
                "anonymous memory",
                Status.WARN,
                f"memfd_create failed ({memfd_error}): the pools fall back to an unlinked file",
                "Allow the memfd_create system call, and lift the memory limit if it is reached.",
            )
        )
    if dev_shm_bytes is None:
        status = Status.FAIL if memfd_error is not None else Status.WARN
        detail, remedy = "not there", "Mount a tmpfs on /dev/shm (docker run --shm-size=1g)."
    elif dev_shm_bytes < COMFORTABLE_DEV_SHM_BYTES:
        status, detail = Status.WARN, f"{_size(dev_shm_bytes)} free"
        remedy = "Enlarge it: docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm."
    else:
        status, detail, remedy = Status.OK, f"{_size(dev_shm_bytes)} free", ""
    findings.append(Finding("/dev/shm", status, detail, remedy))
    return findings


def check_open_files(soft: int, hard: int) -> list[Finding]:
    """The limit on open files leaves room for a dozen workers."""
    unlimited = resource.RLIM_INFINITY
    detail = "unlimited" if soft == unlimited else f"{soft} (hard limit {hard})"
    if soft == unlimited or soft >= COMFORTABLE_OPEN_FILES:
        return [Finding("open files", Status.OK, detail)]
    room = hard == unlimited or hard >= COMFORTABLE_OPEN_FILES
    remedy = "ulimit -n 4096 before the run"
    return [
        Finding(
            "open files",
            Status.WARN,
            detail,
            remedy if room else f"{remedy}, after an administrator has raised the hard limit",
        )
    ]


def check_folder(path: str | Path, need_bytes: int = _GB) -> list[Finding]:
    """A run can write its event files and checkpoints.

    Args:
        path (str or Path): the log folder; it need not exist yet.
        need_bytes (int): how much a run may write.
    """
    path = Path(path)
    name = "log folder"
    # What does not exist yet is made by the run, so the nearest folder that exists decides.
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    remedy = "Choose another one: --log-dir here, log.dir=... for a run."
    if not nearest.is_dir():
        return [Finding(name, Status.FAIL, f"{nearest} is not a folder", remedy)]
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return [Finding(name, Status.FAIL, f"{nearest}: {error.strerror or error}", remedy)]
    stats = os.statvfs(nearest)
    free = stats.f_bavail * stats.f_frsize
    if free < need_bytes:
        return [Finding(name, Status.WARN, f"{path}: {_size(free)} free on its disk", remedy)]
    return [Finding(name, Status.OK, f"{path} is writable, {_size(free)} free")]


def check_machine(log_dir: str | Path) -> list[Finding]:
    """All of the above, on this machine."""
    # Imports torch, whose absence this package is meant to report instead of dying of it.
    from torchrl_dvla.memory import available_bytes

    return [
        *check_cores(usable_cores()),
        *check_memory(available_bytes()),
        *check_shared_memory(dev_shm_free(), try_memfd()),
        *check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        *check_folder(log_dir),
    ]
