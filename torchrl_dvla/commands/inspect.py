# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Say what a checkpoint is: sizes, action head, cameras, prompt, tokenizer, base model.

PATH is a folder that save_pretrained wrote, a run of `train`, or one of its checkpoints (update-*).
Of something else it says what that looks like. Weights are not loaded, unless --config-name or
settings ask whether the policy fits an environment: then as a run's collector would check it.

  torchrl-dvla inspect my/policy --config-name libero env.cameras=[agentview,robot0_eye_in_hand]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from torchrl_dvla.commands.saved_policy import SavedPolicy, add_settings, read_json
from torchrl_dvla.memory import format_bytes
from torchrl_dvla.modules import FlowVLAConfig, TransformersVLAConfig
from torchrl_dvla.modules.config import PolicyConfig
from torchrl_dvla.modules.load_policy import policy_class
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy, check_settings
from torchrl_dvla.saved_state import COUNT, read_state, require_form

#: Bytes of an entry, by safetensors' names.
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4}
_ITEM_BYTES |= {"I64": 8, "F64": 8}
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I64": "int64"}
#: A backbone's sizes, as transformers names them.
_SIZES = {"hidden_size": "wide", "num_hidden_layers": "layers"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    parser.add_argument("path", metavar="PATH", help="folder of a policy, a run or a checkpoint")
    add_settings(parser, "none, whether it fits is not asked")


def run(args: argparse.Namespace) -> int:
    """Prints it; 1 if the policy does not fit."""
    saved = SavedPolicy.find(args.path)
    rows = [("policy", str(saved.folder))]
    if saved.manifest:
        metadata = saved.manifest["metadata"]
        rows.append(("checkpoint", f"update {metadata['update']}, {saved.manifest['created_at']}"))
        rows.append(("written by", f"torchrl_dvla {metadata['torchrl_dvla']}"))
        config = metadata["config"]
        rows.append(("run", f"{config.get('name')}, seed {config.get('seed')}"))
    rows += _pretrained_rows(saved.folder) if saved.is_pretrained else _state_rows(saved.folder)
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    if args.config_name or args.config_dir or args.overrides:
        cfg = saved.settings(args)
        check_settings(cfg)
        check_policy(cfg, saved.load(cfg))
        print(f"{'fits':<{width}}  {cfg.name}: a collector would take them together")
    return 0


def _state_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """Of a policy that is saved as a state dict alone."""
    state = read_state(folder / "state.pt", mmap=True)
    yield "format", "a state dict; the settings of the run say what it is loaded into"
    sizes: dict[str, list[int]] = {}
    for tensor in state.values():
        if hasattr(tensor, "numel"):
            sizes.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(tensor.nbytes)
    num_entries = sum(tensor.numel() for tensor in state.values() if hasattr(tensor, "numel"))
    yield "parameters", f"{num_entries:,}, with buffers"
    yield "bytes", ", ".join(f"{format_bytes(sum(each))} {dtype}" for dtype, each in sizes.items())


def _pretrained_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """Of a folder that ``save_pretrained`` wrote."""
    data = read_json(folder / "config.json")
    kind = policy_class(folder)
    if data["architecture"] != kind.__name__:
        raise ValueError(
            f"{folder / 'config.json'} must be of a TransformersVLA or a FlowVLA, got "
            f"{data['architecture']!r}. It was written by another version of torchrl_dvla."
        )
    form = {"weights": {"file": str, "num_bytes": COUNT, "crc32": str}, "config": {str: object}}
    require_form(form, {key: data.get(key) for key in form}, str(folder / "config.json"))
    config = kind.config_class.from_dict(data["config"])
    yield "format", f"{data['architecture']}, format version {data.get('format_version')}"
    weights = folder / data["weights"]["file"]
    if not weights.is_file() or weights.stat().st_size != data["weights"]["num_bytes"]:
        found = f"{weights.stat().st_size} bytes" if weights.is_file() else "no such file"
        raise ValueError(
            f"{weights} must have {data['weights']['num_bytes']} bytes, got {found}. Copy the "
            "checkpoint again, with all its files."
        )
    counts: dict[str, list[int]] = {}
    try:
        with safe_open(weights, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                entry = file.get_slice(name)
                counts.setdefault(entry.get_dtype(), []).append(prod(entry.get_shape()))
    except SafetensorError as error:
        raise ValueError(f"{weights} must be a safetensors file, got an error: {error}.") from error
    yield "parameters", f"{sum(map(sum, counts.values())):,}, with buffers"
    yield (
        "bytes",
        ", ".join(
            f"{format_bytes(_ITEM_BYTES.get(dtype, 0) * sum(each))} {_DTYPES.get(dtype, dtype)}"
            for dtype, each in counts.items()
        ),
    )
    yield "base model", _describe_backbone(config)
    yield from _head_rows(config)
    yield "action dimension", str(config.action_dim)
    height, width = config.image_size
    cameras = ["image", "wrist_image"][: config.num_cameras]
    yield "cameras", f"{config.num_cameras} of {height} x {width}: {', '.join(cameras)}"
    yield "state", f"{config.state_dim} entries" if config.state_dim else "not read"
    prompt = config.prompt_style
    yield "prompt", ", ".join(f"{key} {value!r}" for key, value in vars(prompt).items() if value)
    words = read_json(folder / "tokenizer" / "tokenizer.json").get("model", {}).get("vocab", ())
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json").get("tokenizer_class")
    yield "tokenizer", f"{tokenizer}, {len(words)} words"


def _head_rows(config: PolicyConfig) -> Iterator[tuple[str, str]]:
    """What kinds of policies differ in."""
    if isinstance(config, FlowVLAConfig):
        yield "frozen", "images and instruction" if config.freeze_prefix else "nothing"
        noise = "a learned deviation" if config.sampler == "noise" else f"{config.noise_level:g}"
        head = f"flow matching, {config.num_steps} denoising steps; stochastic: "
        head += f"{config.stochastic_step}, by {config.sampler}, noise {noise}"
        yield "action head", head
        yield "chunk size", f"{config.backbone['chunk_size']} env steps"
        yield "statistics", "actions and state: mean and standard deviation"
    elif isinstance(config, TransformersVLAConfig):
        frozen = {"vision": config.freeze_vision, "language": config.freeze_language}
        names = [name for name, is_frozen in frozen.items() if is_frozen]
        yield "frozen", ", ".join(names) or "nothing"
        tokenizer = config.action_tokenizer
        head = f"tokens, decoded in parallel: {tokenizer['num_bins']} bins ({tokenizer['kind']})"
        yield "action head", f"{head}, {config.num_queries} queries"
        yield "chunk size", f"{config.chunk_size} env steps"
        bounds = [name for name in ("low", "high", "norm_low", "norm_high") if name in tokenizer]
        statistics = ", ".join(f"{name} {_short(tokenizer[name])}" for name in bounds)
        state = "; state: mean and standard deviation" if config.state_dim else ""
        yield "statistics", f"actions: {statistics}{state}"


def _describe_backbone(config: PolicyConfig) -> str:
    parts = [config.backbone["model_type"]]
    for tower in ("vision", "text"):
        sizes = config.backbone.get(f"{tower}_config") or {}
        found = [f"{sizes[key]} {word}" for key, word in _SIZES.items() if key in sizes]
        if found:
            parts.append(f"{tower} {' and '.join(found)}")
    return f"{', '.join(parts)}, {config.dtype}"


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
