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

from torchrl_dvla.recording import DASHBOARD, TensorBoardRecorder, check_writable, encode_gif


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


def test_the_dashboard_opens_arranged(tmp_path):
    TensorBoardRecorder(tmp_path / "tb").close()
    (event,) = _events(tmp_path / "tb").Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(DASHBOARD)
    lanes = {chart.title: list(chart.multiline.tag) for chart in layout.category[1].chart}
    assert lanes["busy share"] == [r"lane/[a-z]+_busy"]
    for charts in DASHBOARD.values():
        for tags in charts.values():
            for tag in tags:
                re.compile(tag)


def test_a_resumed_run_hides_what_came_after_the_checkpoint(tmp_path):
    with TensorBoardRecorder(tmp_path / "tb") as recorder:
        for step in range(4):
            recorder.scalars({"loss/entropy": float(step)}, step=step)
    with TensorBoardRecorder(tmp_path / "tb", start_step=2) as recorder:
        recorder.scalars({"loss/entropy": 20.0}, step=2)
    values = [(e.step, e.value) for e in _events(tmp_path / "tb").Scalars("loss/entropy")]
    assert values == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_a_writable_folder_is_made_and_left_empty_and_another_refused_by_name(tmp_path):
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"log\.dir must be a folder that can be written to, got"):
        check_writable(tmp_path / "file" / "logs")
