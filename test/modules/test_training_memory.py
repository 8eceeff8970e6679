# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Memory of training: what is computed without weights against what real tensors take."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tensordict import NonTensorStack
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla import GRPOLoss
from torchrl_dvla.modules import LoraConfig
from torchrl_dvla.modules.master_weights import MasterWeights
from torchrl_dvla.modules.training_memory import (
    TrainingMemory,
    kept_bytes,
    training_memory,
    training_modes,
)

from .policies import INSTRUCTIONS, make_flow_policy, make_observation, make_policy

MAKE = {
    "tokens": make_policy,
    **{kind: lambda kind=kind: make_flow_policy(kind) for kind in ("pi0", "pi05", "smolvla")},
}
INSTRUCTION = INSTRUCTIONS[1]


def rebuilt(policy, config):
    other = type(policy)(dataclasses.replace(config, lora=None), tokenizer=policy.tokenizer)
    other.load_state_dict(policy.state_dict())
    if config.lora is not None:
        other.add_adapters(config.lora)
    return other


def sampled(policy, rows):
    td = make_observation(rows, size=policy.config.image_size[0], instructions=[INSTRUCTION] * rows)
    td["observation", "state"].zero_()  # of pi0.5, each number is as many words
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        td = policy(td)
    td["language_instruction"] = NonTensorStack(*[INSTRUCTION] * rows)
    td["action_is_pad"] = torch.zeros(rows, policy.chunk_size, dtype=torch.bool)
    td["advantage"] = torch.linspace(-1, 1, rows)[:, None]
    return td


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("tokens", "float32"), ("pi0", "bfloat16"), ("pi05", "bfloat16"), ("smolvla", "float32")],
)
def test_computed_is_within_5_percent_of_measured(kind, dtype):
    pytest.importorskip("peft", reason="of the extra 'lora'")
    base = MAKE[kind]()
    config = dataclasses.replace(base.config, dtype=dtype)
    modes = training_modes(config, rank=2)
    for mode in [*modes][:3] + ["LoRA 2, checkpointed"]:
        changed = modes[mode]
        computed = training_memory(changed, base.tokenizer, INSTRUCTION)
        policy = rebuilt(base, changed)
        rows, td = 6, sampled(policy, 6)
        key = ("vla_action", "tokens" if kind == "tokens" else "path")
        taken = td[key]
        measured = kept_bytes(policy, lambda: policy.get_dist(td).log_prob(taken))  # noqa: B023
        kept = computed.fixed + rows * computed.decision
        assert kept == pytest.approx(measured, rel=0.05), (mode, kept, measured)
        parameters = list(policy.parameters())
        assert computed.weights == sum(p.nbytes for p in parameters), mode

        trained = [p for p in parameters if p.requires_grad]
        masters = MasterWeights(trained)
        optimizer = torch.optim.AdamW(masters.stepped, lr=1e-3)
        GRPOLoss(policy)(td)["loss_objective"].backward()
        gradients = [p.grad for p in (*masters.stepped, *trained) if p.grad is not None]
        assert computed.gradients == pytest.approx(distinct_bytes(gradients), rel=0.05), mode
        optimizer.step()
        state = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
        assert computed.optimizer == pytest.approx(distinct_bytes(state), rel=0.05), mode
        assert computed.masters == distinct_bytes(masters.masters), mode


def distinct_bytes(tensors):
    return sum({id(t): t.nbytes for t in tensors}.values())


def test_larger_images_and_batches():
    base = make_flow_policy("pi0")
    sizes = []
    for side in (32, 64):
        data = dict(base.config.backbone)
        data["vlm_config"] = {**data["vlm_config"]}
        data["vlm_config"]["vision_config"] = {**data["vlm_config"]["vision_config"],
                                               "image_size": side}  # fmt: skip
        config = dataclasses.replace(base.config, backbone=data, image_size=(side, side))
        computed = training_memory(config, base.tokenizer, INSTRUCTION)
        policy = type(base)(config, tokenizer=base.tokenizer)
        for rows in (3, 12):
            td = sampled(policy, rows)
            path = td["vla_action", "path"]
            measured = kept_bytes(policy, lambda: policy.get_dist(td).log_prob(path))  # noqa: B023
            kept = computed.fixed + rows * computed.decision
            assert kept == pytest.approx(measured, rel=0.05)
        sizes.append(computed.decision)
    assert sizes[1] > 1.5 * sizes[0]


def test_the_largest_micro_batch_by_hand():
    # 0.9 * 10000 - (1000 + 400 + 800 + 200 + 100) - 1000 of inference - 500 of rows = 5000
    memory = TrainingMemory(
        weights=1000, trained=200, gradients=400, optimizer=800, masters=200, fixed=100,
        decision=999,
    )  # fmt: skip
    assert memory.states == 2400 and memory.learner(3) == 2400 + 100 + 2997
    assert memory.largest_micro_batch(10_000, batch_bytes=500) == 5
    assert memory.largest_micro_batch(3000) == 0


def test_modes_order_as_expected():
    pytest.importorskip("peft", reason="of the extra 'lora'")
    base = make_flow_policy("pi05")
    found = {
        mode: training_memory(config, base.tokenizer, INSTRUCTION)
        for mode, config in training_modes(base.config, rank=2).items()
    }
    full, expert, lora = found["full"], found["expert only"], found["LoRA 2"]
    assert full.trained > expert.trained > lora.trained
    assert full.decision > expert.decision
    assert found["full, checkpointed"].decision < 0.6 * full.decision
    with_its_own = dataclasses.replace(base.config, lora=LoraConfig(rank=5))
    assert "LoRA 5" in training_modes(with_its_own)
