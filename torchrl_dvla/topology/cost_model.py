# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the work of each lane costs: the input of the planner, as a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from torchrl_dvla.differences import differences, join_some
from torchrl_dvla.validation import (
    Natural,
    NonNegative,
    Positive,
    Range,
    check_fields,
    from_mapping,
)

__all__ = ["LaneCosts"]

Share = Annotated[float, Range(above=0, most=1)]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class LaneCosts:
    """Seconds that the work of each lane takes one core or one GPU, and the bytes that it moves.

    ``torchrl-dvla calibrate`` measures them; they may as well be written by hand.

    Args:
        name (str): of the configuration.
        env_step_s (float): an env step, with its share of the rendering.
        env_steps_per_decision (float): env steps that a decision executes on average.
        decisions_per_rollout (float): decisions of a rollout on average.
        call_row_s (float): what each row adds to a policy call.
        learn_row_s (float): learning a row: every epoch of it, with its share of optimizer steps.
        row_bytes (int): a decision in its row.
        version_bytes (int): a version of the weights.
        call_s (float): what a policy call takes however many rows it has.
        reset_s (float): the reset that begins a rollout.
        loop_s (float): the collector's own thread, for a decision.
        publish_s (float): publishing a version to the readers of the learner's node.
        trained_bytes (int): gradients of the trained parameters. Defaults to *version_bytes*.
        optimizer_steps_per_row (float): optimizer steps of an update over its rows. They count
            where several ranks reduce gradients.
        learned_share (float): share of the sampled decisions that are learned; the others are of
            groups without contrast.
        env_bytes (int): main memory of one environment. 0 bounds nothing.
        env_device (str): where environments simulate, ``"cpu"`` or ``"cuda"``.
        policy_device (str): where the policy is called and learns.
        settings (Mapping): settings of the configuration that the costs depend on, by full name.
        machine (Mapping): where they were measured.

    Raises:
        ValueError: for a cost that is negative, not finite, or 0 where none can be free.

    Examples:
        >>> costs = LaneCosts("toy", 1e-3, 4, 10, 1e-3, 2e-3, row_bytes=100, version_bytes=1000,
        ...     call_s=2e-3, reset_s=0.02)
        >>> round(costs.sample_s, 9), costs.call_seconds(batch_size=4)
        (0.006, 0.0015)
        >>> LaneCosts("toy", 0.0, 4, 10, 1e-3, 2e-3, row_bytes=100, version_bytes=1000)
        Traceback (most recent call last):
        ...
        ValueError: env_step_s must be positive, got 0.0. Correct it.
    """

    name: str
    env_step_s: Positive
    env_steps_per_decision: Positive
    decisions_per_rollout: Annotated[float, Range(1)]
    call_row_s: Positive
    learn_row_s: Positive
    row_bytes: Annotated[int, Range(1)]
    version_bytes: Annotated[int, Range(1)]
    call_s: NonNegative = 0.0
    reset_s: NonNegative = 0.0
    loop_s: NonNegative = 0.0
    publish_s: NonNegative = 0.0
    trained_bytes: Natural | None = None
    optimizer_steps_per_row: NonNegative = 0.0
    learned_share: Share = 1.0
    env_bytes: Natural = 0
    env_device: Device = "cpu"
    policy_device: Device = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.trained_bytes is None:
            object.__setattr__(self, "trained_bytes", self.version_bytes)
        if self.env_device == "cuda" and self.policy_device == "cpu":
            raise ValueError(
                "env_device must be 'cpu' where policy_device is, got 'cuda'. Observations of a "
                "GPU's simulation are decided on there: set policy_device to 'cuda'."
            )

    @property
    def sample_s(self) -> float:
        """Seconds of simulation behind a decision, with its share of the reset."""
        steps_s = self.env_step_s * self.env_steps_per_decision
        return steps_s + self.reset_s / self.decisions_per_rollout

    def call_seconds(self, batch_size: float) -> float:
        """Seconds of a policy call behind a decision, in batches of *batch_size*."""
        return self.call_s / batch_size + self.call_row_s

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON, in the order of the fields."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LaneCosts:
        """The costs of a JSON file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not JSON, lacks a cost, or has one that is unknown or impossible.
        """
        given = Path(path).expanduser()
        if not given.is_file():
            raise FileNotFoundError(
                f"The costs must be a JSON file, got {str(given)!r}, where none is. "
                "`torchrl-dvla calibrate` measures them."
            )
        try:
            data = json.loads(given.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{given} must be JSON, got: {error}. `torchrl-dvla calibrate` writes it."
            ) from None
        if not isinstance(data, dict):
            raise ValueError(f"{given} must be a JSON object, got {data!r:.99}. Measure them anew.")
        try:
            return from_mapping(cls, data)
        except ValueError as error:
            raise ValueError(f"{given}: {error}") from None

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Require that they are the costs of a configuration.

        Costs without settings, which were written by hand, are those of any.

        Args:
            settings (Mapping): what they depend on, by full name.

        Raises:
            ValueError: naming the settings that differ.
        """
        if self.settings and (wrong := differences(settings, self.settings)):
            raise ValueError(
                f"The costs must be those of this configuration, got those of {self.name!r}: "
                f"{join_some(wrong)}. Measure them with `torchrl-dvla calibrate` and the same "
                "settings."
            )
