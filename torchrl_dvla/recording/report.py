# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Final report of a run: success rates with confidence intervals, throughput, policy lag."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["RunReport", "SuccessRate", "wilson_interval"]

#: Two-sided 95 % quantile of the normal distribution.
_Z_95 = 1.959963984540054


def wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    r"""95 % Wilson score interval of a success probability.

    .. math::
        \frac{\hat p + \frac{z^2}{2n} \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4n^2}}}
             {1 + \frac{z^2}{n}}

    Unlike :math:`\hat p \pm z \sqrt{\hat p (1 - \hat p) / n}` it stays in ``[0, 1]`` and does not
    shrink to a point when no or every trial succeeds, both common with 50 evaluation episodes.

    Args:
        num_successes (int): successful trials.
        num_trials (int): trials, at least 1.

    Returns:
        The lower and the upper bound.

    Raises:
        ValueError: unless ``0 <= num_successes <= num_trials`` and ``num_trials >= 1``.

    Examples:
        >>> low, high = wilson_interval(10, 10)
        >>> f"{low:.3f} {high:.3f}"
        '0.722 1.000'

    Reference:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(
            "num_successes must lie in [0, num_trials] with num_trials >= 1, got "
            f"{num_successes} of {num_trials}. Pass counts, not rates."
        )
    rate, z = num_successes / num_trials, _Z_95
    centre = rate + z * z / (2 * num_trials)
    spread = z * math.sqrt(rate * (1 - rate) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class SuccessRate:
    """Success rate over evaluation episodes, with its confidence interval.

    Args:
        num_successes (int): successful episodes.
        num_episodes (int): episodes.

    Examples:
        >>> print(SuccessRate(31, 50))
        62.0 % (31/50, 95 % interval 48.2-74.1)
    """

    num_successes: int
    num_episodes: int

    @classmethod
    def of(cls, successes: Sequence[bool]) -> SuccessRate:
        """Count the outcomes of episodes."""
        return cls(sum(bool(success) for success in successes), len(successes))

    @property
    def rate(self) -> float:
        """Share of successful episodes, in ``[0, 1]``."""
        return self.num_successes / self.num_episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success probability."""
        return wilson_interval(self.num_successes, self.num_episodes)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{100 * self.rate:.1f} % ({self.num_successes}/{self.num_episodes}, "
            f"95 % interval {100 * low:.1f}-{100 * high:.1f})"
        )


@dataclass
class RunReport:
    """Table of a run's results, all measured during the run.

    Args:
        name (str): what was run.
        before (SuccessRate, optional): greedy success before training; ``None`` if not evaluated.
        after (SuccessRate, optional): the same after training, on the same episodes.
        lane_shares (Mapping): share of the training time that each lane was busy, in ``[0, 1]``.
        env_steps_per_s (float): env steps per second of training.
        decisions_per_s (float): policy calls per second of training.
        num_updates (int): learner updates.
        num_episodes (int): training episodes.
        num_env_steps (int): env steps of training episodes.
        mean_policy_lag (float): mean policy lag of the decisions learned from.
        max_policy_lag (int): largest policy lag of a decision learned from.
        training_s (float): duration of the training, evaluations before and after not included.
        ended_by (str): why training ended.
        checkpoint (str): path of the last checkpoint; empty if none was written.
        tasks (Mapping): of a run of several tasks ``before`` and ``after`` of each, by its name.
    """

    name: str
    before: SuccessRate | None
    after: SuccessRate | None
    lane_shares: Mapping[str, float]
    env_steps_per_s: float
    decisions_per_s: float
    num_updates: int
    num_episodes: int
    num_env_steps: int
    mean_policy_lag: float
    max_policy_lag: int
    training_s: float
    ended_by: str
    checkpoint: str
    tasks: Mapping[str, Mapping[str, SuccessRate]] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the table."""
        lanes = ", ".join(f"{lane} {100 * share:.0f} %" for lane, share in self.lane_shares.items())
        return [
            ("greedy success before", "not evaluated" if self.before is None else str(self.before)),
            ("greedy success after", "not evaluated" if self.after is None else str(self.after)),
            *[(f"  {name}", _before_and_after(found)) for name, found in self.tasks.items()],
            ("env steps/s", f"{self.env_steps_per_s:.1f} ({self.decisions_per_s:.1f} decisions/s)"),
            ("lanes busy", lanes),
            ("updates", str(self.num_updates)),
            ("episodes", f"{self.num_episodes} ({self.num_env_steps} env steps)"),
            ("policy lag", f"mean {self.mean_policy_lag:.2f}, max {self.max_policy_lag}"),
            ("training time", f"{_clock(self.training_s)} (ended by {self.ended_by})"),
            ("checkpoint", self.checkpoint or "none"),
        ]

    def to_text(self) -> str:
        """The table as aligned plain text."""
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        body = [f"{label:<{width}}  {value}" for label, value in rows]
        rule = "-" * min(80, max(len(line) for line in [*body, self.name]))
        return "\n".join([rule, self.name, rule, *body, rule])

    def to_markdown(self) -> str:
        """The table as Markdown, which TensorBoard's text panel renders."""
        lines = [f"| {self.name} | |", "|---|---|"]
        return "\n".join(lines + [f"| {label} | {value} |" for label, value in self.rows()])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figures as JSON."""
        data = asdict(self) | {"lane_shares": dict(self.lane_shares)}
        Path(path).write_text(json.dumps(data, indent=2) + "\n")


def _before_and_after(found: Mapping[str, SuccessRate]) -> str:
    shown = (found.get(name) for name in ("before", "after"))
    return " -> ".join(f"{s.num_successes}/{s.num_episodes}" if s else "-" for s in shown)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
