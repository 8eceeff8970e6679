# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TensorBoard files of a run: scalars under documented names, rollout videos, a dashboard."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torchrl.record.loggers import get_logger

__all__ = ["DASHBOARD", "TensorBoardRecorder", "check_writable", "encode_gif"]

#: Charts of the custom-scalars tab: category -> chart -> regular expressions of scalar names.
DASHBOARD: dict[str, dict[str, list[str]]] = {
    "Success": {
        "greedy, held-out initial states": [r"eval/success_rate", r"eval_subset/success_rate"],
        "sampled, training episodes": [r"collector/success_rate"],
        "episode length (env steps)": [r"collector/episode_env_steps", r"eval.*/episode_env_steps"],
    },
    "Lanes": {
        "busy share": [r"lane/[a-z]+_busy"],
        "idle share by reason": [r"lane/[a-z]+_idle_.+"],
        "overlap of the lanes": [r"lane/overlap"],
        "critical lane (0 sampling, 1 inference, 2 gradient, 3 distribution)": [r"lane/critical"],
        "throughput": [r"collector/env_steps_per_s", r"collector/decisions_per_s"],
    },
    "Staleness": {
        "policy lag of learned decisions": [r"staleness/policy_lag_(mean|max)"],
        "effective sample share": [r"loss/ESS"],
        "weights: publish duration": [r"weights/publish_s"],
    },
    "Groups": {
        "admitted, kept, dropped": [r"buffer/groups_(admitted|kept|dropped|learned)"],
        "share of kept groups": [r"groups/kept_share"],
        "mean return of learned groups": [r"groups/mean_return"],
    },
    "Loss": {
        "losses": [r"loss/loss_.+"],
        "clip fraction": [r"loss/clip_fraction"],
        "divergence": [r"loss/kl_approx", r"loss/kl_to_ref"],
        "entropy": [r"loss/entropy"],
        "gradient norm": [r"optim/grad_norm"],
        "learning rate": [r"optim/lr"],
    },
    "Memory and faults": {
        "pages": [r"memory/environment/pages_.+"],
        "bytes of the two pools": [r"memory/.+/(used|peak|reserved)_bytes"],
        "faults": [r"faults/.+"],
    },
}


def check_writable(path: str | os.PathLike[str], *, name: str = "log.dir") -> Path:
    """Create the folder ``path`` and check that a file can be written into it.

    Args:
        path (str or os.PathLike): the folder.

    Keyword Args:
        name (str): name of the setting, for the error.

    Returns:
        The folder as an absolute path.

    Raises:
        ValueError: if it cannot be made or written to.
    """
    folder = Path(path).expanduser().absolute()
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written to, got {str(folder)!r} "
            f"({error.strerror or error}). Choose another one: {name}=/path/with/write/access."
        ) from error
    return folder


def encode_gif(frames: torch.Tensor, *, fps: float = 10.0) -> bytes:
    """Animated GIF of images, the video format that TensorBoard plays.

    Args:
        frames (torch.Tensor): ``uint8`` images ``[T, 3, H, W]``.

    Keyword Args:
        fps (float): frames per second. GIF counts in hundredths of a second. Defaults to ``10``.

    Returns:
        The file's content.

    Raises:
        ValueError: if ``frames`` are no such images.

    Examples:
        >>> encode_gif(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))[:6]
        b'GIF89a'
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(
            f"frames must be uint8 [T, 3, H, W] with T >= 1, got {frames.dtype} "
            f"{list(frames.shape)}. Stack camera images along a new first dimension."
        )
    images = [
        # One palette a frame: a shared one smears a scene's colours.
        Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).quantize(colors=256)
        for frame in frames.cpu()
    ]
    out = io.BytesIO()
    images[0].save(
        out,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
        # Pillow would merge equal neighbours and so shorten the pause of a robot that waits.
        optimize=False,
    )
    return out.getvalue()


class TensorBoardRecorder:
    """Writer of a run's event files, through TorchRL's TensorBoard logger.

    On top of the logger it arranges the dashboard (:data:`DASHBOARD`, tab "Custom Scalars"), and
    writes videos itself: ``SummaryWriter.add_video`` needs ``moviepy.editor``, which current
    moviepy no longer has.

    Args:
        log_dir (str or os.PathLike): folder of the event files; made if missing.

    Keyword Args:
        start_step (int, optional): step at which a resumed run goes on. What an interrupted run
            logged at later steps is hidden. Defaults to ``None``, a new run.

    Raises:
        ValueError: if the folder cannot be written to.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TensorBoardRecorder(folder) as recorder:
        ...         recorder.scalars({"loss/entropy": 1.5}, step=0)
        ...     len(list(Path(folder).glob("events.out.tfevents.*")))
        1
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, start_step: int | None = None) -> None:
        folder = check_writable(log_dir, name="log_dir")
        self._logger = get_logger(
            "tensorboard", logger_name=str(folder.parent), experiment_name=folder.name
        )
        self.log_dir = folder
        if start_step is not None:
            self._hide_from(start_step)
        layout = {
            category: {chart: ["Multiline", tags] for chart, tags in charts.items()}
            for category, charts in DASHBOARD.items()
        }
        self._writer.add_custom_scalars(layout)

    @property
    def logger(self) -> Any:
        """TorchRL's logger.

        Raises:
            RuntimeError: after :meth:`close`: TensorBoard's writer would begin another file.
        """
        if self._logger is None:
            raise RuntimeError("The recorder was closed by close(). Make another for more events.")
        return self._logger

    @property
    def _writer(self) -> Any:
        return self.logger.experiment

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Write scalars by name; those that are not finite are left out.

        Every name has a line in the guide's page on metrics.
        """
        for name, value in values.items():
            number = float(value)
            if math.isfinite(number):
                self.logger.log_scalar(name, number, step=step)

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
        row = torch.cat(list(images.cpu()), dim=-1)
        self._writer.add_image(name, row, global_step=step)

    def text(self, name: str, text: str, *, step: int = 0) -> None:
        """Write Markdown, shown in the tab "Text"."""
        self._writer.add_text(name, text, global_step=step)

    def flush(self) -> None:
        """Flush the event file to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file; safe to call twice."""
        if self._logger is not None:
            self._writer.close()
        self._logger = None

    def __enter__(self) -> TensorBoardRecorder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _hide_from(self, step: int) -> None:
        # SummaryWriter takes purge_step only when it is built, which TorchRL's logger does without.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._writer.file_writer.add_event(Event(step=step, session_log=start), step)
