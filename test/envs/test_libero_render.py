# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Coarser meshes, on meshes small enough to work out by hand."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np

from torchrl_dvla.envs.libero_render import cluster_faces, with_coarse_meshes


def grid_mesh(num: int) -> tuple[np.ndarray, np.ndarray]:
    """A flat square of `num` x `num` cells, two faces each."""
    x, y = np.meshgrid(np.arange(num + 1.0), np.arange(num + 1.0), indexing="ij")
    vertices = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1)
    index = np.arange((num + 1) ** 2).reshape(num + 1, num + 1)
    a, b = index[:-1, :-1].ravel(), index[1:, :-1].ravel()
    c, d = index[1:, 1:].ravel(), index[:-1, 1:].ravel()
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    return vertices, faces


def test_a_fine_grid_keeps_every_face():
    vertices, faces = grid_mesh(3)
    kept, indices = cluster_faces(vertices, faces, 64)
    np.testing.assert_array_equal(indices, np.arange(18))
    np.testing.assert_array_equal(kept, faces)


def test_merged_vertices():
    # 1 and 2 share a cell, and 1 is as near to its mean as 2: the first one stays
    vertices = np.array([[0.0, 0, 0], [0.95, 0, 0], [1.0, 0, 0], [0, 1.0, 0]])
    faces = np.array([[0, 1, 3], [1, 2, 3], [0, 2, 3]])
    kept, indices = cluster_faces(vertices, faces, 4)
    # the second face has lost a corner, the third has become the first
    np.testing.assert_array_equal(indices, [0])
    np.testing.assert_array_equal(kept, [[0, 1, 3]])


class Model(SimpleNamespace):
    """The mesh part of an mjModel, copied with its arrays as an mjModel is."""

    def __copy__(self) -> Model:
        return copy.deepcopy(self)


def test_only_large_meshes_of_the_copy_change():
    (large, large_faces), (small, small_faces) = grid_mesh(40), grid_mesh(2)
    faces = np.concatenate([large_faces, small_faces])
    corners = np.arange(faces.size).reshape(-1, 3)
    model = Model(
        nmesh=2,
        mesh_vertadr=np.array([0, len(large)]),
        mesh_vertnum=np.array([len(large), len(small)]),
        mesh_vert=np.concatenate([large, small]),
        mesh_faceadr=np.array([0, len(large_faces)]),
        mesh_facenum=np.array([len(large_faces), len(small_faces)]),
        mesh_face=faces,
        mesh_facenormal=corners,
        mesh_facetexcoord=corners.copy(),
    )
    coarse = with_coarse_meshes(model, 200)
    assert 50 <= coarse.mesh_facenum[0] <= 200
    assert coarse.mesh_facenum[1] == 8
    np.testing.assert_array_equal(coarse.mesh_face[3200:], model.mesh_face[3200:])
    assert model.mesh_facenum[0] == 3200
    # each face has kept its own normals and texture coordinates
    num = coarse.mesh_facenum[0]
    np.testing.assert_array_equal(coarse.mesh_facenormal[:num], coarse.mesh_facetexcoord[:num])
    starts = coarse.mesh_facenormal[:num, 0]
    assert (starts % 3 == 0).all()
    original = model.mesh_face[starts // 3]
    moved = np.abs(model.mesh_vert[coarse.mesh_face[:num]] - model.mesh_vert[original]).max()
    # no corner has left its cell
    assert moved <= 40 / 4
