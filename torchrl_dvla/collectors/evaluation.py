# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Evaluation episodes that run beside training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from torchrl_dvla.data import EpisodeSpec, Rollout
from torchrl_dvla.validation import Natural, check

__all__ = ["Evaluation", "EvaluationResult"]


@dataclass
class EvaluationResult:
    """What the episodes of one evaluation did, in the order in which they were asked for.

    Args:
        successes (list of bool): success of each episode. One whose environment returned what is
            refused, such as a NaN reward, in each of its tries is a failure.
        episode_returns (list of float): summed reward of each episode.
        num_env_steps (list of int): length of each episode in env steps.
        policy_version (int): version of the weights, one for all episodes; -1 if none of them came
            to a decision.
        frames (dict): camera images ``uint8 [T, 3, H, W]``, one a decision, by episode number, for
            the episodes that were to keep them, but for refused ones.
    """

    successes: list[bool]
    episode_returns: list[float]
    num_env_steps: list[int]
    policy_version: int
    frames: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def success_rate(self) -> float:
        """Share of successful episodes."""
        return sum(self.successes) / len(self.successes)


class Evaluation:
    """An evaluation under way; :meth:`result` waits for it.

    Args:
        episodes (sequence of EpisodeSpec): what to play.

    Keyword Args:
        greedy (bool): take the most likely tokens instead of sampling.
        num_frames_episodes (int): episodes, from the first, whose images are kept.
    """

    def __init__(
        self, episodes: Sequence[EpisodeSpec], *, greedy: bool, num_frames_episodes: int
    ) -> None:
        if not episodes:
            raise ValueError("episodes must hold at least one EpisodeSpec, got none. Add some.")
        self.episodes = list(episodes)
        self.greedy = greedy
        self.num_frames_episodes = check("num_frames_episodes", num_frames_episodes, Natural)
        self._finished: dict[int, Rollout] = {}
        self._frames: dict[int, torch.Tensor] = {}
        self._future: Future[EvaluationResult] = Future()

    @property
    def num_finished(self) -> int:
        """Episodes that have ended."""
        return len(self._finished)

    def finished(self) -> dict[int, tuple[Rollout, torch.Tensor | None]]:
        """Episodes that have ended until now, by number, with the frames that they were to keep.

        If the inference process has to be restarted, none has: all are played again.
        """
        return {k: (rollout, self._frames.get(k)) for k, rollout in list(self._finished.items())}

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call ``callback()`` once the result is there, from the thread that has it."""
        self._future.add_done_callback(lambda _: callback())

    def done(self) -> bool:
        """Whether the result is there."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> EvaluationResult:
        """Wait for the result.

        Raises:
            TimeoutError: if it is not there after ``timeout_s`` seconds.
            RuntimeError: if the collector ended before the evaluation, an episode's worker kept
                crashing, or its task was quarantined.
        """
        try:
            return self._future.result(timeout_s)
        except TimeoutError:
            raise TimeoutError(
                f"The evaluation took more than timeout_s={timeout_s:g} s: {self.num_finished} of "
                f"{len(self.episodes)} episodes have ended. Raise it, or play fewer."
            ) from None

    def finish_episode(
        self, index: int, rollout: Rollout, frames: torch.Tensor | None = None
    ) -> None:
        """Called by the collector at the end of episode ``index``."""
        if frames is not None:
            self._frames[index] = frames
        self._finished[index] = rollout  # last: other threads look for it
        if len(self._finished) < len(self.episodes) or self.done():
            return
        rollouts = [self._finished[k] for k in range(len(self.episodes))]
        self._future.set_result(
            EvaluationResult(
                successes=[rollout.success for rollout in rollouts],
                episode_returns=[rollout.episode_return for rollout in rollouts],
                num_env_steps=[rollout.num_env_steps for rollout in rollouts],
                policy_version=max(rollout.last_policy_version for rollout in rollouts),
                frames=self._frames,
            )
        )

    def begin_anew(self) -> None:
        """Called by the collector when all episodes have to be played again."""
        self._finished.clear()
        self._frames.clear()

    def fail(self, error: Exception) -> None:
        """Called by the collector when it ends before the evaluation does."""
        if not self._future.done():
            self._future.set_exception(error)
