# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Off-screen frames of a MuJoCo model, taken in two halves: *capture* now, *draw* perhaps later."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from torchrl_dvla.envs.libero_meshes import with_coarse_meshes

__all__ = ["FrameRenderer"]

# A GL context belongs to the thread that made it current, and Mesa keeps state per process: one
# frame at a time. MuJoCo's software path uses several threads inside one frame anyway.
_GL_LOCK = threading.RLock()

# robosuite's group 0 holds collision geometry and its group 1 what is meant to be seen
_COLLISION_GROUP, _VISUAL_GROUP = 0, 1
_MAX_SCENE_GEOMS = 1000


class FrameRenderer:
    """Draws the frames of some cameras of one model.

    robosuite draws a frame at the instant an observation falls due, because the simulation then
    moves on. A chunked policy sees one frame in ``chunk_size``, and which one is only known once
    the chunk is over (it may end early). So the work is split: :meth:`capture` notes where every
    visible geom is, which takes microseconds, and :meth:`draw` turns the last capture into pixels,
    which takes a hundred milliseconds in software and is done once per decision.

    Each renderer owns its GL context and makes it current for each frame, so that any number of
    them in one process draw their own meshes and textures, also from different threads.

    Args:
        model: the ``mujoco.MjModel``.
        cameras (sequence of str): names of the cameras to draw.

    Keyword Args:
        height (int): frame height in pixels.
        width (int): frame width in pixels.
        shadows (bool): draw shadows and reflections. ``False`` changes pixels and is much faster.
            Defaults to ``True``.
        msaa (bool): smooth edges by 4 samples per pixel, as robosuite does. Defaults to ``True``.
        max_mesh_faces (int, optional): merge vertices of larger meshes until so many faces are
            left. Changes pixels. ``None``, the default, draws meshes as they are.
        device_id (int): GPU for EGL; -1 lets robosuite choose. Defaults to -1.

    Raises:
        ValueError: if the model has no camera of a given name.
    """

    def __init__(
        self,
        model: Any,
        cameras: Sequence[str],
        *,
        height: int,
        width: int,
        shadows: bool = True,
        msaa: bool = True,
        max_mesh_faces: int | None = None,
        device_id: int = -1,
    ) -> None:
        import mujoco
        from robosuite.utils.binding_utils import GLContext

        self._mujoco = mujoco
        self._model = model
        self._context: Any = None
        self._gl: Any = None
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._shape = (height, width, 3)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[_COLLISION_GROUP] = 0
        self._options.geomgroup[_VISUAL_GROUP] = 1
        self._perturbation = mujoco.MjvPerturb()
        self._cameras = []
        self._scenes = []
        for name in cameras:
            index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
            if index < 0:
                known = [model.camera(i).name for i in range(model.ncam)]
                raise ValueError(
                    f"cameras must be among {', '.join(known)}, got {name!r}. Correct the name."
                )
            camera = mujoco.MjvCamera()
            camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            camera.fixedcamid = index
            scene = mujoco.MjvScene(model, maxgeom=_MAX_SCENE_GEOMS)
            if not shadows:
                scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
                scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self._cameras.append(camera)
            self._scenes.append(scene)
        # the off-screen buffer is as large as a frame; its size does not reach the pixels
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        if not msaa:
            model.vis.quality.offsamples = 0
        if not shadows:
            model.vis.quality.shadowsize = 0
        # meshes and textures are copied into the GL context, once and for all
        drawn = model if max_mesh_faces is None else with_coarse_meshes(model, max_mesh_faces)
        with _GL_LOCK:
            self._gl = GLContext(max_width=width, max_height=height, device_id=device_id)
            with self._current():
                self._context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_150)
                mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        with _GL_LOCK:
            self._gl.make_current()
            try:
                yield
            finally:
                _release_current()

    def capture(self, data: Any) -> None:
        """Note what there is to see.

        Args:
            data: the ``mujoco.MjData`` to take positions from.
        """
        for camera, scene in zip(self._cameras, self._scenes, strict=True):
            self._mujoco.mjv_updateScene(
                self._model,
                data,
                self._options,
                self._perturbation,
                camera,
                self._mujoco.mjtCatBit.mjCAT_ALL,
                scene,
            )

    def draw(self) -> list[np.ndarray]:
        """Pixels of the last capture.

        Returns:
            one ``uint8`` array ``[H, W, 3]`` for each camera, bottom row first (as OpenGL and
            robosuite have it).
        """
        frames = []
        with self._current():
            for scene in self._scenes:
                frame = np.empty(self._shape, dtype=np.uint8)
                self._mujoco.mjr_render(self._viewport, scene, self._context)
                self._mujoco.mjr_readPixels(frame, None, self._viewport, self._context)
                frames.append(frame)
        return frames

    def close(self) -> None:
        """Free the GL resources; may be called twice."""
        context, gl = self._context, self._gl
        self._context = self._gl = None
        if gl is None:
            return
        with _GL_LOCK:
            if context is not None:
                # textures and buffers are freed in whatever context is current: it must be ours
                gl.make_current()
                context.free()
            gl.free()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _release_current() -> None:
    """Leave no context current, so that the next frame may be drawn by another thread."""
    backend = os.environ.get("MUJOCO_GL", "").lower()
    if backend == "osmesa":
        from OpenGL import GL, osmesa

        osmesa.OSMesaMakeCurrent(None, None, GL.GL_FLOAT, 0, 0)
    elif backend == "egl":
        from OpenGL import EGL
        from robosuite.renderers.context import egl_context

        EGL.eglMakeCurrent(
            egl_context.EGL_DISPLAY, EGL.EGL_NO_SURFACE, EGL.EGL_NO_SURFACE, EGL.EGL_NO_CONTEXT
        )
