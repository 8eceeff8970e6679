# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Folders of OpenVLA as OpenVLA-OFT fine-tunes it: token head, or head that regresses actions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchrl.data.vla import VocabTailActionTokenizer

from torchrl_dvla.modules.backbones import PixelStyle
from torchrl_dvla.modules.config import TransformersVLAConfig, action_tokenizer_to_dict
from torchrl_dvla.modules.formats.flow_weights import NameTable
from torchrl_dvla.modules.formats.policy_folder import PolicyFolder, Stated, read_json, settle
from torchrl_dvla.modules.formats.tensor_file import TensorFile
from torchrl_dvla.modules.openvla import OpenVLABackbone
from torchrl_dvla.modules.regression_vla import RegressionVLA
from torchrl_dvla.modules.transformers_vla import TransformersVLA

__all__ = ["L1_HEAD", "read_openvla"]

#: Files of training by OpenVLA-OFT beside the model.
L1_HEAD = "action_head--*_checkpoint.pt"
_PROPRIO = "proprio_projector--*_checkpoint.pt"
_REFUSED = {
    "noisy_action_projector--*_checkpoint.pt": "Its head denoises actions by diffusion",
    "vision_backbone--*_checkpoint.pt": "Its towers read the instruction by FiLM",
}
#: The project's names of what it is given on LIBERO.
_CAMERAS = ("full_image", "wrist_image")

#: Settings that a checkpoint must have, where it has them: no other network is built.
_FIXED: dict[str, Any] = {
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
}
_READ = {"image_sizes", "n_action_bins", "norm_stats", "pad_to_multiple_of", "text_config"}
_CHECKED = {"proprio_dim", "use_proprio"}
#: Of which no decision depends.
_IRRELEVANT = {
    "_name_or_path", "arch_specifier", "architectures", "auto_map", "bos_token_id", "dtype",
    "eos_token_id", "hf_llm_id", "is_composition", "llm_backbone_id", "llm_max_length",
    "model_type", "output_projector_states", "pad_token_id", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
_FIXED_TEXT: dict[str, Any] = {
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "rope_scaling": None, "tie_word_embeddings": False,
}  # fmt: skip
#: What the file leaves out is what transformers 4.40 took.
_TEXT = {
    "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}  # fmt: skip
#: Attention heads of both of timm's towers, which no shape tells.
_TOWER_HEADS = 16

_MODEL = "backbone.model."
_LM_HEAD = "language_model.lm_head.weight"
_QKV = tuple(
    (f"attn.qkv.{part}[{each}]", f"{{}}.{each}_proj.{part}")
    for part in ("weight", "bias")
    for each in "qkv"
)
#: Parts of names there, and here: of DINOv2 and of SigLIP.
_TOWERS = {
    "vision_backbone.featurizer.": (
        ("blocks.", "layers."), ("attn.proj.", "attention.o_proj."),
        *((there, here.format("attention")) for there, here in _QKV),
        ("ls1.scale_factor", "layer_scale1.lambda1"), ("ls2.scale_factor", "layer_scale2.lambda1"),
        ("patch_embed.proj.", "patch_embed."),
    ),
    "vision_backbone.fused_featurizer.": (
        ("blocks.", "layers."), ("attn.proj.", "self_attn.out_proj."),
        *((there, here.format("self_attn")) for there, here in _QKV),
        ("norm1.", "layer_norm1."), ("norm2.", "layer_norm2."),
        ("patch_embed.proj.", "patch_embed."),
    ),
}  # fmt: skip
_STARTS = {
    f"{_LM_HEAD}[actions]": "query_head.projection.weight",
    "language_model.model.": f"{_MODEL}language_model.",
    "projector.": f"{_MODEL}projector.",
    "proprio_projector.fc1.": "state_projector.layers.0.",
    "proprio_projector.fc2.": "state_projector.layers.2.",
    "action_head.model.": "query_head.",
    **{tower: _MODEL + tower for tower in _TOWERS},
}


@dataclass(frozen=True)
class _Names(NameTable):
    def name_in_file(self, own: str) -> str:
        for there, here in _STARTS.items():
            if own.startswith(here):
                name = there + own.removeprefix(here)
                for new, old in _TOWERS.get(there, ()):
                    name = name.replace(old, new)
                return name
        return own


def read_openvla(folder: Path, stated: Stated) -> PolicyFolder:
    """What a folder of OpenVLA-OFT holds; its weights are not read yet.

    It has ``config.json``, ``preprocessor_config.json``, safetensors and a tokenizer. Statistics
    are in ``dataset_statistics.json``, or else in ``config.json``. With an
    ``action_head--*_checkpoint.pt`` it regresses actions, and can be evaluated alone.

    Args:
        folder (Path): the folder.
        stated (Stated): what the files do not say: ``cameras`` and ``chunk_size``; ``unnorm_key``
            where they have statistics of several data sets.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a setting or tensor is not known here or would change the policy, or
            statistics are missing; names it.

    Reference:
        https://github.com/moojink/openvla-oft: ``prismatic/extern/hf/modeling_prismatic.py``,
        ``prismatic/vla/constants.py``, ``experiments/robot/openvla_utils.py`` (images, state),
        ``experiments/robot/robot_utils.py`` (gripper); https://github.com/PRIME-RL/SimpleVLA-RL
        (action tokens alone are drawn).
    """
    path = folder / "config.json"
    data = read_json(path)
    _require_known(data, path)
    for pattern, reason in _REFUSED.items():
        if found := sorted(folder.glob(pattern)):
            raise ValueError(
                f"{str(folder)!r} must hold a token head or one that regresses actions, got "
                f"{found[0].name!r}. {reason}, for which there is no network here."
            )
    parts = {
        prefix: part
        for prefix, pattern in (("action_head.", L1_HEAD), ("proprio_projector.", _PROPRIO))
        if (part := _only(folder, pattern)) is not None
    }
    file = TensorFile(_weights_path(folder), parts)
    text = {**_TEXT, **(data.get("text_config") or {})}
    num_bins = int(data.get("n_action_bins", 256))
    padding = int(data.get("pad_to_multiple_of", 64))
    table, sizes = _names(file, text, num_bins, padding)

    stats, source = _statistics(folder, data, stated)
    tokenizer = _action_tokenizer(stats, num_bins, source)
    action_dim = tokenizer["norm_low"].numel()
    state, statistics = _state(file, data, stats, source, path)
    settle("action_dim", action_dim, stated.action_dim, folder)
    settle("state_dim", state, stated.state_dim, folder)
    cameras = settle("cameras", None, stated.cameras, folder)
    if cameras not in (_CAMERAS, _CAMERAS[:1]):
        raise ValueError(
            f"stated.cameras must be {list(_CAMERAS)} or the first of them, got {list(cameras)}: "
            "as many as num_images_in_input when the policy was trained."
        )
    tower = sizes["vision_config"]["image_size"]
    regresses = "action_head." in parts
    if regresses:
        sizes["l1_head_size"] = _shape(file, table, "query_head.fc1.weight")[0]
    config = TransformersVLAConfig(
        backbone=sizes,
        action_dim=action_dim,
        chunk_size=settle("chunk_size", None, stated.chunk_size, folder),
        action_tokenizer=action_tokenizer_to_dict(VocabTailActionTokenizer(**tokenizer)),
        image_size=stated.image_size or (tower, tower),
        state_dim=state,
        num_cameras=len(cameras),
        tokens_per_step=action_dim,
        prompt_style=OpenVLABackbone.prompt_style,
        pixel_style=_pixel_style(folder / "preprocessor_config.json", tower),
        bidirectional_prompt=OpenVLABackbone.bidirectional_prompt,
        dtype={"BF16": "bfloat16", "F16": "float16"}.get(  # type: ignore[arg-type]
            file.dtypes[table.own[f"{_MODEL}language_model.norm.weight"]], "float32"
        ),
    )
    return PolicyFolder(
        format="OpenVLA-OFT, regressing actions: for evaluation" if regresses else "OpenVLA-OFT",
        file=file,
        table=table,
        config=config,
        statistics=statistics,
        tokenizer=stated.tokenizer or ".",
        cameras=cameras,
        policy_class=RegressionVLA if regresses else TransformersVLA,
        first_entry="start",
    )


def _require_known(data: dict[str, Any], path: Path) -> None:
    """Refuse settings of another network or version."""
    unknown = sorted(set(data) - set(_FIXED) - _READ - _CHECKED - _IRRELEVANT)
    if unknown:
        raise ValueError(
            f"{path} must hold settings that are known here, got {', '.join(unknown)}. It is of "
            "another version of OpenVLA-OFT, or of a fork."
        )
    text = data.get("text_config") or {}
    found = [(name, data.get(name, value), value) for name, value in _FIXED.items()]
    found += [(f"text_config.{n}", text.get(n, value), value) for n, value in _FIXED_TEXT.items()]
    for name, value, required in found:
        if value != required:
            raise ValueError(
                f"{name} in {path} must be {required!r}, got {value!r}. Other networks of its "
                "family are not built here."
            )


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise ValueError(
            f"{str(folder)!r} must hold one {pattern}, got {[each.name for each in found]}. Leave "
            "that which belongs to the model."
        )
    return found[0] if found else None


def _weights_path(folder: Path) -> Path:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() or single.is_file():
        return index if index.is_file() else single
    remedy = "Copy the checkpoint again, with all its files."
    if (folder / "lora_adapter").is_dir():
        remedy = (
            "It has adapters in lora_adapter/ alone: merge them by OpenVLA-OFT's "
            "vla-scripts/merge_lora_weights_and_save.py, into the model that they were trained on."
        )
    raise FileNotFoundError(
        f"{str(folder)!r} must contain model.safetensors.index.json or model.safetensors, got "
        f"neither. {remedy}"
    )


def _names(
    file: TensorFile, text: Mapping[str, Any], num_bins: int, padding: int
) -> tuple[_Names, dict[str, Any]]:
    """Names of the tensors, and the sizes that follow from their shapes."""
    for name in [name for name in file.shapes if ".attn.qkv." in name]:
        file.split(name, dict.fromkeys("qkv", file.shapes[name][0] // 3))
    num_words = file.shapes.get(_LM_HEAD, (0,))[0]
    if num_words >= num_bins + padding:
        rows = {"words": num_words - num_bins - padding, "actions": num_bins, "padding": padding}
        file.split(_LM_HEAD, rows)
    regresses = any(name.startswith("action_head.") for name in file.shapes)
    depths = {tower: _depth(file, f"{tower}blocks.") for tower in _TOWERS}
    own: dict[str, str] = {}
    unread, unknown = [], []
    for name in file.shapes:
        start = next((each for each in _STARTS if name.startswith(each)), None)
        short = name.removeprefix(start or "")
        # The last layer, the norm behind it and the pooling of the towers; the head over words.
        last = f"blocks.{depths.get(start or '', 0) - 1}."
        is_behind = start in _TOWERS and short.startswith((last, "norm.", "attn_pool."))
        is_word = name.startswith(_LM_HEAD) and (regresses or not name.endswith("[actions]"))
        if is_behind or is_word:
            unread.append(name)
        elif start is None:
            unknown.append(name)
        else:
            for old, new in _TOWERS.get(start, ()):
                short = short.replace(old, new)
            own[_STARTS[start] + short] = name
    if unknown:
        lora = any("lora" in name for name in unknown)
        remedy = "It holds adapters: merge them first." if lora else "It is another model's."
        raise ValueError(
            f"{file.path} must hold nothing that is not read, got {len(unknown)} such: "
            f"{', '.join(sorted(unknown)[:6])}. {remedy}"
        )
    table = _Names(own, tuple(unread), {})

    def shape(name: str) -> tuple[int, ...]:
        return _shape(file, table, name)

    towers = {}
    for key, tower in zip(("vision_config", "fused_vision_config"), _TOWERS):
        width, _, patch, _ = shape(f"{_MODEL}{tower}patch_embed.weight")
        towers[key] = {
            "hidden_size": width,
            "num_hidden_layers": depths[tower] - 1,
            "num_attention_heads": _TOWER_HEADS,
            "patch_size": patch,
            "image_size": math.isqrt(shape(f"{_MODEL}{tower}pos_embed")[1]) * patch,
        }
    dino, siglip = towers["vision_config"], towers["fused_vision_config"]
    dino["num_registers"] = shape(f"{_MODEL}vision_backbone.featurizer.reg_token")[1]
    first = f"{_MODEL}vision_backbone.fused_featurizer.layers.0.mlp.fc1.weight"
    siglip["intermediate_size"] = shape(first)[0]
    layer = f"{_MODEL}language_model.layers.0."
    words, width = shape(f"{_MODEL}language_model.embed_tokens.weight")
    heads = int(text["num_attention_heads"])
    key_rows = shape(f"{layer}self_attn.k_proj.weight")[0]
    language = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": shape(f"{layer}mlp.up_proj.weight")[0],
        "num_hidden_layers": _depth(file, "language_model.model.layers."),
        "num_attention_heads": heads,
        "num_key_value_heads": key_rows * heads // width,
        "vocab_size": words,
        **{name: text[name] for name in _TEXT if name != "num_attention_heads"},
    }
    for name in set(language) & set(text):
        if language[name] != text[name]:
            raise ValueError(
                f"text_config.{name} must be {language[name]}, as the weights in {file.path} have "
                f"it, got {text[name]}. The files are of two policies."
            )
    return table, {"model_type": "openvla", **towers, "text_config": language}


def _shape(file: TensorFile, table: NameTable, name: str) -> tuple[int, ...]:
    """Shape by our name."""
    if name not in table.own:
        raise ValueError(
            f"{file.path} must hold {table.name_in_file(name)!r}, got {len(file.shapes)} tensors "
            "without it. It is another model's, or only a part: copy the checkpoint again."
        )
    return file.shapes[table.own[name]]


def _depth(file: TensorFile, prefix: str) -> int:
    numbers = {n.removeprefix(prefix).split(".")[0] for n in file.shapes if n.startswith(prefix)}
    return max(map(int, numbers), default=-1) + 1


def _statistics(folder: Path, data: dict[str, Any], stated: Stated) -> tuple[dict[str, Any], str]:
    """Statistics of one data set, and where they were found."""
    path = folder / "dataset_statistics.json"
    found = read_json(path) if path.is_file() else data.get("norm_stats") or {}
    path = path if path.is_file() else folder / "config.json"
    names = sorted(found)
    key = stated.unnorm_key or (names[0] if len(names) == 1 else "")
    if key not in found:
        what = f"those of {stated.unnorm_key!r}" if stated.unnorm_key else "those of one data set"
        remedy = (
            f"Pass policy.stated.unnorm_key=<one of them>{'' if names else ', if there is one'}"
        )
        raise ValueError(
            f"the statistics in {path} must be {what}, got {', '.join(names) or 'none'}. {remedy}, "
            "or copy the dataset_statistics.json of the data that the policy was trained on."
        )
    return found[key], f"{key!r} in {path}"


def _numbers(stats: Mapping[str, Any], entry: str, size: int | None, source: str) -> Any:
    """Ends of the range, and which dimensions are scaled from it."""
    values = stats.get(entry)
    values = values if isinstance(values, dict) else {}
    low, high = (values.get(name) for name in ("q01", "q99"))
    lengths = [
        len(each) if isinstance(each, list) and all(isinstance(x, int | float) for x in each) else 0
        for each in (low, high)
    ]
    if lengths != [size or max(lengths)] * 2 or not lengths[0]:
        raise ValueError(
            f"the statistics of {source} must hold q01 and q99 of the {entry}, of "
            f"{size or 'as many'} numbers each, got {low} and {high}. They are missing, or another "
            "robot's: take those of the data that the policy was trained on."
        )
    mask = torch.tensor(values.get("mask") or [True] * lengths[0], dtype=torch.bool)
    low, high = (torch.tensor(each, dtype=torch.float64) for each in (low, high))
    if mask.shape != low.shape or not (low.isfinite() & high.isfinite() & (low <= high)).all():
        raise ValueError(
            f"the statistics of {source} must hold finite q01 of the {entry}, below q99, and a "
            f"mask as long, got {low.tolist()}, {high.tolist()} and {mask.tolist()}. They are "
            "damaged."
        )
    return low, high, mask


def _action_tokenizer(stats: Mapping[str, Any], num_bins: int, source: str) -> dict[str, Any]:
    low, high, mask = _numbers(stats, "action", None, source)
    if mask.tolist() != [True] * (len(mask) - 1) + [False]:
        raise ValueError(
            f"the mask of the action of {source} must be False for the last dimension alone, the "
            f"gripper's, got {mask.tolist()}. Robots with others are not supported."
        )
    # Its data have 0 for a closed gripper and 1 for an open one, LIBERO 1 for closed and -1.
    return {
        "num_bins": num_bins, "norm_low": low, "norm_high": high, "norm_mask": mask,
        "gripper_binarize": True, "gripper_binarize_threshold": 0.5, "gripper_invert": True,
    }  # fmt: skip


def _state(
    file: TensorFile, data: dict[str, Any], stats: Mapping[str, Any], source: str, path: Path
) -> tuple[int, dict[str, torch.Tensor]]:
    """Size of the state, 0 for none, and its statistics."""
    size = file.shapes.get("proprio_projector.fc1.weight", (0, 0))[1]
    if data.get("use_proprio") not in (None, bool(size)):
        raise ValueError(
            f"use_proprio in {path} must be {bool(size)}, as there is "
            f"{'a' if size else 'no'} {_PROPRIO}, got {data['use_proprio']}. Copy the checkpoint "
            "again, with all its files."
        )
    if not size:
        return 0, {}
    low, high, mask = _numbers(stats, "proprio", size, source)
    width = high - low + 1e-8
    mean = torch.where(mask, low + width / 2, 0.0).float()
    std = torch.where(mask, width / 2, 1.0).float()
    return size, {"state_projector.mean": mean, "state_projector.std": std}


def _pixel_style(path: Path, tower: int) -> PixelStyle:
    """Normalisation of both towers; the project's resizing and its crop are in no file."""
    data = read_json(path)
    means: Any = data.get("means") or ()
    stds: Any = data.get("stds") or ()
    sizes = data.get("input_sizes", [[3, tower, tower]] * 2)
    strategy = data.get("image_resize_strategy", "resize-naive")
    if sizes != [[3, tower, tower]] * 2 or strategy != "resize-naive":
        raise ValueError(
            f"{path} must have input_sizes of twice [3, {tower}, {tower}], as the weights, and "
            f"'resize-naive', got {sizes} and {strategy!r}. The files are of two policies."
        )
    try:
        mean, std = (tuple(float(x) for tower in each for x in tower) for each in (means, stds))
        return PixelStyle(mean=mean, std=std, interpolation="lanczos", crop=0.9)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold means and stds of two towers, three numbers each, got {means} and "
            f"{stds}. Copy it again."
        ) from error
