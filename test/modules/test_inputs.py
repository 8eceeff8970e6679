# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pixels, states, words and samples."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchrl_dvla.modules import TinyBackboneConfig, word_tokenizer
from torchrl_dvla.modules.action_head import inverse_cdf_sample
from torchrl_dvla.modules.backbones import PixelStyle
from torchrl_dvla.modules.policy_inputs import PixelNormalizer, StateProjector
from torchrl_dvla.modules.tiny import _sine_table


class TestPixels:
    def test_normalises_by_channel(self):
        style = PixelStyle(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
        image = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
        pixels = PixelNormalizer(style, image_size=(2, 2))(image)
        expected = torch.tensor([0.2, -0.6, -3.2])
        torch.testing.assert_close(pixels[0, :, 0, 0], expected)

    def test_float_images_mean_the_same_and_are_left_alone(self):
        normalize = PixelNormalizer(PixelStyle(), image_size=(4, 4))
        image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
        scaled = image.float() / 255
        kept = scaled.clone()
        torch.testing.assert_close(normalize(scaled), normalize(image))
        assert torch.equal(scaled, kept)

    def test_resizes_with_antialiasing(self):
        # A one-pixel chessboard is grey from afar.
        board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 255
        image = board.to(torch.uint8).expand(1, 3, 8, 8)
        style = PixelStyle(interpolation="bilinear")
        pixels = PixelNormalizer(style, image_size=(2, 2))(image)
        torch.testing.assert_close(pixels, torch.zeros(1, 3, 2, 2), atol=0.05, rtol=0)

    def test_bad_style(self):
        with pytest.raises(ValueError, match="three entries"):
            PixelStyle(mean=(0.5,))
        with pytest.raises(ValueError, match="must be 'bilinear' or 'bicubic', got 'nearest'"):
            PixelStyle(interpolation="nearest")


class TestState:
    def test_standardises(self):
        projector = StateProjector(2, 8)
        projector.set_statistics(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
        state = torch.tensor([[3.0, 10.0]])
        expected = projector.layers(torch.tensor([[1.0, 2.0]]))
        torch.testing.assert_close(projector(state), expected[:, None])

    def test_refuses_a_zero_std(self):
        with pytest.raises(ValueError, match=r"must be positive.*smallest std of 0"):
            StateProjector(2, 8).set_statistics(torch.zeros(2), torch.tensor([1.0, 0.0]))


class TestWords:
    def test_order_of_instructions_does_not_matter(self):
        one = word_tokenizer(["open the drawer", "lift it"])
        two = word_tokenizer(["lift it", "open the drawer"])
        assert one.get_vocab() == two.get_vocab()
        assert one.pad_token_id == 0 and one.unk_token_id == 1

    def test_no_words(self):
        with pytest.raises(ValueError, match="at least one word"):
            word_tokenizer(["", "  "])


class TestSampling:
    def test_frequencies(self):
        probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
        counts = torch.bincount(inverse_cdf_sample(probs.expand(20000, 4)), minlength=4)
        # Three standard deviations of a binomial are at most 3 * sqrt(0.25 / 20000) = 0.011.
        torch.testing.assert_close(counts / 20000, probs, atol=0.011, rtol=0)
        assert counts[1] == 0

    @pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-24])
    def test_impossible_tokens_at_the_ends(self, monkeypatch: pytest.MonkeyPatch, draw: float):
        monkeypatch.setattr(torch, "rand_like", lambda tensor: torch.full_like(tensor, draw))
        logits = torch.tensor([-torch.inf, 0.3, -0.2, 1.1, -torch.inf])
        token = inverse_cdf_sample(F.softmax(logits, -1)[None])
        assert token.item() == (1 if draw == 0.0 else 3)

    def test_refuses_nan(self):
        with pytest.raises(ValueError, match="must be finite"):
            inverse_cdf_sample(torch.tensor([[0.5, torch.nan]]))


class TestTiny:
    def test_sine_table_tells_cells_apart(self):
        table = _sine_table(8, 32)
        assert table.shape == (64, 32)
        distance = torch.cdist(table, table) + torch.eye(64) * 100
        assert distance.min() > 0.5
        # Row and column are each half of the table.
        assert torch.equal(table[3 * 8 + 5, :16], table[3 * 8 + 2, :16])
        assert torch.equal(table[3 * 8 + 5, 16:], table[1 * 8 + 5, 16:])

    def test_sizes_that_do_not_divide(self):
        with pytest.raises(ValueError, match=r"vision_size must be a multiple of head_size=32"):
            TinyBackboneConfig(vision_size=100)
        with pytest.raises(ValueError, match=r"image_size must be a multiple .*32, got 100"):
            TinyBackboneConfig(image_size=100)
