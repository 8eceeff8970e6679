# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Weights of pi0, pi0.5 and SmolVLA as openpi and LeRobot name them: names, and sizes from shapes.

Both projects name their modules alike. The names of what a folder holds are mapped one by one, and
sizes are read from the shapes, so that what is loaded is what is there and not what a variant's
name stands for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from torchrl_dvla.modules.formats.tensor_file import TensorFile

__all__ = [
    "NameTable",
    "paligemma_sizes",
    "pi_names",
    "smolvla_names",
    "smolvla_sizes",
]

_VLM = "network.model.model.vlm."
_EMBED = "network.model.embed_action_time."
_PALIGEMMA = "paligemma_with_expert.paligemma."
_WORDS = f"{_PALIGEMMA}model.language_model.embed_tokens.weight"
_TIED_WORDS = f"{_PALIGEMMA}lm_head.weight"

#: What a name begins with there, and here. The first that fits counts.
_PI = {
    # transformers has dropped "vision_model" with version 5.6.
    f"{_PALIGEMMA}model.vision_tower.vision_model.": f"{_VLM}vision_tower.",
    f"{_PALIGEMMA}model.": _VLM,
    "paligemma_with_expert.gemma_expert.model.": "network.model.model.dit.",
    "state_proj.": f"{_EMBED}state_proj.",
    "action_in_proj.": f"{_EMBED}action_in_proj.",
    "action_time_mlp_in.": f"{_EMBED}action_time_mlp_in.",
    "action_time_mlp_out.": f"{_EMBED}action_time_mlp_out.",
    "time_mlp_in.": f"{_EMBED}time_mlp_in.",
    "time_mlp_out.": f"{_EMBED}time_mlp_out.",
    "action_out_proj.": "network.model.action_out_proj.",
}
_SMOLVLA = {
    "vlm_with_expert.vlm.model.": "network.vlm.model.",
    "vlm_with_expert.lm_expert.": "network.expert.",
    **{
        f"{name}.": f"network.{name}."
        for name in (
            "state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in",
            "action_time_mlp_out",
        )
    },
}  # fmt: skip
#: Heads over words, of which no action depends.
_PI_UNREAD = (
    "paligemma_with_expert.gemma_expert.lm_head.weight",
    "paligemma_with_expert.gemma_expert.model.embed_tokens.weight",
)
_SMOLVLA_UNREAD = ("vlm_with_expert.vlm.lm_head.weight",)

#: Widths of an attention head that no shape tells. Gemma's is that of its one key.
_SIGLIP_HEAD = 72
#: Of language model and vision tower, by the name of the model that SmolVLA was built on.
_SMOLVLM_HEADS = {
    "SmolVLM2-256M-Video-Instruct": (64, 64),
    "SmolVLM2-500M-Video-Instruct": (64, 64),
    "SmolVLM2-500M-Instruct": (64, 64),
    "SmolVLM2-2.2B-Instruct": (64, 72),
}
#: Entries of a checkpoint of LeRobot before 0.4, which kept its statistics there.
_OLD_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class NameTable:
    """Entries of a policy's state dict and the tensors of a file that they are read from.

    Args:
        own (Mapping): name in the file by name in the state dict.
        unread (tuple of str): tensors of the file of which no action depends.
        starts (Mapping): what names begin with in the file, by what they begin with here.
        copies (Mapping): unread tensors that equal another one which is read, by name.
    """

    own: Mapping[str, str]
    unread: tuple[str, ...]
    starts: Mapping[str, str]
    copies: Mapping[str, str] = field(default_factory=dict)

    def name_in_file(self, own: str) -> str:
        """Name in the file of an entry, also of one that the file lacks."""
        if own in self.own:
            return self.own[own]
        start = next((each for each in self.starts if own.startswith(each)), "")
        return self.starts.get(start, "") + own.removeprefix(start)


def pi_names(file: TensorFile, prefix: str) -> NameTable:
    """Names of a pi0 or pi0.5.

    Args:
        file (TensorFile): the weights.
        prefix (str): what every name begins with, ``"model."`` of LeRobot.

    Raises:
        ValueError: if a name is of something else, with the name.

    Reference:
        https://github.com/Physical-Intelligence/openpi,
        ``examples/convert_jax_model_to_pytorch.py`` and
        ``src/openpi/models_pytorch/pi0_pytorch.py``; https://github.com/huggingface/lerobot,
        ``policies/pi0/modeling_pi0.py`` (``_fix_pytorch_state_dict_keys``).
    """
    words, tied = prefix + _WORDS, prefix + _TIED_WORDS
    table = _names(file, prefix, _PI, (*_PI_UNREAD, _TIED_WORDS))
    # safetensors writes one of two tied tensors. In LeRobot they are not tied: actions depend on
    # the words, and the head stays what it was.
    if tied in file.shapes:
        if words in file.shapes:
            found = file.read([words, tied])
            if torch.equal(found[words], found[tied]):
                table = dataclasses.replace(table, copies={tied: words})
        else:
            unread = tuple(name for name in table.unread if name != tied)
            own = {**table.own, f"{_VLM}language_model.embed_tokens.weight": tied}
            table = dataclasses.replace(table, own=own, unread=unread)
    return table


def smolvla_names(file: TensorFile) -> NameTable:
    """Names of a SmolVLA.

    Args:
        file (TensorFile): the weights.

    Raises:
        ValueError: if a name is of something else, with the name.

    Reference:
        https://github.com/huggingface/lerobot, ``policies/smolvla/modeling_smolvla.py`` and
        ``smolvlm_with_expert.py``.
    """
    return _names(file, "model.", _SMOLVLA, _SMOLVLA_UNREAD)


def _names(
    file: TensorFile, prefix: str, table: Mapping[str, str], unread: tuple[str, ...]
) -> NameTable:
    own: dict[str, str] = {}
    left_out: list[str] = []
    unknown: list[str] = []
    for name in file.shapes:
        short = name.removeprefix(prefix) if name.startswith(prefix) else None
        start = next((each for each in table if short and short.startswith(each)), None)
        if short in unread:
            left_out.append(name)
        elif short is None or start is None:
            unknown.append(name)
        else:
            own[table[start] + short.removeprefix(start)] = name
    if unknown:
        remedy = "It is another model's, or of a version that is not known here."
        if any(name.startswith(_OLD_STATISTICS) for name in unknown):
            remedy = (
                "It has its statistics where LeRobot kept them before 0.4, and where nothing reads "
                "them now: convert it by lerobot/processor/migrate_policy_normalization.py."
            )
        elif any("lora" in name for name in unknown):
            remedy = "It holds adapters: merge them into the model that they were trained on."
        raise ValueError(
            f"{file.path} must hold nothing that is not read, got {len(unknown)} such: "
            f"{', '.join(sorted(unknown)[:6])}. {remedy}"
        )
    starts = {here: prefix + there for there, here in table.items()}
    return NameTable(own, tuple(left_out), starts)


def paligemma_sizes(file: TensorFile, table: NameTable) -> dict[str, Any]:
    """Sizes of a pi0 or pi0.5 as fields of a ``PI0Config``, from the shapes of its tensors.

    Args:
        file (TensorFile): the weights.
        table (NameTable): its names.

    Raises:
        ValueError: if a tensor that they follow from is missing.
    """
    shape = _shapes_of(file, table)
    vision, text, expert = (
        f"{_VLM}vision_tower.",
        f"{_VLM}language_model.",
        "network.model.model.dit.",
    )
    return {
        "vlm_config": {
            "model_type": "paligemma",
            "text_config": _gemma(shape, text)
            | {"vocab_size": shape(f"{text}embed_tokens.weight")[0]},
            "vision_config": _siglip(shape, vision, "encoder.layers.", _SIGLIP_HEAD)
            | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "projection_dim": shape(f"{_VLM}multi_modal_projector.linear.weight")[0],
            # No word's: images stand there in the stream.
            "image_token_id": shape(f"{text}embed_tokens.weight")[0],
        },
        # Its input is projected actions: its table of words is dropped.
        "dit_config": _gemma(shape, expert) | {"vocab_size": 1},
        "max_action_dim": shape("network.model.action_out_proj.weight")[0],
    }


def smolvla_sizes(file: TensorFile, table: NameTable, vlm: str) -> dict[str, Any]:
    """Sizes of a SmolVLA as fields of a ``PI0Config``, from the shapes of its tensors.

    Args:
        file (TensorFile): the weights.
        table (NameTable): its names.
        vlm (str): name of the model that it was built on, for what no shape tells.

    Raises:
        ValueError: if a tensor that they follow from is missing, that model is not known, or the
            expert has other layers than the model.
    """
    model = vlm.rstrip("/").rpartition("/")[2]
    if model not in _SMOLVLM_HEADS:
        raise ValueError(
            f"vlm_model_name must be one of {', '.join(_SMOLVLM_HEADS)}, got {vlm!r}. The widths "
            "of its attention heads follow from no shape: other models cannot be loaded."
        )
    text_head, vision_head = _SMOLVLM_HEADS[model]
    shape = _shapes_of(file, table)
    vision, text, expert = (
        f"network.{each}." for each in ("vlm.model.vision_model", "vlm.model.text_model", "expert")
    )
    towers = _llama(shape, text, text_head), _llama(shape, expert, text_head)
    depths = [tower["num_hidden_layers"] for tower in towers]
    if depths[0] != depths[1]:
        raise ValueError(
            f"the expert must have as many layers as the language model, got {depths[1]} and "
            f"{depths[0]}. An expert of fewer layers (num_expert_layers) is not supported."
        )
    vision_config = _siglip(shape, vision, "encoder.layers.", vision_head)
    shuffled = shape("network.vlm.model.connector.modality_projection.proj.weight")[1]
    words = shape(f"{text}embed_tokens.weight")[0]
    return {
        "vlm_config": {
            "model_type": "smolvlm",
            "text_config": {**towers[0], "model_type": "llama", "vocab_size": words},
            "vision_config": vision_config,
            "scale_factor": math.isqrt(shuffled // vision_config["hidden_size"]),
            "image_token_id": 0,
            "pad_token_id": 0,
        },
        "dit_config": {**towers[1], "model_type": "llama", "vocab_size": 1},
        "max_action_dim": shape("network.action_out_proj.weight")[0],
        "max_state_dim": shape("network.state_proj.weight")[1],
    }


def _shapes_of(file: TensorFile, table: NameTable) -> Any:
    def shape(name: str) -> tuple[int, ...]:
        """Shape by our name."""
        if name not in table.own:
            raise ValueError(
                f"{file.path} must hold {table.name_in_file(name)!r}, got {len(file.shapes)} "
                f"tensors without it: {', '.join(sorted(file.shapes)[:3])} etc. It is another "
                "model's, or only a part: copy the checkpoint again."
            )
        return file.shapes[table.own[name]]

    shape.names = table.own  # type: ignore[attr-defined]
    return shape


def _depth(shape: Any, prefix: str) -> int:
    numbers = {
        int(name.removeprefix(prefix).split(".")[0])
        for name in shape.names
        if name.startswith(prefix)
    }
    return max(numbers, default=-1) + 1


def _decoder(shape: Any, prefix: str, head: int) -> dict[str, Any]:
    first = f"{prefix}layers.0."
    heads, width = shape(f"{first}self_attn.q_proj.weight")
    return {
        "hidden_size": width,
        "intermediate_size": shape(f"{first}mlp.up_proj.weight")[0],
        "num_hidden_layers": _depth(shape, f"{prefix}layers."),
        "num_attention_heads": heads // head,
        "num_key_value_heads": shape(f"{first}self_attn.k_proj.weight")[0] // head,
        "head_dim": head,
    }


def _gemma(shape: Any, prefix: str) -> dict[str, Any]:
    # Both experts of all variants have one key head.
    head = shape(f"{prefix}layers.0.self_attn.k_proj.weight")[0]
    return {"model_type": "gemma", **_decoder(shape, prefix, head)}


def _llama(shape: Any, prefix: str, head: int) -> dict[str, Any]:
    return {**_decoder(shape, prefix, head), "rms_norm_eps": 1e-5}


def _siglip(shape: Any, prefix: str, layers: str, head: int) -> dict[str, Any]:
    width, _, patch, _ = shape(f"{prefix}embeddings.patch_embedding.weight")
    num_patches = shape(f"{prefix}embeddings.position_embedding.weight")[0]
    return {
        "hidden_size": width,
        "intermediate_size": shape(f"{prefix}{layers}0.mlp.fc1.weight")[0],
        "num_hidden_layers": _depth(shape, prefix + layers),
        "num_attention_heads": width // head,
        "image_size": math.isqrt(num_patches) * patch,
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh",
    }


def weights_dtype(file: TensorFile, table: NameTable) -> str:
    """Dtype of the expert's projections, by torch's name: that which the network computes in."""
    name = next(
        own
        for own in table.own
        if own.endswith("layers.0.self_attn.q_proj.weight")
        and (".dit." in own or ".expert." in own)
    )
    dtype = file.dtypes[table.own[name]]
    if dtype not in _DTYPES:
        raise ValueError(
            f"{table.own[name]!r} in {file.path} must be of {', '.join(_DTYPES)}, got {dtype}. "
            "Quantised checkpoints cannot be loaded."
        )
    return str(_DTYPES[dtype]).removeprefix("torch.")
