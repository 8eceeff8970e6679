# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checks of what is installed, and of the machine: cores, memory, open files, folders."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

from torchrl_dvla.findings import Finding, Status

#: Ranges of pyproject.toml (a test compares them). That of transformers is the minor release that
#: the shipped checkpoint was trained and scored with: another may run without an error and succeed
#: less. openvla-oft's issue 135 tells of 38 points lost that way.
REQUIRED: dict[str, str] = {
    "torch": ">=2.13",
    "torchrl": ">=0.14.1,<0.15",
    "tensordict": ">=0.14.3,<0.15",
    "transformers": ">=5.23,<5.24",
}
#: Only needed for the simulator.
REQUIRED_FOR_LIBERO: dict[str, str] = {
    "mujoco": ">=3.8,<4",
    "robosuite": "==1.4.0",
}
#: The same for ManiSkill, whose observation modes are switched inside a chunk.
REQUIRED_FOR_MANISKILL: dict[str, str] = {
    "mani_skill": ">=3.0.1,<3.1",
}
MINIMUM_PYTHON = (3, 11)

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


# -- what is installed -----------------------------------------------------------------------------
def installed_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Versions of distributions; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Finding]:
    """Check that the interpreter is recent enough."""
    is_recent = version[:2] >= MINIMUM_PYTHON
    text, need = (".".join(map(str, numbers)) for numbers in (version, MINIMUM_PYTHON))
    remedy = "" if is_recent else f"Install Python {need} or newer and `make setup`."
    yield Finding("python", Status.OK if is_recent else Status.FAIL, text, remedy)


def check_versions(
    installed: Mapping[str, str | None],
    required: Mapping[str, str] = REQUIRED,
) -> Iterator[Finding]:
    """Check that each distribution is there, and in its range.

    Args:
        installed (mapping of str to str or None): versions found; ``None`` where absent.
        required (mapping of str to str): a version specifier per distribution.

    Yields:
        One finding per distribution.

    Examples:
        >>> for finding in check_versions({"torch": "2.9.0"}, {"torch": ">=2.13"}):
        ...     print(finding.format())
        fail  torch               2.9.0, must be >=2.13
              -> pip install 'torch>=2.13' (or `make setup` for all pins)
    """
    for name, specifier in required.items():
        version = installed.get(name)
        remedy = f"pip install '{name}{specifier}' (or `make setup` for all pins)"
        if version is None:
            yield Finding(name, Status.FAIL, f"not installed, must be {specifier}", remedy)
        elif not SpecifierSet(specifier).contains(version, prereleases=True):
            yield Finding(name, Status.FAIL, f"{version}, must be {specifier}", remedy)
        else:
            yield Finding(name, Status.OK, version)


def check_cuda_build(cuda_version: str | None, has_nvidia_device: bool) -> Iterator[Finding]:
    """Check that a machine with an NVIDIA GPU has a torch that can use it.

    Args:
        cuda_version (str or None): ``torch.version.cuda``.
        has_nvidia_device (bool): whether the machine shows such a device.
    """
    status, remedy = Status.OK, ""
    if cuda_version is not None:
        detail = f"CUDA {cuda_version}"
    elif not has_nvidia_device:
        detail = "CPU (no NVIDIA device found)"
    else:
        status, detail = Status.WARN, "CPU build on a machine with an NVIDIA device"
        remedy = "pip install --force-reinstall torch, from the index that fits your CUDA driver."
    yield Finding("torch build", status, detail, remedy)


def check_libero_distributions(owners: Iterable[str]) -> Iterator[Finding]:
    """Check that no two distributions share the ``libero`` namespace.

    Args:
        owners (iterable of str): distributions that install a top-level package ``libero``.
    """
    owners = sorted(set(owners))
    if not owners:
        detail = "not installed: only environments without it, such as ToyVLAEnv, will run"
        remedy = "pip install 'torchrl-dvla[libero]', or `make setup`."
        yield Finding("libero", Status.WARN, detail, remedy)
    elif len(owners) == 1:
        version = installed_versions(owners)[owners[0]]
        yield Finding("libero", Status.OK, f"{owners[0]} {version or ''}".rstrip())
    else:
        detail = f"{', '.join(owners)} overwrite each other's files"
        remedy = f"pip uninstall {' '.join(owners)}, then `make setup` for the one that is pinned."
        yield Finding("libero", Status.FAIL, detail, remedy)


# -- the machine -----------------------------------------------------------------------------------
def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GB:.1f} GB" if num_bytes >= _GB else f"{num_bytes / _MB:.0f} MB"


def usable_cores(root: Path = Path("/")) -> float:
    """Cores this process may use: its affinity, or less where a control group grants less."""
    # imports torch, whose absence is to be reported instead of died of
    from torchrl_dvla.memory.available_memory import cgroup_folders

    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # not on Linux
        cores = float(os.cpu_count() or 1)
    for folder in cgroup_folders("cpu", root):
        try:
            quota = (folder / "cpu.max").read_text().split()
        except OSError:
            continue
        if quota[0] != "max":
            cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


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


def check_cores(num_cores: float) -> Iterator[Finding]:
    """Check that simulation and learning can overlap."""
    detail = f"{num_cores:g} usable"
    if num_cores >= 2:
        yield Finding("cores", Status.OK, detail)
    else:
        detail += ": the lanes take turns instead of overlapping"
        remedy = "Give the machine or container 2 cores or more (docker run --cpus=2)."
        yield Finding("cores", Status.WARN, detail, remedy)


def check_memory(available_bytes: int | None) -> Iterator[Finding]:
    """Check that there is room for two LIBERO workers beside the learner."""
    status, remedy, each = Status.OK, "", _size(LIBERO_WORKER_BYTES)
    if available_bytes is None:
        status, detail, remedy = Status.WARN, "cannot be read here", "Keep 8 GB free for LIBERO."
    else:
        detail = f"{_size(available_bytes)} available"
        if available_bytes < 2 * LIBERO_WORKER_BYTES:
            status = Status.FAIL
            detail += f", too little for one LIBERO worker ({each}) and the learner"
            remedy = (
                "Free memory, raise the container's limit (docker run --memory=8g), or use `make "
                "quick`."
            )
        elif available_bytes < COMFORTABLE_BYTES:
            status, detail = Status.WARN, f"{detail}; a LIBERO worker takes up to {each}"
            remedy = "Run fewer workers (workers.num_workers=1), or free some memory."
    yield Finding("memory", status, detail, remedy)


def check_shared_memory(dev_shm_bytes: int | None, memfd_error: str | None) -> Iterator[Finding]:
    """Check both kinds of shared memory: anonymous (the pools) and /dev/shm (PyTorch's own).

    Args:
        dev_shm_bytes (int or None): free bytes under /dev/shm.
        memfd_error (str or None): why anonymous shared memory could not be allocated.
    """
    if memfd_error is None:
        yield Finding("anonymous memory", Status.OK, "memfd works")
    else:
        detail = f"memfd_create failed ({memfd_error}): the pools fall back to an unlinked file"
        remedy = "Allow the memfd_create system call, and lift the memory limit if it is reached."
        yield Finding("anonymous memory", Status.WARN, detail, remedy)
    if dev_shm_bytes is None:
        status = Status.FAIL if memfd_error is not None else Status.WARN
        detail, remedy = "not there", "Mount a tmpfs on /dev/shm (docker run --shm-size=1g)."
    elif dev_shm_bytes < COMFORTABLE_DEV_SHM_BYTES:
        status, detail = Status.WARN, f"{_size(dev_shm_bytes)} free"
        remedy = "Enlarge it: docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm."
    else:
        status, detail, remedy = Status.OK, f"{_size(dev_shm_bytes)} free", ""
    yield Finding("/dev/shm", status, detail, remedy)


def check_open_files(soft: int, hard: int) -> Iterator[Finding]:
    """Check that the limit on open files leaves room for a dozen workers."""
    unlimited = resource.RLIM_INFINITY
    detail = "unlimited" if soft == unlimited else f"{soft} (hard limit {hard})"
    if soft == unlimited or soft >= COMFORTABLE_OPEN_FILES:
        yield Finding("open files", Status.OK, detail)
    else:
        remedy = "ulimit -n 4096 before the run"
        if hard != unlimited and hard < COMFORTABLE_OPEN_FILES:
            remedy += ", after an administrator has raised the hard limit"
        yield Finding("open files", Status.WARN, detail, remedy)


def check_folder(path: str | Path, need_bytes: int = _GB) -> Iterator[Finding]:
    """Check that a run can write its event files and checkpoints.

    Args:
        path (str or Path): the log folder; it need not exist yet.
        need_bytes (int): how much a run may write.
    """
    path = Path(path)
    # What does not exist yet is made by the run, so the nearest folder that exists decides.
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    problem = None if nearest.is_dir() else f"{nearest} is not a folder"
    if problem is None:
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            problem = f"{nearest}: {error.strerror or error}"
    remedy = "Choose another one: --log-dir here, log.dir=... for a run."
    if problem is not None:
        yield Finding("log folder", Status.FAIL, problem, remedy)
        return
    stats = os.statvfs(nearest)
    free = stats.f_bavail * stats.f_frsize
    if free < need_bytes:
        yield Finding("log folder", Status.WARN, f"{path}: {_size(free)} free on its disk", remedy)
    else:
        yield Finding("log folder", Status.OK, f"{path} is writable, {_size(free)} free")


def check_machine(log_dir: str | Path) -> Iterator[Finding]:
    """Check all of the above on this machine."""
    from torchrl_dvla.memory import available_bytes

    yield from check_cores(usable_cores())
    yield from check_memory(available_bytes())
    yield from check_shared_memory(dev_shm_free(), try_memfd())
    yield from check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield from check_folder(log_dir)
