# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Environments for chunked policies."""

from torchrl_dvla.envs.chunk_env import ChunkEnv
from torchrl_dvla.envs.libero_env import LiberoChunkEnv
from torchrl_dvla.envs.libero_setup import (
    LIBERO_SUITES,
    LiberoTask,
    choose_gl_backend,
    libero_tasks,
    setup_libero,
    validate_libero,
)
from torchrl_dvla.envs.toy_env import ToyChunkEnv

__all__ = [
    "LIBERO_SUITES",
    "ChunkEnv",
    "LiberoChunkEnv",
    "LiberoTask",
    "ToyChunkEnv",
    "choose_gl_backend",
    "libero_tasks",
    "setup_libero",
    "validate_libero",
]
