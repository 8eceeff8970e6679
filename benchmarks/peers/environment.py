# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The environment that all libraries play, of gymnasium, numpy and nothing else."""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np

EPISODE_STEPS, IMAGE_SIZE, ACTION_DIM = 16, 64, 2
#: CPU time of an env step.
STEP_S = 0.002
#: Side of the squares that are drawn, half of it.
_HALF = 4


class ReachEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A square that is moved to another: images, two real numbers as the action, 16 env steps.

    The observation is uint8 ``[H, W, 3]`` or ``[3, H, W]``. The reward comes with the last env
    step, in ``(0, 1]`` by the distance that is left, so no two rollouts of a group have the same.

    An env step *computes* for 2 ms: it counts CPU time of its own thread, so it takes longer where
    others compete for the core, as a simulator does. What it computes releases the GIL, as the
    bindings of simulators do.

    Args:
        config (dict, optional): keyword arguments, as RLlib hands them over.

    Keyword Args:
        channels_first (bool): whether images are ``[3, H, W]``, for libraries that do not turn them
            by themselves. Defaults to ``False``.
    """

    def __init__(
        self, config: dict[str, Any] | None = None, *, channels_first: bool = False
    ) -> None:
        channels_first = channels_first or bool(config and config["channels_first"])
        self._channels_first = channels_first
        shape = (3, IMAGE_SIZE, IMAGE_SIZE) if channels_first else (IMAGE_SIZE, IMAGE_SIZE, 3)
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self._work = np.ones(8192)
        self._position = self._target = np.zeros(2)
        self._num_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._position, self._target = self.np_random.uniform(-1, 1, (2, 2))
        self._num_steps = 0
        return self._draw(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        end_s = time.thread_time() + STEP_S
        self._num_steps += 1
        self._position = np.clip(self._position + 0.2 * np.clip(action, -1, 1), -1, 1)
        image = self._draw()
        is_over = self._num_steps == EPISODE_STEPS
        distance = float(np.linalg.norm(self._position - self._target))
        while time.thread_time() < end_s:
            np.sqrt(self._work, out=self._work)
        reward = float(np.exp(-3 * distance)) if is_over else 0.0
        return image, reward, is_over, False, {"success": is_over and distance < 0.2}

    def _draw(self) -> np.ndarray:
        image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for channel, centre in enumerate((self._position, self._target)):
            row, column = ((centre + 1) / 2 * (IMAGE_SIZE - 1)).astype(int)
            rows = slice(max(0, row - _HALF), row + _HALF)
            image[rows, max(0, column - _HALF) : column + _HALF, channel] = 255
        return np.ascontiguousarray(image.transpose(2, 0, 1)) if self._channels_first else image
