# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Off-screen frames of a MuJoCo model, taken in two halves: *capture* now, *draw* perhaps later."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["FrameRenderer", "cluster_faces", "with_coarse_meshes"]

# A GL context belongs to the thread that made it current, and Mesa keeps state per process: one
# frame at a time. MuJoCo's software path uses several threads inside one frame anyway.
_GL_LOCK = threading.RLock()

# robosuite's group 0 holds collision geometry and its group 1 what is meant to be seen
_COLLISION_GROUP, _VISUAL_GROUP = 0, 1
_MAX_SCENE_GEOMS = 1000
# Cells along a mesh's longest side at the first try, and how much fewer at each further one
_FIRST_RESOLUTION = 32
_SHRINK = 0.85
_COARSEST = 4


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
            # -1: the GPU is robosuite's choice, by MUJOCO_EGL_DEVICE_ID
            self._gl = GLContext(max_width=width, max_height=height, device_id=-1)
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


# -- coarser meshes -------------------------------------------------------------------------------


def cluster_faces(
    vertices: np.ndarray, faces: np.ndarray, resolution: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the vertices of a mesh that share a cell of a grid.

    Of each cell the vertex nearest to the cell's mean stays; faces that lose a corner vanish.

    Args:
        vertices (np.ndarray): positions ``[V, 3]``.
        faces (np.ndarray): vertex indices ``[F, 3]``.
        resolution (int): cells along the longest side.

    Returns:
        vertex indices ``[K, 3]`` of the faces that remain, and their indices ``[K]`` in ``faces``.

    Reference:
        Rossignac and Borrel, *Multi-resolution 3D approximations for rendering complex scenes*,
        1993.

    Examples:
        >>> square = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.9, 0.9, 0]])
        >>> triangles = np.array([[0, 1, 4], [0, 4, 3], [1, 2, 4]])
        >>> kept, indices = cluster_faces(square, triangles, 2)
        >>> indices  # the third lies within one cell of its neighbours' corner
        array([0, 1])
    """
    low = vertices.min(axis=0)
    size = max(float((vertices.max(axis=0) - low).max()), 1e-9) / resolution
    cells = np.minimum(((vertices - low) / size).astype(np.int64), resolution - 1)
    codes = (cells[:, 0] * resolution + cells[:, 1]) * resolution + cells[:, 2]
    _, cluster, counts = np.unique(codes, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), 3))
    np.add.at(sums, cluster, vertices)
    distance = np.linalg.norm(vertices - (sums / counts[:, None])[cluster], axis=1)
    # the first vertex of each cluster in an order sorted by cluster, then by distance
    order = np.lexsort((distance, cluster))
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    merged = order[first][cluster][faces]
    a, b, c = merged.T
    indices = np.flatnonzero((a != b) & (b != c) & (a != c))
    # the same triangle may be left over several times
    a, b, c = np.sort(merged[indices], axis=1).T.astype(np.int64)
    num = len(vertices)
    _, unique = np.unique((a * num + b) * num + c, return_index=True)
    indices = indices[np.sort(unique)]
    return merged[indices], indices


def _at_most(
    vertices: np.ndarray, faces: np.ndarray, max_faces: int
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`cluster_faces` on about the finest grid that leaves at most ``max_faces``."""
    kept, indices = cluster_faces(vertices, faces, _FIRST_RESOLUTION)
    # a surface has about as many faces as cells, which grow with the square of the resolution
    resolution = int(_FIRST_RESOLUTION * (max_faces / max(len(kept), 1)) ** 0.5)
    while True:
        kept, indices = cluster_faces(vertices, faces, max(resolution, _COARSEST))
        if len(kept) <= max_faces or resolution <= _COARSEST:
            return kept, indices
        resolution = int(resolution * _SHRINK)


def with_coarse_meshes(model: Any, max_faces: int) -> Any:
    """A copy of a model for drawing, with at most so many faces in each mesh.

    Surviving faces keep their normals and texture coordinates. Only drawing may use the copy:
    physics needs the meshes as they were.

    Args:
        model: the ``mujoco.MjModel``.
        max_faces (int): faces per mesh, in so far as a grid of 4 cells leaves that few; meshes
            below it stay as they are.

    Returns:
        the copy.
    """
    coarse = copy.copy(model)
    for mesh in range(coarse.nmesh):
        num_faces = int(coarse.mesh_facenum[mesh])
        if num_faces <= max_faces:
            continue
        start = int(coarse.mesh_faceadr[mesh])
        vertex = int(coarse.mesh_vertadr[mesh])
        vertices = coarse.mesh_vert[vertex : vertex + int(coarse.mesh_vertnum[mesh])]
        faces = coarse.mesh_face[start : start + num_faces]
        kept, indices = _at_most(vertices, faces, max_faces)
        end = start + len(kept)
        coarse.mesh_face[start:end] = kept
        for corner in (coarse.mesh_facenormal, coarse.mesh_facetexcoord):
            corner[start:end] = corner[start : start + num_faces][indices]
        coarse.mesh_facenum[mesh] = len(kept)
    return coarse
