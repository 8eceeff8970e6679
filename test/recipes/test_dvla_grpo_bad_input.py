# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import json
import shutil

import pytest
import torch
from omegaconf.errors import ConfigAttributeError
from torchrl.data.vla import UniformActionTokenizer

from torchrl_dvla.modules import TransformersVLA
from torchrl_dvla.recording import CheckpointDirectory, GracefulStop


@pytest.fixture
def ends_early(recipe, monkeypatch):
    """Run the recipe; it has to end with an error before it starts a worker."""

    def start_workers(*args, **kwargs):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(recipe.utils, "make_collector", start_workers)

    def run(cfg, error, match):
        with pytest.raises(error, match=match):
            recipe.dvla_grpo.train(cfg, GracefulStop())

    return run


@pytest.fixture(scope="module")
def libero_policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    policy = TransformersVLA.tiny(
        ["pick up the alphabet soup and place it in the basket"],
        action_dim=7,
        chunk_size=8,
        state_dim=9,
        action_tokenizer=UniformActionTokenizer(16, low=-1.0, high=1.0),
    )
    policy.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("group.group_size=1", "group_size must be at least 2, got 1"),
        ("group.max_policy_lag=-1", "max_policy_lag must be at least 0, got -1"),
        ("workers.num_workers=0", "num_workers must be positive, got 0"),
        ("optim.lr=0", r"optim\.lr must be positive, got 0"),
        ("train.max_minutes=0", r"train\.max_minutes must be positive, got 0"),
        ("env.backend=maniskill", "env.backend must be 'toy' or 'libero', got 'maniskill'"),
        ("policy.kind=rnn", r"policy\.kind must be one of .*, got 'rnn'"),
        ("device=cuda:7", "device must be one that torch sees, got 'cuda:7'"),
        ("policy.action_dim=3", "action_dim must be 3 as the policy's, got 2"),
        (
            "env.image_size=16",
            r"image_shape must be \(3, 32, 32\) as the policy's, got \(3, 16, 16\)",
        ),
        ("policy.state_dim=6 policy.state_std=null", "state_dim must be 6 as the policy's, got 4"),
        ("checkpoint.resume=nowhere", r"checkpoint\.resume must be the folder of a training check"),
    ],
)
def test_settings_that_cannot_work(settings, ends_early, override, message):
    ends_early(settings("toy", *override.split()), (ValueError, FileNotFoundError), message)


def test_a_setting_that_does_not_exist(settings):
    with pytest.raises(Exception, match=r"group_sise") as caught:
        settings("toy", "group.group_sise=8")
    assert isinstance(caught.value.__cause__, ConfigAttributeError) or "group_sise" in str(caught)


def test_an_unwritable_log_folder(settings, ends_early, tmp_path):
    (tmp_path / "file").write_text("")
    cfg = settings("toy", f"log.dir={tmp_path / 'file' / 'runs'}")
    ends_early(cfg, ValueError, r"log\.dir must be a folder that can be written to")


def test_no_shared_memory_left(settings, ends_early):
    # 2 * 8 + 1 groups of 8 million rollouts, several hundred gigabytes
    cfg = settings("toy", "group.group_size=8000000")
    ends_early(cfg, RuntimeError, r"The environment pool needs .* Lower group\.group_size")


def test_a_flow_matching_policy_is_refused_not_pretended(settings, ends_early):
    ends_early(settings("libero_pi0"), ValueError, "action-token policy, got 'flow_matching'")


def test_a_checkpoint_that_has_to_be_made_first(settings, ends_early):
    ends_early(settings("libero_openvla_oft"), ValueError, "policy.checkpoint must be given")


# -- checkpoints ----------------------------------------------------------------------------------


def _training_checkpoint(tmp_path, policy):
    state = {
        "optimizer": {},
        "scheduler": {},
        "collector": {},
        "buffer": {},
        "rng": {},
        "run": {},
    }
    return CheckpointDirectory(tmp_path / "run" / "checkpoints").save(3, policy, state)


def test_resuming_with_another_architecture(settings, ends_early, recipe, tmp_path):
    path = _training_checkpoint(tmp_path, recipe.utils.make_policy(settings("toy")))
    cfg = settings("toy", f"checkpoint.resume={path}", "policy.backbone.text_layers=1")
    ends_early(cfg, ValueError, "must have this policy's architecture, got differences")


@pytest.mark.parametrize("name", ["training.pt", "checkpoint.json"])
def test_resuming_from_a_truncated_checkpoint(settings, ends_early, tmp_path, name):
    path = _training_checkpoint(tmp_path, torch.nn.Linear(2, 2))
    file = path / name
    file.write_bytes(file.read_bytes()[:-9])
    cfg = settings("toy", f"checkpoint.resume={path.parents[1]}")
    ends_early(cfg, ValueError, "truncated|must be whole")


def test_a_policy_checkpoint_that_is_not_there(settings, ends_early):
    cfg = settings("libero", "policy.checkpoint=nowhere/at/all")
    ends_early(cfg, (FileNotFoundError, ImportError), "nowhere/at/all|LIBERO is not installed")


@pytest.mark.libero
@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["env.task_suite=libero_kitchen"], ValueError, "task_suite must be one of libero_spatial"),
        (["env.task_ids=[10]"], ValueError, "task_id must be from 0 to 9 in libero_object, got 10"),
        (["env.task_ids=[]"], ValueError, "task_ids must name at least one task"),
        (["eval.num_episodes=51"], ValueError, "init_state_id must be from 0 to 49"),
        (["env.camera_height=0"], ValueError, "camera_height must be a whole number from 1"),
        (["env.camera_width=64"], ValueError, r"image_shape must be \(3, 128, 128\)"),
        (["env.chunk_size=4", "workers.max_decisions=60"], ValueError, "chunk_size must be 8"),
        (["env.max_episode_steps=512"], ValueError, "max_decisions must be at least 64, got 15"),
        (["env.cameras=[agentview,robot0_eye_in_hand]"], ValueError, "must name 1 camera"),
    ],
)
def test_libero_settings_that_cannot_work(
    settings, ends_early, libero_policy, overrides, error, message
):
    pytest.importorskip("libero")
    cfg = settings("libero", f"policy.checkpoint={libero_policy}", *overrides)
    ends_early(cfg, error, message)


@pytest.mark.libero
def test_missing_assets(settings, ends_early, monkeypatch, tmp_path):
    pytest.importorskip("libero")
    from torchrl_dvla.envs import libero_setup

    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    monkeypatch.setattr(libero_setup, "_wheel_assets", lambda: tmp_path / "gone")
    ends_early(settings("libero"), FileNotFoundError, "'assets' folder must exist, got .* Install")


@pytest.mark.libero
@pytest.mark.parametrize(
    ("damage", "message"),
    [("truncated", "The file is truncated"), ("foreign", "Point to a transformers checkpoint")],
)
def test_a_damaged_policy_checkpoint(
    settings, ends_early, libero_policy, tmp_path, damage, message
):
    pytest.importorskip("libero")
    folder = shutil.copytree(libero_policy, tmp_path / "copy")
    if damage == "truncated":
        (weights,) = folder.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ends_early(settings("libero", f"policy.checkpoint={folder}"), ValueError, message)
