# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TensorBoard files of a run: scalars, rollout videos, hyperparameters, a dashboard."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams

from torchrl_dvla.recording.recorder import (
    BY_ENV_STEPS,
    RunRecorder,
    encode_gif,
    grid_row,
    plain_settings,
)

__all__ = ["DASHBOARD", "TensorBoardRecorder", "read_events"]


def _with_interval(name: str) -> list[str]:
    """A success rate and the ends of its interval, drawn as a line in a band."""
    return [f"{name}/success_{what}" for what in ("rate", "low", "high")]


#: Charts of the custom-scalars tab: category -> chart -> regular expressions of scalar names.
DASHBOARD: dict[str, dict[str, list[str]]] = {
    "Overview": {
        "greedy success, all held-out scenes": _with_interval("eval"),
        "greedy success, a few held-out scenes": _with_interval("eval_subset"),
        "sampled success, training episodes": [r"collector/success_rate"],
        "mean return of learned groups": [r"groups/mean_return"],
        "env steps/s": [r"collector/env_steps_per_s"],
        "policy lag": [r"staleness/policy_lag_mean"],
        "env steps of a greedy episode": [r"eval/episode_env_steps"],
        "env steps of a training episode": [r"collector/episode_env_steps"],
    },
    "Lanes": {
        "busy share": [r"lane/[a-z]+_busy"],
        "idle share by reason": [r"lane/[a-z]+_idle_.+"],
        "overlap of the lanes": [r"lane/overlap"],
        "critical lane (0 sampling, 1 inference, 2 gradient, 3 distribution)": [r"lane/critical"],
        "decisions/s": [r"collector/decisions_per_s"],
    },
    "Staleness": {
        "policy lag of learned decisions": [r"staleness/policy_lag_(mean|max)"],
        "effective sample share": [r"loss/ESS"],
        "weights: publish duration": [r"weights/publish_s"],
    },
    "Groups": {
        "admitted, kept, dropped": [r"buffer/groups_(admitted|kept|dropped|learned)"],
        "share of kept groups": [r"groups/kept_share"],
    },
    "Loss": {
        "losses": [r"loss/loss_.+"],
        "clip fraction": [r"loss/clip_fraction", r"loss/clip_fraction_(low|high|dual)"],
        "ratio to the behaviour policy": [f"loss/ratio_p{share}" for share in ("05", "50", "95")],
        "divergence": [r"loss/kl_approx", r"loss/kl_to_ref"],
        "entropy": [r"loss/entropy"],
        "gradient norm": [r"optim/grad_norm"],
        "learning rate": [r"optim/lr"],
    },
    "Cluster": {
        "nodes by state": [r"cluster/nodes_(healthy|restarting|stale|dead)"],
        "versions behind": [r"cluster/version_lag"],
        "bytes between nodes": [r"cluster/bytes_.+"],
    },
    "Memory and faults": {
        "pages": [r"memory/environment/pages_.+"],
        "bytes of the two pools": [r"memory/.+/(used|peak|reserved)_bytes"],
        "faults": [r"faults/.+"],
    },
}


def read_events(folder: str | os.PathLike[str]) -> EventAccumulator:
    """All event files of a folder, as one; what a resumed run has hidden is left out."""
    return EventAccumulator(os.fspath(folder), size_guidance={"scalars": 0}).Reload()


class TensorBoardRecorder(RunRecorder):
    """Recorder of a run's event files, through TorchRL's TensorBoard logger.

    On top of the logger it arranges the dashboard (:data:`DASHBOARD`, tab "Custom Scalars") with
    the charts that the run has scalars for, and writes videos itself: ``SummaryWriter.add_video``
    needs ``moviepy.editor``, which current moviepy no longer has.

    Args:
        log_dir (str or os.PathLike): folder of the event files; made if missing.

    Keyword Args:
        start_step (int, optional): step at which a resumed run goes on. What an interrupted run
            logged at later steps is hidden. Defaults to ``None``, a new run.
        start_env_steps (int): the same for scalars whose steps are env steps. Defaults to 0.

    Raises:
        ValueError: if the folder cannot be written to.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TensorBoardRecorder(folder) as recorder:
        ...         recorder.scalars({"loss/entropy": 1.5}, step=0)
        ...     len(list(Path(folder).glob("events.out.tfevents.*")))
        1
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        start_step: int | None = None,
        start_env_steps: int = 0,
    ) -> None:
        self._names: set[str] = set()
        self._layout: dict[str, dict[str, list[Any]]] = {}
        self._by_env_steps: list[tuple[str, Any]] = []
        super().__init__(
            log_dir,
            backend="tensorboard",
            start_step=start_step,
            start_env_steps=start_env_steps,
        )
        if start_step is not None:
            self._hide_from(start_step)

    @property
    def _writer(self) -> Any:
        return self.logger.experiment

    def scalars(
        self, values: Mapping[str, float], *, step: int, env_steps: int | None = None
    ) -> None:
        """Write scalars by name; those that are not finite are left out.

        Every name has a line in the guide's page on metrics. A chart of the dashboard appears with
        its first scalar.

        Args:
            values (Mapping): the scalars.

        Keyword Args:
            step (int): learner updates until now.
            env_steps (int, optional): env steps of training until now. With it, success and return
                are written a second time, over env steps, under ``Overview_by_env_steps/``.
        """
        super().scalars(values, step=step, env_steps=env_steps)
        if not values.keys() <= self._names:
            self._names |= values.keys()
            self._arrange()

    def video(self, name: str, frames: torch.Tensor, *, step: int, fps: float = 10.0) -> None:
        """Write ``uint8`` images ``[T, 3, H, W]`` as a video, shown in the tab "Images"."""
        height, width = int(frames.shape[-2]), int(frames.shape[-1])
        image = Summary.Image(
            height=height,
            width=width,
            colorspace=3,
            encoded_image_string=encode_gif(frames, fps=fps),
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._writer.file_writer.add_summary(summary, step)

    def images(self, name: str, images: torch.Tensor, *, step: int) -> None:
        """Write ``uint8`` images ``[B, 3, H, W]`` as one grid row."""
        self._writer.add_image(name, grid_row(images), global_step=step)

    def text(self, name: str, text: str, *, step: int = 0) -> None:
        """Write Markdown, shown in the tab "Text"."""
        self._writer.add_text(name, text, global_step=step)

    def hparams(self, settings: Mapping[str, Any]) -> None:
        """Write the settings that runs are compared by, shown in the tab "HParams".

        Beside them it shows the newest greedy and sampled success. The logger's own method would
        write a second folder, which TensorBoard takes for another run.
        """
        metrics = dict.fromkeys(("eval/success_rate", "collector/success_rate"))
        for summary in hparams(plain_settings(settings), metrics):
            self._writer.file_writer.add_summary(summary)

    def flush(self) -> None:
        """Flush the event file to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file; safe to call twice."""
        if self._logger is not None:
            self._writer.close()
        super().close()

    def _arrange(self) -> None:
        """Write the dashboard anew if a chart got its first scalar: the newest one counts."""
        layout = {}
        for category, charts in DASHBOARD.items():
            shown = {
                title: ["Margin" if tags[-1].endswith("_high") else "Multiline", tags]
                for title, tags in charts.items()
                if any(re.fullmatch(tag, name) for tag in tags for name in self._names)
            }
            if shown:
                layout[category] = shown
        if layout != self._layout:
            self._writer.add_custom_scalars(layout)
            self._layout = layout

    def _remove_from(self, step: int, env_steps: int) -> None:
        """Keep in memory what is to be seen again once all later steps are hidden."""
        events = read_events(self.log_dir)
        self._names = set(events.Tags()["scalars"])
        self._by_env_steps = [
            (name, point)
            for name in sorted(self._names)
            if name.startswith(BY_ENV_STEPS)
            for point in events.Scalars(name)
            if point.step < env_steps
        ]

    def _hide_from(self, step: int) -> None:
        # SummaryWriter takes purge_step only when it is built, which TorchRL's logger does without.
        start = SessionLog(status=SessionLog.START)
        self._writer.file_writer.add_event(Event(step=step, session_log=start), step)
        # That hides the steps of all scalars, though env steps are larger: once more.
        for name, point in self._by_env_steps:
            self._writer.add_scalar(name, point.value, point.step, point.wall_time)
        self._by_env_steps.clear()
        self._arrange()
