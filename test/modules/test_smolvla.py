# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Facts of SmolVLA: transformers has no model of its own to compare with, but all of its parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchrl_dvla.modules.smolvla import SmolVLA

from .policies import make_flow_policy


@pytest.fixture
def network():
    return make_flow_policy("smolvla").network


def inputs(network, num_rows=2):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(num_rows, 2, 3, *network.image_size, generator=generator)
    text_ids = [torch.tensor([2, 3]), torch.tensor([4, 3, 5])][:num_rows]
    state = torch.randn(num_rows, network.config.max_state_dim, generator=generator)
    shape = (num_rows, network.config.chunk_size, network.config.max_action_dim)
    x = torch.randn(shape, generator=generator)
    return pixels, text_ids, state, x, torch.tensor([1.0, 0.5])[:num_rows]


@torch.no_grad()
def test_prefix_is_smolvlm_with_a_state_token(network):
    pixels, text_ids, state, _, _ = inputs(network)
    prefix = network.prefix(pixels, text_ids, state)
    # Two images of one token each (2 x 2 patches, shuffled), three of text, the state.
    assert prefix.mask.tolist() == [[1, 1, 1, 1, 0, 1], [1] * 6]
    vlm = network.vlm.model
    images = [
        torch.stack(list(vlm.get_image_features(pixels[:, camera, None]).pooler_output))
        for camera in range(2)
    ]
    text = vlm.text_model.embed_tokens(torch.tensor([[2, 3, 0], [4, 3, 5]]))
    tokens = torch.cat([*images, text], 1) * 32**0.5
    tokens = torch.cat([tokens, network.state_proj(state)[:, None]], 1)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    seen[:, :, :5, 5] = False
    seen[0, :, :, 4] = False
    expected = vlm.text_model(
        inputs_embeds=tokens,
        attention_mask=torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
        position_ids=torch.tensor([[0, 1, 2, 3, 3, 4], [0, 1, 2, 3, 4, 5]]),
        use_cache=True,
    ).past_key_values
    for ours, theirs in zip(prefix.cache.layers, expected.layers, strict=True):
        for row, count in ((0, 4), (1, 6)):
            torch.testing.assert_close(ours.keys[row, :, :count], theirs.keys[row, :, :count])
            torch.testing.assert_close(ours.values[row, :, :count], theirs.values[row, :, :count])


@torch.no_grad()
def test_expert_by_the_formulas(network):
    pixels, text_ids, state, x, time = inputs(network, num_rows=1)
    prefix = network.prefix(pixels, text_ids, state)  # 2 + 2 + 1 tokens

    half = torch.linspace(0, 1, 16)
    angles = time[:, None] * 2 * torch.pi / (4e-3 * 1000**half)  # periods from 0.004 to 4
    waves = torch.cat([angles.sin(), angles.cos()], 1)[:, None].expand(-1, 4, -1)
    h = torch.cat([network.action_in_proj(x), waves], -1)
    h = network.action_time_mlp_out(F.silu(network.action_time_mlp_in(h)))

    def turned(heads, positions):
        frequencies = 10_000.0 ** -(torch.arange(8) / 8)
        angle = (positions[:, None] * frequencies).repeat(1, 2)
        first, second = heads.chunk(2, -1)
        return heads * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    def norm(module, h):
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    def heads(h):
        return h.unflatten(-1, (2, 16)).transpose(1, 2)

    for i, (layer, cached) in enumerate(zip(network.expert.layers, prefix.cache.layers)):
        attention, normed = layer.self_attn, norm(layer.input_layernorm, h)
        seen = torch.ones(4, 5, dtype=torch.bool)
        if i == 0:  # the prefix, and action tokens up to itself
            positions = torch.arange(5, 9)
            key = turned(heads(attention.k_proj(normed)), positions)
            key = torch.cat([cached.keys, key], 2)
            value = torch.cat([cached.values, heads(attention.v_proj(normed))], 2)
            seen = torch.cat([seen, torch.ones(4, 4, dtype=torch.bool).tril()], 1)
        else:  # projections of the prefix's keys and values
            positions = torch.arange(4)
            key = heads(attention.k_proj(cached.keys.transpose(1, 2).flatten(2)))
            value = heads(attention.v_proj(cached.values.transpose(1, 2).flatten(2)))
        query = turned(heads(attention.q_proj(normed)), positions)
        scores = (query @ key.transpose(2, 3) / 4).masked_fill(~seen, -torch.inf)
        h = h + attention.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        h = h + layer.mlp(norm(layer.post_attention_layernorm, h))
    h = norm(network.expert.norm, h)
    velocity, hidden = network.velocity(prefix, x, time)
    torch.testing.assert_close(hidden, h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity, network.action_out_proj(h), rtol=1e-4, atol=1e-4)
    assert torch.equal(velocity, network.velocity(prefix, x, time)[0])


@torch.no_grad()
def test_action_tokens_see_earlier_ones_only(network):
    pixels, text_ids, state, x, time = inputs(network)
    prefix = network.prefix(pixels, text_ids, state)
    before = network.velocity(prefix, x, time)[0]
    x[:, 2] += 1.0
    changed = (network.velocity(prefix, x, time)[0] - before).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False, False, True, True]


def test_frozen_prefix_leaves_no_graph(network):
    network.freeze_prefix()
    pixels, text_ids, state, x, time = inputs(network)
    prefix = network.prefix(pixels, text_ids, state)
    assert not any(layer.keys.requires_grad for layer in prefix.cache.layers)
    network.velocity(prefix, x, time)[0].sum().backward()
    moving = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert moving == {
        "expert", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out",
    }  # fmt: skip


def test_grouped_heads_and_half_precision(network):
    data = make_flow_policy("smolvla").config.backbone
    for part in (data["vlm_config"]["text_config"], data["dit_config"]):
        part["num_key_value_heads"] = 1
    network = SmolVLA.from_dict(data, dtype=torch.bfloat16)
    assert network.expert.layers[1].self_attn.k_proj.weight.shape == (16, 16)
    pixels, text_ids, state, x, time = inputs(network)
    prefix = network.prefix(pixels.bfloat16(), text_ids, state)
    velocity, _ = network.velocity(prefix, x, time)
    assert velocity.dtype == torch.float32 and velocity.isfinite().all()
