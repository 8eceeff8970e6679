# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small policies and observations, and backbones of every family with random parameters."""

from __future__ import annotations

import dataclasses

import torch
from tensordict import NonTensorStack, TensorDict
from torch import nn
from torchrl.data.vla import UniformActionTokenizer
from transformers import Idefics3Config, PaliGemmaConfig, Qwen2_5_VLConfig, SmolVLMConfig

from torchrl_dvla.modules import FlowVLA, TinyBackboneConfig, TinyFlowConfig, TransformersVLA

INSTRUCTIONS = ["pick up the black bowl and place it on the plate", "open the drawer", "lift it"]
ACTION_DIM, CHUNK, STATE_DIM, BINS = 6, 4, 6, 16

#: A backbone of a few ten thousand parameters: facts about layout do not need more.
SMALL = TinyBackboneConfig(
    image_size=32, patch_size=8, vision_size=32, vision_layers=2, text_size=32, text_layers=2,
    head_size=16, mlp_ratio=2.0,
)  # fmt: skip


def make_policy(**kwargs) -> TransformersVLA:
    kwargs.setdefault("action_tokenizer", UniformActionTokenizer(BINS, low=-1.0, high=1.0))
    kwargs.setdefault("state_dim", STATE_DIM)
    policy = TransformersVLA.tiny(
        INSTRUCTIONS, action_dim=ACTION_DIM, chunk_size=CHUNK, backbone=SMALL, **kwargs
    )
    # The head starts nearly uniform; with larger logits a wrong token shows.
    policy.query_head.projection.weight.data.mul_(30.0)
    return policy


#: The same of pi0: 4 tokens an image.
SMALL_FLOW = TinyFlowConfig(
    image_size=32, patch_size=16, vision_size=32, vision_layers=2, text_size=32, expert_size=32,
    head_size=16, mlp_ratio=2.0,
)  # fmt: skip


def make_flow_policy(model_type="pi0", **kwargs) -> FlowVLA:
    kwargs.setdefault("state_dim", STATE_DIM)
    backbone = dataclasses.replace(SMALL_FLOW, model_type=model_type)
    policy = FlowVLA.tiny(
        INSTRUCTIONS, action_dim=ACTION_DIM, chunk_size=CHUNK, backbone=backbone, **kwargs
    )
    for name, parameter in policy.named_parameters():
        if ".dense." in name:  # modulations start without effect
            generator = torch.Generator().manual_seed(0)
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def make_observation(
    *batch: int, instructions=None, size=32, state_dim=STATE_DIM, wrist=False
) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    shape = (*batch, 3, size, size)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in "ab"]
    observation = {"image": images[0], "state": torch.randn(*batch, state_dim, generator=generator)}
    if wrist:
        observation["wrist_image"] = images[1]
    names = instructions or INSTRUCTIONS * torch.Size(batch).numel()
    strings = NonTensorStack(*names[: torch.Size(batch).numel()])
    text = strings.view(*batch) if len(batch) > 1 else strings if batch else names[0]
    return TensorDict({"observation": observation, "language_instruction": text}, list(batch))


VOCABULARY = 64
IMAGE_TOKEN = 60

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def smolvlm(config=SmolVLMConfig):
    return config(
        vision_config=_VISION, text_config={"model_type": "llama", **_TEXT}, scale_factor=2,
        image_token_id=IMAGE_TOKEN, pad_token_id=0,
    )  # fmt: skip


def paligemma(**text):
    return PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
        text_config={"model_type": "gemma", "head_dim": 8, **_TEXT, **text},
        projection_dim=32, hidden_size=32, image_token_index=IMAGE_TOKEN, vocab_size=VOCABULARY,
    )  # fmt: skip


def paligemma2():
    """Gemma 2 text: soft-capped attention and sliding windows."""
    return paligemma(model_type="gemma2", sliding_window=128, query_pre_attn_scalar=8)


def qwen2_5_vl():
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        },
        text_config={
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2],
            },
            **_TEXT,
        },
        image_token_id=IMAGE_TOKEN, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip


FAMILIES = {
    "smolvlm": smolvlm,
    "idefics3": lambda: smolvlm(Idefics3Config),
    "paligemma": paligemma,
    "paligemma2": paligemma2,
    "qwen2_5_vl": qwen2_5_vl,
}


def reference_hidden(model: nn.Module, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Hidden states of a family's own forward pass, prompt only."""
    model_type = model.config.model_type
    if model_type in ("smolvlm", "idefics3"):
        return model(input_ids=ids, pixel_values=pixels[:, None], use_cache=False).last_hidden_state
    if model_type == "paligemma":
        # Token type 0 marks the prefix, which sees itself in both directions.
        return model(
            input_ids=ids,
            pixel_values=pixels,
            token_type_ids=torch.zeros_like(ids),
            attention_mask=torch.ones_like(ids),
            use_cache=False,
        ).last_hidden_state
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_rescale=False, do_normalize=False,
        do_resize=False,
    )  # fmt: skip
    images = list(pixels.numpy())
    inputs = processor(images, return_tensors="pt", input_data_format="channels_first")
    return model(
        input_ids=ids,
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
        mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
        attention_mask=torch.ones_like(ids),
        use_cache=False,
    ).last_hidden_state
