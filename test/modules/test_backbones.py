# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Adapters against the families' own forward passes."""

from __future__ import annotations

import pytest
import torch

from torchrl_dvla.modules import TransformersVLA, backbones, word_tokenizer
from torchrl_dvla.modules.backbones import VLABackbone, backbone_class, register_backbone
from torchrl_dvla.modules.pretrained import backbone_from_dict, backbone_to_dict

from .policies import FAMILIES, IMAGE_TOKEN, make_observation, reference_hidden

family = pytest.mark.parametrize("name", FAMILIES)


def build(name):
    config = FAMILIES[name]()
    torch.manual_seed(0)
    model = backbone_from_dict(backbone_to_dict(config), dtype=torch.float32).eval()
    adapter = backbone_class(config.model_type)
    return adapter(model, image_size=adapter.image_size_of(config, (32, 32)))


SIZES = {"action_dim": 3, "chunk_size": 2, "image_size": (32, 32), "state_dim": 4}


def small_vla(name, **kwargs):
    texts = ["lift the cup", "open it"]
    policy = TransformersVLA.from_backbone(FAMILIES[name](), instructions=texts, **SIZES | kwargs)
    policy.query_head.projection.weight.data.mul_(30.0)
    policy.query_head.queries.data.normal_()
    return policy


@family
@torch.no_grad()
def test_prompt_is_read_as_the_family_reads_it(name):
    """Without queries, hidden states equal those of the transformers model itself."""
    backbone = build(name)
    num_image = backbone.num_image_tokens
    pixels = torch.randn(2, 3, 32, 32)
    text = torch.randint(3, IMAGE_TOKEN, (2, 5))
    ids = torch.cat([torch.full((2, num_image), IMAGE_TOKEN), text], 1)
    expected = reference_hidden(backbone.model, ids, pixels)

    embeddings = torch.cat([backbone.embed_images(pixels), backbone.embed_tokens(text)], 1)
    image, start = backbone.image_positions(backbone.first_position)
    rest = torch.arange(start, start + 5).expand(backbone.num_position_axes, -1)
    visible = torch.ones(num_image + 5, num_image + 5, dtype=torch.bool)
    if not backbone.bidirectional_prompt:
        visible.tril_()
    hidden = backbone.decode(
        embeddings,
        torch.cat([image, rest], -1)[:, None],
        torch.zeros(1, 1, *visible.shape).masked_fill(~visible, -torch.inf),
        num_image + 5,
    )
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


@family
@torch.no_grad()
def test_policy_on_every_family(name):
    policy = small_vla(name)
    td = make_observation(2, state_dim=4)
    logits = policy.action_logits(td)
    assert logits.shape == (2, 2, 3, 256)
    assert torch.isfinite(logits).all()
    # OpenVLA-OFT's layout is the default on a given backbone: one query a token.
    assert policy.query_head.queries.shape == (6, 32)
    td["observation", "image"][0] = 0
    difference = (policy.action_logits(td) - logits).abs().amax((-3, -2, -1))
    assert difference[0] > 1e-4 and difference[1] < 1e-5
    # Images of another size are resized.
    policy = small_vla(name, image_size=(48, 48))
    assert policy.action_logits(make_observation(2, state_dim=4, size=48)).shape == logits.shape


@family
def test_freezing(name):
    policy = small_vla(name, freeze_vision=True, freeze_language=True)
    policy.action_logits(make_observation(2, state_dim=4)).sum().backward()
    for module in (policy.backbone.vision_model, policy.backbone.language_model):
        assert all(parameter.grad is None for parameter in module.parameters())
    assert policy.query_head.queries.grad is not None


@family
@torch.no_grad()
def test_checkpoint_of_every_family(name, tmp_path):
    policy = small_vla(name)
    policy.save_pretrained(tmp_path)
    again = TransformersVLA.from_pretrained(tmp_path)
    td = make_observation(2, state_dim=4)
    assert torch.equal(policy.action_logits(td), again.action_logits(td))


@family
@torch.no_grad()
def test_pretrained_folder(name, tmp_path):
    """A transformers checkpoint folder gives weights, tokenizer and pixel statistics."""
    backbone = build(name)
    backbone.model.save_pretrained(tmp_path)
    word_tokenizer(["lift the cup", "open it"]).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}'
    )
    policy = TransformersVLA.from_backbone(tmp_path, **SIZES)
    ours = dict(policy.backbone.model.named_parameters())
    for parameter_name, parameter in backbone.model.named_parameters():
        assert torch.equal(ours[parameter_name], parameter), parameter_name
    style = policy.config.pixel_style
    assert (style.mean, style.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert style.interpolation == "bilinear"
    # The family's own prompt, in the checkpoint's own words.
    assert policy.config.prompt_style == policy.backbone.prompt_style
    assert policy.action_logits(make_observation(2, state_dim=4)).shape == (2, 2, 3, 256)


@torch.no_grad()
def test_bfloat16_backbone_float32_logits():
    policy = small_vla("smolvlm", dtype="bfloat16")
    assert policy.backbone.dtype == torch.bfloat16
    assert policy.query_head.projection.weight.dtype == torch.float32
    logits = policy.action_logits(make_observation(2, state_dim=4))
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


def test_qwen_positions_of_an_image():
    """A 32 x 48 image of 8-pixel tokens: rows count along height, columns along width."""
    config = FAMILIES["qwen2_5_vl"]()
    model = backbone_from_dict(backbone_to_dict(config), dtype=torch.float32)
    backbone = backbone_class("qwen2_5_vl")(model, image_size=(16, 24))
    positions, following = backbone.image_positions(7)
    assert positions.tolist() == [[7, 7, 7, 7, 7, 7], [7, 7, 7, 8, 8, 8], [7, 8, 9, 7, 8, 9]]
    assert following == 10
    assert backbone.image_size_of(config, (30, 45)) == (32, 48)
    with pytest.raises(ValueError, match=r"multiple of 8 .* got \(16, 20\)"):
        backbone_class("qwen2_5_vl")(model, image_size=(16, 20))


def test_unknown_family_lists_the_known():
    with pytest.raises(ValueError, match=r"one of \['idefics3', .*'smolvlm'\], got 'bert'"):
        backbone_class("bert")
    from transformers import BertConfig

    with pytest.raises(ValueError, match="got 'bert'"):
        TransformersVLA.from_backbone(BertConfig(), instructions=["x"], **SIZES)


def test_a_family_can_be_added(monkeypatch):
    monkeypatch.setattr(backbones, "_BACKBONES", dict(backbones._BACKBONES))

    @register_backbone
    class OtherBackbone(backbones.SmolVLMBackbone):
        model_types = ("other_vlm",)

    assert backbone_class("other_vlm") is OtherBackbone
    with pytest.raises(ValueError, match="'other_vlm'.* got 'bert'"):
        backbone_class("bert")
    with pytest.raises(ValueError, match="must name at least one"):
        register_backbone(VLABackbone)


def test_stream_longer_than_the_window():
    config = FAMILIES["paligemma2"]()
    policy = TransformersVLA.from_backbone(
        config, instructions=["x"], action_dim=8, chunk_size=16, image_size=(32, 32)
    )
    td = make_observation(2, state_dim=4).exclude(("observation", "state"))
    td["language_instruction"] = "x"
    # 16 image tokens + 1 word + 128 queries in a window of 128.
    with pytest.raises(ValueError, match=r"must not exceed the 128 tokens .* got 145"):
        policy.action_logits(td)


def test_source_without_tokenizer():
    with pytest.raises(ValueError, match="tokenizer must be given"):
        TransformersVLA.from_backbone(FAMILIES["smolvlm"](), **SIZES)
