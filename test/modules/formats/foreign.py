# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Tiny random checkpoints in the formats of LeRobot and openpi, name by name and field by field."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tensordict import NonTensorStack, TensorDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

INSTRUCTIONS = ["lift the cup", "open the drawer"]
STATE_DIM, ACTION_DIM, CHUNK_SIZE, MAX_DIM = 5, 4, 6, 8
#: Of the cameras: no multiple of the tower's, and of another aspect ratio.
HEIGHT, WIDTH = 48, 60
WORDS = 320
KINDS = ("pi0", "pi05", "smolvla")


# -- weights ---------------------------------------------------------------------------------------
def _linear(name, size_out, size_in, bias=True):
    shapes = {f"{name}.weight": (size_out, size_in)}
    return shapes | ({f"{name}.bias": (size_out,)} if bias else {})


def _norm(name, size, bias=False):
    return {f"{name}.weight": (size,)} | ({f"{name}.bias": (size,)} if bias else {})


def _siglip(name, width, mlp, layers, patch, num_patches):
    shapes = {
        f"{name}.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{name}.embeddings.patch_embedding.bias": (width,),
        f"{name}.embeddings.position_embedding.weight": (num_patches, width),
        **_norm(f"{name}.post_layernorm", width, bias=True),
    }
    for i in range(layers):
        layer = f"{name}.encoder.layers.{i}"
        for each in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{each}", width, width)
        shapes |= _norm(f"{layer}.layer_norm1", width, bias=True)
        shapes |= _norm(f"{layer}.layer_norm2", width, bias=True)
        shapes |= _linear(f"{layer}.mlp.fc1", mlp, width) | _linear(f"{layer}.mlp.fc2", width, mlp)
    return shapes


def _decoder(name, width, mlp, layers, heads, kv_heads, head, *, adaptive=False, cross=None):
    def norm(name):
        return _linear(f"{name}.dense", 3 * width, width) if adaptive else _norm(name, width)

    shapes = norm(f"{name}.norm")
    for i in range(layers):
        layer = f"{name}.layers.{i}"
        key_in = cross if cross and i % 2 else width
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (heads * head, width),
            f"{layer}.self_attn.k_proj.weight": (kv_heads * head, key_in),
            f"{layer}.self_attn.v_proj.weight": (kv_heads * head, key_in),
            f"{layer}.self_attn.o_proj.weight": (width, heads * head),
            f"{layer}.mlp.gate_proj.weight": (mlp, width),
            f"{layer}.mlp.up_proj.weight": (mlp, width),
            f"{layer}.mlp.down_proj.weight": (width, mlp),
        }
        shapes |= norm(f"{layer}.input_layernorm") | norm(f"{layer}.post_attention_layernorm")
    return shapes


def pi_shapes(kind, *, image=28):
    """openpi's names; LeRobot's begin with ``model.``."""
    whole = "paligemma_with_expert"
    vlm, adaptive = f"{whole}.paligemma.model", kind == "pi05"
    shapes = {
        **_siglip(f"{vlm}.vision_tower.vision_model", 144, 96, 2, 14, (image // 14) ** 2),
        **_linear(f"{vlm}.multi_modal_projector.linear", 64, 144),
        f"{whole}.paligemma.lm_head.weight": (WORDS, 64),
        **_decoder(f"{vlm}.language_model", 64, 96, 2, 4, 1, 16),
        **_decoder(f"{whole}.gemma_expert.model", 32, 48, 2, 4, 1, 16, adaptive=adaptive),
        f"{whole}.gemma_expert.lm_head.weight": (WORDS, 32),
        **_linear("action_in_proj", 32, MAX_DIM),
        **_linear("action_out_proj", MAX_DIM, 32),
    }
    if adaptive:
        return shapes | _linear("time_mlp_in", 32, 32) | _linear("time_mlp_out", 32, 32)
    shapes |= _linear("state_proj", 32, MAX_DIM)
    return shapes | _linear("action_time_mlp_in", 32, 64) | _linear("action_time_mlp_out", 32, 32)


def smolvla_shapes():
    whole = "vlm_with_expert"
    vlm = f"{whole}.vlm.model"
    return {
        **_siglip(f"{vlm}.vision_model", 128, 96, 2, 8, 16),
        f"{vlm}.connector.modality_projection.proj.weight": (128, 128 * 4),
        f"{vlm}.text_model.embed_tokens.weight": (WORDS, 128),
        **_decoder(f"{vlm}.text_model", 128, 160, 2, 2, 1, 64),
        f"{whole}.vlm.lm_head.weight": (WORDS, 128),
        **_decoder(f"{whole}.lm_expert", 96, 256, 2, 2, 1, 64, cross=64),
        **_linear("state_proj", 128, MAX_DIM),
        **_linear("action_in_proj", 96, MAX_DIM),
        **_linear("action_out_proj", MAX_DIM, 96),
        **_linear("action_time_mlp_in", 96, 192),
        **_linear("action_time_mlp_out", 96, 96),
    }


def make_weights(shapes, prefix=""):
    """Random tensors: a linear layer keeps the scale of its input, a norm nearly so."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = 0.1 * values
            # Gemma's is 1 + weight.
            is_gemma = "paligemma_with_expert" in name and "vision" not in name
            if name.endswith((".weight", ".scale_factor")) and not is_gemma:
                values = 1.0 + values
        elif "embed_tokens" in name or "lm_head" in name:
            values = 0.1 * values
        elif "position" not in name:
            values = values * values[0].numel() ** -0.5
        weights[prefix + name] = values.contiguous()
    return weights


# -- LeRobot ---------------------------------------------------------------------------------------
_ALL = {
    "n_obs_steps": 1, "device": "cpu", "use_amp": False, "use_peft": False, "push_to_hub": True,
    "repo_id": None, "private": None, "tags": None, "license": None, "pretrained_path": None,
    "pretrained_revision": None, "chunk_size": CHUNK_SIZE, "n_action_steps": 3,
    "max_state_dim": MAX_DIM, "max_action_dim": MAX_DIM, "empty_cameras": 1, "rtc_config": None,
    "min_period": 0.004, "max_period": 4.0, "compile_model": False, "compile_mode": "max-autotune",
    "optimizer_lr": 2.5e-05, "optimizer_betas": [0.9, 0.95], "optimizer_eps": 1e-08,
    "optimizer_weight_decay": 0.01, "optimizer_grad_clip_norm": 1.0, "scheduler_warmup_steps": 1000,
    "scheduler_decay_steps": 30000, "scheduler_decay_lr": 2.5e-06, "freeze_vision_encoder": False,
    "train_expert_only": False,
}  # fmt: skip
_PI = {
    "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m", "dtype": "float32",
    "num_inference_steps": 3, "time_sampling_beta_alpha": 1.5, "time_sampling_beta_beta": 1.0,
    "time_sampling_scale": 0.999, "time_sampling_offset": 0.001, "use_relative_actions": False,
    "relative_exclude_joints": ["gripper"], "action_feature_names": None,
    "image_resolution": [28, 28], "gradient_checkpointing": False,
}  # fmt: skip
_SMOLVLA = {
    "resize_imgs_with_padding": [32, 32], "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False, "tokenizer_max_length": 48, "num_steps": 3,
    "use_cache": True, "train_state_proj": True,
    "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "load_vlm_weights": False,
    "add_image_special_tokens": False, "attention_mode": "cross_attn", "prefix_length": -1,
    "pad_language_to": "longest", "num_expert_layers": -1, "num_vlm_layers": 2,
    "self_attn_every_n_layers": 2, "expert_width_multiplier": 0.75,
}  # fmt: skip


def lerobot_config(
    kind, *, state_dim=STATE_DIM, action_dim=ACTION_DIM, size=(HEIGHT, WIDTH),
    cameras=("image", "image2"), chunk_size=CHUNK_SIZE, max_tokens=None,
):  # fmt: skip
    """``config.json`` as LeRobot 0.6.1 writes it."""
    mode = "QUANTILES" if kind == "pi05" else "MEAN_STD"
    own = {"tokenizer_max_length": 200 if kind == "pi05" else 48, **_PI}
    return {
        "type": kind,
        "input_features": {
            **{
                f"observation.images.{name}": {"type": "VISUAL", "shape": [3, *size]}
                for name in cameras
            },
            "observation.state": {"type": "STATE", "shape": [state_dim]},
            "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 480, 640]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [action_dim]}},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        **_ALL,
        **(_SMOLVLA if kind == "smolvla" else own),
        "chunk_size": chunk_size,
        **({"tokenizer_max_length": max_tokens} if max_tokens else {}),
    }


def make_statistics(state_dim=STATE_DIM, action_dim=ACTION_DIM):
    """Of state and action, by LeRobot's names."""
    generator = torch.Generator().manual_seed(1)
    stats = {}
    for key, size in (("observation.state", state_dim), ("action", action_dim)):
        low = torch.randn(size, generator=generator) - 2.0
        stats |= {
            f"{key}.mean": torch.randn(size, generator=generator),
            f"{key}.std": torch.rand(size, generator=generator) + 0.5,
            f"{key}.q01": low,
            f"{key}.q99": low + 3.0 + torch.rand(size, generator=generator),
            f"{key}.min": low - 1.0,
            f"{key}.max": low + 5.0,
        }
    return stats


def lerobot_steps(kind, **sizes):
    """Steps of both processors as LeRobot 0.6.1 writes them."""
    config = lerobot_config(kind, **sizes)
    normalize = {
        "eps": 1e-08,
        "features": {**config["input_features"], **config["output_features"]},
        "norm_map": config["normalization_mapping"],
    }
    name = "paligemma-3b-pt-224" if kind != "smolvla" else "SmolVLM2-500M-Video-Instruct"
    tokenize = ("tokenizer_processor", {
        "max_length": config["tokenizer_max_length"], "task_key": "task", "padding_side": "right",
        "padding": "longest" if kind == "smolvla" else "max_length", "truncation": True,
        "tokenizer_name": f"nowhere/{name}",
    })  # fmt: skip
    relative = ("relative_actions_processor", {
        "enabled": False, "exclude_joints": ["gripper"], "action_names": None,
    })  # fmt: skip
    device = ("device_processor", {"device": "cpu", "float_dtype": None})
    first = [("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {})]
    normalizer = ("normalizer_processor", normalize)
    steps = {
        "pi0": [*first, ("pi0_new_line_processor", {}), tokenize, device, relative, normalizer],
        "pi05": [*first, relative, normalizer,
                 ("pi05_prepare_state_tokenizer_processor_step", {}), tokenize, device],
        "smolvla": [*first, ("smolvla_new_line_processor", {}), tokenize, device, normalizer],
    }[kind]  # fmt: skip
    unnormalize = {**normalize, "features": config["output_features"]}
    last = [
        ("unnormalizer_processor", unnormalize),
        ("absolute_actions_processor", {"enabled": False}),
    ]
    if kind == "smolvla":
        last = last[:1]
    return steps, [*last, ("device_processor", {"device": "cpu", "float_dtype": None})]


def write_lerobot(folder: Path, kind: str, **sizes) -> Path:
    """A folder as LeRobot saves a policy of this kind."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = smolvla_shapes() if kind == "smolvla" else pi_shapes(kind)
    weights = make_weights(shapes, "model.")
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(lerobot_config(kind, **sizes), indent=4))
    for which, steps in zip(("pre", "post"), lerobot_steps(kind, **sizes)):
        name = f"policy_{which}processor"
        entries = []
        for i, (step, settings) in enumerate(steps):
            entry = {"registry_name": step, "config": settings}
            if step.endswith("normalizer_processor"):
                entry["state_file"] = f"{name}_step_{i}_{step}.safetensors"
                dims = {k: v for k, v in sizes.items() if k.endswith("_dim")}
                save_file(make_statistics(**dims), str(folder / entry["state_file"]))
            entries.append(entry)
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": entries}, indent=2))
    write_tokenizer(folder / "tokenizer")
    return folder


# -- openpi ----------------------------------------------------------------------------------------
def write_openpi(folder: Path, kind: str, *, converted: bool = True, **dims) -> Path:
    """A folder as openpi's converter leaves it, or without it as its training does."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = make_weights(pi_shapes(kind))
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    stats = make_statistics(**dims)
    norm_stats = {
        name: {kind: stats[f"{key}.{kind}"].tolist() for kind in ("mean", "std", "q01", "q99")}
        for name, key in (("state", "observation.state"), ("actions", "action"))
    }
    path = folder / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"norm_stats": norm_stats}))
    if converted:
        config = {
            "action_dim": MAX_DIM, "action_horizon": CHUNK_SIZE, "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m", "precision": "float32",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder / "tokenizer")
    return folder


# -- OpenVLA-OFT -----------------------------------------------------------------------------------
#: Widths and layers; 16 heads each, as timm's towers have.
_DINO, _SIGLIP_FUSED, _LLAMA = (32, 128, 3), (48, 60, 3), (32, 64, 2)
UNNORM_KEY = "libero_spatial_no_noops"


def _timm(name, width, mlp, layers, num_patches, *, scales):
    shapes = {
        f"{name}.pos_embed": (1, num_patches, width),
        f"{name}.patch_embed.proj.weight": (width, 3, 14, 14),
        f"{name}.patch_embed.proj.bias": (width,),
        **_norm(f"{name}.norm", width, bias=True),
    }
    for i in range(layers):
        block = f"{name}.blocks.{i}"
        shapes |= _norm(f"{block}.norm1", width, bias=True)
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width)
        shapes |= _linear(f"{block}.attn.proj", width, width)
        shapes |= _norm(f"{block}.norm2", width, bias=True)
        shapes |= _linear(f"{block}.mlp.fc1", mlp, width) | _linear(f"{block}.mlp.fc2", width, mlp)
        if scales:
            shapes |= {f"{block}.ls{k}.scale_factor": (width,) for k in (1, 2)}
    return shapes


def openvla_shapes(dino=_DINO, siglip=_SIGLIP_FUSED, llama=_LLAMA, heads=4, num_patches=4):
    """Names of a folder that transformers 4.40 saves, 32,064 words and all."""
    tower, fused = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
    pool = f"{fused}.attn_pool"
    vision, width, siglip_width = dino[0] + siglip[0], llama[0], siglip[0]
    return {
        f"{tower}.cls_token": (1, 1, dino[0]),
        f"{tower}.reg_token": (1, 4, dino[0]),
        **_timm(tower, *dino, num_patches, scales=True),
        **_timm(fused, *siglip, num_patches, scales=False),
        f"{pool}.latent": (1, 1, siglip_width),
        **_linear(f"{pool}.q", siglip_width, siglip_width),
        **_linear(f"{pool}.kv", 2 * siglip_width, siglip_width),
        **_linear(f"{pool}.proj", siglip_width, siglip_width),
        **_norm(f"{pool}.norm", siglip_width, bias=True),
        **_linear(f"{pool}.mlp.fc1", siglip[1], siglip_width),
        **_linear(f"{pool}.mlp.fc2", siglip_width, siglip[1]),
        **_linear("projector.fc1", 4 * vision, vision),
        **_linear("projector.fc2", width, 4 * vision),
        **_linear("projector.fc3", width, width),
        "language_model.model.embed_tokens.weight": (32064, width),
        **_decoder("language_model.model", *llama, heads, heads, width // heads),
        "language_model.lm_head.weight": (32064, width),
    }


def l1_shapes(width, action_dim=7):
    """Of the head that regresses actions; the names of a parallel module."""
    head = "module.model"
    shapes = _norm(f"{head}.layer_norm1", action_dim * width, bias=True)
    shapes |= _linear(f"{head}.fc1", width, action_dim * width)
    for i in range(2):
        block = f"{head}.mlp_resnet_blocks.{i}.ffn"
        shapes |= _norm(f"{block}.0", width, bias=True) | _linear(f"{block}.1", width, width)
    shapes |= _norm(f"{head}.layer_norm2", width, bias=True)
    return shapes | _linear(f"{head}.fc2", action_dim, width)


def openvla_statistics(action_dim=7, state_dim=8):
    stats = make_statistics(state_dim, action_dim)
    names = {"action": "action", "proprio": "observation.state"}
    kinds = ("mean", "std", "min", "max", "q01", "q99")
    found = {
        name: {kind: stats[f"{key}.{kind}"].tolist() for kind in kinds}
        for name, key in names.items()
    }
    found["action"]["mask"] = [True] * (action_dim - 1) + [False]
    return {**found, "num_transitions": 52970, "num_trajectories": 432}


def openvla_config(image_size=28):
    """``config.json`` as OpenVLA-OFT saves it, of a tiny Llama."""
    return {
        "_name_or_path": "openvla/openvla-7b", "arch_specifier": "no-align+fused-gelu-mlp",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "hf_llm_id": "meta-llama/Llama-2-7b-hf", "image_resize_strategy": "resize-naive",
        "image_sizes": [image_size] * 2, "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048, "model_type": "openvla", "n_action_bins": 256,
        "norm_stats": {"bridge_orig": openvla_statistics(7, 7)}, "output_projector_states": False,
        "pad_to_multiple_of": 64, "pad_token_id": 32000,
        "text_config": {
            "hidden_size": 32, "intermediate_size": 64, "model_type": "llama",
            "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4,
            "pad_token_id": 32000, "torch_dtype": "float32", "vocab_size": 32064,
        },
        "timm_model_ids": [
            "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224",
        ],
        "timm_override_act_layers": [None, None], "torch_dtype": "float32",
        "transformers_version": "4.40.1", "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }  # fmt: skip


def write_openvla(
    folder: Path, *, l1=False, proprio=False, action_dim=7, state_dim=8, num_shards=2
) -> Path:
    """A folder as OpenVLA-OFT leaves it, merged; with ``l1`` and ``proprio`` the files beside."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = make_weights(openvla_shapes())
    names = list(weights)
    shards = [names[i::num_shards] for i in range(num_shards)]
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        tensors = {name: weights[name] for name in shard}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(openvla_config(), indent=2))
    images = {
        "image_processor_type": "PrismaticImageProcessor", "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, 28, 28]] * 2, "interpolations": ["bicubic"] * 2,
        "means": [[0.484375, 0.455078125, 0.40625], [0.5] * 3],
        "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3],
        "use_fused_vision_backbone": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    stats = {UNNORM_KEY: openvla_statistics(action_dim, state_dim)}
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    if l1:
        head = make_weights(l1_shapes(32, action_dim))
        torch.save(head, folder / "action_head--150000_checkpoint.pt")
    if proprio:
        shapes = _linear("module.fc1", 32, state_dim) | _linear("module.fc2", 32, 32)
        torch.save(make_weights(shapes), folder / "proprio_projector--150000_checkpoint.pt")
    return folder


# -- what they are called with ---------------------------------------------------------------------
def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes that puts ``<bos>`` first, as PaliGemma's does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *letters])}
    model = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip


def make_observation(num_rows=2):
    """Observations, and noise, the same as scripts/compare_with_lerobot.py makes."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, 3, HEIGHT, WIDTH)
    images = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in "ab"]
    state = torch.randn(num_rows, STATE_DIM, generator=generator)
    noise = torch.randn(num_rows, CHUNK_SIZE, MAX_DIM, generator=generator)
    observation = {"image": images[0], "wrist_image": images[1], "state": state}
    td = {"observation": observation, "language_instruction": NonTensorStack(*INSTRUCTIONS)}
    return TensorDict(td, [num_rows]), noise


@torch.no_grad()
def denoise(policy, td, x):
    """Actions from noise, by the ODE."""
    prefix, _ = policy._observe(td)
    for k in range(policy.config.num_steps):
        step = torch.full((len(x),), k)
        x, _ = policy._transition(prefix, x, step, torch.zeros_like(step, dtype=torch.bool))
    return policy.action_statistics.restore(x[..., : policy.action_dim])
