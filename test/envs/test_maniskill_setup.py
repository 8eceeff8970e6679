# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What is said about ManiSkill before anything is started."""

from __future__ import annotations

import importlib.util

import pytest

from torchrl_dvla.envs import maniskill_setup
from torchrl_dvla.envs.maniskill_setup import (
    MANISKILL_INSTRUCTIONS,
    choose_vulkan_driver,
    drawing_errors,
    find_vulkan_driver,
    prompts_refused,
    validate_maniskill,
)


@pytest.fixture
def drivers(tmp_path, monkeypatch):
    """A folder where Vulkan's loader would look, on a machine without a GPU."""
    for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES", "LP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(maniskill_setup, "_ICD_FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(maniskill_setup, "_NVIDIA_DEVICE", str(tmp_path / "nvidia0"))
    return tmp_path


def test_without_a_driver_the_packages_are_named(drivers):
    (drivers / "radeon_icd.x86_64.json").touch()  # of a GPU that is not there
    with pytest.raises(RuntimeError, match="mesa-vulkan-drivers libvulkan1.*bookworm-backports"):
        choose_vulkan_driver()


def test_mesas_driver_for_the_cpu_is_chosen_and_draws_with_one_thread(drivers, monkeypatch):
    (drivers / "intel_icd.x86_64.json").touch()
    (drivers / "lvp_icd.x86_64.json").touch()
    assert choose_vulkan_driver() == "cpu"
    environ = maniskill_setup.os.environ
    assert environ["VK_ICD_FILENAMES"] == str(drivers / "lvp_icd.x86_64.json")
    assert environ["LP_NUM_THREADS"] == "1"


def test_what_the_user_has_set_is_kept(drivers, monkeypatch):
    mine = drivers / "mine.json"
    mine.touch()
    monkeypatch.setenv("VK_ICD_FILENAMES", str(mine))
    monkeypatch.setenv("LP_NUM_THREADS", "3")
    assert choose_vulkan_driver() == "cpu"
    environ = maniskill_setup.os.environ
    assert (environ["VK_ICD_FILENAMES"], environ["LP_NUM_THREADS"]) == (str(mine), "3")
    mine.unlink()
    with pytest.raises(RuntimeError, match=r"got VK_ICD_FILENAMES='.*mine.json'"):
        choose_vulkan_driver()


def test_a_gpu_brings_its_own_driver(drivers):
    (drivers / "nvidia0").touch()
    assert find_vulkan_driver({}) == ("gpu", "")
    (drivers / "nvidia_icd.json").touch()
    named = {"VK_ICD_FILENAMES": str(drivers / "nvidia_icd.json")}
    assert find_vulkan_driver(named) == ("gpu", str(drivers / "nvidia_icd.json"))


@pytest.mark.parametrize(
    "message",
    [  # what sapien says without a driver, and with that of Debian 12
        "vk::createInstanceUnique: ErrorIncompatibleDriver",
        'Failed to find a supported physical device "cpu"',
    ],
)
def test_sapiens_words_become_a_remedy(message):
    with pytest.raises(RuntimeError, match="No Vulkan device.*Mesa 24.3.*apt-get install"):
        with drawing_errors():
            raise RuntimeError(message)


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="^out of memory$"), drawing_errors():
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"camera_width": 0}, "camera_width must be at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"chunk_size": 4, "replan_interval": 5}, "from 1 to chunk_size=4, got 5"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        validate_maniskill("PickCube-v1", **settings)


def test_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"torchrl-dvla\[maniskill\].*EXTRAS=maniskill"):
        validate_maniskill("PickCube-v1")


@pytest.mark.maniskill
def test_tasks_that_are_known_here_and_those_that_are_not():
    from mani_skill.utils.registration import REGISTERED_ENVS

    for task, words in MANISKILL_INSTRUCTIONS.items():
        assert validate_maniskill(task) == words
        # they are let through without a look at the registry
        assert validate_maniskill(task, robot="panda") == words
        assert task in REGISTERED_ENVS
    assert validate_maniskill("PickCube-v1", instruction="take it") == "take it"
    with pytest.raises(ValueError, match="got 'PickCubes-v1'. Did you mean PickCube-v1"):
        validate_maniskill("PickCubes-v1")
    with pytest.raises(ValueError, match="instruction must be given for 'RotateValveLevel0-v1'"):
        validate_maniskill("RotateValveLevel0-v1")


@pytest.mark.maniskill
@pytest.mark.parametrize(
    ("task", "assets"),
    [
        ("PickSingleYCB-v1", "ycb"),
        ("AnymalC-Reach-v1", "anymal_c"),  # those of the robot
        ("OpenCabinetDoor-v1", "partnet_mobility_cabinet"),  # that ManiSkill does not declare
    ],
)
def test_a_task_that_has_to_be_downloaded_names_the_command(task, assets, monkeypatch, tmp_path):
    from mani_skill.utils import assets as maniskill_assets

    monkeypatch.setattr(maniskill_assets, "is_data_source_downloaded", lambda name: False)
    command = f"Run `python -m mani_skill.utils.download_asset -y {assets}`"
    with pytest.raises(FileNotFoundError, match=command):
        validate_maniskill(task, instruction="do it")


@pytest.mark.maniskill
def test_nothing_is_asked_on_standard_input():
    from mani_skill.utils import download_asset

    asked = download_asset.prompt_yes_no
    with pytest.raises(FileNotFoundError, match="download the ycb assets.*download_asset -y NAME"):
        with prompts_refused():
            download_asset.prompt_yes_no("Do you want to\n download the ycb assets?")
    assert download_asset.prompt_yes_no is asked
