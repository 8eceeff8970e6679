#!/usr/bin/env python3
# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Compare OpenVLA-OFT with its own code, on a tiny random checkpoint.

Two environments, for the project wants timm 0.9.16 and a transformers of its own:

    python scripts/compare_with_openvla_oft.py answer FOLDER               # with openvla-oft
    python scripts/compare_with_openvla_oft.py check FOLDER                # with torchrl_dvla

``FOLDER`` is what ``test/modules/formats/foreign.py`` writes (``write_openvla``), with or without
the head that regresses actions. ``answer`` loads it into ``OpenVLAForActionPrediction`` and writes
down what that does with pixels that are prepared already. ``check`` loads it here and prints the
largest differences as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

INSTRUCTION = "Lift the cup"
CHUNK_SIZE, ACTION_DIM, IMAGE = 8, 7, 28
STATE = [0.5, -0.5, 1.0, -1.0, 0.25, 2.0, -2.0, 0.0]


def pixels(num_cameras: int) -> torch.Tensor:
    """Normalised pixels ``[1, 6 * cameras, 28, 28]``, the same wherever they are made."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 6 * num_cameras, IMAGE, IMAGE, generator=generator)


def answer(folder: Path) -> None:
    """Write down what the project's own code does."""
    import timm
    from prismatic.extern.hf import configuration_prismatic, modeling_prismatic
    from prismatic.models.action_heads import L1RegressionActionHead
    from prismatic.models.projectors import ProprioProjector

    create = timm.create_model
    sizes = {"reg4": {"embed_dim": 32, "depth": 3, "mlp_ratio": 4}}
    sizes["siglip"] = {"embed_dim": 48, "depth": 3, "mlp_ratio": 60 / 48}

    def create_tiny(model_id: str, **kwargs: Any) -> Any:
        return create(model_id, **kwargs, **next(v for k, v in sizes.items() if k in model_id))

    timm.create_model = create_tiny
    configuration_prismatic.VISION_BACKBONE_TO_RESOLUTION["dinosiglip-vit-so-224px"] = [IMAGE] * 2
    model, info = modeling_prismatic.OpenVLAForActionPrediction.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info.values()), info
    model.eval()
    model.norm_stats = json.loads((folder / "dataset_statistics.json").read_text())
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    prompt = f"In: What action should the robot take to {INSTRUCTION.lower()}?\nOut:"
    inputs = tokenizer(prompt, return_tensors="pt")
    head, given = None, {}
    if files := list(folder.glob("action_head--*")):
        width = model.llm_dim
        head = L1RegressionActionHead(width, width, ACTION_DIM).eval()
        projector = ProprioProjector(width, len(STATE)).eval()
        for module, path in ((head, files[0]), (projector, *folder.glob("proprio_projector--*"))):
            state = torch.load(path, weights_only=True)
            module.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
        stats = next(iter(model.norm_stats.values()))["proprio"]
        low, high = (torch.tensor(stats[name], dtype=torch.float64) for name in ("q01", "q99"))
        proprio = 2 * (torch.tensor(STATE) - low) / (high - low + 1e-8) - 1
        given = {"proprio": proprio.clip(-1, 1).numpy(), "proprio_projector": projector}
    num_cameras = 2 if head else 1
    model.vision_backbone.set_num_images_in_input(num_cameras)
    seen: dict[str, Any] = {}
    model.language_model.register_forward_hook(lambda _, __, out: seen.update(logits=out.logits))
    with torch.inference_mode():
        actions, _ = model.predict_action(
            inputs["input_ids"],
            pixel_values=pixels(num_cameras),
            attention_mask=torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.bool),
            action_head=head,
            **given,
        )
        towers = model.vision_backbone.forward(pixels(num_cameras))
    num = CHUNK_SIZE * ACTION_DIM
    logits = seen["logits"][0, -num - 2 : -2, -256 - 64 : -64]
    answers = {
        "actions": actions.tolist(),
        "logits": logits.reshape(CHUNK_SIZE, ACTION_DIM, 256).tolist(),
        "features": towers[0].tolist(),
    }
    (folder / "answers.json").write_text(json.dumps(answers))
    print(json.dumps({"first": actions[0].tolist(), "features": towers[0, 0, :2].tolist()}))


def check(folder: Path) -> None:
    """Print how far this project is from it."""
    from tensordict import TensorDict

    from torchrl_dvla.modules import load_policy
    from torchrl_dvla.modules.formats import Stated

    answers = {
        k: torch.tensor(v) for k, v in json.loads((folder / "answers.json").read_text()).items()
    }
    regresses = any(folder.glob("action_head--*"))
    cameras = ("full_image", "wrist_image")[: 1 + regresses]
    policy: Any = load_policy(folder, stated=Stated(cameras=cameras, chunk_size=CHUNK_SIZE)).eval()
    prepared = iter([torch.cat(pixels(len(cameras)).split(6, 1))])
    policy.normalize.forward = lambda *_: next(prepared)
    black = torch.zeros(1, 3, IMAGE, IMAGE, dtype=torch.uint8)
    observation = {"image": black, "wrist_image": black, "state": torch.tensor([STATE])}
    td = TensorDict({"observation": observation, "language_instruction": INSTRUCTION}, [1])
    with torch.inference_mode():
        features = policy.backbone.model.vision_backbone(
            torch.cat(pixels(len(cameras)).split(6, 1))
        )
        found = {"features": features.flatten(0, 1)}
        if regresses:
            found["actions"] = policy(td)["vla_action", "chunk"][0]
        else:  # the project itself decodes the likeliest of all words
            found["logits"] = policy.action_logits(td)[0]
    gripper = -(2 * answers["actions"][..., -1:] - 1).sign()  # of its evaluation on LIBERO
    answers["actions"] = torch.cat([answers["actions"][..., :-1], gripper], -1)
    report = {k: float((v - answers[k]).abs().max()) for k, v in found.items()}
    print(json.dumps(report | {f"largest_{k}": float(answers[k].abs().max()) for k in found}))


def main() -> None:
    """Run one half."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("half", choices=("answer", "check"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    (answer if args.half == "answer" else check)(args.folder)


if __name__ == "__main__":
    main()
