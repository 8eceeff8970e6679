# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Recorder of a run: scalars under documented names, videos and texts, by a logger of TorchRL."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torchrl.record.loggers import get_logger

__all__ = [
    "BY_ENV_STEPS",
    "LogBackend",
    "RunRecorder",
    "check_backend",
    "check_writable",
    "encode_gif",
]

#: Names of TorchRL's loggers that a run may be recorded by.
LogBackend = Literal["tensorboard", "csv", "wandb"]

#: Prefix of the scalars whose steps are env steps. TensorBoard sorts names, capitals first.
BY_ENV_STEPS = "Overview_by_env_steps/"
#: What is recorded there a second time, and as what.
_BY_ENV_STEPS = {
    "eval/success_rate": "greedy_success",
    "eval_subset/success_rate": "greedy_success_subset",
    "collector/success_rate": "sampled_success",
    "groups/mean_return": "mean_return",
}


def check_backend(backend: LogBackend) -> None:
    """Require the package that a logger writes with.

    Raises:
        ImportError: with the line that installs it.
    """
    if backend != "csv" and importlib.util.find_spec(backend) is None:
        raise ImportError(
            f"log.backend={backend} needs the package {backend}, which is not installed. Install "
            f"it with `pip install {backend}`, or set log.backend=csv."
        )


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


class RunRecorder:
    """Recorder of a run by a logger of TorchRL, for CSV files and Weights & Biases.

    Videos and images are files ``videos/*.gif`` and ``images/*.png`` of the run's folder, since the
    loggers' own writing of videos needs more packages; W&B gets them, too.

    Args:
        log_dir (str or os.PathLike): folder of the run; made if missing.

    Keyword Args:
        backend (str): ``"csv"`` or ``"wandb"``; for ``"tensorboard"`` there is
            :class:`~torchrl_dvla.recording.TensorBoardRecorder`. Defaults to ``"csv"``: a file
            ``scalars/<name>.csv`` for each scalar, with lines ``step,value``.
        start_step (int, optional): step at which a resumed run goes on. What an interrupted run
            recorded at later steps is removed. Defaults to ``None``, a new run.
        start_env_steps (int): the same for scalars whose steps are env steps. Defaults to 0.

    Raises:
        ValueError: if the folder cannot be written to.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with RunRecorder(folder) as recorder:
        ...         recorder.scalars({"loss/entropy": 1.5}, step=0)
        ...     (Path(folder) / "scalars" / "loss" / "entropy.csv").read_text().strip()
        '0,1.5'
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        backend: LogBackend = "csv",
        start_step: int | None = None,
        start_env_steps: int = 0,
    ) -> None:
        self.log_dir: Path = check_writable(log_dir, name="log_dir")
        if start_step is not None:
            self._remove_from(start_step, start_env_steps)
        folder, kwargs = self.log_dir.parent, {}
        if backend == "wandb":
            # Its own folder goes into the run's. With the same id, a resumed run goes on there.
            kwargs["wandb_kwargs"] = {"project": folder.name, "id": self.log_dir.name}
            folder = self.log_dir
        self._backend = backend
        self._logger = get_logger(
            backend, logger_name=str(folder), experiment_name=self.log_dir.name, **kwargs
        )

    @property
    def logger(self) -> Any:
        """TorchRL's logger.

        Raises:
            RuntimeError: after :meth:`close`: TensorBoard's writer would begin another file.
        """
        if self._logger is None:
            raise RuntimeError("The recorder was closed by close(). Make another for more events.")
        return self._logger

    def scalars(
        self, values: Mapping[str, float], *, step: int, env_steps: int | None = None
    ) -> None:
        """Write scalars by name; those that are not finite are left out.

        Every name has a line in the guide's page on metrics.

        Args:
            values (Mapping): the scalars.

        Keyword Args:
            step (int): learner updates until now.
            env_steps (int, optional): env steps of training until now. With it, success and return
                are written a second time, over env steps, under :data:`BY_ENV_STEPS`.
        """
        for name, value in values.items():
            number = float(value)
            if not math.isfinite(number):
                continue
            self.logger.log_scalar(name, number, step=step)
            if env_steps is not None and name in _BY_ENV_STEPS:
                self.logger.log_scalar(BY_ENV_STEPS + _BY_ENV_STEPS[name], number, step=env_steps)

    def video(self, name: str, frames: torch.Tensor, *, step: int, fps: float = 10.0) -> None:
        """Write ``uint8`` images ``[T, 3, H, W]`` as a video."""
        path = self._file("videos", f"{name}.gif")
        path.write_bytes(encode_gif(frames, fps=fps))
        self._upload(name, path, step)

    def images(self, name: str, images: torch.Tensor, *, step: int) -> None:
        """Write ``uint8`` images ``[B, 3, H, W]`` as one grid row."""
        path = self._file("images", f"{name}_{step}.png")
        Image.fromarray(grid_row(images).permute(1, 2, 0).numpy()).save(path)
        self._upload(name, path, step)

    def text(self, name: str, text: str, *, step: int = 0) -> None:
        """Write Markdown."""
        self._file("texts", f"{name}.md").write_text(text)

    def hparams(self, settings: Mapping[str, Any]) -> None:
        """Write the settings that runs are compared by; those that are ``None`` are left out."""
        self.logger.log_hparams(plain_settings(settings))

    def flush(self) -> None:
        """Flush what was written to disk."""

    def close(self) -> None:
        """Flush and close what was written; safe to call twice."""
        if self._logger is not None and self._backend == "wandb":
            self._logger.experiment.finish()
        self._logger = None

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _file(self, folder: str, name: str) -> Path:
        self.logger  # noqa: B018 - refuses after close()
        path = self.log_dir / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _upload(self, name: str, path: Path, step: int) -> None:
        if self._backend == "wandb":
            wandb = importlib.import_module("wandb")

            kind = wandb.Video if path.suffix == ".gif" else wandb.Image
            self.logger.experiment.log({name: kind(str(path), caption=f"update {step}")})

    def _remove_from(self, step: int, env_steps: int) -> None:
        folder = self.log_dir / "scalars"
        for path in folder.rglob("*.csv"):
            is_by_env_steps = path.relative_to(folder).as_posix().startswith(BY_ENV_STEPS)
            start = env_steps if is_by_env_steps else step
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if int(line.split(",")[0]) < start))


def grid_row(images: torch.Tensor) -> torch.Tensor:
    """Images ``[B, 3, H, W]`` side by side, ``[3, H, B * W]``."""
    return torch.cat(list(images.cpu()), dim=-1)


def plain_settings(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Settings as what a table of runs can show."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in settings.items()
        if value is not None
    }
