# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Folders that LeRobot saves pi0, pi0.5 and SmolVLA in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchrl_dvla.modules.backbones import PixelStyle, PromptStyle
from torchrl_dvla.modules.config import FlowVLAConfig
from torchrl_dvla.modules.formats.flow_weights import (
    paligemma_sizes,
    pi_names,
    smolvla_names,
    smolvla_sizes,
    weights_dtype,
)
from torchrl_dvla.modules.formats.policy_folder import (
    PolicyFolder,
    Stated,
    read_json,
    settle,
    statistics_of,
)
from torchrl_dvla.modules.formats.tensor_file import TensorFile
from torchrl_dvla.modules.pi0 import Pi0
from torchrl_dvla.modules.pi05 import Pi05

__all__ = ["read_lerobot"]

#: Fields of ``config.json`` that change no decision: of training, of the hub, of the machine.
_IRRELEVANT = {
    "action_feature_names", "compile_mode", "compile_model", "device", "dtype", "empty_cameras",
    "freeze_vision_encoder", "gradient_checkpointing", "license", "load_vlm_weights",
    "optimizer_betas", "optimizer_eps", "optimizer_grad_clip_norm", "optimizer_lr",
    "optimizer_weight_decay", "pad_language_to", "pretrained_path", "pretrained_revision",
    "private", "push_to_hub", "relative_exclude_joints", "repo_id", "rtc_config",
    "rtc_training_max_delay", "scheduler_decay_lr", "scheduler_decay_steps",
    "scheduler_warmup_steps", "tags", "train_expert_only", "train_state_proj", "use_amp",
    "use_cache", "memory_frames", "memory_stride", "memory_temporal_attention_every",
}  # fmt: skip
#: Fields that are read below.
_READ = {
    "type", "input_features", "output_features", "normalization_mapping", "chunk_size",
    "n_action_steps", "max_state_dim", "max_action_dim", "tokenizer_max_length", "min_period",
    "max_period",
}  # fmt: skip
_READ_PI = _READ | {
    "image_resolution", "num_inference_steps", "time_sampling_beta_alpha",
    "time_sampling_beta_beta", "time_sampling_offset", "time_sampling_scale",
}  # fmt: skip
#: Fields that have to have these values: with others the network is another one.
_FIXED: dict[str, Any] = {"n_obs_steps": 1, "use_peft": False}
_FIXED_PI = _FIXED | {
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "use_relative_actions": False,
    "use_visual_memory": False,
    "use_proprioceptive_memory": False,
}
_FIXED_SMOLVLA = _FIXED | {
    "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False,
    "add_image_special_tokens": False,
    "attention_mode": "cross_attn",
    "self_attn_every_n_layers": 2,
}
#: Checked against the weights themselves.
_SHAPES_SMOLVLA = {"num_expert_layers", "num_vlm_layers", "expert_width_multiplier"}
_FIELDS = {
    "pi0": (_READ_PI, _FIXED_PI),
    "pi05": (_READ_PI, _FIXED_PI),
    "smolvla": (
        _READ
        | _SHAPES_SMOLVLA
        | {"num_steps", "prefix_length", "resize_imgs_with_padding", "vlm_model_name"},
        _FIXED_SMOLVLA,
    ),
}

#: Steps of the processors, and the settings that they may have; ``...``: any.
_STEPS: dict[str, dict[str, Any]] = {
    "rename_observations_processor": {"rename_map": ...},
    "to_batch_processor": {},
    "pi0_new_line_processor": {},
    "smolvla_new_line_processor": {},
    "pi05_prepare_state_tokenizer_processor_step": {
        "max_state_dim": ..., "task_key": "task", "include_state_in_prompt": True,
    },
    "tokenizer_processor": {
        "max_length": ..., "task_key": "task", "padding_side": "right", "padding": ...,
        "truncation": ..., "tokenizer_name": ...,
    },
    "device_processor": {"device": ..., "float_dtype": None},
    "normalizer_processor": {"eps": 1e-8, "features": ..., "norm_map": ...},
    "unnormalizer_processor": {"eps": 1e-8, "features": ..., "norm_map": ...},
    "relative_actions_processor": {"enabled": False, "exclude_joints": ..., "action_names": ...},
    "absolute_actions_processor": {"enabled": False},
}  # fmt: skip
_PROMPTS = {
    "pi0": Pi0.template,
    "pi05": Pi05.template,
    "smolvla": Pi0.template,
}
_MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES")


def read_lerobot(folder: Path, stated: Stated) -> PolicyFolder:
    """What a folder that LeRobot saved holds; its weights are not read yet.

    It has ``config.json``, ``model.safetensors``, ``policy_preprocessor.json`` and
    ``policy_postprocessor.json``, which name files of statistics.

    Args:
        folder (Path): the folder.
        stated (Stated): what the files do not say: a tokenizer that is to be had here; the cameras,
            where there are more than two; of a pi0.5 by LeRobot before 0.5.1, ``padded_state``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a setting or step of the files is not known here or would change the policy,
            or statistics are missing; names it.

    Reference:
        https://github.com/huggingface/lerobot, versions 0.4.0 to 0.6.1: ``configs/policies.py``,
        ``policies/{pi0,pi05,smolvla}/{configuration,processor}_*.py``, ``processor/pipeline.py``,
        ``processor/normalize_processor.py``.
    """
    path = folder / "config.json"
    data = read_json(path)
    kind = data.get("type")
    if kind not in _FIELDS:
        raise ValueError(
            f"the type in {path} must be one of {', '.join(_FIELDS)}, got {kind!r}. LeRobot's "
            "other policies cannot be loaded."
        )
    _check_fields(data, path, kind)
    before, before_states = _processor(folder / "policy_preprocessor.json")
    after, after_states = _processor(folder / "policy_postprocessor.json")
    tokenizer = _only(before, "tokenizer_processor", folder)
    state_dim, action_dim, cameras, image_size = _features(data, path, stated)
    modes = _modes(data, path)
    for steps, name in ((before, "normalizer_processor"), (after, "unnormalizer_processor")):
        found = _only(steps, name, folder).get("norm_map")
        if found != data["normalization_mapping"]:
            raise ValueError(
                f"norm_map of {name} in {folder} must be the normalization_mapping of {path}, got "
                f"{found} and {data['normalization_mapping']}. The files are of two policies."
            )

    file = TensorFile(folder / "model.safetensors")
    if kind == "smolvla":
        table = smolvla_names(file)
        sizes = smolvla_sizes(file, table, str(data["vlm_model_name"]))
        for name in ("num_expert_layers", "num_vlm_layers"):
            if data[name] > 0:  # else all
                _require(path, name, data[name], sizes["dit_config"]["num_hidden_layers"])
        tower = sizes["vlm_config"]["vision_config"]["image_size"]
        _require(path, "resize_imgs_with_padding", data["resize_imgs_with_padding"], [tower] * 2)
    else:
        table = pi_names(file, "model.")
        sizes = paligemma_sizes(file, table)
        tower = sizes["vlm_config"]["vision_config"]["image_size"]
        _require(path, "image_resolution", data["image_resolution"], [tower] * 2)
        sizes["max_state_dim"] = data["max_state_dim"]
        for name in ("alpha", "beta"):
            sizes[f"time_sampling_beta_{name}"] = data[f"time_sampling_beta_{name}"]
        for name in ("scale", "offset"):
            sizes[f"time_sampling_{name}"] = data[f"time_sampling_{name}"]
    for name in ("max_action_dim", "max_state_dim"):
        _require(path, name, data[name], sizes[name])
    periods = {name: data[name] for name in ("min_period", "max_period")}

    settle("chunk_size", data["chunk_size"], stated.chunk_size, folder)
    in_prompt = kind == "pi05"
    settle("state_in_prompt", in_prompt, stated.state_in_prompt, folder)
    padded = _padded_state(data, stated, folder) if in_prompt else False
    scaling = {
        name: "standard" if modes[name] in ("MEAN_STD", "IDENTITY") else "range" for name in modes
    }
    config = FlowVLAConfig(
        backbone={
            **sizes, **periods, "chunk_size": data["chunk_size"], "model_type": kind,
        },
        action_dim=action_dim,
        state_dim=state_dim,
        image_size=image_size,
        num_cameras=len(cameras),
        prompt_style=PromptStyle(instruction=_PROMPTS[kind]),
        pixel_style=PixelStyle(
            interpolation="bilinear",
            antialias=False,
            padding="top_left" if kind == "smolvla" else "center",
        ),
        dtype=weights_dtype(file, table),  # type: ignore[arg-type]
        num_steps=data["num_steps" if kind == "smolvla" else "num_inference_steps"],
        state_scaling=scaling["STATE"],  # type: ignore[arg-type]
        action_scaling=scaling["ACTION"],  # type: ignore[arg-type]
        prompt_state_dim=data["max_state_dim"] if padded else 0,
        max_prompt_tokens=tokenizer["max_length"],
    )  # fmt: skip
    statistics: dict[str, torch.Tensor] = {}
    for entry, key, states, size in (
        ("state", "observation.state", before_states, state_dim),
        ("action", "action", after_states, action_dim),
    ):
        mode = modes[entry.upper()]
        found = {
            name.removeprefix(f"{key}."): tensor
            for name, tensor in states.items()
            if name.rpartition(".")[0] == key
        }
        added = 1e-8 if entry == "state" and mode == "MEAN_STD" else 0.0
        source = f"the statistics in {folder}"
        statistics |= statistics_of(entry, mode, found, size, source, added=added)
    return PolicyFolder(
        format=f"LeRobot {kind}",
        file=file,
        table=table,
        config=config,
        statistics=statistics,
        tokenizer=stated.tokenizer
        or str(settle("tokenizer", tokenizer.get("tokenizer_name"), None, folder)),
        cameras=cameras,
        replan_interval=data["n_action_steps"],
    )


def _check_fields(data: Mapping[str, Any], path: Path, kind: str) -> None:
    """Refuse settings that are missing, not known, or of another network."""
    read, fixed = _FIELDS[kind]
    missing = sorted(read - set(data) - {"type"})
    unknown = sorted(set(data) - read - set(fixed) - _IRRELEVANT)
    if missing or unknown:
        raise ValueError(
            f"{path} must hold the settings of a {kind} by LeRobot 0.4.0 to 0.6.1, got missing "
            f"{missing} and unknown {unknown}. It was written by another version, whose settings "
            "could change the policy in silence."
        )
    for name, wanted in fixed.items():
        if name in data:
            _require(path, name, data[name], wanted)
    if kind == "smolvla" and data["prefix_length"] > 0:  # else nothing is padded
        _require(path, "prefix_length", data["prefix_length"], 0)


def _require(path: Path, name: str, found: Any, wanted: Any) -> None:
    found = list(found) if isinstance(found, tuple) else found
    if found != wanted:
        raise ValueError(
            f"{name} in {path} must be {wanted!r}, got {found!r}. A policy with another value "
            "cannot be loaded."
        )


def _processor(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Settings of a processor's steps by name, and the statistics that they name."""
    steps: dict[str, dict[str, Any]] = {}
    states: dict[str, torch.Tensor] = {}
    for entry in read_json(path).get("steps", ()):
        name = entry.get("registry_name") or entry.get("class")
        settings = entry.get("config", {})
        allowed = _STEPS.get(name)
        if allowed is None or name in steps:
            raise ValueError(
                f"the steps in {path} must be among {', '.join(_STEPS)}, and each once, got "
                f"{name!r}. What it does to observations or actions would be left out."
            )
        for key, value in settings.items():
            if key not in allowed or allowed[key] not in (..., value):
                wanted = repr(allowed[key]) if key in allowed else "absent"
                raise ValueError(
                    f"{key} of step {name!r} in {path} must be {wanted}, got {value!r}. What it "
                    "does would be left out."
                )
        steps[name] = settings
        if "state_file" in entry:
            file = path.parent / entry["state_file"]
            if not file.is_file() or file.parent != path.parent:
                raise FileNotFoundError(
                    f"{path.parent} must contain {entry['state_file']}, which {path.name} names, "
                    "got no such file. Without it statistics would be left out: copy the "
                    "checkpoint again, with all its files."
                )
            tensors = TensorFile(file)
            states |= tensors.read(tensors.shapes)
    return steps, states


def _only(steps: Mapping[str, dict[str, Any]], name: str, folder: Path) -> dict[str, Any]:
    if name not in steps:
        raise ValueError(
            f"the processors in {str(folder)!r} must have a {name}, got {sorted(steps)}. Save the "
            "policy with its processors."
        )
    return steps[name]


def _features(
    data: Mapping[str, Any], path: Path, stated: Stated
) -> tuple[int, int, tuple[str, ...], tuple[int, int]]:
    """Sizes of state and action, the cameras that are given, and their height and width."""
    inputs, outputs = data["input_features"] or {}, data["output_features"] or {}
    shapes: dict[str, tuple[int, ...]] = {}
    cameras: list[str] = []
    for key, feature in {**inputs, **outputs}.items():
        shapes[key] = tuple(feature["shape"])
        if feature["type"] == "VISUAL":
            name = key.removeprefix("observation.images.")
            # Empty ones are masked: without them the network computes the same.
            if not name.startswith("empty_camera"):
                cameras.append(name)
        elif key not in ("observation.state", "action"):
            raise ValueError(
                f"the features in {path} must be images, 'observation.state' and 'action', got "
                f"{key!r} of type {feature['type']}. It would be left out."
            )
    for key in ("observation.state", "action"):
        if key not in shapes:
            raise ValueError(
                f"the features in {path} must hold {key!r}, got {sorted(shapes)}. The policy was "
                "saved without the data that it was trained on."
            )
    chosen = stated.cameras
    if chosen is None:
        if not 1 <= len(cameras) <= 2:
            raise ValueError(
                f"stated.cameras must be given for {str(path.parent)!r}, which has {cameras}, got "
                "nothing. Pass policy.stated.cameras=[<scene>,<wrist>]; the others are masked, as "
                "LeRobot does with a camera that is not there."
            )
        chosen = tuple(cameras)
    if [name for name in cameras if name in chosen] != list(chosen):
        raise ValueError(
            f"stated.cameras must be among {cameras} of {path}, in this order, got {list(chosen)}. "
            "The network was trained with it."
        )
    if len(chosen) == 2 and "wrist" in chosen[0] and "wrist" not in chosen[1]:
        raise ValueError(
            f"the first camera of {path} must be one of the scene, got {list(chosen)}. The camera "
            "of the scene comes first here."
        )
    state_dim, action_dim = shapes["observation.state"][0], shapes["action"][0]
    settle("state_dim", state_dim, stated.state_dim, path.parent)
    settle("action_dim", action_dim, stated.action_dim, path.parent)
    sizes = {
        shapes[key][-2:]
        for name in chosen
        for key in (f"observation.images.{name}", name)
        if key in shapes
    }
    if stated.image_size is None and len(sizes) > 1:
        raise ValueError(
            f"stated.image_size must be given for {str(path.parent)!r}, whose cameras have sizes "
            f"{sorted(sizes)}, got nothing. Both are rendered alike here, and resized."
        )
    height, width = stated.image_size or next(iter(sizes))
    return state_dim, action_dim, chosen, (height, width)


def _modes(data: Mapping[str, Any], path: Path) -> dict[str, str]:
    """How states and actions are scaled."""
    mapping = data["normalization_mapping"]
    _require(path, "normalization_mapping.VISUAL", mapping.get("VISUAL", "IDENTITY"), "IDENTITY")
    modes = {}
    for name in ("STATE", "ACTION"):
        modes[name] = mapping.get(name)
        if modes[name] not in _MODES:
            raise ValueError(
                f"normalization_mapping.{name} in {path} must be one of {', '.join(_MODES)}, got "
                f"{modes[name]!r}. Values would be scaled otherwise, or not at all."
            )
    return modes


def _padded_state(data: Mapping[str, Any], stated: Stated, folder: Path) -> bool:
    # LeRobot 0.4 padded the state that it put into the prompt, 0.5.0 and later do not; settings
    # tell 0.5.1 from what was before.
    said = False if "use_relative_actions" in data else None
    return bool(settle("padded_state", said, stated.padded_state, folder))
