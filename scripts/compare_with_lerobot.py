#!/usr/bin/env python3
# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Compare the flow policies with LeRobot's own, on tiny random ones that LeRobot saves.

Two environments, for LeRobot and this project want other versions of transformers:

    python scripts/compare_with_lerobot.py make pi05 /tmp/pi05            # with LeRobot
    python scripts/compare_with_lerobot.py check /tmp/pi05                # with torchrl_dvla

``make`` builds a policy of LeRobot with random weights and statistics (its variants are replaced
by tiny ones), saves it by LeRobot's own ``save_pretrained``, and writes down what it does with one
observation and noise. ``make pi05 FOLDER --load`` loads the policy that is there, strictly.
``check`` loads the folder and prints the largest difference as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

INSTRUCTIONS = ["lift the cup", "open the drawer"]
STATE_DIM, ACTION_DIM, CHUNK_SIZE, MAX_DIM = 5, 4, 6, 8
#: Of the cameras: no multiple of the tower's, and of another aspect ratio.
HEIGHT, WIDTH = 48, 60
PALIGEMMA_IMAGE, SMOLVLM_IMAGE = 28, 32
VOCABULARY = 320


def observation(num_rows: int = 2) -> dict[str, torch.Tensor]:
    """Two cameras, state and noise, the same wherever they are made."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, 3, HEIGHT, WIDTH)
    images = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in "ab"]
    return {
        "image": images[0],
        "wrist_image": images[1],
        "state": torch.randn(num_rows, STATE_DIM, generator=generator),
        "noise": torch.randn(num_rows, CHUNK_SIZE, MAX_DIM, generator=generator),
    }


# -- with LeRobot ----------------------------------------------------------------------------------


def make(kind: str, folder: Path, load: bool) -> None:
    """Save a random policy of LeRobot, and what it does; or load the one that is there."""
    _do_without_torchvision()
    from lerobot.configs.types import FeatureType, PolicyFeature

    folder.mkdir(parents=True, exist_ok=True)
    if kind == "smolvla":
        _shrink_smolvlm()
        sizes = {
            "num_vlm_layers": 2,
            "resize_imgs_with_padding": (SMOLVLM_IMAGE, SMOLVLM_IMAGE),
            "num_steps": 3,
        }
    else:
        _shrink_paligemma(kind)
        sizes = {
            "image_resolution": (PALIGEMMA_IMAGE, PALIGEMMA_IMAGE),
            "num_inference_steps": 3,
        }
    name = {"pi0": "PI0", "pi05": "PI05", "smolvla": "SmolVLA"}[kind]
    policy_class = getattr(_module(kind, "modeling"), f"{name}Policy")
    config = getattr(_module(kind, "configuration"), f"{name}Config")(
        device="cpu",
        chunk_size=CHUNK_SIZE,
        n_action_steps=3,
        max_state_dim=MAX_DIM,
        max_action_dim=MAX_DIM,
        empty_cameras=1,
        input_features={
            "observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, HEIGHT, WIDTH)),
            "observation.images.image2": PolicyFeature(FeatureType.VISUAL, (3, HEIGHT, WIDTH)),
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        **sizes,
    )
    torch.manual_seed(0)
    if load:
        policy = policy_class.from_pretrained(folder, strict=True)
        assert policy.config.type == kind
    else:
        policy = policy_class(config)
        with torch.no_grad():
            for parameter in policy.parameters():  # modulations and norms start without effect
                parameter.add_(0.02 * torch.randn_like(parameter))
        policy.save_pretrained(folder)
        _save_tokenizer(folder / "tokenizer")
    before, after = _processors(kind, config, folder, load)
    seen = observation()
    batch = before(
        {
            "observation.images.image": seen["image"] / 255,
            "observation.images.image2": seen["wrist_image"] / 255,
            "observation.state": seen["state"],
            "task": INSTRUCTIONS,
        }
    )
    chunk = policy.predict_action_chunk(batch, noise=seen["noise"])
    actions = torch.stack([after(chunk[:, k]) for k in range(CHUNK_SIZE)], 1)
    import lerobot
    import transformers

    versions = {"lerobot": lerobot.__version__, "transformers": transformers.__version__}
    answers = {"actions": actions.tolist(), "kind": kind, "versions": versions}
    (folder / "answers.json").write_text(json.dumps(answers))
    print(json.dumps({"kind": kind, "first": actions[0, 0].tolist(), **versions}))


def _module(kind: str, what: str) -> Any:
    import importlib

    return importlib.import_module(f"lerobot.policies.{kind}.{what}_{kind}")


def _do_without_torchvision() -> None:
    """LeRobot's data sets want it, its policies do not."""
    import importlib.abc
    import importlib.util
    import sys
    from dataclasses import make_dataclass
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from unittest.mock import MagicMock

    import transformers

    assert transformers.AutoConfig  # has looked for torchvision before it is replaced
    if importlib.util.find_spec("torchvision") is not None:
        return

    class Anything(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, *args: Any) -> ModuleSpec | None:
            return ModuleSpec(name, self) if name.partition(".")[0] == "torchvision" else None

        def create_module(self, spec: ModuleSpec) -> ModuleType:
            return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)

        def exec_module(self, module: ModuleType) -> None:
            pass

    sys.meta_path.append(Anything())
    # Its packages import all of LeRobot's policies, with all that these want.
    spec = importlib.util.find_spec("lerobot")
    assert spec is not None and spec.submodule_search_locations
    policies = ModuleType("lerobot.policies")
    policies.__path__ = [str(Path(spec.submodule_search_locations[0]) / "policies")]
    sys.modules[policies.__name__] = policies
    stub = ModuleType("lerobot.transforms")
    stub.ImageTransformsConfig = make_dataclass("ImageTransformsConfig", [])
    sys.modules[stub.__name__] = stub


def _processors(kind: str, config: Any, folder: Path, load: bool) -> Any:
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.processor.converters import (
        policy_action_to_transition,
        transition_to_policy_action,
    )
    from transformers import AutoTokenizer

    tokenizer = str(folder / "tokenizer")
    own = AutoTokenizer.from_pretrained
    # The tokenizers of the real models are downloaded: these are in the folder.
    AutoTokenizer.from_pretrained = lambda name, **kwargs: own(tokenizer)
    if load:
        read = PolicyProcessorPipeline.from_pretrained
        after = read(
            str(folder), config_filename="policy_postprocessor.json",
            to_transition=policy_action_to_transition, to_output=transition_to_policy_action,
        )  # fmt: skip
        return read(str(folder), config_filename="policy_preprocessor.json"), after
    stats: dict[str, dict[str, torch.Tensor]] = {}
    for key, size in (("observation.state", STATE_DIM), ("action", ACTION_DIM)):
        low = torch.randn(size) - 2.0
        stats[key] = {
            "mean": torch.randn(size), "std": torch.rand(size) + 0.5,
            "q01": low, "q99": low + 3.0 + torch.rand(size), "min": low, "max": low + 5.0,
        }  # fmt: skip
    make_pair = getattr(_module(kind, "processor"), f"make_{kind}_pre_post_processors")
    pair = make_pair(config, dataset_stats=stats)
    for each in pair:
        each.save_pretrained(folder)
    return pair


def _save_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes that puts ``<bos>`` first, as PaliGemma's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

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


def _shrink_paligemma(kind: str) -> None:
    """Tiny sizes in place of LeRobot's variants and of what it writes into configs itself."""
    from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

    module = _module(kind, "modeling")

    def fixed(base: type, **values: Any) -> Any:
        class Fixed(base):
            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, values.get(name, value))

        Fixed.__name__ = base.__name__
        return Fixed

    vision = fixed(SiglipVisionConfig, intermediate_size=96, projection_dim=64)
    text = fixed(GemmaConfig, vocab_size=VOCABULARY)

    class Paligemma(PaliGemmaConfig):
        def __init__(self) -> None:
            super().__init__(
                vision_config=vision(
                    hidden_size=144, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=2, patch_size=14, image_size=PALIGEMMA_IMAGE,
                    vision_use_head=False, projection_dim=64,
                ),
                text_config=text(
                    hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=1, head_dim=16,
                    vocab_size=VOCABULARY,
                ),
                projection_dim=64,
            )  # fmt: skip

    module.CONFIG_MAPPING = {"paligemma": Paligemma, "gemma": text}
    sizes = {"gemma_2b": (64, 2, 96, 4, 1, 16), "gemma_300m": (32, 2, 48, 4, 1, 16)}
    module.get_gemma_config = lambda variant: module.GemmaConfig(*sizes[variant])


def _shrink_smolvlm() -> None:
    """A tiny SmolVLM in place of the one on the hub."""
    import types

    from lerobot.policies.smolvla import smolvlm_with_expert as module
    from transformers import SmolVLMConfig

    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": SMOLVLM_IMAGE, "patch_size": 8,
        },
        text_config={
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 128,
            "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
        scale_factor=2, image_token_id=VOCABULARY - 1, pad_token_id=0,
    )  # fmt: skip
    tokenizer = types.SimpleNamespace(fake_image_token_id=3, global_image_token_id=3)
    processor = types.SimpleNamespace(tokenizer=tokenizer)
    module.AutoConfig = types.SimpleNamespace(from_pretrained=lambda name: config)
    module.AutoProcessor = types.SimpleNamespace(from_pretrained=lambda name: processor)


# -- with torchrl_dvla -----------------------------------------------------------------------------


@torch.no_grad()
def check(folder: Path) -> None:
    """Compare what the policy in a folder does here with what it did there."""
    import transformers
    from tensordict import NonTensorStack, TensorDict

    from torchrl_dvla.modules import load_policy
    from torchrl_dvla.modules.formats import Stated

    policy = load_policy(folder, stated=Stated(tokenizer=str(folder / "tokenizer")))
    seen = observation()
    x = seen.pop("noise")
    td = TensorDict(
        {"observation": seen, "language_instruction": NonTensorStack(*INSTRUCTIONS)}, [len(x)]
    )
    prefix, _ = policy._observe(td)
    for k in range(policy.config.num_steps):
        step = torch.full((len(x),), k)
        x, _ = policy._transition(prefix, x, step, torch.zeros_like(step, dtype=torch.bool))
    actions = policy.action_statistics.restore(x[..., :ACTION_DIM])
    answers = json.loads((folder / "answers.json").read_text())
    expected = torch.tensor(answers["actions"])
    print(
        json.dumps(
            {
                "kind": answers["kind"],
                "max_difference": float((actions - expected).abs().max()),
                "largest_action": float(expected.abs().max()),
                "there": answers["versions"],
                "here": {"transformers": transformers.__version__},
            }
        )
    )


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "check"])
    parser.add_argument("arguments", nargs="+", help="make: KIND FOLDER; check: FOLDER")
    parser.add_argument("--load", action="store_true", help="load the policy that is there")
    args = parser.parse_args()
    if args.what == "make":
        kind, folder = args.arguments
        make(kind, Path(folder), args.load)
    else:
        check(Path(args.arguments[0]))


if __name__ == "__main__":
    main()
