# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Recipes that begin with a checkpoint of another project, to the start of the run and beyond."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from torchrl_dvla.__main__ import main
from torchrl_dvla.modules import load_policy
from torchrl_dvla.modules.formats import Stated
from torchrl_dvla.recipes.dvla_grpo import train, utils
from torchrl_dvla.recipes.dvla_grpo.settings import CONFIG, flat
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy
from torchrl_dvla.recording import GracefulStop, TrainingScenes

KINDS = {"libero_pi0": "pi0", "libero_pi05": "pi05", "libero_smolvla": "smolvla"}
#: A policy of LIBERO, but for its chunks.
SIZES = {"state_dim": 8, "action_dim": 7, "size": (256, 256), "max_tokens": 200}


@pytest.fixture(scope="module")
def folders(foreign, tmp_path_factory):
    folder = tmp_path_factory.mktemp("libero")
    return {kind: foreign.write_lerobot(folder / kind, kind, **SIZES) for kind in KINDS.values()}


def overrides(folder, *others):
    return (
        f"policy.path={folder}", f"policy.stated.tokenizer={folder / 'tokenizer'}",
        "device=cpu", *others,
    )  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_configuration_starts_from_a_checkpoint(settings, folders, name):
    folder = folders[KINDS[name]]
    cfg = settings(name, *overrides(folder, "env.chunk_size=6"))
    policy = utils.make_policy(cfg)
    assert policy.config.freeze_prefix and policy.config.sampler == "sde"
    assert policy.config.num_steps == {"pi0": 4, "pi05": 3, "smolvla": 10}[KINDS[name]]
    plan = check_policy(cfg, policy)  # calls the policy on what the environment's specs say
    assert "environment" in str(plan)
    loss = utils.make_loss(cfg, policy)
    optimizer, *_ = utils.make_optimizer(cfg, loss, lambda: 0.0)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert 0 < trained < 0.6 * sum(p.numel() for p in policy.parameters())


def test_a_pi05_of_openpi_as_its_configuration_says(foreign, settings, tmp_path):
    dims = {"state_dim": 8, "action_dim": 7}
    folder = foreign.write_openpi(tmp_path / "pi05", "pi05", converted=False, **dims)
    stated = ("chunk_size=10", "state_in_prompt=false", "image_size=[256,256]")
    given = ["env.chunk_size=10", *(f"policy.stated.{each}" for each in stated)]
    cfg = settings("libero_pi05", *overrides(folder, *given))
    policy = utils.make_policy(cfg)
    check_policy(cfg, policy)
    assert policy.config.state_dim == 0 and policy.chunk_size == 10
    cfg = settings("libero_pi05", *overrides(folder, *given[:-1]))
    with pytest.raises(ValueError, match=r"image_shape must be \(3, 28, 28\) as the policy's"):
        check_policy(cfg, utils.make_policy(cfg))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("env.chunk_size=50", "as the environment takes them"),
        ("env.cameras=[agentview]", "number of cameras must be 2"),
        ("env.camera_height=128", r"image_shape must be \(3, 256, 256\)"),
        ("env.orientation=quaternion", "state_dim must be 8 as the policy's, got 9"),
        ("policy.stated.chunk_size=50", "stated.chunk_size must be 6"),
    ],
)
def test_an_environment_that_does_not_fit(settings, folders, setting, message):
    cfg = settings("libero_pi0", *overrides(folders["pi0"], "env.chunk_size=6", setting))
    with pytest.raises(ValueError, match=message):
        check_policy(cfg, utils.make_policy(cfg))


def test_an_instruction_that_is_too_long_for_the_policy(foreign, settings, tmp_path):
    folder = foreign.write_lerobot(tmp_path / "pi0", "pi0", **SIZES | {"max_tokens": 48})
    cfg = settings("libero_pi0", *overrides(folder, "env.chunk_size=6"))
    with pytest.raises(ValueError, match=r"must have at most 48 tokens .*, got \d+\. The network"):
        check_policy(cfg, utils.make_policy(cfg))


def test_settings_of_the_other_kind_of_policy(settings, folders, tmp_path):
    cfg = settings("libero_pi0", *overrides(folders["pi0"], "+policy.temperature=0.5"))
    with pytest.raises(ValueError, match="policy must leave out freeze_vision"):
        utils.make_policy(cfg)
    utils.make_policy(settings("toy")).save_pretrained(tmp_path)
    cfg = settings("toy", "policy=flow_checkpoint", f"policy.path={tmp_path}")
    with pytest.raises(ValueError, match="policy must leave out freeze_prefix, num_steps"):
        utils.make_policy(cfg)


@pytest.mark.parametrize("name", KINDS)
def test_a_configuration_says_only_what_is_its_own(name):
    own = yaml.safe_load((CONFIG / f"{name}.yaml").read_text())
    shared = {}
    for entry in own.pop("defaults")[:-1]:
        for group, options in entry.items():
            for option in [options] if isinstance(options, str) else options:
                data = yaml.safe_load((CONFIG / group / f"{option}.yaml").read_text())
                shared |= flat(data if group == "common" else {group: data})
    own = flat(own)
    assert set(own) <= set(shared)
    assert [setting for setting in own if own[setting] == shared[setting]] == []


def test_an_openvla_oft_as_its_configuration_says(foreign, settings, tmp_path):
    folder = foreign.write_openvla(tmp_path / "tokens")
    given = (f"policy.path={folder}", "device=cpu", "inference_device=cpu")
    cfg = settings("libero_openvla_oft", *given, "policy.dtype=float32")
    policy = utils.make_policy(cfg)
    check_policy(cfg, policy)  # calls the policy on what the environment's specs say
    assert policy.temperature == 1.6 and policy.chunk_size == 8
    loss = utils.make_loss(cfg, policy)
    optimizer, *_ = utils.make_optimizer(cfg, loss, lambda: 0.0)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert trained == sum(p.numel() for p in policy.parameters())
    for setting, message in (
        ("env.cameras=[agentview,robot0_eye_in_hand]", "number of cameras must be 1"),
        ("env.camera_width=224", r"image_shape must be \(3, 256, 256\)"),
        ("policy.stated.unnorm_key=droid", "must be those of 'droid', got libero_spatial"),
    ):
        cfg = settings("libero_openvla_oft", *given, setting)
        with pytest.raises(ValueError, match=message):
            check_policy(cfg, utils.make_policy(cfg))
    # One of ours says itself what is stated.
    policy.save_pretrained(tmp_path / "saved")
    again = (f"policy.path={tmp_path / 'saved'}", "device=cpu", "~policy.stated")
    assert utils.make_policy(settings("libero_openvla_oft", *again)).config.dtype == "bfloat16"


def test_a_head_that_regresses_is_evaluated_and_not_trained(foreign, settings, tmp_path, capsys):
    folder = foreign.write_openvla(tmp_path / "l1", l1=True, proprio=True)
    cfg = settings(
        "libero_openvla_oft", f"policy.path={folder}", "device=cpu", "policy.dtype=float32",
        "policy.stated.cameras=[full_image,wrist_image]",
        "env.cameras=[agentview,robot0_eye_in_hand]",
    )  # fmt: skip
    policy = utils.make_policy(cfg)
    check_policy(cfg, policy)
    with pytest.raises(ValueError, match="has no log-probabilities to form ratios of"):
        utils.make_loss(cfg, policy)
    sizes = {"state_dim": 4, "action_dim": 2}
    folder = foreign.write_openvla(tmp_path / "toy", l1=True, proprio=True, **sizes)
    stated = ("cameras=[full_image]", "chunk_size=4", "image_size=[32,32]")
    command = ["evaluate", str(folder), "--config-name", "toy", "policy=checkpoint", "--episodes=2"]
    command += ["workers.num_workers=1", *(f"policy.stated.{each}" for each in stated)]
    assert main(command) == 0
    assert "0/2" in capsys.readouterr().out  # its gripper is -1 or 1, out of the toy's reach


def test_a_run_and_its_export(foreign, settings, tmp_path, capsys):
    """From a folder of LeRobot through two updates on the toy task, and back to such a folder."""
    sizes = {"state_dim": 4, "action_dim": 2, "size": (32, 32), "chunk_size": 4}
    folder = foreign.write_lerobot(tmp_path / "pi0", "pi0", cameras=("image",), **sizes)
    cfg = settings(
        "toy", "policy=flow_checkpoint", *overrides(folder, "policy.num_steps=2"),
        "group.group_size=4", "group.groups_per_update=1", "group.on_no_signal=keep",
        "workers.envs_per_worker=2", "workers.num_workers=1", "optim.minibatch_size=16",
        "loss.ratio_level=sequence", "eval.num_episodes=0", "train.num_updates=1",
        "train.max_minutes=null", f"log.dir={tmp_path / 'runs'}",
    )  # fmt: skip
    train.train(cfg, GracefulStop())
    (run,) = (tmp_path / "runs" / "toy").iterdir()
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["export", str(run), str(out)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"LeRobot pi0: {out}\n"
    before, after = (load_file(each / "model.safetensors") for each in (folder, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("paligemma.model" in name for name in changed)  # it was frozen
    policy = load_policy(out, stated=Stated(tokenizer=str(out / "tokenizer")))
    (own,) = run.glob("checkpoints/update-*/components/*-policy")
    trained = load_policy(own).state_dict()
    gaps = [f"what the policy in '{folder}' was trained from", "init states of toy"]
    assert TrainingScenes.load(own).gaps == TrainingScenes.load(out).gaps == gaps
    assert all(torch.equal(trained[name], tensor) for name, tensor in policy.state_dict().items())
    # It is all in the run: what it began with may be gone, but the export needs it.
    shutil.move(folder, tmp_path / "moved")
    assert main(["export", str(run), str(tmp_path / "again")]) == 1
    base = ["--base", str(tmp_path / "moved")]
    assert main(["export", str(run), str(tmp_path / "again"), *base]) == 0
    assert main(["inspect", str(run)]) == 0


def test_a_run_of_an_openvla_oft_and_its_export(foreign, settings, tmp_path, capsys):
    sizes = {"state_dim": 4, "action_dim": 2}
    folder = foreign.write_openvla(tmp_path / "openvla", **sizes)
    stated = ("cameras=[full_image]", "chunk_size=4", "image_size=[32,32]")
    cfg = settings(
        "toy", "policy=checkpoint", f"policy.path={folder}",
        *(f"policy.stated.{each}" for each in stated), "policy.freeze_vision=true",
        "group.group_size=4", "group.groups_per_update=1", "group.on_no_signal=keep",
        "workers.envs_per_worker=2", "workers.num_workers=1", "optim.minibatch_size=16",
        "eval.num_episodes=0", "train.num_updates=1", "train.max_minutes=null",
        # The toy's targets are out of reach of a gripper: the entropy alone has a gradient.
        "loss.entropy_coeff=0.01", "group.max_no_signal_groups=1",
        f"log.dir={tmp_path / 'runs'}",
    )  # fmt: skip
    train.train(cfg, GracefulStop())
    (run,) = (tmp_path / "runs" / "toy").iterdir()
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["export", str(run), str(out)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"OpenVLA-OFT: {out}\n"
    before, after = ({}, {})
    for tensors, each in ((before, folder), (after, out)):
        for file in each.glob("*.safetensors"):
            tensors |= load_file(file)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "language_model.lm_head.weight" in changed and len(before) == len(after)
    assert not any(name.startswith("vision_backbone") for name in changed)  # it was frozen
    assert main(["inspect", str(out), "--config-name", "toy", "policy=checkpoint",
                 *(f"policy.stated.{each}" for each in stated)]) == 0  # fmt: skip
    found = capsys.readouterr().out
    assert "rounded to -1 or 1 and inverted" in found and "90% of the area" in found
    assert main(["inspect", str(run)]) == 0
