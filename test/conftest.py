# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What every test runs under."""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported anywhere: the tests' own processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing may be fetched while testing.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torchrl.envs.utils import exploration_type, set_exploration_type

from torchrl_dvla.envs.maniskill_setup import find_vulkan_driver

from . import named_memory

ROOT = Path(__file__).resolve().parents[1]
HAS_LIBERO = importlib.util.find_spec("libero") is not None


def pytest_configure(config: pytest.Config) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_libero = pytest.mark.skip(reason="LIBERO is not installed: pip install torchrl-dvla[libero]")
    no_maniskill = pytest.mark.skip(reason=_why_not_maniskill())
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("libero") and not HAS_LIBERO:
            item.add_marker(no_libero)
        if item.get_closest_marker("maniskill") and _why_not_maniskill():
            item.add_marker(no_maniskill)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    if hasattr(config, "workerinput"):
        # One of several workers, which take whole files in this order: those that take long begin.
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@functools.cache
def _why_not_maniskill() -> str:
    if importlib.util.find_spec("mani_skill") is None:
        return "ManiSkill is not installed: pip install torchrl-dvla[maniskill]"
    try:
        find_vulkan_driver(os.environ)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a policy may be on."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[None]:
    """Hydra gives the root logger one that writes to the stream of the test, which is closed."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers[:] = before


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_exploration_type_left() -> Iterator[None]:
    """TorchRL keeps one for the whole process: a test that leaves it set fails, not a later one."""
    yield
    left = exploration_type()
    set_exploration_type(None).__enter__()  # for good
    assert left is None, f"the exploration type {left} was left set"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder in whose subfolders sockets can be: their paths have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="test-") as folder:
        yield Path(folder)


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., Any]:
    """Runs Python with arguments in a folder of its own, where it finds the package."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=600.0,  # a hang; seconds when the machine is idle
        )

    return run


@pytest.fixture(scope="session", autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    """The suite leaves /dev/shm as it found it (torch's own files go with their processes)."""
    before = named_memory.named()
    yield
    gc.collect()
    own = [name for name in named_memory.left_behind(before) if "dvla" in name]
    assert not own, f"left in /dev/shm: {own}"


@pytest.fixture(scope="session")
def foreign() -> Any:
    """The writer of tiny checkpoints in the formats of other projects."""
    path = ROOT / "test" / "modules" / "formats" / "foreign.py"
    spec = importlib.util.spec_from_file_location("foreign", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
