# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checks of ManiSkill: there is a Vulkan driver, and it really draws a frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from torchrl_dvla.doctor.rendering import Drawing, draw_in_child
from torchrl_dvla.findings import Finding, Status

_REMEDY = (
    "make setup EXTRAS=maniskill, or apt-get install mesa-vulkan-drivers libvulkan1: Mesa 24.3 or "
    "newer, which Debian 12 has in bookworm-backports."
)

# A red box in a lit scene. Compiling the shaders takes most of the time.
_DRAW = """
import json, sys, sapien
scene = sapien.Scene(
    [sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(sapien.Device(sys.argv[1]))])
scene.set_ambient_light([0.5, 0.5, 0.5])
builder = scene.create_actor_builder()
builder.add_box_visual(half_size=[0.2, 0.2, 0.2], material=[1.0, 0.0, 0.0])
builder.build_static().set_pose(sapien.Pose([1, 0, 0]))
camera = scene.add_camera("camera", 48, 48, 1.5, 0.01, 10)
scene.update_render()
camera.take_picture()
frame = camera.get_picture("Color")[..., :3]
summary = sapien.render.get_device_summary().splitlines()
name = next((line.split(": ")[1] for line in summary if line.startswith("GPU:")), "Vulkan")
print(json.dumps({"contrast": int(255 * (frame.max() - frame.min())), "renderer": name}))
"""


def draw(device: str, timeout_s: float = 180.0) -> Drawing:
    """Outcome of drawing one frame with sapien, in a child process.

    Args:
        device (str): ``"cpu"`` or ``"cuda"``.
        timeout_s (float): after this the child is ended.
    """
    return draw_in_child(_DRAW, [device], {}, timeout_s)


def check_maniskill(draw: Callable[[str], Drawing] = draw) -> Iterator[Finding]:
    """Check that ManiSkill's renderer draws a frame.

    Args:
        draw (callable): draws one frame on a device.
    """
    from torchrl_dvla.envs.maniskill_setup import choose_vulkan_driver

    try:
        backend = choose_vulkan_driver()
    except RuntimeError as error:
        yield Finding("Vulkan driver", Status.FAIL, str(error).split(". ")[0], _REMEDY)
        return
    yield Finding("Vulkan driver", Status.OK, os.environ.get("VK_ICD_FILENAMES") or "of the GPU")
    drawing = draw("cuda" if backend == "gpu" else "cpu")
    if drawing.works:
        yield Finding("ManiSkill rendering", Status.OK, f"{backend}: {drawing.renderer}")
    else:
        problem = drawing.error or "the frame came out in a single colour"
        yield Finding("ManiSkill rendering", Status.FAIL, f"{backend}: {problem}", _REMEDY)
