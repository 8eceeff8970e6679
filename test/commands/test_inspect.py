# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command inspect: what a checkpoint is, and what others look like."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from torchrl_dvla.commands.saved_policy import describe_other
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings


def rows(text):
    """Values by label."""
    return {line[:18].strip(): line[18:].strip() for line in text.splitlines()}


def test_the_shipped_policy(call):
    code, out, err = call("inspect", "dvla_sft/checkpoints/libero_object")
    assert code == 0, err
    found = rows(out)
    assert found["parameters"] == "1,048,827, with buffers"
    assert found["bytes"] == "4.0 MiB float32"  # 1048827 * 4 / 2**20 = 4.001
    assert found["action head"] == "tokens, decoded in parallel: 33 bins (uniform), 8 queries"
    assert (found["chunk size"], found["action dimension"]) == ("8 env steps", "7")
    assert (found["cameras"], found["state"]) == ("1 of 128 x 128: image", "9 entries")
    assert found["base model"].startswith("smolvlm, vision 128 wide and 3 layers, text 128 wide")
    assert found["prompt"] == "instruction '{instruction}'"
    assert found["tokenizer"].endswith(", 26 words")
    assert found["statistics"].startswith("actions: low -1.03, high 1.03; state: mean")


def test_a_run_and_whether_its_policy_fits(call, trained):
    code, out, err = call("inspect", trained, "--config-name", "toy")
    assert code == 0, err
    found = rows(out)
    assert found["checkpoint"].startswith("update 2, ") and found["run"] == "toy, seed 0"
    assert found["fits"] == "toy: a collector would take them together"
    code, out, err = call("inspect", trained, "env.chunk_size=2")
    assert code == 1 and "chunk size" in rows(out) and "fits" not in rows(out)
    assert "as the environment takes them, got [4, 2]" in err and "Traceback" not in err


@pytest.fixture
def policy(trained, tmp_path):
    (folder,) = trained.glob("checkpoints/update-*/components/*-policy")
    return shutil.copytree(folder, tmp_path / "a policy")


def test_damaged_policies(call, policy):
    (weights,) = policy.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    code, _, err = call("inspect", policy)
    assert code == 1 and f"{weights} must have" in err
    weights.unlink()
    assert "got no such file" in call("inspect", policy)[2]
    config = policy / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps(data | {"architecture": "Other"}))
    assert "must be of a TransformersVLA or a FlowVLA, got 'Other'" in call("inspect", policy)[2]
    config.write_text(json.dumps(data | {"weights": {}}))
    assert "config.json.weights.file' is missing" in call("inspect", policy)[2]
    del data["config"]["chunk_size"]
    config.write_text(json.dumps(data))
    assert "missing ['chunk_size']" in call("inspect", policy)[2]


#: Files of a folder, and what it is said to be.
OTHERS = {
    "LeRobot": ({"config.json": {"type": "pi0", "input_features": {}}}, "the settings of a pi0 by"),
    "another of LeRobot": ({"config.json": {"type": "act", "input_features": {}}}, "got 'act'"),
    "LeRobot data": ({"meta/info.json": {}}, "a LeRobot data set"),
    "PEFT": ({"adapter_config.json": {"base_model_name_or_path": "x"}}, "a PEFT adapter of 'x'"),
    "OpenVLA": ({"config.json": {"model_type": "openvla"}}, "model.safetensors.index.json or"),
    "transformers": ({"config.json": {"model_type": "qwen"}}, "TransformersVLA.from_backbone"),
    "openpi": ({"assets/x/norm_stats.json": {}, "model.safetensors": {}}, "a safetensors file"),
    "openpi JAX": ({"params/_METADATA": {}}, "openpi checkpoint (JAX)"),
    "weights": ({"model.safetensors": {}}, "weights without a config.json: model.safetensors"),
    "damaged": ({"config.json": None}, "a folder with config.json in it"),
    "runs": ({"a_seed0/checkpoints/x": {}}, "a folder of runs. Pass one of them: a_seed0"),
    "nothing": ({}, "a folder with nothing in it"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_others_look_like(call, tmp_path, name):
    files, message = OTHERS[name]
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{" if data is None else json.dumps(data))
    code, out, err = call("inspect", tmp_path)
    assert (code, out) == (1, "") and message in err and "Traceback" not in err


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert describe_other(tmp_path / "model.safetensors").startswith("a file (.safetensors)")


def test_a_manifest_of_another_program(call, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    code, _, err = call("inspect", tmp_path)
    assert code == 1 and err.startswith("error: ") and "manifest" in err.lower()


def test_a_flow_policy(call, tmp_path):
    flow = utils.make_policy(compose_settings("toy_flow", []))
    flow.save_pretrained(tmp_path)
    code, out, err = call("inspect", tmp_path, "--config-name", "toy")
    assert code == 0, err
    found = rows(out)
    assert found["format"].startswith("FlowVLA") and found["chunk size"] == "4 env steps"
    assert found["fingerprint"] == "compared when it is loaded"
    assert found["action head"] == (
        "flow matching, 4 denoising steps; stochastic: random, by sde, noise 0.5, at the start 1"
    )
    assert found["base model"].startswith("pi0") and found["fits"].startswith("toy")
    arguments = ("inspect", tmp_path, "--config-name", "toy", "policy.temperature=0.5")
    assert "policy.temperature=1.0" in call(*arguments)[2]


def test_a_policy_of_lerobot(call, foreign, tmp_path):
    sizes = {"state_dim": 8, "action_dim": 7, "size": (256, 256)}
    folder = foreign.write_lerobot(tmp_path / "pi0", "pi0", max_tokens=200, **sizes)
    code, out, err = call("inspect", folder)
    assert code == 0, err
    found = rows(out)
    assert found["format"] == "LeRobot pi0"
    num = sum(math.prod(shape) for shape in foreign.pi_shapes("pi0").values())
    unread = 320 * 32  # the expert's head over words
    assert found["parameters"] == f"{num - unread:,}, with buffers"
    assert found["not read"].startswith(f"{unread:,} parameters of heads over words: model.")
    assert found["base model"] == (
        "pi0, vision 144 wide and 2 layers, text 64 wide and 2 layers, "
        "expert 32 wide and 2 layers, float32"
    )
    assert found["camera names"] == "image is 'image', wrist_image is 'image2'"
    assert found["replan interval"] == "3 env steps"
    assert found["gripper"] == "the last dimension is executed as it is"
    assert found["on LIBERO"] == (
        "env.chunk_size=6 env.replan_interval=3 env.camera_height=256 env.camera_width=256 "
        "env.cameras=[agentview,robot0_eye_in_hand] env.orientation=axis_angle"
    )
    command = ["inspect", folder, "--config-name", "libero_pi0", "device=cpu"]
    tokenizer = f"policy.stated.tokenizer={folder / 'tokenizer'}"
    code, out, err = call(*command, tokenizer, "env.chunk_size=6")
    assert code == 0, err
    assert rows(out)["fits"] == "libero_pi0: a collector would take them together"
    code, _, err = call(*command, tokenizer)
    assert code == 1 and "got [6, 7]" in err


def test_an_openvla_oft(call, foreign, tmp_path):
    folder = foreign.write_openvla(tmp_path / "l1", l1=True, proprio=True)
    both = "policy.stated.cameras=[full_image,wrist_image]"
    command = ["inspect", folder, "--config-name", "libero_openvla_oft", "device=cpu", both,
               "inference_device=cpu"]  # fmt: skip
    code, out, err = call(*command, "env.cameras=[agentview,robot0_eye_in_hand]")
    assert code == 0, err
    found = rows(out)
    assert found["format"] == "OpenVLA-OFT, regressing actions: for evaluation"
    assert found["action head"] == "regression: it can be evaluated, not trained, 56 queries"
    assert found["base model"] == (
        "openvla, vision 32 wide and 2 layers, fused vision 48 wide and 2 layers, "
        "text 32 wide and 2 layers, float32"
    )
    assert found["gripper"] == "the last dimension is rounded to -1 or 1 and inverted"
    assert found["resizing"] == "lanczos, smoothed, padding none, 90% of the area from the middle"
    assert (found["state"], found["tokenizer"]) == ("8 entries", ".")
    assert found["not read"].endswith(
        " parameters on which no action depends: language_model.lm_head.weight[actions], "
        "language_model.lm_head.weight[padding], language_model.lm_head.weight[words], "
        "vision_backbone.featurizer.blocks, vision_backbone.featurizer.norm, "
        "vision_backbone.fused_featurizer.attn_pool, vision_backbone.fused_featurizer.blocks, "
        "vision_backbone.fused_featurizer.norm"
    )
    assert found["fits"].startswith("libero_openvla_oft")
    code, _, err = call("inspect", folder)
    assert code == 1 and "stated.cameras must be given" in err


def test_two_cameras_and_operational_words_are_shown(call, tmp_path):
    cfg = compose_settings("toy", [])
    utils.make_policy(cfg).save_pretrained(tmp_path)
    assert rows(call("inspect", tmp_path)[1])["frozen"] == "nothing"
