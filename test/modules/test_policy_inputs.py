# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pixels, states, words and samples; the token stream: ids, positions, and who sees whom."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from torchrl_dvla.modules import TinyBackboneConfig, TinyFlowConfig, word_tokenizer
from torchrl_dvla.modules.action_head import inverse_cdf_sample
from torchrl_dvla.modules.backbones import PixelStyle, PromptStyle
from torchrl_dvla.modules.policy_inputs import PixelNormalizer, RangeScaler, StateProjector
from torchrl_dvla.modules.prompt import PromptBuilder
from torchrl_dvla.modules.tiny import _sine_table

from .policies import make_observation


def test_normalises_by_channel():
    style = PixelStyle(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    image = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    pixels = PixelNormalizer(style, image_size=(2, 2))(image)
    expected = torch.tensor([0.2, -0.6, -3.2])
    torch.testing.assert_close(pixels[0, :, 0, 0], expected)


def test_float_images_mean_the_same_and_are_left_alone():
    normalize = PixelNormalizer(PixelStyle(), image_size=(4, 4))
    image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    scaled = image.float() / 255
    kept = scaled.clone()
    torch.testing.assert_close(normalize(scaled), normalize(image))
    assert torch.equal(scaled, kept)


def test_resizes_with_antialiasing():
    # A one-pixel chessboard is grey from afar.
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 255
    image = board.to(torch.uint8).expand(1, 3, 8, 8)
    style = PixelStyle(interpolation="bilinear")
    pixels = PixelNormalizer(style, image_size=(2, 2))(image)
    torch.testing.assert_close(pixels, torch.zeros(1, 3, 2, 2), atol=0.05, rtol=0)


def test_images_as_tensorflow_resizes_and_crops_them():
    """The numbers are of TensorFlow 2.21: resize (lanczos3, antialias), crop_and_resize of 90 %."""
    image = (torch.arange(144) * 37 % 256).to(torch.uint8).view(6, 8, 3).permute(2, 0, 1)[None]
    resized = [[104, 159, 112, 71], [177, 138, 92, 136], [156, 127, 77, 108], [144, 109, 92, 173]]
    cropped = [[113, 156, 111, 78], [173, 136, 92, 132], [154, 126, 78, 106], [142, 110, 91, 162]]
    for crop, expected in ((1.0, resized), (0.9, cropped)):
        # Two towers: pixels in [0, 1], and in [-1, 1].
        style = PixelStyle(
            mean=(0,) * 3 + (0.5,) * 3,
            std=(1,) * 3 + (0.5,) * 3,
            interpolation="lanczos",
            crop=crop,
        )
        pixels = PixelNormalizer(style, image_size=(4, 4))(image)
        assert pixels.shape == (1, 6, 4, 4)
        assert (pixels[0, 0] * 255).round().tolist() == expected
        torch.testing.assert_close(pixels[:, 3:], 2 * pixels[:, :3] - 1)


@pytest.mark.parametrize(("height", "width"), [(2, 4), (4, 2)])
def test_pads_instead_of_distorting(height, width):
    image = torch.full((1, 3, height, width), 255, dtype=torch.uint8)
    pixels = PixelNormalizer(PixelStyle(padding="center"), image_size=(4, 4))(image)[0, 0]
    # black, white, white, black along the shorter side
    lines = (pixels if height < width else pixels.T).unique(dim=1).flatten()
    assert lines.tolist() == [-1.0, 1.0, 1.0, -1.0]
    pixels = PixelNormalizer(PixelStyle(padding="top_left"), image_size=(4, 4))(image)[0, 0]
    lines = (pixels if height < width else pixels.T).unique(dim=1).flatten()
    assert lines.tolist() == [-1.0, -1.0, 1.0, 1.0]
    # A 6 x 9 image becomes 2 x 4: 6 / (9 / 4) = 2.67, and LeRobot and openpi round down.
    image = torch.full((1, 3, 6, 9), 255, dtype=torch.uint8)
    style = PixelStyle(padding="center", interpolation="bilinear")
    pixels = PixelNormalizer(style, image_size=(4, 4))(image)[0, 0, :, 0]
    assert pixels.tolist() == [-1.0, 1.0, 1.0, -1.0]


def test_smoothing_is_a_choice():
    # Of four columns, two are sampled between their neighbours: 0.5 and 2.5.
    image = torch.tensor([0, 60, 120, 240], dtype=torch.uint8).expand(1, 3, 4, 4)
    style = PixelStyle(mean=(0.0,) * 3, std=(1 / 255,) * 3, interpolation="bilinear")
    plain = PixelNormalizer(dataclasses.replace(style, antialias=False), image_size=(2, 2))
    torch.testing.assert_close(plain(image)[0, 0, 0], torch.tensor([30.0, 180.0]))
    # A filter of twice the width takes in the next columns too.
    smooth = PixelNormalizer(style, image_size=(2, 2))(image)[0, 0, 0]
    weights = torch.tensor([0.75, 0.75, 0.25])
    expected = (weights * torch.tensor([0.0, 60.0, 120.0])).sum() / weights.sum()
    torch.testing.assert_close(smooth[0], expected)


@pytest.mark.parametrize(
    ("low", "high"), [([0.0, 1.0], [1.0, 1.0]), ([0.0, 0.0], [1.0, math.nan]), ([0.0], [1.0])]
)
def test_ranges_that_are_none(low, high):
    scaler = RangeScaler(2)
    with pytest.raises(ValueError, match="^low and high must have shape .2,. and be finite, and"):
        scaler.set_range(torch.tensor(low), torch.tensor(high))
    saved = {"0.low": torch.tensor(low), "0.high": torch.tensor(high)}
    with pytest.raises(ValueError, match="^0.low and 0.high must have"):
        torch.nn.Sequential(scaler).load_state_dict(saved)


def test_the_end_of_a_range_is_exact():
    """Or it would fall into another bin of the prompt."""
    scaler = RangeScaler(3)
    low = torch.tensor([0.1, -1234.567, 1e-3])
    scaler.set_range(low, low + torch.tensor([0.7, 3.3, 1e-3]))
    assert scaler.standardize(low).tolist() == [-1.0, -1.0, -1.0]


def test_standardises():
    projector = StateProjector(2, 8)
    projector.set_statistics(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    state = torch.tensor([[3.0, 10.0]])
    expected = projector.layers(torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(projector(state), expected[:, None])


def test_order_of_instructions_does_not_matter():
    one = word_tokenizer(["open the drawer", "lift it"])
    two = word_tokenizer(["lift it", "open the drawer"])
    assert one.get_vocab() == two.get_vocab()
    assert one.pad_token_id == 0 and one.unk_token_id == 1


def test_frequencies():
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    counts = torch.bincount(inverse_cdf_sample(probs.expand(20000, 4)), minlength=4)
    # Three standard deviations of a binomial are at most 3 * sqrt(0.25 / 20000) = 0.011.
    torch.testing.assert_close(counts / 20000, probs, atol=0.011, rtol=0)
    assert counts[1] == 0


def test_every_token_can_be_drawn_in_half_precision():
    probs = torch.full((300,), 1 / 300, dtype=torch.bfloat16)
    assert inverse_cdf_sample(probs.expand(20000, 300)).unique().tolist() == [*range(300)]


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-24])
def test_impossible_tokens_at_the_ends(monkeypatch: pytest.MonkeyPatch, draw: float):
    monkeypatch.setattr(torch, "rand_like", lambda tensor: torch.full_like(tensor, draw))
    logits = torch.tensor([-torch.inf, 0.3, -0.2, 1.1, -torch.inf])
    token = inverse_cdf_sample(F.softmax(logits, -1)[None])
    assert token.item() == (1 if draw == 0.0 else 3)


def test_sine_table_tells_cells_apart():
    table = _sine_table(8, 32)
    assert table.shape == (64, 32)
    distance = torch.cdist(table, table) + torch.eye(64) * 100
    assert distance.min() > 0.5
    # Row and column are each half of the table.
    assert torch.equal(table[3 * 8 + 5, :16], table[3 * 8 + 2, :16])
    assert torch.equal(table[3 * 8 + 5, 16:], table[1 * 8 + 5, 16:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptStyle(instruction="do it"), r"must contain '{instruction}', got 'do it'"),
        (lambda: PixelStyle(mean=(0.5,)), "three or six entries"),
        (lambda: PixelStyle(interpolation="nearest"), r"one of \['bilinear', .* got 'nearest'"),
        (
            lambda: StateProjector(2, 8).set_statistics(torch.zeros(2), torch.tensor([1.0, 0.0])),
            "std must be positive",
        ),
        (lambda: PixelStyle(mean=(0.5, 0.5, math.nan)), "mean must be .*finite"),
        (lambda: PixelStyle(std=(math.nan, 0.5, 0.5)), "std must be .*finite"),
        (lambda: PixelStyle(std=(0.5, 0.0, 0.5)), "be finite and std positive"),
        (lambda: TinyFlowConfig(text_size=40), "text_size must be a multiple of head_size=32, got"),
        (lambda: TinyFlowConfig(image_size=100), "image_size must be a multiple of patch_size=16"),
        (lambda: word_tokenizer(["", "  "]), "at least one word"),
        (lambda: inverse_cdf_sample(torch.tensor([[0.5, torch.nan]])), "must be finite"),
        (lambda: TinyBackboneConfig(vision_size=100), "vision_size must be a multiple of head_siz"),
        (lambda: TinyBackboneConfig(image_size=100), r"image_size must be a multiple .*, got 100"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.0, 0.0], [1.0, 0.0]),
        ([0.0, 0.0], [1.0, -1.0]),
        ([0.0, 0.0], [1.0, math.nan]),
        ([0.0, 0.0], [1.0, math.inf]),
        ([0.0, math.nan], [1.0, 1.0]),
        ([0.0], [1.0]),
    ],
)
def test_statistics_that_would_spoil_every_state(mean, std):
    projector = StateProjector(2, 8)
    before = projector.state_dict()
    with pytest.raises(ValueError, match="^mean and std must have shape .2,. and be finite, and"):
        projector.set_statistics(torch.tensor(mean), torch.tensor(std))
    saved = {f"0.{key}": value for key, value in before.items()}
    saved |= {"0.mean": torch.tensor(mean), "0.std": torch.tensor(std)}
    with pytest.raises(ValueError, match="^0.mean and 0.std must have"):
        torch.nn.Sequential(projector).load_state_dict(saved)
    assert projector.mean.tolist() == [0.0, 0.0] and projector.std.tolist() == [1.0, 1.0]


# -- the token stream -----------------------------------------------------------------------------
def builder(policy, **kwargs):
    defaults = {
        "style": PromptStyle(), "num_cameras": 1, "use_state": True, "num_queries": 2,
        "bidirectional": False,
    }  # fmt: skip
    return PromptBuilder(policy.backbone, policy.tokenizer, **{**defaults, **kwargs})


def lay_out(prompt, *instructions):
    return prompt(list(instructions), device=torch.device("cpu"), dtype=torch.float32)


def test_ids_and_positions_of_a_padded_batch(policy):
    prompt = lay_out(builder(policy), "lift it", "open the drawer")
    vocabulary = policy.tokenizer.get_vocab()
    expected = [[vocabulary[w] for w in ("lift", "it")] + [0]]
    expected += [[vocabulary[w] for w in ("open", "the", "drawer")]]
    assert prompt.token_ids.tolist() == expected
    # 32 x 32 image, patch 8, shuffle 2: 4 image tokens; then one state token. Queries count
    # from the end of their own instruction, and the padding's own position is of no account.
    rows = [[0, 1, 2, 3, 4, 5, 6, 7, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert prompt.position_ids.tolist() == [rows]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_who_sees_whom(policy, bidirectional):
    prompt = lay_out(builder(policy, bidirectional=bidirectional), "lift it", "open the drawer")
    seen = prompt.attention_bias == 0
    assert seen.shape == (2, 1, 10, 10)
    assert ((prompt.attention_bias == 0) | (prompt.attention_bias == -torch.inf)).all()
    for row, padding in enumerate(([7], [])):
        for query in range(10):
            for key in range(10):
                if key in padding:
                    wanted = False
                elif query >= 8:
                    wanted = True  # queries see the prompt and each other, both ways
                elif key >= 8:
                    wanted = False
                else:
                    wanted = bidirectional or key <= query
                assert seen[row, 0, query, key] == wanted, (row, query, key)
    # One mask serves all rows where nothing is padded.
    assert lay_out(builder(policy), "lift it", "lift it").attention_bias.shape[0] == 1


def test_frame_of_two_cameras_with_text(policy):
    style = PromptStyle("pick", "up the", "it", "{instruction} it")
    prompt = builder(policy, style=style, num_cameras=2)
    # pick | up the | 4 image | it | up the | 4 image | it | state
    assert prompt.frame_length == 1 + 2 * (2 + 4 + 1) + 1
    ids = (prompt.start_ids, prompt.image_start_ids, prompt.image_end_ids)
    assert [len(tokens) for tokens in ids] == [1, 2, 1]
    assert len(prompt.instruction_ids("lift")) == 2


def test_small_batches_are_remembered(policy):
    prompt = builder(policy, cache_size=2)
    first = lay_out(prompt, "lift it")
    assert lay_out(prompt, "lift it") is first
    assert lay_out(prompt, "open it") is not first
    lay_out(prompt, "pick it")
    assert lay_out(prompt, "lift it") is not first  # only two are kept


def test_words_that_the_tokenizer_does_not_know_are_said(policy, caplog):
    prompt = builder(policy)
    lay_out(prompt, "lift it, please", "open it")
    lay_out(prompt, "lift it, please")
    assert [record.getMessage() for record in caplog.records] == [
        "The tokenizer does not know 'please' of 'lift it, please': the policy cannot tell them "
        "apart."
    ]
    lay_out(prompt, "...")  # no word
    with pytest.raises(ValueError, match="have a word that the tokenizer knows, got 'close that"):
        lay_out(prompt, "close that")
    assert len(caplog.records) == 1


@torch.no_grad()
def test_queries_see_each_other_but_not_backwards(policy):
    td = make_observation(2)
    states: list[torch.Tensor] = []
    last = policy.backbone.model.text_model.layers[-1]
    handle = last.register_forward_hook(lambda module, args, output: states.append(output))
    before = policy.action_logits(td)
    policy.query_head.queries.data[-1] += 1.0
    after = policy.action_logits(td)
    handle.remove()
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-3
    num_queries = len(policy.query_head.queries)
    assert torch.equal(states[0][:, :-num_queries], states[1][:, :-num_queries])
    assert not torch.equal(states[0][:, -num_queries:], states[1][:, -num_queries:])


@torch.no_grad()
def test_padding_changes_nothing(policy):
    td = make_observation(2, instructions=["lift it", "pick up the black bowl"])
    before = policy.action_logits(td)
    policy.backbone.model.text_model.embed_tokens.weight.data[0] = 123.0
    assert torch.equal(policy.action_logits(td), before)
