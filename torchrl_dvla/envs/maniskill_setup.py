# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ManiSkill's tasks and the Vulkan driver that it draws with: chosen and checked before any worker.

Nothing here starts a simulator. A task of :data:`MANISKILL_INSTRUCTIONS` is checked without even
importing ManiSkill, any other imports its registry.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchrl_dvla.validation import Range, check

__all__ = [
    "MANISKILL_INSTRUCTIONS",
    "choose_vulkan_driver",
    "drawing_errors",
    "find_vulkan_driver",
    "maniskill_instruction",
    "missing_assets",
    "prompts_refused",
    "validate_maniskill",
]

#: What a policy is told in the usual tasks. All of these need no download, are played by
#: ``control_mode="pd_ee_delta_pose"`` and tell success.
MANISKILL_INSTRUCTIONS: Mapping[str, str] = {
    "PickCube-v1": "pick up the red cube and move it to the green goal",
    "PushCube-v1": "push the blue cube to the goal region in front of it",
    "PullCube-v1": "pull the blue cube onto the target",
    "StackCube-v1": "stack the red cube on top of the green cube",
    "StackPyramid-v1": "put the red cube next to the green one and the blue cube on top of both",
    "PlaceSphere-v1": "place the blue sphere into the bin",
    "RollBall-v1": "roll the blue ball to the goal region at the other end of the table",
    "LiftPegUpright-v1": "lift the peg upright",
    "PegInsertionSide-v1": "pick up the peg and insert its orange end into the hole of the box",
    "PlugCharger-v1": "pick up the charger and plug it into the receptacle",
    "PokeCube-v1": "take the peg and poke the red cube to the goal",
    "PullCubeTool-v1": "pull the blue cube closer with the L-shaped tool",
    "PushT-v1": "push the T-shaped block onto the target",
}
_INSTALL = (
    "Install it with `pip install torchrl-dvla[maniskill]`, or `make setup EXTRAS=maniskill`."
)
_NO_DRIVER = (
    "ManiSkill needs a Vulkan driver, even for its physics: that of an NVIDIA GPU, or Mesa 24.3 or "
    "newer for the CPU. Install it with `make setup EXTRAS=maniskill`, or `apt-get install "
    "mesa-vulkan-drivers libvulkan1` (Debian 12 has it in bookworm-backports)."
)
_DOWNLOAD = "python -m mani_skill.utils.download_asset -y"
#: What sapien's errors have in common when there is no driver, or one that is too old.
_DRIVER_WORDS = ("vk::", "vulkan", "physical device", "render device", "rendering device")
_ICD_FOLDERS = ("/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d")
_NVIDIA_DEVICE = "/dev/nvidia0"
#: Assets that ManiSkill does not declare; it looks for them when the task is built.
_UNDECLARED = {"OpenCabinetDoor-v1": ("partnet_mobility_cabinet",)}
_MAX_IMAGE_SIZE = 4096


def find_vulkan_driver(environ: Mapping[str, str]) -> tuple[str, str]:
    """The Vulkan driver that ManiSkill will use.

    Args:
        environ (Mapping): the process's environment.

    Returns:
        ManiSkill's ``render_backend``, ``"gpu"`` or ``"cpu"``; and the file that describes the
        driver, empty for that of the GPU, which Vulkan's loader finds.

    Raises:
        RuntimeError: if there is none; it names the packages.
    """
    named = environ.get("VK_DRIVER_FILES") or environ.get("VK_ICD_FILENAMES")
    if named:
        files = [file for file in named.split(os.pathsep) if os.path.isfile(file)]
    elif os.path.exists(_NVIDIA_DEVICE):
        return "gpu", ""
    else:
        files = [
            str(file) for folder in _ICD_FOLDERS for file in sorted(Path(folder).glob("lvp_icd*"))
        ]
    if not files:
        found = f"VK_ICD_FILENAMES={named!r}" if named else f"none in {', '.join(_ICD_FOLDERS)}"
        raise RuntimeError(f"A file must describe a Vulkan driver, got {found}. {_NO_DRIVER}")
    return ("gpu" if "nvidia" in files[0] else "cpu"), files[0]


def choose_vulkan_driver() -> str:
    """Set what Vulkan's loader and Mesa read once, where it is unset: before ManiSkill is imported.

    Without a GPU, ``VK_ICD_FILENAMES`` names Mesa's driver for the CPU, and ``LP_NUM_THREADS`` lets
    it draw with one thread, since the environments of several workers share the cores.

    Returns:
        ManiSkill's ``render_backend``: ``"gpu"`` or ``"cpu"``.

    Raises:
        RuntimeError: if there is no driver; it names the packages.
    """
    backend, file = find_vulkan_driver(os.environ)
    if backend == "cpu":
        os.environ.setdefault("LP_NUM_THREADS", "1")
        if "VK_DRIVER_FILES" not in os.environ:
            os.environ.setdefault("VK_ICD_FILENAMES", file)
    return backend


@contextlib.contextmanager
def drawing_errors() -> Iterator[None]:
    """Say what is missing where sapien only says that it found no device.

    Raises:
        RuntimeError: instead of sapien's, naming the packages.
    """
    try:
        yield
    except RuntimeError as error:
        if any(word in str(error).lower() for word in _DRIVER_WORDS):
            raise RuntimeError(f"No Vulkan device can be used ({error}). {_NO_DRIVER}") from error
        raise


@contextlib.contextmanager
def prompts_refused() -> Iterator[None]:
    """Refuse what ManiSkill would ask on standard input: a worker has none to answer from.

    Raises:
        FileNotFoundError: with the question, and the command that downloads the assets.
    """
    from mani_skill.utils import download_asset

    def refuse(message: str) -> bool:
        question = " ".join(message.split())
        raise FileNotFoundError(
            f"Assets of ManiSkill must be downloaded first, got its question {question!r}. Run "
            f"`{_DOWNLOAD} NAME` with the name in it."
        )

    original = download_asset.prompt_yes_no
    download_asset.prompt_yes_no = refuse
    try:
        yield
    finally:
        download_asset.prompt_yes_no = original


def maniskill_instruction(task: str, instruction: str | None = None) -> str:
    """What a policy is told in a task.

    Args:
        task (str): id of the task.
        instruction (str, optional): the words, if they are not those of
            :data:`MANISKILL_INSTRUCTIONS`.

    Raises:
        ValueError: for a task that has no words there, if none are given.

    Examples:
        >>> maniskill_instruction("StackCube-v1")
        'stack the red cube on top of the green cube'
    """
    words = MANISKILL_INSTRUCTIONS.get(task) if instruction is None else instruction
    if words is None:
        raise ValueError(
            f"instruction must be given for {task!r}, got none. ManiSkill has no words for its "
            f"tasks; known here are {', '.join(MANISKILL_INSTRUCTIONS)}."
        )
    return words


def validate_maniskill(
    task: str,
    *,
    camera_height: int = 128,
    camera_width: int = 128,
    chunk_size: int = 8,
    replan_interval: int | None = None,
    instruction: str | None = None,
    robot: str | None = None,
) -> str:
    """Check an environment's arguments without starting a simulator.

    :class:`ManiSkillChunkEnv` calls it first; a recipe calls it in the parent process, so that a
    task that has to be downloaded, or a machine that cannot draw, ends the run before any worker
    exists.

    Args:
        task (str): id of the task.

    Keyword Args:
        camera_height (int): frame height in pixels. Defaults to 128.
        camera_width (int): frame width in pixels. Defaults to 128.
        chunk_size (int): env steps in an action chunk. Defaults to 8.
        replan_interval (int, optional): env steps executed per decision, at most ``chunk_size``.
        instruction (str, optional): what the policy is told.
        robot (str, optional): ManiSkill's name of the robot. Defaults to the task's own.

    Returns:
        The instruction.

    Raises:
        ValueError: for an unknown task or a number out of range.
        ImportError: if ManiSkill is not installed.
        FileNotFoundError: for a task whose assets are not here, with the command to download them.
        RuntimeError: if there is no Vulkan driver.
    """
    for name, size in (("camera_height", camera_height), ("camera_width", camera_width)):
        check(name, size, int, Range(1, _MAX_IMAGE_SIZE, remedy="Policies commonly use 224."))
    check("chunk_size", chunk_size, int, Range(1, remedy="Use the policy's chunk size."))
    check("replan_interval", replan_interval, int | None)
    if replan_interval is not None and not 1 <= replan_interval <= chunk_size:
        raise ValueError(
            f"replan_interval must be from 1 to chunk_size={chunk_size}, got {replan_interval}. "
            "A decision executes at least one and at most all env steps of its chunk."
        )
    if importlib.util.find_spec("mani_skill") is None:
        raise ImportError(f"ManiSkill is not installed. {_INSTALL}")
    choose_vulkan_driver()
    if task not in MANISKILL_INSTRUCTIONS or robot is not None:
        _check_assets(task, robot)
    return maniskill_instruction(task, instruction)


def _check_assets(task: str, robot: str | None) -> None:
    import mani_skill.envs  # noqa: F401  it registers the tasks
    from mani_skill.agents.registration import REGISTERED_AGENTS
    from mani_skill.utils import assets
    from mani_skill.utils.registration import REGISTERED_ENVS

    if task not in REGISTERED_ENVS:
        near = difflib.get_close_matches(task, REGISTERED_ENVS, 3) or MANISKILL_INSTRUCTIONS
        raise ValueError(
            f"task must be the id of a ManiSkill task, got {task!r}. Did you mean "
            f"{' or '.join(list(near)[:3])}?"
        )
    spec = REGISTERED_ENVS[task]
    wanted = [*spec.asset_download_ids, *_UNDECLARED.get(task, ())]
    agent = REGISTERED_AGENTS.get(robot or _default_robot(spec.cls))
    wanted += agent.asset_download_ids if agent is not None else []
    if missing := missing_assets(wanted, assets.DATA_GROUPS, assets.is_data_source_downloaded):
        commands = "; ".join(f"{_DOWNLOAD} {name}" for name in missing)
        raise FileNotFoundError(
            f"The assets {', '.join(missing)} of {task} must be downloaded first, got none here. "
            f"Run `{commands}`."
        )


def _default_robot(cls: type) -> Any:
    """The default of the argument that names the robot, ``None`` where there is none."""
    for base in cls.__mro__:
        if parameter := inspect.signature(base.__init__).parameters.get("robot_uids"):  # type: ignore[misc]
            return None if isinstance(parameter.default, tuple) else parameter.default
    return None


def missing_assets(
    wanted: list[str], groups: Mapping[str, list[str]], is_there: Callable[[str], bool]
) -> list[str]:
    """Those of ``wanted`` that are not on this machine; a group is, if all of its members are.

    Args:
        wanted (list of str): names of data sources and groups.
        groups (Mapping): members of each group, which may be groups.
        is_there (Callable): whether a data source is.

    Examples:
        >>> groups = {"kitchen": ["pans", "lids"], "pans": ["wok"]}
        >>> missing_assets(["kitchen", "lids"], groups, {"lids"}.__contains__)
        ['kitchen']
    """

    def holds(name: str) -> bool:
        members = groups.get(name, [name])  # a robot's group has the name of its only member
        return is_there(name) if name in members else all(holds(member) for member in members)

    return [name for name in dict.fromkeys(wanted) if not holds(name)]
