# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Adapters in the recipe: trained, published, saved and gone on with, on a base that stays."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tensordict import NonTensorStack, TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.__main__ import main
from torchrl_dvla.modules import (
    FlowVLA,
    LoraConfig,
    TinyBackboneConfig,
    TinyFlowConfig,
    TransformersVLA,
    load_policy,
)
from torchrl_dvla.modules.adapters import weights_checksum
from torchrl_dvla.recipes.dvla_grpo import train, utils
from torchrl_dvla.recipes.dvla_grpo.settings import LoraSettings, settings_from, to_dict
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy, check_settings
from torchrl_dvla.recording import GracefulStop, RunCheckpoints
from torchrl_dvla.weight_update import WeightStore

pytest.importorskip("peft", reason="of the extra 'lora'")

#: The toy task from a checkpoint, a few groups and no evaluation.
SMALL = (
    "policy=checkpoint", "policy.lora.rank=2", "group.group_size=4", "group.groups_per_update=1",
    "optim.num_epochs=1", "workers.envs_per_worker=4", "workers.num_workers=1",
    "optim.minibatch_size=16", "optim.micro_batch_size=8", "eval.num_episodes=0",
    "checkpoint.every_updates=1",
    "group.on_no_signal=keep", "group.max_no_signal_groups=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of a policy of the toy task."""
    folder = tmp_path_factory.mktemp("base")
    backbone = TinyBackboneConfig(
        image_size=32, patch_size=8, vision_size=32, vision_layers=1, text_size=64, head_size=32
    )
    policy = TransformersVLA.tiny(
        [utils.TOY_INSTRUCTION], action_dim=2, chunk_size=4, state_dim=4, backbone=backbone
    )
    policy.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flow_base(tmp_path_factory):
    """A checkpoint of a tiny pi0 of the toy task."""
    folder = tmp_path_factory.mktemp("flow_base")
    backbone = TinyFlowConfig(image_size=32, vision_size=32, text_size=32, expert_size=32)
    sizes = {"action_dim": 2, "chunk_size": 4, "state_dim": 4}
    FlowVLA.tiny([utils.TOY_INSTRUCTION], backbone=backbone, **sizes).save_pretrained(folder)
    return folder


def of_flow(folder):
    return (
        "policy=flow_checkpoint", f"policy.path={folder}", "policy.lora.rank=2",
        "policy.num_steps=2", "loss.ratio_level=sequence",
    )  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_update_in_bfloat16_and_one_more(settings, base, tmp_path, capsys):
    before = contents(base)
    given = (*SMALL, f"policy.path={base}", "policy.dtype=bfloat16",
             "policy.gradient_checkpointing=true")  # fmt: skip
    with GracefulStop() as stop:
        train.train(settings("toy", *given, "train.num_updates=1"), stop)
    (run,) = (tmp_path / "runs" / "toy").iterdir()
    latest = RunCheckpoints(run / "checkpoints").latest()
    (saved,) = latest.glob("components/*-policy")
    (weights,) = saved.glob("*.safetensors")
    tensors = load_file(weights)
    assert tensors and all("lora_" in name and t.dtype == torch.bfloat16 for name, t in
                           tensors.items())  # fmt: skip
    assert any(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)
    data = json.loads((saved / "config.json").read_text())
    assert data["base"]["path"] == str(base) and data["config"]["lora"]["rank"] == 2
    assert contents(base) == before
    # In the run's memory it was not touched either.
    policy = load_policy(saved)
    assert weights_checksum(policy) == data["base"]["checksum"]
    (masters,) = saved.parent.glob("*-masters/state.pt")
    state = torch.load(masters, weights_only=True)
    assert len(state) == len(tensors)
    rounded = sorted(float(t.bfloat16().double().sum()) for t in state.values())
    assert rounded == sorted(float(t.double().sum()) for t in tensors.values())

    with GracefulStop() as stop:
        resumed = settings("toy", *given, "train.num_updates=2", f"checkpoint.resume={run}")
        train.train(resumed, stop)
    (again,) = RunCheckpoints(run / "checkpoints").latest().glob("components/*-policy")
    assert (
        again.parents[1].name.endswith("2")
        and weights.read_bytes() != next(again.glob("*.safetensors")).read_bytes()
    )
    capsys.readouterr()
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert "rank 2, alpha 4" in said and f"the checkpoint in {base}" in said
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert not any("lora_" in name for name in load_policy(out).state_dict())
    assert main(["export", str(run), str(out)]) == 1  # it is there
    # The settings of the run put adapters on the base; what is saved has them.
    assert main(["inspect", str(run), "device=cpu"]) == 0


def test_what_is_trained_alone_is_published(settings, base):
    sizes = {}
    for name, given in {
        "all": ("policy.lora.rank=null",),
        "language": ("policy.lora.rank=null", "policy.freeze_vision=true"),
        "adapters": (),
    }.items():
        cfg = settings("toy", *SMALL, f"policy.path={base}", *given)
        policy = utils.make_policy(cfg)
        options = utils.make_updater(cfg, policy)
        trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
        check_policy(cfg, policy)
        with options_store(options, policy) as store:
            buffers = sum(b.nbytes for b in policy.buffers())
            assert trained <= store.layout.weight_bytes <= trained + buffers
            sizes[name] = store.layout.weight_bytes
        optimizer, *_ = utils.make_optimizer(cfg, utils.make_loss(cfg, policy), lambda: 0.0)
        stepped = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        assert stepped == trained
    assert sizes["adapters"] < sizes["language"] < sizes["all"]


def test_of_a_flow_policy_the_adapters_alone_have_versions(settings, flow_base):
    cfg = settings("toy", *SMALL[2:], *of_flow(flow_base))
    policy = utils.make_policy(cfg)
    check_policy(cfg, policy)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    frozen_bytes = sum(p.nbytes for p in policy.parameters() if not p.requires_grad)
    before = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    updater = utils.make_updater(cfg, policy)  # held: with it goes its store
    with options_store(updater, policy) as store:
        versioned = {name for e in store.layout.entries if not e.is_frozen for name in e.names}
        assert set(trained) <= versioned <= set(trained) | {n for n, _ in policy.named_buffers()}
        assert frozen_bytes <= store.layout.frozen_bytes < 1.1 * frozen_bytes + 4096
        # They are in memory once: the learner's are the store's.
        now = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
        assert now and not now & before
        reader, served = store.reader("lane"), utils.make_policy(cfg)
        for parameter in trained.values():
            parameter.data.add_(1.0)
        assert store.publish(policy) == 1
        reader.adopt_into(served)
        for name, parameter in served.named_parameters():
            assert torch.equal(parameter, policy.get_parameter(name)), name
        del parameter, served
        reader.close()


@pytest.mark.slow
def test_an_update_of_a_flow_policy_with_adapters(settings, flow_base, tmp_path):
    before = contents(flow_base)
    cfg = settings("toy", *SMALL[2:], *of_flow(flow_base), "train.num_updates=1")
    with GracefulStop() as stop:
        train.train(cfg, stop)
    (run,) = (tmp_path / "runs" / "toy").iterdir()
    (saved,) = run.glob("checkpoints/update-*/components/*-policy")
    (weights,) = saved.glob("*.safetensors")
    tensors = load_file(weights)
    assert tensors and all("lora_" in name for name in tensors)
    assert any(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)
    assert contents(flow_base) == before
    policy = load_policy(saved)
    data = json.loads((saved / "config.json").read_text())
    assert weights_checksum(policy) == data["base"]["checksum"]


def options_store(updater, policy):
    updater.init_on_sender(model=policy, num_workers=0)
    return updater.store


def test_a_reference_policy_has_the_same_base(settings, base):
    cfg = settings("toy", *SMALL, f"policy.path={base}", "loss.kl_to_ref_coeff=0.1")
    policy = utils.make_policy(cfg)
    loss = utils.make_loss(cfg, policy)
    reference = loss.reference_network
    pairs = list(zip(policy.named_parameters(), reference.parameters(), strict=True))
    assert all((own is other) == ("lora_" not in name) for (name, own), other in pairs)
    batch = observe(policy)
    before = loss(batch)
    # A store takes the frozen weights over; the loss keeps no other copy of them.
    old = {p.untyped_storage().data_ptr() for p in policy.parameters() if not p.requires_grad}
    with WeightStore(policy, trainable_only=True):
        held = [*loss.parameters(), *loss.buffers(), *reference.parameters()]
        assert not old & {tensor.untyped_storage().data_ptr() for tensor in held}
        after = loss(batch)
        assert before["kl_to_ref"] == after["kl_to_ref"] == 0  # it is the policy as it is now
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        assert loss(batch)["kl_to_ref"] > 0  # the adapters are its own


def observe(policy):
    """Three decisions of the toy task."""
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    batch = TensorDict(
        {
            "observation": {"image": images, "state": torch.randn(3, 4)},
            "advantage": torch.ones(3, 1),
        },
        [3],
    )
    batch.set("language_instruction", NonTensorStack(*[utils.TOY_INSTRUCTION] * 3))
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        return policy(batch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("policy.lora.rank=0",), "policy.lora.rank must be at least 1, got 0"),
        (("policy.lora.rank=-2",), "policy.lora.rank must be at least 1, got -2"),
        (("policy.lora.rank=null", "policy.lora.alpha=2"), "policy.lora.rank must be given with"),
        (("policy.lora.targets=[]",), "policy.lora.targets must name at least one kind of layer"),
    ],
)
def test_settings_that_do_not_fit(settings, base, given, message):
    with pytest.raises(ValueError, match=message):
        settings("toy", *SMALL, f"policy.path={base}", *given)


def test_targets_that_no_layer_has(settings, base):
    cfg = settings("toy", *SMALL, f"policy.path={base}", "policy.lora.targets=[query]")
    with pytest.raises(ValueError, match=r"got \['query'\], which name no layer"):
        utils.make_policy(cfg)


def test_policies_of_another_kind(settings):
    with pytest.raises(ValueError, match=r"policy.lora must be left out with policy._target_"):
        settings("toy_flow", "+policy.lora.rank=2")
    with pytest.raises(ValueError, match=r"policy.lora.rank must be null with kind=tiny_vla"):
        settings("toy", "policy.kind=tiny_vla", "policy.lora.rank=2")


def test_peft_is_looked_for_before_anything_starts(settings, base, monkeypatch):
    cfg = settings("toy", *SMALL, f"policy.path={base}")

    def absent():
        raise ImportError("pip install peft")

    monkeypatch.setattr("torchrl_dvla.recipes.dvla_grpo.validation.import_peft", absent)
    with pytest.raises(ImportError, match="pip install peft"):
        check_settings(cfg)


def test_settings_survive_a_checkpoint(settings, base):
    cfg = settings("toy", *SMALL, f"policy.path={base}")
    assert settings_from(to_dict(cfg)) == cfg
    assert cfg.policy.lora == LoraSettings(rank=2)
    assert cfg.policy.lora.to_config() == LoraConfig(rank=2)
