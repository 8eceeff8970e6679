# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Runs recorded by TorchRL's loggers for CSV files and Weights & Biases."""

from __future__ import annotations

import importlib.util
import sys
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image

from torchrl_dvla.recording import RunRecorder, check_backend, recorder


def test_csv_files_hold_scalars_videos_and_texts(tmp_path):
    with RunRecorder(tmp_path / "run") as run:
        run.scalars({"loss/entropy": 1.5, "optim/lr": float("nan")}, step=1, env_steps=40)
        run.scalars({"collector/success_rate": 0.25}, step=2, env_steps=80)
        run.hparams({"optim.lr": 0.1, "kl": None})
        run.video("eval/episode_0", torch.zeros(2, 3, 4, 6, dtype=torch.uint8), step=2)
        run.images("eval/start", torch.zeros(3, 3, 4, 6, dtype=torch.uint8), step=2)
        run.text("settings", "seed: 0")
    files = {p.relative_to(tmp_path / "run").as_posix(): p for p in tmp_path.rglob("*.*")}
    assert set(files) == {
        "scalars/loss/entropy.csv",
        "scalars/collector/success_rate.csv",
        "scalars/Overview_by_env_steps/sampled_success.csv",
        "texts/hparams0.txt",
        "texts/settings.md",
        "videos/eval/episode_0.gif",
        "images/eval/start_2.png",
    }
    assert files["scalars/Overview_by_env_steps/sampled_success.csv"].read_text() == "80,0.25\n"
    assert files["texts/hparams0.txt"].read_text() == "optim.lr: 0.1"
    assert Image.open(files["images/eval/start_2.png"]).size == (18, 4)


def test_a_resumed_run_goes_on_in_its_csv_files(tmp_path):
    with RunRecorder(tmp_path) as run:
        for step in range(1, 4):
            run.scalars({"collector/success_rate": step / 4}, step=step, env_steps=100 * step)
    with RunRecorder(tmp_path, start_step=3, start_env_steps=250) as run:
        run.scalars({"collector/success_rate": 1.0}, step=3, env_steps=290)
    scalars = tmp_path / "scalars"
    assert (scalars / "collector/success_rate.csv").read_text() == "1,0.25\n2,0.5\n3,1.0\n"
    by_env_steps = scalars / "Overview_by_env_steps/sampled_success.csv"
    assert by_env_steps.read_text() == "100,0.25\n200,0.5\n290,1.0\n"


def test_a_run_of_weights_and_biases_can_be_resumed_and_has_videos(tmp_path, monkeypatch):
    made, wandb = MagicMock(), MagicMock()
    monkeypatch.setattr(recorder, "get_logger", made)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger = made.return_value
    folder = tmp_path / "toy" / "time_seed0"
    with RunRecorder(folder, backend="wandb") as run:
        run.scalars({"optim/lr": 0.5}, step=3)
        run.hparams({"seed": 0})
        run.video("eval/episode_0", torch.zeros(2, 3, 4, 6, dtype=torch.uint8), step=3)
    made.assert_called_once_with(
        "wandb",
        logger_name=str(folder),
        experiment_name="time_seed0",
        wandb_kwargs={"project": "toy", "id": "time_seed0"},
    )
    logger.log_scalar.assert_called_once_with("optim/lr", 0.5, step=3)
    logger.log_hparams.assert_called_once_with({"seed": 0})
    wandb.Video.assert_called_once_with(
        str(folder / "videos/eval/episode_0.gif"), caption="update 3"
    )
    logger.experiment.log.assert_called_once_with({"eval/episode_0": wandb.Video.return_value})
    logger.experiment.finish.assert_called_once_with()
    with pytest.raises(RuntimeError, match=r"The recorder was closed by close\(\)"):
        run.video("a", torch.zeros(1, 3, 4, 6, dtype=torch.uint8), step=3)


def test_a_logger_without_its_package_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_backend("csv")
    with pytest.raises(ImportError, match=r"log\.backend=wandb .*`pip install wandb`"):
        check_backend("wandb")
