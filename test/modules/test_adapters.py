# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Low-rank adapters: what they add, what a folder of them holds, and what they are loaded on."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla import GRPOLoss
from torchrl_dvla.modules import LoraConfig, load_policy
from torchrl_dvla.modules.adapters import add_adapters_, merged_weights, weights_checksum
from torchrl_dvla.recording import RunCheckpoints
from torchrl_dvla.weight_update import WeightStore

from .policies import make_flow_policy, make_observation, make_policy

peft = pytest.importorskip("peft", reason="of the extra 'lora'")

KINDS = {"tokens": make_policy, "pi0": make_flow_policy}


def fill(policy, seed=0):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def act(policy):
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        td = policy(make_observation(2))
    policy_actions = td["vla_action", "chunk"]
    if hasattr(policy, "action_logits"):
        return policy.action_logits(make_observation(2))
    return policy_actions


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """A checkpoint without adapters."""
    KINDS[request.param]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def test_what_is_added_by_hand():
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2, bias=False), "other": nn.Linear(2, 2)})
    model.q_proj.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    add_adapters_(model, LoraConfig(rank=1, alpha=3.0))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight"]
    assert model.q_proj(torch.tensor([5.0, 7.0])).tolist() == [5, 7]  # B is zero
    model.q_proj.lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0]]))
    model.q_proj.lora_B["default"].weight.copy_(torch.tensor([[1.0], [10.0]]))
    # W + 3 / 1 * [1, 10]^T [1, 2]
    assert merged_weights(model)["q_proj.weight"].tolist() == [[4, 6], [30, 61]]
    assert model.q_proj(torch.tensor([1.0, 1.0])).tolist() == [10, 91]


def test_layers_that_are_frozen_get_none():
    policy = make_flow_policy("pi05", freeze_prefix=True)
    policy.add_adapters(LoraConfig(rank=2))
    names = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert names and all(".dit." in name and "lora_" in name for name in names)
    policy = make_flow_policy("pi0", sampler="noise")
    policy.add_adapters(LoraConfig(rank=2, targets=["q_proj"]))
    names = [n for n, p in policy.named_parameters() if p.requires_grad]
    # The head of the deviation starts anew; of the last layer of the prefix no query is read.
    assert any(name.startswith("noise_head.") for name in names)
    assert not any("language_model.layers.1." in name for name in names)


def test_the_global_generator_is_left_alone(folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_policy(folder, lora=LoraConfig(rank=2))
    assert torch.equal(torch.rand(2), expected)


def test_training_changes_the_adapters_alone(folder):
    policy = load_policy(folder, lora=LoraConfig(rank=2))
    before = {name: t.clone() for name, t in policy.state_dict().items()}
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        td = policy(make_observation(4))
    td["action_is_pad"] = torch.zeros(4, policy.chunk_size, dtype=torch.bool)
    td["advantage"] = torch.tensor([[1.0], [-1.0], [0.5], [2.0]])
    loss = GRPOLoss(policy)
    trained = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(td)["loss_objective"].backward()
        optimizer.step()
    changed = {n for n, t in policy.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and changed == {n for n in before if "lora_" in n}


def test_what_is_published_is_what_is_merged(folder):
    policy = load_policy(folder, lora=LoraConfig(rank=2))
    twin, plain = load_policy(folder, lora=LoraConfig(rank=2)), load_policy(folder)
    size = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    with WeightStore(policy, trainable_only=True) as store:
        assert store.layout.weight_bytes < size + 1000  # and a few statistics
        fill(policy)
        store.publish()
        one, other = store.reader("with adapters"), store.reader("without")
        one.adopt_into(twin)
        other.adopt_into(plain)
        torch.testing.assert_close(act(twin), act(policy), rtol=0, atol=0)
        merged = merged_weights(policy)
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(tensor, merged[name], rtol=0, atol=0)
        torch.testing.assert_close(act(plain), act(policy), rtol=1e-4, atol=1e-5)
        one.close()
        other.close()


# -- folders --------------------------------------------------------------------------------------
def test_a_folder_of_adapters(folder, tmp_path):
    policy = load_policy(folder, lora=LoraConfig(rank=2))
    torch.testing.assert_close(act(policy), act(load_policy(folder)), rtol=0, atol=0)
    fill(policy)
    policy.save_pretrained(tmp_path / "adapters")
    data = json.loads((tmp_path / "adapters" / "config.json").read_text())
    assert data["base"] == {
        "path": str(folder), "checksum": weights_checksum(load_policy(folder)), "stated": {},
    }  # fmt: skip
    sizes = [next(f.glob("*.safetensors")).stat().st_size for f in (folder, tmp_path / "adapters")]
    assert sizes[1] < sizes[0] / 2
    again = load_policy(tmp_path / "adapters")
    torch.testing.assert_close(act(again), act(policy), rtol=0, atol=0)
    assert again.config == policy.config and again.base == policy.base
    # Training goes on with them, but not with others on top.
    assert load_policy(tmp_path / "adapters", lora=LoraConfig(rank=2)).config == policy.config
    with pytest.raises(ValueError, match="lora must be None for a policy that has adapters"):
        load_policy(tmp_path / "adapters", lora=LoraConfig(rank=3))
    assert load_policy(tmp_path / "adapters", dtype="bfloat16").config.dtype == "bfloat16"


def test_adapters_on_random_weights_are_saved_with_them(tmp_path):
    policy = make_flow_policy()
    policy.add_adapters(LoraConfig(rank=2, targets=["o_proj"]))
    fill(policy)
    policy.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    torch.testing.assert_close(act(again), act(policy), rtol=0, atol=0)
    assert again.base is None and again.config.lora == policy.config.lora


def test_the_merged_policy_is_an_ordinary_one(folder, tmp_path):
    policy = load_policy(folder, lora=LoraConfig(rank=2))
    fill(policy)
    policy.merged().save_pretrained(tmp_path / "merged")
    plain = load_policy(tmp_path / "merged")
    assert plain.config.lora is None and not any("lora_" in n for n in plain.state_dict())
    torch.testing.assert_close(act(plain), act(policy), rtol=1e-4, atol=1e-5)


def test_adapters_on_another_base(folder, tmp_path):
    policy = load_policy(folder, lora=LoraConfig(rank=2))
    policy.save_pretrained(tmp_path / "adapters")
    other = load_policy(folder)
    next(p for p in other.parameters() if p.ndim == 2).data += 0.01
    other.save_pretrained(tmp_path / "other")
    other = load_policy(tmp_path / "other", lora=LoraConfig(rank=2))
    message = (
        f"must be loaded on the checkpoint that they were trained on, '{folder}' with checksum"
    )
    with pytest.raises(ValueError, match=f"{message}.*, got '{tmp_path / 'other'}' with checksum"):
        other.read_weights(tmp_path / "adapters")
    load_policy(tmp_path / "other").save_pretrained(folder)  # trained further in place
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path / "adapters")
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=r"where nothing is\. If it has been moved, correct"
    ):
        load_policy(tmp_path / "adapters")


@pytest.mark.parametrize(
    ("lora", "message"),
    [(LoraConfig(rank=3), "'lora.rank' is 2 instead of 3"),
     (LoraConfig(rank=2, alpha=1.0), "'lora.alpha' is 4.0 instead of 1.0"),
     (None, "'lora.rank' is unknown")],
)  # fmt: skip
def test_adapters_of_another_size(lora, message, tmp_path):
    make_flow_policy().save_pretrained(tmp_path / "base")
    load_policy(tmp_path / "base", lora=LoraConfig(rank=2)).save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path / "base", lora=lora).read_weights(tmp_path / "adapters")


def test_a_checkpoint_of_a_run(folder, tmp_path):
    policy = load_policy(folder, lora=LoraConfig(rank=2))
    fill(policy)
    path = RunCheckpoints(tmp_path / "run", policy=policy).save(1)
    assert path is not None
    again = load_policy(folder, lora=LoraConfig(rank=2))
    RunCheckpoints(tmp_path / "run", policy=again).load(path)
    torch.testing.assert_close(act(again), act(policy), rtol=0, atol=0)


def test_what_was_frozen_says_where_the_adapters_are(tmp_path):
    make_flow_policy().save_pretrained(tmp_path / "base")
    policy = load_policy(tmp_path / "base", lora=LoraConfig(rank=2), freeze_prefix=True)
    policy.save_pretrained(tmp_path / "adapters")
    assert load_policy(tmp_path / "adapters").config.freeze_prefix
    with pytest.raises(ValueError, match=r"freeze_prefix must be \[True\] or None for"):
        load_policy(tmp_path / "adapters", freeze_prefix=False)


# -- refused --------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_not_positive(rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        LoraConfig(rank=rank)


def test_targets_that_match_nothing():
    with pytest.raises(ValueError, match="targets must name at least one kind of layer"):
        LoraConfig(rank=1, targets=[])
    with pytest.raises(ValueError, match=r"got \['query'\], which name no layer. The policy has "):
        make_flow_policy().add_adapters(LoraConfig(rank=1, targets=["query"]))
    policy = make_policy()
    policy.backbone.freeze(vision=True, language=True)
    with pytest.raises(ValueError, match="which name only layers that are frozen anyway"):
        policy.add_adapters(LoraConfig(rank=1))
    assert policy.config.lora is None


def test_without_peft(monkeypatch):
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'torchrl-dvla\[lora\]'"):
        make_policy().add_adapters(LoraConfig(rank=1))


def test_a_base_that_is_damaged(folder, tmp_path):
    load_policy(folder, lora=LoraConfig(rank=2)).save_pretrained(tmp_path / "adapters")
    path = Path(tmp_path / "adapters" / "config.json")
    data = json.loads(path.read_text())
    data["base"]["path"] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="base"):
        load_policy(tmp_path / "adapters")
