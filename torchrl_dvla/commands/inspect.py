# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Say what a checkpoint is: format, sizes, action head, cameras, prompt, and what it needs.

PATH is a folder that save_pretrained wrote, a pi0, pi0.5 or SmolVLA of LeRobot or openpi, an
OpenVLA-OFT, a run of `train`, or one of its checkpoints (update-*). Of something else it says what
that looks like. Weights are not loaded, unless --config-name or settings ask whether the policy
fits an environment: then as a run's collector would check it.

  torchrl-dvla inspect my/pi0 --config-name libero_pi0
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from torchrl_dvla.commands.saved_policy import SavedPolicy, add_settings, read_json
from torchrl_dvla.memory import format_bytes
from torchrl_dvla.modules import FlowVLAConfig, TransformersVLAConfig
from torchrl_dvla.modules.config import PolicyConfig
from torchrl_dvla.modules.formats import PolicyFolder, read_foreign
from torchrl_dvla.modules.load_policy import policy_class
from torchrl_dvla.recipes.dvla_grpo.settings import PolicySettings
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy, check_settings
from torchrl_dvla.saved_state import COUNT, read_state, require_form

#: Bytes of an entry, by safetensors' names.
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4}
_ITEM_BYTES |= {"I64": 8, "F64": 8}
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I64": "int64"}
#: Bytes of a parameter, in the dtypes that policies compute in.
_NEEDED = {"float32": 4, "bfloat16": 2}
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
    is_asked = args.config_name or args.config_dir or args.overrides
    cfg = saved.settings(args) if is_asked else None
    if saved.is_foreign:
        stated = cfg.policy.stated if cfg and isinstance(cfg.policy, PolicySettings) else None
        rows += _foreign_rows(read_foreign(saved.folder, stated))
    elif saved.is_pretrained:
        rows += _pretrained_rows(saved.folder)
    else:
        rows += _state_rows(saved.folder)
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    if cfg is not None:
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
    yield from _size_rows({dtype: sum(each) for dtype, each in counts.items()})
    yield from _config_rows(config)
    if config.lora is not None:
        lora = config.lora
        yield "adapters", f"rank {lora.rank}, alpha {lora.alpha:g}, of {', '.join(lora.targets)}"
        path = (data.get("base") or {}).get("path")
        yield "on", f"the checkpoint in {path}" if path else "the weights beside them"
    has_fingerprint = data.get("fingerprint") is not None
    yield "fingerprint", "compared when it is loaded" if has_fingerprint else "none"
    words = read_json(folder / "tokenizer" / "tokenizer.json").get("model", {}).get("vocab", ())
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json").get("tokenizer_class")
    yield "tokenizer", f"{tokenizer}, {len(words)} words"


def _foreign_rows(found: PolicyFolder) -> Iterator[tuple[str, str]]:
    """Of a folder that another project wrote."""
    config, table = found.config, found.table
    yield "format", found.format
    yield from _size_rows(found.file.count(table.own.values()))
    if table.unread:
        left = sum(found.file.count(table.unread).values())
        kinds = sorted({".".join(name.split(".")[:3]) for name in table.unread})
        is_long = len(kinds) < len(table.unread)
        what = "on which no action depends" if is_long else "of heads over words"
        listed = ", ".join(kinds if is_long else table.unread)
        yield "not read", f"{left:,} parameters {what}: {listed}"
    yield from _config_rows(config)
    yield "tokenizer", found.tokenizer
    names = zip(("image", "wrist_image"), found.cameras)
    yield "camera names", ", ".join(f"{name} is {theirs!r}" for name, theirs in names)
    chunk_size = getattr(config, "chunk_size", None) or config.backbone["chunk_size"]
    executed = found.replan_interval
    yield "replan interval", f"{executed} env steps" if executed else "not said"
    height, width = config.image_size
    cameras = ("agentview", "robot0_eye_in_hand")[: config.num_cameras]
    yield (
        "on LIBERO",
        f"env.chunk_size={chunk_size} env.replan_interval={executed or '...'} "
        f"env.camera_height={height} env.camera_width={width} env.cameras=[{','.join(cameras)}] "
        "env.orientation=axis_angle",
    )


def _size_rows(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Number and bytes of tensors, by safetensors' names of dtypes."""
    total = sum(counts.values())
    yield "parameters", f"{total:,}, with buffers"
    parts = (
        f"{format_bytes(_ITEM_BYTES.get(dtype, 0) * count)} {_DTYPES.get(dtype, dtype)}"
        for dtype, count in counts.items()
    )
    yield "bytes", ", ".join(parts)
    needed = (f"{format_bytes(size * total)} in {dtype}" for dtype, size in _NEEDED.items())
    yield "needs", f"{', '.join(needed)} on each device that it is on, for the weights"


def _config_rows(config: PolicyConfig) -> Iterator[tuple[str, str]]:
    """What is the same in all formats."""
    yield "base model", _describe_backbone(config)
    yield from _head_rows(config)
    yield "action dimension", str(config.action_dim)
    yield "gripper", _gripper(config)
    height, width = config.image_size
    cameras = ["image", "wrist_image"][: config.num_cameras]
    yield "cameras", f"{config.num_cameras} of {height} x {width}: {', '.join(cameras)}"
    style = config.pixel_style
    smoothing = "smoothed" if style.antialias else "not smoothed"
    crop = "" if style.crop == 1.0 else f", {style.crop:.0%} of the area from the middle"
    yield "resizing", f"{style.interpolation}, {smoothing}, padding {style.padding}{crop}"
    yield "state", f"{config.state_dim} entries" if config.state_dim else "not read"
    prompt = config.prompt_style
    yield "prompt", ", ".join(f"{key} {value!r}" for key, value in vars(prompt).items() if value)


def _gripper(config: PolicyConfig) -> str:
    """What is done to the last action dimension."""
    tokenizer = getattr(config, "action_tokenizer", {})
    rules = [
        word
        for key, word in (
            ("gripper_binarize", "rounded to -1 or 1"),
            ("gripper_invert", "inverted"),
        )
        if tokenizer.get(key)
    ]
    return f"the last dimension is {' and '.join(rules) or 'executed as it is'}"


def _head_rows(config: PolicyConfig) -> Iterator[tuple[str, str]]:
    """What kinds of policies differ in."""
    if isinstance(config, FlowVLAConfig):
        yield "frozen", "images and instruction" if config.freeze_prefix else "nothing"
        noise = "a learned deviation" if config.sampler == "noise" else f"{config.noise_level:g}"
        head = f"flow matching, {config.num_steps} denoising steps; stochastic: "
        head += f"{config.stochastic_step}, by {config.sampler}, noise {noise}, at the start "
        head += f"{config.initial_noise:g}"
        yield "action head", head
        yield "chunk size", f"{config.backbone['chunk_size']} env steps"
        words = {"standard": "mean and standard deviation", "range": "a range"}
        state = f"; state: {words[config.state_scaling]}" if config.state_dim else ""
        yield "statistics", f"actions: {words[config.action_scaling]}{state}"
    elif isinstance(config, TransformersVLAConfig):
        frozen = {"vision": config.freeze_vision, "language": config.freeze_language}
        names = [name for name, is_frozen in frozen.items() if is_frozen]
        yield "frozen", ", ".join(names) or "nothing"
        tokenizer = config.action_tokenizer
        head = f"tokens, decoded in parallel: {tokenizer['num_bins']} bins ({tokenizer['kind']})"
        if "l1_head_size" in config.backbone:
            head = "regression: it can be evaluated, not trained"
        yield "action head", f"{head}, {config.num_queries} queries"
        yield "chunk size", f"{config.chunk_size} env steps"
        bounds = [name for name in ("low", "high", "norm_low", "norm_high") if name in tokenizer]
        statistics = ", ".join(f"{name} {_short(tokenizer[name])}" for name in bounds)
        state = "; state: mean and standard deviation" if config.state_dim else ""
        yield "statistics", f"actions: {statistics}{state}"


def _describe_backbone(config: PolicyConfig) -> str:
    parts = [config.backbone["model_type"]]
    backbone = {**config.backbone, **config.backbone.get("vlm_config", {})}
    backbone["expert_config"] = config.backbone.get("dit_config")
    for tower in ("vision", "fused_vision", "text", "expert"):
        sizes = backbone.get(f"{tower}_config") or {}
        found = [f"{sizes[key]} {word}" for key, word in _SIZES.items() if key in sizes]
        if found:
            parts.append(f"{tower.replace('_', ' ')} {' and '.join(found)}")
    return f"{', '.join(parts)}, {config.dtype}"


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
