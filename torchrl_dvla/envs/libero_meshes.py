# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Coarser meshes for software rendering."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

__all__ = ["cluster_faces", "with_coarse_meshes"]

# Cells along a mesh's longest side at the first try, and how much fewer at each further one
_FIRST_RESOLUTION = 32
_SHRINK = 0.85
_COARSEST = 4


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
        vertex indices ``[K, 3]`` of the faces that remain, and their places ``[K]`` in ``faces``.

    Reference:
        Rossignac and Borrel, *Multi-resolution 3D approximations for rendering complex scenes*,
        1993.

    Examples:
        >>> square = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.9, 0.9, 0]])
        >>> triangles = np.array([[0, 1, 4], [0, 4, 3], [1, 2, 4]])
        >>> kept, places = cluster_faces(square, triangles, 2)
        >>> places  # the third lies within one cell of its neighbours' corner
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
    places = np.flatnonzero((a != b) & (b != c) & (a != c))
    # the same triangle may be left over several times
    a, b, c = np.sort(merged[places], axis=1).T.astype(np.int64)
    num = len(vertices)
    _, unique = np.unique((a * num + b) * num + c, return_index=True)
    places = places[np.sort(unique)]
    return merged[places], places


def _at_most(
    vertices: np.ndarray, faces: np.ndarray, max_faces: int
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`cluster_faces` on about the finest grid that leaves at most ``max_faces``."""
    kept, places = cluster_faces(vertices, faces, _FIRST_RESOLUTION)
    # a surface has about as many faces as cells, which grow with the square of the resolution
    resolution = int(_FIRST_RESOLUTION * (max_faces / max(len(kept), 1)) ** 0.5)
    while True:
        kept, places = cluster_faces(vertices, faces, max(resolution, _COARSEST))
        if len(kept) <= max_faces or resolution <= _COARSEST:
            return kept, places
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
        kept, places = _at_most(vertices, faces, max_faces)
        end = start + len(kept)
        coarse.mesh_face[start:end] = kept
        for corner in (coarse.mesh_facenormal, coarse.mesh_facetexcoord):
            corner[start:end] = corner[start : start + num_faces][places]
        coarse.mesh_facenum[mesh] = len(kept)
    return coarse
