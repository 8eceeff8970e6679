# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Sizes from shapes, at the sizes of the published models: files without data."""

from __future__ import annotations

import json
import math
import os

import pytest

from torchrl_dvla.modules.formats.flow_weights import (
    TensorFile,
    paligemma_sizes,
    pi_names,
    smolvla_names,
    smolvla_sizes,
    weights_dtype,
)

from .foreign import _decoder, _linear, _siglip


@pytest.fixture
def write(tmp_path):
    def write(shapes):
        """A safetensors file that is all holes behind its header."""
        header, end = {}, 0
        for name, shape in shapes.items():
            size = 2 * math.prod(shape)
            offsets = [end, end + size]
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + end)
        return TensorFile(path)

    return write


def pick(found, **wanted):
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("adaptive", [False, True])
def test_pi0_and_pi05(write, adaptive):
    """Gemma of 2 billion and of 300 million, and the SigLIP tower of PaliGemma."""
    whole = "paligemma_with_expert"
    vlm = f"{whole}.paligemma.model"
    shapes = {
        **_siglip(f"{vlm}.vision_tower.vision_model", 1152, 4304, 27, 14, 256),
        **_linear(f"{vlm}.multi_modal_projector.linear", 2048, 1152),
        f"{whole}.paligemma.lm_head.weight": (257152, 2048),
        **_decoder(f"{vlm}.language_model", 2048, 16384, 18, 8, 1, 256),
        **_decoder(f"{whole}.gemma_expert.model", 1024, 4096, 18, 8, 1, 256, adaptive=adaptive),
        **_linear("action_in_proj", 1024, 32),
        **_linear("action_out_proj", 32, 1024),
        **_linear("time_mlp_in" if adaptive else "action_time_mlp_in", 1024, 1024),
    }
    file = write(shapes)
    table = pi_names(file, "")
    sizes = paligemma_sizes(file, table)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
    pick(
        sizes["vlm_config"]["text_config"],
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, vocab_size=257152, **heads,
    )  # fmt: skip
    pick(
        sizes["dit_config"],
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=18, **heads,
    )  # fmt: skip
    pick(
        sizes["vlm_config"]["vision_config"],
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=224, patch_size=14,
    )  # fmt: skip
    assert sizes["max_action_dim"] == 32 and weights_dtype(file, table) == "bfloat16"
    # 3.2 billion: 2.0 of words and language, 0.4 of the tower, 0.3 of the expert, 0.5 of words.
    total = sum(file.count(table.own.values()).values())
    assert 3.2e9 < total < 3.4e9


def test_smolvla(write):
    """SmolVLM2-500M with half of its layers, and an expert of three quarters of its width."""
    whole = "vlm_with_expert"
    vlm = f"{whole}.vlm.model"
    shapes = {
        **_siglip(f"{vlm}.vision_model", 768, 3072, 12, 16, 1024),
        f"{vlm}.connector.modality_projection.proj.weight": (960, 768 * 16),
        f"{vlm}.text_model.embed_tokens.weight": (49280, 960),
        **_decoder(f"{vlm}.text_model", 960, 2560, 16, 15, 5, 64),
        f"{whole}.vlm.lm_head.weight": (49280, 960),
        **_decoder(f"{whole}.lm_expert", 720, 2048, 16, 15, 5, 64, cross=320),
        **_linear("state_proj", 960, 32),
        **_linear("action_out_proj", 32, 720),
    }
    file = write({f"model.{name}": shape for name, shape in shapes.items()})
    table = smolvla_names(file)
    sizes = smolvla_sizes(file, table, "HuggingFaceTB/SmolVLM2-500M-Video-Instruct")
    heads = {"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64}
    pick(
        sizes["vlm_config"]["text_config"],
        hidden_size=960, intermediate_size=2560, num_hidden_layers=16, vocab_size=49280, **heads,
    )  # fmt: skip
    pick(
        sizes["dit_config"],
        hidden_size=720, intermediate_size=2048, num_hidden_layers=16, **heads,
    )  # fmt: skip
    pick(
        sizes["vlm_config"]["vision_config"],
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=512, patch_size=16,
    )  # fmt: skip
    assert sizes["vlm_config"]["scale_factor"] == 4
    assert (sizes["max_action_dim"], sizes["max_state_dim"]) == (32, 32)
    assert 3.9e8 < sum(file.count(table.own.values()).values()) < 4.6e8


def test_what_sizes_follow_from_is_missing(write):
    file = write({"model.vlm_with_expert.lm_expert.norm.weight": (720,)})
    with pytest.raises(ValueError, match="must hold 'model.vlm_with_expert.vlm.model.text_model"):
        smolvla_sizes(file, smolvla_names(file), "SmolVLM2-500M-Instruct")
