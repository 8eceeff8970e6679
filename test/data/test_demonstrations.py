# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tensordict import TensorDict
from torchrl.data.vla import UniformActionTokenizer
from torchrl.envs import TransformedEnv

from torchrl_dvla.data.augmentation import RandomShift, StateNoise, shift_image
from torchrl_dvla.data.demonstrations import (
    Demonstration,
    DemonstrationInfo,
    make_demonstration_buffer,
    stack_demonstrations,
)
from torchrl_dvla.envs import ToyChunkEnv

TOKENIZER = UniformActionTokenizer(3, low=-1.0, high=1.0)


def make_demo(seed=0, instruction="pick", success=True, num_rows=3):
    generator = torch.Generator().manual_seed(seed)
    rows = TensorDict(
        {
            "observation": {
                "image": torch.randint(0, 256, (num_rows, 3, 8, 8), generator=generator).byte(),
                "state": torch.full((num_rows, 2), float(seed)),
            },
            "vla_action": {"chunk": torch.zeros(num_rows, 4, 2)},
            "action_is_pad": torch.zeros(num_rows, 4, dtype=torch.bool),
        },
        [num_rows],
    )
    info = DemonstrationInfo(instruction, "suite", 0, seed, success, num_env_steps=4 * num_rows)
    return Demonstration(rows, info)


def test_round_trip(tmp_path):
    demo = make_demo(seed=5, instruction="put the bowl\non the 'plate'")
    demo.save(tmp_path / "deep" / "5.safetensors")
    loaded = Demonstration.load(tmp_path / "deep" / "5.safetensors")
    assert loaded.info == demo.info
    assert (loaded.rows == demo.rows).all()
    assert loaded.rows["observation", "image"].dtype == torch.uint8
    # nothing but the file is left behind
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["5.safetensors"]


def test_the_hash_of_the_init_state_is_kept_and_may_be_absent(tmp_path):
    path, demo = tmp_path / "5.safetensors", make_demo(seed=5)
    info = dataclasses.replace(demo.info, init_state_hash=2**63 - 1)
    Demonstration(demo.rows, info).save(path)
    assert Demonstration.load(path).info == info
    with safe_open(path, framework="pt") as file:
        names, metadata = list(file.keys()), file.metadata()
        tensors = {name: file.get_tensor(name) for name in names}
    old = {key: value for key, value in dataclasses.asdict(info).items() if key[:4] != "init"}
    save_file(tensors, path, metadata={**metadata, "info": json.dumps(old)})
    assert Demonstration.load(path).info == demo.info
    assert demo.info.init_state_hash == -1


def test_a_second_camera_is_kept(tmp_path):
    demo = make_demo(seed=5)
    image = demo.rows["observation", "image"]
    demo.rows["observation", "wrist_image"] = 255 - image
    demo.save(tmp_path / "5.safetensors")
    loaded = Demonstration.load(tmp_path / "5.safetensors")
    assert torch.equal(loaded.rows["observation", "wrist_image"], 255 - image)
    demo.rows["observation", "wrist_image"] = image[:, :1]
    demo.save(tmp_path / "5.safetensors")
    with pytest.raises(ValueError, match="belong together, got .*'wrist_image'"):
        Demonstration.load(tmp_path / "5.safetensors")


def test_continuous_actions_need_no_tokenizer():
    rows, _ = stack_demonstrations([make_demo()])
    assert ("vla_action", "tokens") not in rows.keys(True)


def test_both_cameras_are_shifted_each_on_its_own():
    torch.manual_seed(0)
    image = torch.arange(64 * 3 * 8 * 8, dtype=torch.int32).view(64, 3, 8, 8)
    td = TensorDict({"observation": {"image": image, "wrist_image": image.clone()}}, [64])
    shifted = RandomShift(4)(td)["observation"]
    moved = [(shifted[name] != image).flatten(1).any(1) for name in ("image", "wrist_image")]
    assert all(each.sum() > 50 for each in moved)  # 80 of 81 shifts move an image
    assert (shifted["image"] != shifted["wrist_image"]).flatten(1).any(1).sum() > 50


def test_a_truncated_and_a_foreign_file_are_refused(tmp_path):
    path = tmp_path / "0.safetensors"
    make_demo().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="Delete it and record it again"):
        Demonstration.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must be a demonstration file"):
        Demonstration.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image", torch.zeros(3, 3, 8, 8)),
        ("state", torch.zeros(2, 2)),
        ("state", torch.full((3, 2), float("nan"))),
        ("chunk", torch.zeros(3, 4)),
        ("chunk", torch.zeros(())),
        ("action_is_pad", torch.zeros(3, 5, dtype=torch.bool)),
        ("task_id", -1),
        ("success", "yes"),
        ("foreign", 1),
    ],
)
def test_entries_that_do_not_belong_together_are_refused(tmp_path, name, value):
    path = tmp_path / "0.safetensors"
    make_demo().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    if isinstance(value, torch.Tensor):
        tensors[name] = value
    else:
        metadata["info"] = json.dumps(json.loads(metadata["info"]) | {name: value})
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=rf"whole demonstration file, got .*{name}"):
        Demonstration.load(path)


def test_stack_tokenises_and_numbers_instructions():
    demos = [make_demo(1, "pick"), make_demo(2, "place", num_rows=2), make_demo(3, "pick")]
    # three bins of width 2/3: -1/3, +1/3 are the edges, so 0 is token 1 and 0.5 is token 2
    demos[1].rows["vla_action", "chunk"][0, 0, 0] = 0.5
    rows, instructions = stack_demonstrations(demos, TOKENIZER)
    assert rows.shape == (8,)
    assert [instructions.text(0), instructions.text(1)] == ["pick", "place"]
    assert rows["instruction_id"].flatten().tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert rows["vla_action", "tokens"][3].tolist() == [[2, 1], [1, 1], [1, 1], [1, 1]]


def test_buffer_visits_each_row_once_an_epoch_and_restores_instructions():
    demos = [make_demo(seed, instruction) for seed, instruction in ((1, "pick"), (2, "place"))]
    rows, instructions = stack_demonstrations(demos, TOKENIZER)
    buffer = make_demonstration_buffer(rows, instructions, batch_size=3)
    batches = [buffer.sample(), buffer.sample()]
    seeds = [int(s) for b in batches for s in b["observation", "state"][:, 0]]
    assert sorted(seeds) == [1, 1, 1, 2, 2, 2]
    words = [word for b in batches for word in b["language_instruction"]]
    assert words == [{1: "pick", 2: "place"}[seed] for seed in seeds]


def test_augmentation_leaves_the_stored_rows_alone():
    rows, instructions = stack_demonstrations([make_demo()], TOKENIZER)
    options = {"batch_size": 3, "transforms": [RandomShift(4), StateNoise(1.0)]}
    buffer = make_demonstration_buffer(rows, instructions, **options)
    buffer.sample()
    assert (buffer.storage[:]["observation", "image"] == rows["observation", "image"]).all()
    assert (buffer.storage[:]["observation", "state"] == 0).all()
    with pytest.raises(ValueError, match=r"must be in \[1, 3\]"):
        make_demonstration_buffer(rows, instructions, batch_size=4)


def test_shift_moves_pixels_down_and_right():
    image = torch.arange(9).reshape(1, 1, 3, 3).expand(2, 1, 3, 3)
    moved = shift_image(image, torch.tensor([[1, 0], [0, -1]]))
    assert moved[0, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert moved[1, 0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


@pytest.mark.parametrize("transform", [RandomShift(4), StateNoise(1.0)])
def test_augmentation_takes_any_batch_and_no_environment(transform):
    observation = {"image": torch.ones(2, 3, 1, 4, 4), "state": torch.ones(2, 3, 5)}
    rows = TensorDict({"observation": observation}, [2, 3])
    for data in (rows, rows[0], rows[0, 0]):
        out = transform(data.clone())
        for key, value in data.items(True, True):
            assert out[key].shape == value.shape
    with pytest.raises(NotImplementedError, match="must not be part of an environment"):
        TransformedEnv(ToyChunkEnv(), transform).rollout(1)
