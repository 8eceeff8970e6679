# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Settings of LIBERO that both recipes have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchrl_dvla.envs import LIBERO_SUITES
from torchrl_dvla.validation import Count, Natural, Section

__all__ = ["LiberoTasks"]


@dataclass(frozen=True)
class LiberoTasks(Section):
    """Tasks of one suite of LIBERO, and how they are played.

    Raises:
        ValueError: if no task is named, or one twice; the same of cameras; or if a decision is of
            more env steps than its chunk.
    """

    backend: Literal["libero"]
    task_suite: Literal[LIBERO_SUITES]  # type: ignore[valid-type]
    task_ids: tuple[Natural, ...]
    chunk_size: Count
    max_episode_steps: Count
    replan_interval: Count | None = None
    cameras: tuple[str, ...] = ("agentview",)
    orientation: Literal["quaternion", "axis_angle"] = "quaternion"
    shadows: bool = True
    msaa: bool = True
    shuffle_objects: bool = False
    env_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.task_ids or len(set(self.task_ids)) < len(self.task_ids):
            raise ValueError(
                "task_ids must name at least one task, and each once, got "
                f"{list(self.task_ids)}. Use [0]."
            )
        if self.env_steps_per_decision > self.chunk_size:
            raise ValueError(
                f"replan_interval must be from 1 to chunk_size={self.chunk_size}, got "
                f"{self.replan_interval}. Use null for the whole chunk."
            )
        if not 1 <= len(self.cameras) <= 2 or len(set(self.cameras)) < len(self.cameras):
            raise ValueError(
                f"cameras must be one or two different names, got {list(self.cameras)}. Use "
                "[agentview] or [agentview,robot0_eye_in_hand]."
            )

    @property
    def env_steps_per_decision(self) -> int:
        """Env steps executed per decision."""
        return self.replan_interval or self.chunk_size

    @property
    def state_dim(self) -> int:
        """Entries of the state: position and orientation of the gripper, and its two fingers."""
        return 3 + (4 if self.orientation == "quaternion" else 3) + 2
