# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Settings of LIBERO that both recipes have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchrl_dvla.envs import LIBERO_SUITES
from torchrl_dvla.validation import Count, Natural, Section

__all__ = ["LiberoTasks"]


@dataclass(frozen=True)
class LiberoTasks(Section):
    """Tasks of one suite of LIBERO, and how they are played.

    Raises:
        ValueError: if no task is named, or one twice.
    """

    backend: Literal["libero"]
    task_suite: Literal[LIBERO_SUITES]  # type: ignore[valid-type]
    task_ids: tuple[Natural, ...]
    chunk_size: Count
    max_episode_steps: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.task_ids or len(set(self.task_ids)) < len(self.task_ids):
            raise ValueError(
                "task_ids must name at least one task, and each once, got "
                f"{list(self.task_ids)}. Use [0]."
            )
