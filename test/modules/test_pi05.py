# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Facts of pi0.5: transformers has no model of its own to compare with, but all of its parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from torchrl_dvla.modules.pi0 import Pi0
from torchrl_dvla.modules.pi05 import AdaptiveRMSNorm, Pi05, state_words

from .policies import make_flow_policy, make_observation


def inputs(network, num_rows=2):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(num_rows, 1, 3, *network.image_size, generator=generator)
    text_ids = [torch.tensor([2, 3]), torch.tensor([4, 3, 5])][:num_rows]
    shape = (num_rows, network.config.chunk_size, network.config.max_action_dim)
    x = torch.randn(shape, generator=generator)
    return pixels, text_ids, torch.zeros(num_rows, 6), x, torch.tensor([1.0, 0.5])[:num_rows]


def test_adaptive_norm_by_hand():
    norm = AdaptiveRMSNorm(2, eps=1.0)
    with torch.no_grad():
        norm.dense.weight[:, 0] = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.5, 0.0])
        norm.dense.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]))
    # mean square (1 + 5) / 2 + 1 = 4, hence (1, sqrt(5)) / 2; condition (2, 7): scale (2, 0),
    # shift (0, 4), gate (1, 1)
    normed, gate = norm(torch.tensor([[[1.0, 5**0.5]]]), torch.tensor([[2.0, 7.0]]))
    torch.testing.assert_close(normed, torch.tensor([[[1.5, 5**0.5 / 2 + 4.0]]]))
    assert gate.tolist() == [[[1.0, 1.0]]]
    half, gate = norm(torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 2))
    assert half.dtype == gate.dtype == torch.bfloat16


@torch.no_grad()
def test_without_modulation_the_expert_is_a_plain_gemma():
    plain = Pi0.from_dict(make_flow_policy().config.backbone, dtype=torch.float32)
    expert = copy.deepcopy(plain.model.model.dit)
    network = Pi05(plain.model)
    pixels, text_ids, state, x, time = inputs(network)
    prefix = network.prefix(pixels, text_ids, state)
    velocity, hidden = network.velocity(prefix, x, time)
    # The second row is the longest; of the first the prefix has 4 + 2 tokens and one of padding.
    seen = torch.ones(2, 1, 4, 7 + 4, dtype=torch.bool)
    seen[0, :, :, 6] = False
    expected = expert(
        inputs_embeds=network.model.embed_action_time.action_in_proj(x),
        attention_mask=torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
        position_ids=torch.tensor([[6, 7, 8, 9], [7, 8, 9, 10]]),
        past_key_values=prefix.fresh_cache(),
    ).last_hidden_state
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(velocity, network.model.action_out_proj(expected))
    assert torch.equal(velocity, network.velocity(prefix, x, time)[0])


@torch.no_grad()
def test_modulated_blocks_by_the_formulas():
    network = make_flow_policy("pi05").network
    pixels, text_ids, state, x, time = inputs(network, num_rows=1)
    prefix = network.prefix(pixels, text_ids, state)
    expert, embed = network.model.model.dit, network.model.embed_action_time

    half = torch.linspace(0, 1, 16)
    angles = time[:, None] * 2 * torch.pi / (4e-3 * 1000**half)  # periods from 0.004 to 4
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    condition = F.silu(embed.time_mlp_out(F.silu(embed.time_mlp_in(waves))))

    def adapt(norm, h):
        scale, shift, gate = norm.dense(condition)[:, None].split(32, -1)
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift, gate

    h = embed.action_in_proj(x)
    cosine, sine = expert.rotary_emb(h, torch.arange(6, 10)[None])
    for layer, cached in zip(expert.layers, prefix.cache.layers):
        attention = layer.self_attn
        normed, gate = adapt(layer.input_layernorm, h)

        def turned(heads):
            first, second = heads.chunk(2, -1)
            return heads * cosine[:, None] + torch.cat([-second, first], -1) * sine[:, None]

        query = turned(attention.q_proj(normed).unflatten(-1, (2, 16)).transpose(1, 2))
        key = turned(attention.k_proj(normed)[:, None])
        key = torch.cat([cached.keys, key], 2)
        value = torch.cat([cached.values, attention.v_proj(normed)[:, None]], 2)
        weights = (query @ key.transpose(2, 3) / 4).softmax(-1)
        h = h + gate * attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
        normed, gate = adapt(layer.post_attention_layernorm, h)
        h = h + gate * layer.mlp(normed)
    h, _ = adapt(expert.norm, h)
    velocity, hidden = network.velocity(prefix, x, time)
    torch.testing.assert_close(hidden, h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity, network.model.action_out_proj(h), rtol=1e-4, atol=1e-4)


def test_state_in_words():
    # Edges at multiples of 1 / 128 from -1 on; what lies on one belongs to the bin above.
    state = torch.tensor([[-1.0, -1.0 + 1 / 128, -0.5, 0.0, 0.9999, 2.0, -1.5]])
    assert state_words(state) == ["0 1 64 128 255 255 -1"]


@torch.no_grad()
def test_the_prompt_has_the_state():
    policy = make_flow_policy("pi05")
    policy.state_statistics.set_range(torch.zeros(6), torch.full((6,), 2.0))
    td = make_observation(1, instructions=["lift_it\n"])
    td["observation", "state"] = torch.tensor([[0.0, 1.0, 2.0, 0.5, 1.5, -1.0]])
    seen = []
    prefix = policy.network.prefix
    policy.network.prefix = lambda pixels, text_ids, state: (
        seen.extend(text_ids) or prefix(pixels, text_ids, state)
    )
    policy(td)
    expected = "Task: lift it, State: 0 128 255 64 192 -1;\nAction: "
    assert seen[0].tolist() == policy.tokenizer(expected)["input_ids"]
    assert policy.tokenizer.unk_token_id not in seen[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_projections_are_full_precision(dtype):
    network = Pi05.from_dict(make_flow_policy().config.backbone, dtype=dtype)
    full = {
        name for name, parameter in network.named_parameters() if parameter.dtype == torch.float32
    }
    if dtype == torch.bfloat16:
        assert {name.rsplit(".", 2)[-2] for name in full} == {
            "dense", "time_mlp_in", "time_mlp_out", "action_in_proj", "action_out_proj",
        }  # fmt: skip
    pixels, text_ids, state, x, time = inputs(network)
    velocity, _ = network.velocity(network.prefix(pixels.to(dtype), text_ids, state), x, time)
    assert velocity.dtype == torch.float32 and velocity.isfinite().all()
