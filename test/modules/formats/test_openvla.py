# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Folders of OpenVLA-OFT: what is read and refused, and that it decides as the project's code."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import NonTensorStack, TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla import GRPOLoss
from torchrl_dvla.modules import RegressionVLA, TransformersVLA, load_policy
from torchrl_dvla.modules.formats import Stated, export_policy, read_openvla, write_fingerprint

from .foreign import UNNORM_KEY, l1_shapes, openvla_shapes, openvla_statistics, write_openvla

CAMERAS = ("full_image", "wrist_image")
STATE = [0.5, -0.5, 1.0, -1.0, 0.25, 2.0, -2.0, 0.0]
HEAD = "language_model.lm_head.weight"


def stated(num_cameras=1, **kwargs):
    return Stated(cameras=CAMERAS[:num_cameras], chunk_size=8, **kwargs)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_openvla(tmp_path_factory.mktemp("openvla") / "tokens")


@pytest.fixture(scope="module")
def l1(tmp_path_factory):
    return write_openvla(tmp_path_factory.mktemp("openvla") / "l1", l1=True, proprio=True)


@pytest.fixture(scope="module")
def token_policy(tokens):
    return load_policy(tokens, stated=stated()).eval()


@pytest.fixture
def copy(tokens, tmp_path):
    return shutil.copytree(tokens, tmp_path / "copy")


def prepare(policy, num_cameras):
    """Pixels as scripts/compare_with_openvla_oft.py draws them, in place of images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 6 * num_cameras, 28, 28, generator=generator)
    pixels = torch.cat(pixels.split(6, 1))
    policy.normalize.forward = lambda *_: pixels
    return pixels


def observe(*instructions):
    generator = torch.Generator().manual_seed(1)
    num = len(instructions)
    images = torch.randint(0, 256, (2, num, 3, 28, 28), generator=generator, dtype=torch.uint8)
    state = torch.tensor(STATE).expand(num, -1)
    observation = {"image": images[0], "wrist_image": images[1], "state": state}
    words = NonTensorStack(*instructions)
    return TensorDict({"observation": observation, "language_instruction": words}, [num])


# -- what it does --------------------------------------------------------------------------------


@torch.no_grad()
def test_towers_and_logits_are_those_of_the_projects_code(tokens):
    """The numbers are of timm 0.9.16 and of openvla-oft, see docs/measurements/openvla_oft.md."""
    policy = load_policy(tokens, stated=stated()).eval()
    pixels = prepare(policy, 1)
    features = policy.backbone.model.vision_backbone(pixels)[0]
    assert features.shape == (4, 80)  # DINOv2's 32 channels, and SigLIP's 48
    expected = torch.tensor([-0.8017125, -0.5118204, -2.4037344, -0.2089728])
    found = torch.cat([features[0, :2], features[-1, -2:]])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    logits = policy.action_logits(observe("Lift the cup"))[0]
    assert logits.shape == (8, 7, 256)
    expected = torch.tensor([0.1525196, 0.0548199, -0.1837357, -0.1489387])
    found = torch.cat([logits[0, 0, :2], logits[7, 6, -2:]])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_regressed_actions_are_those_of_the_projects_code(l1):
    policy = load_policy(l1, stated=stated(2)).eval()
    assert isinstance(policy, RegressionVLA) and policy.config.num_cameras == 2
    prepare(policy, 2)
    td = policy(observe("Lift the cup"))
    chunk = td["vla_action", "chunk"][0]
    expected = torch.tensor(
        [
            [-0.0256503, -3.0768914, 2.5599182, 2.0633788, -1.8536906, -0.7901486, -1.0],
            [0.0148064, -2.5756891, 2.1666818, 2.2265942, -1.8020923, -1.0826826, -1.0],
        ]
    )  # the gripper, 0.55 and 0.64 of 1 for open, is opened: LIBERO's -1
    torch.testing.assert_close(chunk[[0, 7]], expected, rtol=0, atol=2e-5)
    assert td["vla_action", "log_probs"].tolist() == [[0.0] * 8]
    with pytest.raises(ValueError, match="has no log-probabilities to form ratios of"):
        GRPOLoss(policy)


@torch.no_grad()
def test_tokens_are_drawn_with_their_log_probs(token_policy):
    assert type(token_policy) is TransformersVLA
    td = observe("Lift the cup", "open the second drawer")
    with set_exploration_type(ExplorationType.RANDOM):
        td = token_policy(td)
    sampled = td["vla_action", "tokens"]
    assert sampled.shape == (2, 8, 7) and sampled.min() >= 0 and sampled.max() < 256
    log_probs = token_policy.get_dist(td).log_prob(sampled)
    torch.testing.assert_close(log_probs, td["vla_action", "log_probs"], rtol=0, atol=1e-5)
    # A shorter instruction is padded, which changes nothing.
    alone = token_policy.action_logits(observe("Lift the cup", "open the second drawer")[:1])
    together = token_policy.action_logits(td)
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=1e-5)


def test_tokens_are_the_last_of_the_vocabulary(tokens, token_policy):
    file = read_openvla(tokens, stated()).file
    whole = file.read([f"{HEAD}[words]", f"{HEAD}[actions]", f"{HEAD}[padding]"])
    assert [len(piece) for piece in whole.values()] == [31744, 256, 64]
    weights = load_file(tokens / "model-00001-of-00002.safetensors")
    weights |= load_file(tokens / "model-00002-of-00002.safetensors")
    expected = weights[HEAD][31744:32000]
    assert torch.equal(token_policy.query_head.projection.weight, expected)
    # Token 31999 is the first bin, [-1, -0.992]: 0.0039 of the range above q01.
    stats = openvla_statistics()["action"]
    chunk = token_policy.action_tokenizer.decode(torch.full((1, 7), 255))
    low, high = torch.tensor(stats["q01"])[:6], torch.tensor(stats["q99"])[:6]
    torch.testing.assert_close(chunk[0, :6], low + (high - low) / 510, rtol=0, atol=1e-5)
    assert chunk[0, 6] == 1  # closed: -0.996 is below 0.5


# -- what is read --------------------------------------------------------------------------------


def test_what_is_read(tokens, l1):
    found = read_openvla(tokens, stated(image_size=(256, 256)))
    config = found.config
    assert (found.format, found.tokenizer) == ("OpenVLA-OFT", ".")
    assert (config.chunk_size, config.action_dim, config.state_dim) == (8, 7, 0)
    assert config.image_size == (256, 256) and config.num_queries == 56
    assert config.pixel_style.mean == (0.484375, 0.455078125, 0.40625, 0.5, 0.5, 0.5)
    assert config.backbone["text_config"]["rms_norm_eps"] == 1e-6  # what transformers 4.40 took
    unread = {name.split(".blocks.2.")[0] for name in found.table.unread if ".blocks.2." in name}
    assert unread == {"vision_backbone.featurizer", "vision_backbone.fused_featurizer"}
    other = read_openvla(l1, stated(2))
    assert other.format.startswith("OpenVLA-OFT, regressing") and other.config.state_dim == 8
    stats = openvla_statistics()["proprio"]
    middle = (torch.tensor(stats["q01"]) + torch.tensor(stats["q99"])) / 2
    torch.testing.assert_close(other.statistics["state_projector.mean"], middle, rtol=0, atol=1e-6)


def test_sizes_of_the_published_models(tmp_path, tokens):
    """Seven billion parameters, from the headers of files without data."""
    shapes = openvla_shapes((1024, 4096, 24), (1152, 4304, 27), (4096, 11008, 32), 32, 256)
    folder = shutil.copytree(tokens, tmp_path / "7b", ignore=shutil.ignore_patterns("model*"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064}
    (folder / "config.json").write_text(json.dumps(config))
    images = json.loads((folder / "preprocessor_config.json").read_text())
    images["input_sizes"] = [[3, 224, 224]] * 2
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        offsets = [end, end + size]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    found = read_openvla(folder, stated())
    assert end // 2 == 7_541_237_184
    assert (found.config.dtype, found.config.image_size) == ("bfloat16", (224, 224))
    text_config = found.config.backbone["text_config"]
    assert (text_config["num_attention_heads"], text_config["num_hidden_layers"]) == (32, 32)
    assert found.config.backbone["vision_config"]["num_hidden_layers"] == 23


def test_statistics_of_several_data_sets(copy):
    path = copy / "dataset_statistics.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"other": openvla_statistics()}))
    with pytest.raises(ValueError, match=f"those of one data set, got {UNNORM_KEY}, other. Pass"):
        read_openvla(copy, stated())
    assert read_openvla(copy, stated(unnorm_key="other")).config.action_dim == 7
    with pytest.raises(ValueError, match="must be those of 'droid', got libero"):
        read_openvla(copy, stated(unnorm_key="droid"))
    path.unlink()  # those in config.json are of the model that was fine-tuned
    with pytest.raises(ValueError, match=f"must be those of '{UNNORM_KEY}', got bridge_orig"):
        read_openvla(copy, stated(unnorm_key=UNNORM_KEY))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"norm_stats": None}))
    with pytest.raises(ValueError, match="those of one data set, got none"):
        read_openvla(copy, stated())


# -- what is refused -----------------------------------------------------------------------------


def _config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _text(**changes):
    def change(folder):
        path = folder / "config.json"
        data = json.loads(path.read_text())
        data["text_config"] |= changes
        path.write_text(json.dumps(data))

    return change


def _statistics(entry, **changes):
    def change(folder):
        path = folder / "dataset_statistics.json"
        data = json.loads(path.read_text())
        data[UNNORM_KEY][entry] |= changes
        path.write_text(json.dumps(data))

    return change


def _touch(name):
    return lambda folder: (folder / name).touch()


def _delete(name):
    return lambda folder: (folder / name).unlink()


def _tensor(name, value):
    """Change a tensor, take it out, or add it."""

    def change(folder):
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        file = data["weight_map"].setdefault(name, "model-00001-of-00002.safetensors")
        tensors = load_file(folder / file)
        tensors[name] = value
        if value is None:
            del tensors[name], data["weight_map"][name]
        index.write_text(json.dumps(data))
        save_file(tensors, folder / file)

    return change


def _proprio(folder):
    weights = {"fc1.weight": torch.zeros(32, 7), "fc1.bias": torch.zeros(32)}
    torch.save(weights, folder / "proprio_projector--1_checkpoint.pt")


DINO = "vision_backbone.featurizer"
REFUSED = {
    "another network": (_config(vision_backbone_id="siglip-vit-so400m"), "vision_backbone_id in"),
    "another version": (_config(attention="flash"), "settings that are known here, got attention"),
    "another head": (_touch("noisy_action_projector--1_checkpoint.pt"), "by diffusion, for which"),
    "FiLM": (_touch("vision_backbone--1_checkpoint.pt"), "read the instruction by FiLM"),
    "two heads": (
        lambda folder: [_touch(f"action_head--{i}_checkpoint.pt")(folder) for i in (1, 2)],
        r"must hold one action_head--\*_checkpoint.pt, got \['action_head--1",
    ),
    "a damaged head": (_touch("action_head--1_checkpoint.pt"), "must hold a state dict, got an"),
    "no proprio": (_config(use_proprio=True), "use_proprio in .* must be False, as there is no"),
    "rotary": (_text(rope_scaling={"factor": 2}), "text_config.rope_scaling in .* must be None"),
    "text sizes": (_text(hidden_size=64), "text_config.hidden_size must be 32, as the weights"),
    "no q01": (_statistics("action", q01=None), "must hold q01 and q99 of the action"),
    "NaN": (_statistics("action", q01=[float("nan")] * 7), "must hold finite q01 of the action"),
    "two grippers": (
        _statistics("action", mask=[True] * 5 + [False] * 2),
        "mask of the action .* must be False for the last dimension alone",
    ),
    "another robot's state": (_proprio, "q01 and q99 of the proprio, of 7 numbers"),
    "missing": (_tensor(f"{DINO}.blocks.0.attn.qkv.bias", None), r"blocks.0.attn.qkv.bias\[k\]"),
    "missing norm": (
        _tensor("vision_backbone.fused_featurizer.blocks.1.norm2.bias", None),
        "vision_backbone.fused_featurizer.blocks.1.norm2.bias' is missing",
    ),
    "no registers": (_tensor(f"{DINO}.reg_token", None), f"must hold '{DINO}.reg_token'"),
    "unexpected": (_tensor("extra.weight", torch.zeros(1)), "not read, got 1 such: extra.weight"),
    "adapters": (
        _tensor("base_model.lora_A.weight", torch.zeros(1)), "It holds adapters: merge them first",
    ),
    "shape": (
        _tensor(f"{DINO}.blocks.1.mlp.fc2.weight", torch.zeros(32, 9)),
        rf"'{DINO}.blocks.1.mlp.fc2.weight' is \[32, 9\] instead of \[32, 128\]",
    ),
    "not finite": (
        _tensor(f"{DINO}.cls_token", torch.full((1, 1, 32), torch.inf)),
        "cls_token' holds NaN or infinity",
    ),
    "words": (_tensor(HEAD, torch.zeros(100, 32)), r"'language_model.lm_head.weight\[actions\]'"),
    "a shard": (_delete("model-00002-of-00002.safetensors"), "must be a safetensors file"),
    "the index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "must hold a 'weight_map'",
    ),
    "means": (
        lambda folder: (folder / "preprocessor_config.json").write_text('{"means": [[0, 0, 0]]}'),
        "must hold means and stds of two towers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(copy, name):
    change, message = REFUSED[name]
    change(copy)
    with pytest.raises(ValueError, match=message):
        load_policy(copy, stated=stated())


def test_files_that_are_missing(copy):
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="must contain preprocessor_config.json"):
        read_openvla(copy, stated())
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="got neither. Copy"):
        read_openvla(copy, stated())
    (copy / "lora_adapter").mkdir()
    with pytest.raises(FileNotFoundError, match="adapters in lora_adapter/ alone: merge them"):
        read_openvla(copy, stated())


def test_an_index_of_another_model(copy):
    path = copy / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="got differences: 'more' in model-00001"):
        read_openvla(copy, stated())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunk_size": 8}, "stated.cameras must be given"),
        ({"cameras": CAMERAS}, "stated.chunk_size must be given"),
        (
            {"cameras": ("wrist_image",), "chunk_size": 8},
            r"must be \['full_image', 'wrist_image'\]",
        ),
        (
            {"cameras": CAMERAS[:1], "chunk_size": 8, "action_dim": 14},
            "stated.action_dim must be 7",
        ),
    ],
)
def test_what_has_to_be_stated(tokens, given, message):
    with pytest.raises(ValueError, match=message):
        read_openvla(tokens, Stated(**given))


# -- handed back ---------------------------------------------------------------------------------


def test_an_export_is_the_same_folder_but_for_what_was_trained(tmp_path):
    folder = write_openvla(tmp_path / "base", proprio=True)
    base = read_openvla(folder, stated())
    policy = base.load()
    with torch.no_grad():
        policy.query_head.projection.weight[3] += 1.0
        policy.backbone.model.vision_backbone.featurizer.layers[1].attention.k_proj.bias += 1.0
        policy.state_projector.layers[0].bias += 1.0
    out = tmp_path / "out"
    export_policy(policy, base, out)
    before, after = (read_openvla(each, stated()).file for each in (folder, out))
    assert before.shapes == after.shapes
    one, other = before.read(before.shapes), after.read(after.shapes)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    bias = f"{DINO}.blocks.1.attn.qkv.bias[k]"
    assert changed == {f"{HEAD}[actions]", bias, "proprio_projector.fc1.bias"}
    torch.testing.assert_close(other[bias], one[bias] + 1.0)
    keys = torch.load(out / "proprio_projector--150000_checkpoint.pt", weights_only=True)
    assert set(keys) == {f"module.fc{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    tensors = load_file(out / "model-00001-of-00002.safetensors")
    assert set(tensors) == set(load_file(folder / "model-00001-of-00002.safetensors"))
    write_fingerprint(load_policy(out, stated=stated()), out)
    again = load_policy(out, stated=stated())
    assert all(
        torch.equal(value, policy.state_dict()[n]) for n, value in again.state_dict().items()
    )
    with torch.no_grad():
        again.query_head.projection.weight[:] = 0
    shutil.rmtree(tmp_path / "base")
    export_policy(again, read_openvla(out, stated()), folder)
    shutil.copy(out / "torchrl_dvla_fingerprint.json", folder)
    with pytest.raises(ValueError, match="must do what it did when it was saved"):
        load_policy(folder, stated=stated())


def test_the_head_that_regresses_is_saved_and_has_a_fingerprint(l1, tmp_path):
    policy = load_policy(l1, stated=stated(2))
    policy.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    assert isinstance(again, RegressionVLA)
    assert set(l1_shapes(32)) == {f"module.model.{n}" for n in again.query_head.state_dict()}
    stored = json.loads((tmp_path / "config.json").read_text())["fingerprint"]
    assert len(stored["actions"]) == 8 and stored["log_probs"] == [0.0] * 8
