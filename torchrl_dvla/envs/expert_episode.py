# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One episode of a scripted expert as the labelled decisions that a policy is cloned from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    CAMERA_KEYS,
    STATE_KEY,
)
from torchrl_dvla.envs.expert_grasp import FloatArray
from torchrl_dvla.validation import Count, NonNegative, check_fields

__all__ = ["ActionNoise", "ControlledEnv", "chunk_labels", "record_episode"]


class ControlledEnv(Protocol):
    """Chunked environment that an expert can drive, env step by env step.

    Attributes:
        chunk_size (int): env steps in an action chunk.
        replan_interval (int): env steps executed per decision.
        max_episode_steps (int): truncation horizon in env steps.
    """

    chunk_size: int
    replan_interval: int
    max_episode_steps: int

    def step_with(self, controller: Callable[[], FloatArray]) -> TensorDictBase:
        """One decision whose actions ``[A]`` are asked for one by one."""


@dataclass(frozen=True)
class ActionNoise:
    """Disturbance of the executed actions; the recorded labels stay clean (DART).

    A clone that errs leaves the states its demonstrations went through. Demonstrations under noise
    go through such states too and show the way back. A push that lasts some env steps displaces the
    arm, independent noise of the same size would average out.

    Attributes:
        push (float): standard deviation of a constant offset of the position action, redrawn every
            ``push_steps`` env steps. Rotations get 0.3 times as much.
        push_steps (int): how long a push lasts.
        jitter (float): standard deviation of what is drawn anew at each env step.

    Reference:
        Laskey et al., "DART: Noise Injection for Robust Imitation Learning", 2017,
        https://arxiv.org/abs/1703.09327.
    """

    push: NonNegative = 0.3
    push_steps: Count = 6
    jitter: NonNegative = 0.05

    def __post_init__(self) -> None:
        check_fields(self)

    def sequence(self, num_env_steps: int, rng: np.random.Generator) -> FloatArray:
        """Draw the noise of an episode.

        Args:
            num_env_steps (int): length of the episode.
            rng (numpy Generator): source of randomness.

        Returns:
            Array ``[num_env_steps, 7]``; the gripper's column is zero.
        """
        num_pushes = -(-num_env_steps // self.push_steps)
        # some episodes are left alone, so that the undisturbed way is shown too
        scale = rng.choice([0.0, 0.5, 1.0])
        size = scale * np.array([1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.0])
        # push by push, so that a longer horizon begins with the noise of a shorter one
        drawn = rng.standard_normal((num_pushes, 1 + self.push_steps, 7))
        noise = self.push * drawn[:, :1] + self.jitter * drawn[:, 1:]
        return noise.reshape(-1, 7)[:num_env_steps] * size


def chunk_labels(
    actions: FloatArray, chunk_size: int, interval: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Label each decision with the expert's next ``chunk_size`` actions.

    Args:
        actions (array): the expert's actions ``[L, A]`` of an episode.
        chunk_size (int): length of a label.
        interval (int): env steps between decisions; labels overlap if it is shorter than a chunk.

    Returns:
        Chunks ``[T, chunk, A]`` float32 and the mask ``[T, chunk]`` of what lies behind the
        episode's end, where the last action is repeated.

    Examples:
        >>> chunks, pad = chunk_labels(np.array([[1.0], [2.0], [3.0]]), chunk_size=3, interval=2)
        >>> chunks[:, :, 0].tolist()
        [[1.0, 2.0, 3.0], [3.0, 3.0, 3.0]]
        >>> pad.tolist()
        [[False, False, False], [False, True, True]]
    """
    starts = torch.arange(0, len(actions), interval)
    index = starts[:, None] + torch.arange(chunk_size)
    pad = index >= len(actions)
    labels = torch.as_tensor(np.asarray(actions, dtype=np.float32))
    return labels[index.clamp(max=len(actions) - 1)], pad


def record_episode(
    env: ControlledEnv,
    observation: TensorDictBase,
    act: Callable[[], FloatArray],
    *,
    noise: ActionNoise | None = None,
    rng: np.random.Generator,
) -> tuple[TensorDictBase, bool, int]:
    """Play an episode by an expert.

    The label of a decision is the chunk of clean actions from there on. With
    ``env.replan_interval`` shorter than ``env.chunk_size`` the labels overlap: an episode gives
    more decisions to learn from, at the price of more frames.

    Args:
        env (ControlledEnv): the environment, after its reset.
        observation (TensorDictBase): what the reset returned.
        act (callable): the expert: an action ``[7]`` for the current state.

    Keyword Args:
        noise (ActionNoise, optional): disturbance of what is executed. Defaults to none.
        rng (numpy Generator): source of the noise.

    Returns:
        The rows ``[T]`` of a :class:`~torchrl_dvla.data.demonstrations.Demonstration`, with the
        clean actions ``[T, chunk, 7]``; whether the episode reached the goal; and how many env
        steps it took.
    """
    disturbances = np.zeros((env.max_episode_steps, 7))
    if noise is not None:
        disturbances = noise.sequence(env.max_episode_steps, rng)
    actions: list[FloatArray] = []

    def controller() -> FloatArray:
        action = np.clip(act(), -1.0, 1.0)
        actions.append(action)
        return np.clip(action + disturbances[len(actions) - 1], -1.0, 1.0)

    seen: list[TensorDictBase] = []
    done = False
    while not done:
        seen.append(observation.select(*CAMERA_KEYS, STATE_KEY, strict=False))
        observation = env.step_with(controller)
        done = bool(observation["done"])
    rows = TensorDict.stack(seen)
    chunks, pad = chunk_labels(np.stack(actions), env.chunk_size, env.replan_interval)
    rows.set(ACTION_CHUNK_KEY, chunks)
    rows.set(ACTION_IS_PAD_KEY, pad)
    return rows, bool(observation["success"]), len(actions)
