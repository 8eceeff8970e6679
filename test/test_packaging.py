# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What an installation brings, and whose environment set-up touches; without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that setuptools makes of a copy of the sources."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "torchrl_dvla", folder / "torchrl_dvla", ignore=ignored)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    run = subprocess.run(
        [sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return zipfile.ZipFile(folder / run.stdout.splitlines()[-1])


def test_recipes_configurations_and_the_checkpoint_are_in_the_wheel(wheel):
    packaged = {name for name in wheel.namelist() if name.startswith("torchrl_dvla/")}
    sources = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "torchrl_dvla"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert packaged == {name for name in sources if (ROOT / name).is_file()}
    recipes = "torchrl_dvla/recipes"
    assert f"{recipes}/dvla_grpo/config/common/settings.yaml" in packaged
    assert f"{recipes}/dvla_sft/checkpoints/libero_object/tokenizer/tokenizer.json" in packaged


def test_the_wheel_has_the_console_script(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    scripts = ConfigParser()
    scripts.read_string(wheel.read(name).decode())
    assert dict(scripts["console_scripts"]) == {"torchrl-dvla": "torchrl_dvla.__main__:main"}


@pytest.fixture
def environment_of(tmp_path):
    """A virtual environment that says that the package is installed from a folder."""

    def make(checkout):
        folder = tmp_path / "some venv"
        venv.create(folder, symlinks=True)
        site = sysconfig.get_path("purelib", vars={"base": str(folder)})
        record = Path(site) / "torchrl_dvla-0.1.dist-info"
        record.mkdir()
        (record / "METADATA").write_text("Name: torchrl-dvla\nVersion: 0.1\n")
        origin = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
        (record / "direct_url.json").write_text(json.dumps(origin))
        return folder

    return make


def set_up(folder, checkout):
    """Set-up of a checkout, in an environment in which pip does nothing."""
    (folder / "pip.py").write_text("raise SystemExit('pip was called')")
    env = {**os.environ, "VENV": str(folder), "DVLA_SKIP_APT": "1", "PYTHON": sys.executable}
    env["PYTHONPATH"] = str(folder)
    return subprocess.run(
        ["bash", str(checkout / "scripts/setup.sh")], env=env, capture_output=True, text=True
    )


def test_the_environment_of_another_checkout_is_left_alone(environment_of, tmp_path):
    other = tmp_path / "other checkout"
    other.mkdir()
    folder = environment_of(other)
    before = sorted(folder.rglob("*"))
    run = set_up(folder, ROOT)
    assert run.returncode == 1
    assert f"{folder} belongs to the checkout {other}" in run.stderr
    assert "make VENV=/path/to/another" in run.stderr
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "pip.py"])


@pytest.mark.parametrize("owner", ["this checkout", "a checkout that is gone"])
def test_an_environment_of_its_own_is_set_up(environment_of, tmp_path, owner):
    folder = environment_of(ROOT if owner == "this checkout" else tmp_path / "gone")
    run = set_up(folder, ROOT)
    assert "pip was called" in run.stderr and "belongs" not in run.stderr
