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
from torchrl_dvla.envs.maniskill_env import ManiSkillChunkEnv
from torchrl_dvla.envs.maniskill_setup import (
    MANISKILL_INSTRUCTIONS,
    choose_vulkan_driver,
    validate_maniskill,
)
from torchrl_dvla.envs.toy_env import ToyChunkEnv

__all__ = [
    "LIBERO_SUITES",
    "MANISKILL_INSTRUCTIONS",
    "ChunkEnv",
    "LiberoChunkEnv",
    "LiberoTask",
    "ManiSkillChunkEnv",
    "ToyChunkEnv",
    "choose_gl_backend",
    "choose_vulkan_driver",
    "libero_tasks",
    "setup_libero",
    "validate_libero",
    "validate_maniskill",
]
