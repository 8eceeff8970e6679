# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import json
import os

import pytest
import torch

from torchrl_dvla.recording import Checkpoint, CheckpointDirectory, load_policy, save_policy


def _policy(width=3):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, 1))


@pytest.fixture
def checkpoint(tmp_path):
    directory = CheckpointDirectory(tmp_path / "checkpoints")
    return directory.save(5, _policy(), {"optimizer": {"lr": 0.5}}, config={"seed": 3})


def test_round_trip(checkpoint):
    loaded = Checkpoint.load(checkpoint)
    assert loaded.update == 5
    assert loaded.state == {"optimizer": {"lr": 0.5}}
    assert loaded.metadata["config"] == {"seed": 3}
    policy = _policy()
    with torch.no_grad():
        policy[0].weight.zero_()
    loaded.load_policy(policy)
    assert torch.equal(policy[0].weight, _policy()[0].weight)


def test_only_the_newest_stay(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=2)
    for update in (1, 2, 10):
        directory.save(update, _policy(), {})
    assert [path.name for path in directory.list()] == ["update_00000002", "update_00000010"]
    assert directory.latest() == tmp_path / "update_00000010"


def test_the_same_update_is_replaced(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    directory.save(1, _policy(), {"value": 1})
    directory.save(1, _policy(), {"value": 2})
    assert Checkpoint.load(directory.latest()).state == {"value": 2}


def test_a_failed_save_leaves_the_previous_one_and_nothing_else(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    directory.save(1, _policy(), {})
    with pytest.raises(TypeError, match=r"state\.collector must be"):
        directory.save(2, _policy(), {"collector": object()})
    assert os.listdir(tmp_path) == ["update_00000001"]


def test_what_a_killed_save_left_is_removed(tmp_path):
    (tmp_path / ".partial-1-update_00000003" / "policy").mkdir(parents=True)
    assert CheckpointDirectory(tmp_path).latest() is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["training.pt", "policy/model.safetensors"])
def test_truncation_is_found(checkpoint, name):
    file = checkpoint / name
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    message = f"must have {len(content)} bytes, got {len(content) - 7}: it was truncated .* Resume"
    with pytest.raises(ValueError, match=message):
        Checkpoint.load(checkpoint)


def test_a_flipped_bit_is_found(checkpoint):
    file = checkpoint / "policy/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="SHA-256"):
        Checkpoint.load(checkpoint)


def test_a_missing_file_is_found(checkpoint):
    (checkpoint / "training.pt").unlink()
    with pytest.raises(ValueError, match=r"must hold .*training\.pt, got no such file"):
        Checkpoint.load(checkpoint)


def test_half_of_the_metadata_is_found(checkpoint):
    file = checkpoint / "checkpoint.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match=r"checkpoint\.json must be whole"):
        Checkpoint.load(checkpoint)


def test_another_format_is_refused(checkpoint):
    file = checkpoint / "checkpoint.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps(metadata | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version must be 1, got 99"):
        Checkpoint.load(checkpoint)


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"without checkpoint\.json\. Pass a folder update_"
    ):
        Checkpoint.load(tmp_path)


def test_another_architecture_is_refused_and_nothing_is_copied(tmp_path):
    save_policy(_policy(width=3), tmp_path)
    wider = _policy(width=4)
    before = wider[0].weight.clone()
    message = r"0\.weight is \[3, 2\], not \[4, 2\].*Use the policy settings"
    with pytest.raises(ValueError, match=message):
        load_policy(wider, tmp_path)
    assert torch.equal(wider[0].weight, before)


def test_missing_and_unknown_parameters_are_named(tmp_path):
    save_policy(torch.nn.Linear(2, 1), tmp_path)
    with pytest.raises(ValueError, match=r"missing 0\.weight, 0\.bias, 1\.weight and 1 more"):
        load_policy(_policy(), tmp_path)
    with pytest.raises(ValueError, match="unknown bias, weight"):
        load_policy(_policy(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 64])
def test_a_corrupt_policy_file_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="It is corrupt or truncated"):
        load_policy(_policy(), tmp_path)


def test_a_lazy_policy_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="must be initialised before it is saved, got a lazy 'wei"):
        save_policy(torch.nn.LazyLinear(2), tmp_path)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        CheckpointDirectory(tmp_path, keep=0)
