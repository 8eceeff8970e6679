# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The two passes of pi0 beside transformers' own forward pass."""

from __future__ import annotations

import pytest
import torch

from .policies import make_flow_policy


@pytest.fixture
def network():
    return make_flow_policy(max_action_dim=8).network


def inputs(network, num_rows=3, num_cameras=2):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(num_rows, num_cameras, 3, *network.image_size, generator=generator)
    text_ids = [torch.tensor([2, 3]), torch.tensor([4]), torch.tensor([3, 2, 5])][:num_rows]
    state = torch.randn(num_rows, network.config.max_state_dim, generator=generator)
    shape = (num_rows, network.config.chunk_size, network.config.max_action_dim)
    x = torch.randn(shape, generator=generator)
    return pixels, text_ids, state, x, torch.tensor([1.0, 0.5, 0.25])[:num_rows]


def as_transformers_wants_it(network, pixels, text_ids):
    """Arguments of transformers' own forward pass: 4 tokens an image, then text, then padding."""
    width = max(map(len, text_ids))
    images = [network.config.vlm_config.image_token_id] * 4 * pixels.shape[1]
    rows = [images + ids.tolist() + [0] * (width - len(ids)) for ids in text_ids]
    lengths = torch.tensor([4 * pixels.shape[1] + len(ids) for ids in text_ids])
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": (torch.arange(len(rows[0])) < lengths[:, None]).long(),
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(pixels.shape[:2], dtype=torch.bool),
    }


@torch.no_grad()
def test_velocities_of_a_cached_prefix_are_exactly_those_of_transformers(network):
    pixels, text_ids, state, x, time = inputs(network)
    arguments = as_transformers_wants_it(network, pixels, text_ids)
    prefix = network.prefix(pixels, text_ids, state)
    for points, times in ((x, time), (2 * x, time / 2), (x, time)):  # the cache stays as it is
        expected = network.model(state=state, noise=points, timestep=times, **arguments).logits
        velocity, hidden = network.velocity(prefix, points, times)
        assert torch.equal(velocity, expected)
        assert torch.equal(network.model.action_out_proj(hidden), velocity)


def test_gradients_pass_through_the_cache(network):
    pixels, text_ids, state, x, time = inputs(network)
    found = []
    for cached in (True, False):
        network.zero_grad()
        if cached:
            prefix = network.prefix(pixels, text_ids, state)
            velocity = network.velocity(prefix, x, time)[0]
            velocity = velocity + network.velocity(prefix, -x, time)[0]
        else:
            arguments = as_transformers_wants_it(network, pixels, text_ids)
            velocity = sum(
                network.model(state=state, noise=points, timestep=time, **arguments).logits
                for points in (x, -x)
            )
        velocity.square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 50
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_passes_share_a_prefix_and_nothing_else(network):
    network.freeze_prefix()
    pixels, text_ids, state, x, time = inputs(network)
    prefix = network.prefix(pixels, text_ids, state)
    gradients = []
    for _ in range(2):  # the second has nothing of the first one's graph, which is freed
        network.zero_grad()
        network.velocity(prefix, x, time)[0].sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert not any(layer.keys.requires_grad for layer in prefix.cache.layers)


@torch.no_grad()
def test_image_tokens_see_the_instruction_and_actions_each_other(network):
    pixels, text_ids, state, x, time = inputs(network)
    before = network.prefix(pixels, text_ids, state)
    changed = network.prefix(pixels, [*text_ids[:2], torch.tensor([3, 2, 6])], state)
    keys = [prefix.cache.layers[1].keys for prefix in (before, changed)]
    # The first image token has seen the last word of its own row.
    assert torch.equal(keys[0][:2], keys[1][:2])
    assert not torch.equal(keys[0][2, :, 0], keys[1][2, :, 0])
    velocity = network.velocity(before, x, time)[0]
    other = x.clone()
    other[:, -1] += 1.0  # every action token sees the last one
    assert (network.velocity(before, other, time)[0] - velocity)[:, 0].abs().min() > 0


def test_frozen_prefix(network):
    network.freeze_prefix()
    pixels, text_ids, state, x, time = inputs(network)
    network.velocity(network.prefix(pixels, text_ids, state), x, time)[0].sum().backward()
    moving = {name for name, p in network.named_parameters() if p.grad is not None}
    assert moving == {name for name, _ in network.named_parameters() if ".vlm." not in name}
