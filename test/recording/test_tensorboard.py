# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import io
import math
import re

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer import event_file_writer

from torchrl_dvla.recording import DASHBOARD, TensorBoardRecorder, check_writable, encode_gif


@pytest.fixture(autouse=True)
def _files_in_order(monkeypatch):
    """Event files of one second are read by their numbers' digits: 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def _events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    return accumulator.Reload()


def test_scalars_are_written_where_they_are_finite(tmp_path):
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        recorder.scalars({"loss/entropy": 1.5, "optim/lr": math.nan}, step=4)
        recorder.scalars({"loss/entropy": torch.tensor(0.5)}, step=5)
    events = _events(tmp_path / "tb")
    assert events.Tags()["scalars"] == ["loss/entropy"]
    assert [(e.step, e.value) for e in events.Scalars("loss/entropy")] == [(4, 1.5), (5, 0.5)]


def test_a_video_is_a_gif_with_every_frame_at_its_pace(tmp_path):
    frames = torch.zeros(5, 3, 8, 12, dtype=torch.uint8)
    frames[2:, 0] = 255
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        recorder.video("eval/rollout", frames, step=3, fps=4)
    (event,) = _events(tmp_path / "tb").Images("eval/rollout")
    assert (event.step, event.width, event.height) == (3, 12, 8)
    image = Image.open(io.BytesIO(event.encoded_image_string))
    durations, colours = [], []
    for k in range(image.n_frames):
        image.seek(k)
        durations.append(image.info["duration"])
        colours.append(image.convert("RGB").getpixel((0, 0)))
    # Pillow shows equal neighbours as one frame of their summed duration: none may get lost.
    assert sum(durations) == 5 * 250
    assert (colours[0], colours[-1]) == ((0, 0, 0), (255, 0, 0))


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 3, 4, 4),
        torch.zeros(2, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
    ],
)
def test_what_is_no_video_is_refused(frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[T, 3, H, W\]"):
        encode_gif(frames)


def test_camera_images_stand_side_by_side(tmp_path):
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        recorder.images("camera/start", torch.zeros(3, 3, 8, 10, dtype=torch.uint8), step=0)
    (event,) = _events(tmp_path / "tb").Images("camera/start")
    assert (event.width, event.height) == (30, 8)


def test_a_closed_recorder_begins_no_other_file(tmp_path):
    with TensorBoardRecorder(tmp_path) as recorder:
        pass
    recorder.close()
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for write in (
        lambda: recorder.scalars({"a": 1.0}, step=0),
        lambda: recorder.text("a", "b"),
        lambda: recorder.images("a", image, step=0),
        lambda: recorder.video("a", image, step=0),
        recorder.flush,
    ):
        with pytest.raises(RuntimeError, match=r"The recorder was closed by close\(\)"):
            write()
    assert len(list(tmp_path.iterdir())) == 1


def _layout(folder):
    """Titles of the dashboard's charts, by category, and their content, of the newest layout."""
    event = _events(folder).Tensors("custom_scalars__config__")[-1]
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {group.title: {chart.title: chart for chart in group.chart} for group in layout.category}


def test_the_dashboard_has_every_chart_once_the_run_has_its_scalars(tmp_path):
    for charts in DASHBOARD.values():
        for tags in charts.values():
            for tag in tags:
                re.compile(tag)
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        tags = [tag for charts in DASHBOARD.values() for tags in charts.values() for tag in tags]
        examples = [re.sub(r"\(mean\|max\)", "max", tag) for tag in tags]
        examples = [re.sub(r"\([a-z|]+\)", lambda m: m[0][1:-1].split("|")[0], e) for e in examples]
        examples = [re.sub(r"\[a-z\]\+|\.[+*]", "x", example) for example in examples]
        recorder.scalars(dict.fromkeys(examples, 1.0), step=1)
    layout = _layout(tmp_path / "tb")
    assert {group: list(charts) for group, charts in layout.items()} == {
        group: list(charts) for group, charts in DASHBOARD.items()
    }
    assert next(iter(layout)) == "Overview"
    assert list(layout["Lanes"]["busy share"].multiline.tag) == [r"lane/[a-z]+_busy"]


def test_no_chart_of_the_dashboard_is_empty(tmp_path):
    greedy = {"eval/success_rate": 0.5, "eval/success_low": 0.2, "eval/success_high": 0.8}
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        recorder.scalars(greedy, step=0)
        recorder.scalars({"loss/loss_objective": 1.0, "optim/lr": math.nan}, step=1)
    layout = _layout(tmp_path / "tb")
    assert {group: list(charts) for group, charts in layout.items()} == {
        "Overview": ["greedy success, all held-out scenes"],
        "Loss": ["losses", "learning rate"],
    }
    (band,) = layout["Overview"]["greedy success, all held-out scenes"].margin.series
    assert (band.value, band.lower, band.upper) == tuple(greedy)
    with TensorBoardRecorder(tmp_path / "tb", start_step=2) as recorder:
        recorder.scalars({"collector/success_rate": 0.5}, step=2)
    assert list(_layout(tmp_path / "tb")["Overview"]) == [
        "greedy success, all held-out scenes",
        "sampled success, training episodes",
    ]


def test_evaluation_and_subset_are_never_in_one_chart():
    for charts in DASHBOARD.values():
        for tags in charts.values():
            found = [
                any(re.fullmatch(tag, f"{name}/{what}") for tag in tags)
                for name in ("eval", "eval_subset")
                for what in ("success_rate", "episode_env_steps")
            ]
            assert not (any(found[:2]) and any(found[2:]))


def test_success_is_also_there_over_env_steps(tmp_path):
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        recorder.scalars({"eval/success_rate": 0.25}, step=0, env_steps=0)
        recorder.scalars({"collector/success_rate": 0.5, "optim/lr": 1.0}, step=1, env_steps=900)
    events = _events(tmp_path / "tb")
    steps = {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }
    assert steps == {
        "eval/success_rate": [(0, 0.25)],
        "Overview_by_env_steps/greedy_success": [(0, 0.25)],
        "collector/success_rate": [(1, 0.5)],
        "Overview_by_env_steps/sampled_success": [(900, 0.5)],
        "optim/lr": [(1, 1.0)],
    }


def test_hyperparameters_stand_beside_success_without_a_second_run(tmp_path):
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        recorder.hparams({"optim.lr": 0.5, "seed": 3, "clip": (0.1, 0.2), "kl": None})
        recorder.scalars({"eval/success_rate": 0.25}, step=0)
    assert [path.is_file() for path in (tmp_path / "tb").iterdir()] == [True]
    content = {}
    for tag in ("experiment", "session_start_info"):
        data = _events(tmp_path / "tb").SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
        content[tag] = plugin_data_pb2.HParamsPluginData.FromString(data)
    metrics = content["experiment"].experiment.metric_infos
    assert [m.name.tag for m in metrics] == ["eval/success_rate", "collector/success_rate"]
    shown = content["session_start_info"].session_start_info.hparams
    assert set(shown) == {"optim.lr", "seed", "clip"}
    assert shown["optim.lr"].number_value == 0.5 and shown["clip"].string_value == "(0.1, 0.2)"


def test_a_resumed_run_hides_what_came_after_the_checkpoint(tmp_path):
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        for step in range(4):
            recorder.scalars({"loss/entropy": float(step)}, step=step)
    with TensorBoardRecorder(tmp_path / "tb", start_step=2) as recorder:
        recorder.scalars({"loss/entropy": 20.0}, step=2)
    values = [(e.step, e.value) for e in _events(tmp_path / "tb").Scalars("loss/entropy")]
    assert values == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_a_resumed_run_keeps_what_came_before_the_checkpoint_over_env_steps(tmp_path):
    success = "collector/success_rate"
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        for step in range(1, 4):
            recorder.scalars({success: step / 4}, step=step, env_steps=100 * step)
    with TensorBoardRecorder(tmp_path / "tb", start_step=3, start_env_steps=250) as recorder:
        recorder.scalars({success: 1.0}, step=3, env_steps=290)
    events = _events(tmp_path / "tb")
    assert [(e.step, e.value) for e in events.Scalars(success)] == [(1, 0.25), (2, 0.5), (3, 1.0)]
    found = events.Scalars("Overview_by_env_steps/sampled_success")
    assert [(e.step, e.value) for e in found] == [(100, 0.25), (200, 0.5), (290, 1.0)]


def test_a_writable_folder_is_made_and_left_empty_and_another_refused_by_name(tmp_path):
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"log\.dir must be a folder that can be written to, got"):
        check_writable(tmp_path / "file" / "logs")
