# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Folders of LeRobot: what is read, what LeRobot itself does with them, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrl_dvla.modules import load_policy
from torchrl_dvla.modules.formats import Stated, read_lerobot

from .foreign import (
    ACTION_DIM,
    CHUNK_SIZE,
    KINDS,
    STATE_DIM,
    denoise,
    lerobot_steps,
    make_observation,
    make_statistics,
    write_lerobot,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot")
    return {kind: write_lerobot(folder / kind, kind) for kind in KINDS}


def load(folder, **kwargs):
    return load_policy(folder, stated=Stated(tokenizer=str(folder / "tokenizer")), **kwargs)


#: First and last action of the first row, and the first of the second, as LeRobot 0.6.1 computes
#: them from these very folders (docs/measurements/lerobot.md).
ANSWERS = {
    "pi0": [
        [-2.069898, -3.322682, 3.012462, 2.450931],
        [-1.406756, -2.498056, 3.321162, 0.199687],
        [-0.136378, -1.844151, 3.066451, 0.068109],
    ],
    "pi05": [
        [-3.180695, 0.685067, 0.953304, 4.592838],
        [-4.751481, 1.441182, 0.472364, 0.72346],
        [3.502953, 2.185775, 2.055156, 0.826462],
    ],
    "smolvla": [
        [-1.305513, -4.774349, 2.505144, 0.583111],
        [-1.056712, -2.693998, 2.133077, -0.675628],
        [0.107162, -3.279347, 1.386123, 0.021111],
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_actions_are_those_of_lerobot(folders, kind):
    td, noise = make_observation()
    actions = denoise(load(folders[kind]), td, noise)
    found = torch.stack([actions[0, 0], actions[0, -1], actions[1, 0]])
    torch.testing.assert_close(found, torch.tensor(ANSWERS[kind]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read(folders, kind):
    found = read_lerobot(folders[kind], Stated())
    config = found.config
    assert found.format == f"LeRobot {kind}" and found.replan_interval == 3
    assert found.cameras == ("image", "image2")
    assert (config.state_dim, config.action_dim) == (STATE_DIM, ACTION_DIM)
    assert (config.image_size, config.num_cameras) == ((48, 60), 2)
    assert (config.backbone["chunk_size"], config.num_steps) == (CHUNK_SIZE, 3)
    assert config.max_prompt_tokens == (200 if kind == "pi05" else 48)
    assert found.tokenizer.startswith("nowhere/")
    scaling = "range" if kind == "pi05" else "standard"
    assert config.state_scaling == config.action_scaling == scaling
    assert sorted(found.statistics) == [
        f"{entry}_statistics.{end}"
        for entry in ("action", "state")
        for end in (("high", "low") if kind == "pi05" else ("mean", "std"))
    ]
    # Heads over words: of none an action depends.
    assert all("lm_head" in name for name in found.table.unread)
    assert len(found.table.own) + len(found.table.unread) == len(found.file.shapes)


def test_what_is_loaded_can_be_trained_and_saved(folders, tmp_path):
    td, noise = make_observation()
    policy = load(folders["pi05"], freeze_prefix=True, noise_level=0.3, dtype="float32")
    assert policy.config.noise_level == 0.3
    assert not any(p.requires_grad for p in policy.network.model.model.vlm.parameters())
    expected = denoise(policy, td, noise)
    policy.save_pretrained(tmp_path)
    assert torch.equal(denoise(load_policy(tmp_path), td, noise), expected)


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a folder, whose files may be changed."""

    def copy(kind="pi0"):
        for path in folders[kind].iterdir():
            if path.is_file():
                (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return copy


def change(folder, name, **changes):
    path = folder / name
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def test_settings_of_published_policies(copy):
    """lerobot/smolvla_base and HuggingFaceVLA/smolvla_libero, by LeRobot's issue 2294."""
    folder = copy("smolvla")
    change(folder, "config.json", prefix_length=0, num_expert_layers=0, num_vlm_layers=0,
           vlm_model_name="HuggingFaceTB/SmolVLM2-500M-Instruct")  # fmt: skip
    assert read_lerobot(folder, Stated()).config.backbone["dit_config"]["num_hidden_layers"] == 2


# -- what is refused -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("pi0", {"type": "act"}, "must be one of pi0, pi05, smolvla, got 'act'"),
        ("pi0", {"some_new_switch": True}, r"unknown \['some_new_switch'\]"),
        ("pi0", {"chunk_size": ...}, r"missing \['chunk_size'\]"),
        ("pi0", {"use_relative_actions": True}, "use_relative_actions in .* must be False"),
        ("pi0", {"use_peft": True}, "use_peft in .* must be False"),
        ("pi0", {"n_obs_steps": 2}, "n_obs_steps in .* must be 1"),
        ("pi0", {"max_action_dim": 32}, "max_action_dim in .* must be 8, got 32"),
        ("pi0", {"image_resolution": [224, 224]}, r"must be \[28, 28\], got \[224, 224\]"),
        ("pi05", {"use_visual_memory": True}, "use_visual_memory in .* must be False"),
        ("pi05", {"use_relative_actions": ...}, "stated.padded_state must be given"),
        ("smolvla", {"self_attn_every_n_layers": 4}, "self_attn_every_n_layers in .* must be 2"),
        ("smolvla", {"num_expert_layers": 1}, "num_expert_layers in .* must be 2"),
        ("smolvla", {"add_image_special_tokens": True}, "add_image_special_tokens in"),
        ("smolvla", {"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha in"),
        ("smolvla", {"prefix_length": 300}, "prefix_length in .* must be 0"),
        ("smolvla", {"vlm_model_name": "other/model"}, "vlm_model_name must be one of SmolVLM2"),
        ("smolvla", {"resize_imgs_with_padding": None}, r"must be \[32, 32\], got None"),
    ],
)  # fmt: skip
def test_settings_that_would_be_left_out(copy, kind, changes, message):
    folder = copy(kind)
    change(folder, "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_lerobot(folder, Stated())


def test_scaling_that_is_not_known(copy):
    folder = copy()
    for mode in ("QUANTILE10", None):
        mapping = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": mode}
        change(folder, "config.json", normalization_mapping=mapping)
        with pytest.raises(ValueError, match="normalization_mapping.ACTION in"):
            read_lerobot(folder, Stated())
    change(folder, "config.json", normalization_mapping={**mapping, "VISUAL": "MEAN_STD"})
    with pytest.raises(ValueError, match="normalization_mapping.VISUAL in .* must be 'IDENTITY'"):
        read_lerobot(folder, Stated())


@pytest.mark.parametrize("missing", ["config.json", "policy_preprocessor.json",
                                     "policy_postprocessor.json"])  # fmt: skip
def test_a_file_is_missing(copy, missing):
    folder = copy()
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"must contain {missing}"):
        read_lerobot(folder, Stated())


def test_statistics_are_missing(copy):
    folder = copy()
    (state_file,) = folder.glob("policy_postprocessor_step_0_*.safetensors")
    tensors = load_file(state_file)
    save_file({k: v for k, v in tensors.items() if k != "action.std"}, state_file)
    with pytest.raises(ValueError, match=r"must hold mean and std of the action, got \['max'"):
        read_lerobot(folder, Stated())
    save_file(tensors | {"action.std": torch.ones(2)}, state_file)
    with pytest.raises(ValueError, match="must hold 4 finite numbers for std of the action"):
        read_lerobot(folder, Stated())
    state_file.unlink()
    with pytest.raises(FileNotFoundError, match="must contain policy_postprocessor_step_0_unnorm"):
        read_lerobot(folder, Stated())


@pytest.mark.parametrize(
    ("step", "settings", "message"),
    [
        ("my_own_step", {}, "got 'my_own_step'"),
        ("relative_actions_processor", {"enabled": True}, "enabled of step .* must be False"),
        ("normalizer_processor", {"eps": 1e-3}, "eps of step .* must be 1e-08"),
        ("normalizer_processor", {"norm_map": {}}, "norm_map of normalizer_processor"),
        ("tokenizer_processor", {"padding_side": "left"}, "padding_side of step"),
        ("normalizer_processor", {"normalize_observation_keys": []}, "must be absent"),
    ],
)  # fmt: skip
def test_steps_that_would_be_left_out(copy, step, settings, message):
    folder = copy()
    path = folder / "policy_preprocessor.json"
    data = json.loads(path.read_text())
    for entry in data["steps"]:
        if entry["registry_name"] == step:
            entry["config"] |= settings
            break
    else:
        data["steps"].append({"registry_name": step, "config": settings})
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read_lerobot(folder, Stated())


def weights_of(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.state_proj.bias"), "'model.state_proj.bias' is missing"),
        (lambda t: t.update({"model.other.weight": torch.ones(1)}), "model.other.weight. It is"),
        (lambda t: t.update({"normalize_inputs.buffer_observation_state.mean": torch.ones(5)}),
         "where LeRobot kept them before 0.4"),
        (lambda t: t.update({"model.x.lora_A.weight": torch.ones(1)}), "It holds adapters"),
        (lambda t: t.update({"model.action_in_proj.weight": torch.ones(32, 9)}),
         r"'model.action_in_proj.weight' is \[32, 9\] instead of \[32, 8\]"),
        (lambda t: t["model.action_in_proj.weight"].fill_(torch.nan), "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_weights_of_something_else(copy, folders, edit, message):
    folder = copy()
    weights_of(folder, edit)
    stated = Stated(tokenizer=str(folders["pi0"] / "tokenizer"))
    with pytest.raises(ValueError, match=message):
        read_lerobot(folder, stated).load()


def test_two_tables_of_words(copy, folders):
    """LeRobot does not tie them: actions depend on the embeddings, the head is left as it was."""
    folder, whole = copy(), "model.paligemma_with_expert.paligemma"
    words, head = f"{whole}.model.language_model.embed_tokens.weight", f"{whole}.lm_head.weight"
    weights_of(folder, lambda t: t.update({words: t[head].clone()}))
    assert read_lerobot(folder, Stated()).table.copies == {head: words}
    weights_of(folder, lambda t: t[head].add_(1.0))
    found = read_lerobot(folder, Stated(tokenizer=str(folders["pi0"] / "tokenizer")))
    assert head in found.table.unread and not found.table.copies
    td, noise = make_observation()
    assert torch.equal(denoise(found.load(), td, noise), denoise(load(folders["pi0"]), td, noise))


def test_cameras(copy):
    folder = copy()
    features = json.loads((folder / "config.json").read_text())["input_features"]
    third = {"observation.images.top": {"type": "VISUAL", "shape": [3, 48, 60]}}
    change(folder, "config.json", input_features=features | third)
    with pytest.raises(ValueError, match=r"stated.cameras must be given .* which has \['image'"):
        read_lerobot(folder, Stated())
    assert read_lerobot(folder, Stated(cameras=("image2", "top"))).cameras == ("image2", "top")
    with pytest.raises(ValueError, match="must be among .*, in this order"):
        read_lerobot(folder, Stated(cameras=("top", "image")))
    other = {"observation.effort": {"type": "STATE", "shape": [2]}}
    change(folder, "config.json", input_features=features | other)
    with pytest.raises(ValueError, match="got 'observation.effort' of type STATE"):
        read_lerobot(folder, Stated())


def test_what_is_stated_must_agree(folders):
    with pytest.raises(ValueError, match="stated.chunk_size must be 6, as the files .* got 50"):
        read_lerobot(folders["pi0"], Stated(chunk_size=50))
    with pytest.raises(ValueError, match="stated.action_dim must be 4"):
        read_lerobot(folders["pi0"], Stated(action_dim=7))
    with pytest.raises(OSError, match="Pass policy.stated.tokenizer"):
        load_policy(folders["pi0"], stated=Stated(tokenizer="/nowhere/at/all"))


def test_a_state_that_was_padded_before_the_prompt(copy, folders):
    folder = copy("pi05")
    change(folder, "config.json", use_relative_actions=...)
    tokenizer = str(folders["pi05"] / "tokenizer")
    prompts = []
    for padded in (False, True):
        policy = load_policy(folder, stated=Stated(tokenizer=tokenizer, padded_state=padded))
        seen = []
        policy.prompt.instruction_ids = lambda text, state, seen=seen: (
            seen.append(state) or torch.tensor([5])
        )
        policy(make_observation()[0])
        prompts.append(seen[0].split())
    # Zeros stand in the middle of the range.
    assert prompts[1] == [*prompts[0], "128", "128", "128"]


def test_statistics_by_hand(folders):
    stats = make_statistics()
    policy = load(folders["pi05"])
    low, high = stats["observation.state.q01"], stats["observation.state.q99"]
    torch.testing.assert_close(policy.state_statistics.standardize(high), torch.ones(5))
    assert torch.equal(policy.state_statistics.standardize(low), -torch.ones(5))
    policy = load(folders["pi0"])
    mean, std = stats["action.mean"], stats["action.std"]
    assert torch.equal(policy.action_statistics.restore(torch.ones(4)), std + mean)


def test_every_step_of_the_writer_is_known():
    for kind in KINDS:
        assert [len(steps) for steps in lerobot_steps(kind)] == {
            "pi0": [7, 3], "pi05": [7, 3], "smolvla": [6, 2],
        }[kind]  # fmt: skip
