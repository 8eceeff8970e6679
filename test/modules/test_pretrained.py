# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import json
import resource
import zlib
from pathlib import Path

import pytest
import torch
from torchrl.data.vla import UniformActionTokenizer, VocabTailActionTokenizer
from transformers import AutoModel

from torchrl_dvla.modules import TransformersVLA, TransformersVLAConfig, pretrained
from torchrl_dvla.modules.config import action_tokenizer_from_dict, action_tokenizer_to_dict

from .policies import make_observation, make_policy, smolvlm


@pytest.fixture
def folder(policy: TransformersVLA, tmp_path: Path) -> Path:
    policy.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("weights-*.safetensors")
    return path


@torch.no_grad()
def test_round_trip_is_exact(tmp_path):
    policy = make_policy(seed=7)
    policy.state_projector.set_statistics(torch.arange(6.0), torch.arange(6.0) + 1.0)
    policy.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 1e6
    again = TransformersVLA.from_pretrained(tmp_path, temperature=2.0)
    assert again.config == policy.config
    assert again.config.differences(policy.config) == []
    assert again.temperature == 2.0
    mine, others = policy.state_dict(), again.state_dict()
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    # Buffers that are not stored must have been computed, not left empty.
    for (name, one), (_, other) in zip(policy.named_buffers(), again.named_buffers()):
        assert torch.equal(one, other), name
    td = make_observation(3, instructions=["lift it", "lift unknown words", "Open the drawer"])
    assert torch.equal(policy.action_logits(td), again.action_logits(td))


def test_overwriting_leaves_one_checkpoint(folder):
    before = weights_of(folder)
    other = make_policy(seed=1)
    other.save_pretrained(folder)
    assert weights_of(folder) != before
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(
        ["config.json", "tokenizer", weights_of(folder).name]
    )
    again = TransformersVLA.from_pretrained(folder)
    assert torch.equal(again.query_head.queries, other.query_head.queries)


@pytest.mark.parametrize("dies_at", ["weights", "config.json"])
def test_a_writer_that_dies_leaves_the_old_checkpoint(folder, monkeypatch, dies_at):
    move = pretrained._move

    def failing(source: Path, target: Path) -> None:
        if source.name == dies_at:
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(pretrained, "_move", failing)
    with pytest.raises(OSError, match=r"No space left.*previous checkpoint"):
        make_policy(seed=1).save_pretrained(folder)
    expected = make_policy(seed=0).query_head.queries
    assert torch.equal(TransformersVLA.from_pretrained(folder).query_head.queries, expected)
    assert not list(folder.glob(".writing-*"))


def test_folder_that_cannot_be_written(policy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written to"):
        policy.save_pretrained(tmp_path / "file" / "inside")


def test_weights_of_another_architecture_names_what_differs(folder):
    bins = UniformActionTokenizer(32, low=-1.0, high=1.0)
    other = make_policy(tokens_per_step=2, action_tokenizer=bins)
    with pytest.raises(ValueError) as info:
        other.read_weights(folder)
    assert "'tokens_per_step' is 1 instead of 2" in str(info.value)
    assert "'action_tokenizer.num_bins' is 16 instead of 32" in str(info.value)
    assert "backbone" not in str(info.value).split("Use ")[0]


def _edit_weights(change):
    def damage(folder):
        path = weights_of(folder)
        path.write_bytes(change(path.read_bytes()))

    return damage


def _edit(**changes):
    def damage(folder):
        data = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            (data["config"] if name in ("chunk_size", "new_field") else data)[name] = value
        (folder / "config.json").write_text(json.dumps(data))

    return damage


def _replace(text):
    return lambda folder: (folder / "config.json").write_text(text)


def _zero_weights(folder):
    path = weights_of(folder)
    path.write_bytes(b"\0" * path.stat().st_size)
    entry = json.loads((folder / "config.json").read_text())["weights"]
    _edit(weights=entry | {"crc32": f"{zlib.crc32(path.read_bytes()):08x}"})(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit_weights(lambda data: data[:-1000]), r"must have \d+ bytes, got \d+.*truncated"),
        (_edit_weights(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "checksum .*corrupt"),
        (_zero_weights, "must be a safetensors file"),
        (_replace("{"), "must be valid JSON"),
        (_replace("{}"), "Point to a torchrl_dvla checkpoint"),
        (_replace('{"model_type": "smolvlm"}'), "is a transformers checkpoint .*from_backbone"),
        (_edit(architecture="FlowVLA"), "be 'TransformersVLA', got 'FlowVLA'.*FlowVLA.from"),
        (_edit(format_version=99), r"format_version .* must be 1, got 99"),
        (_edit(new_field=1), r"unknown \['new_field'\] and missing \[\]"),
        (_edit(weights=None), r"weights' must be a mapping, got None"),
        (_edit(weights={"file": "a", "num_bytes": -1, "crc32": 0}), "num_bytes' must be a wh"),
        (
            _edit(weights={"file": "../weights-0.safetensors", "num_bytes": 1, "crc32": ""}),
            r"must be the name of a file beside it, got '\.\./weights-",
        ),
        (_edit(config=[1]), r"config' must be a mapping, got \[1\]"),
        (_edit(chunk_size="x"), "chunk_size must be a whole number"),
        (_replace("[]"), "Point to a torchrl_dvla checkpoint"),
        (_edit(chunk_size=5), r"queries' is \[4, 32\] instead of \[5, 32\]"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        TransformersVLA.from_pretrained(folder)


def test_weights_that_are_not_finite_are_refused(policy, tmp_path):
    policy.query_head.queries.data[0, 0] = float("nan")
    policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'query_head\.queries' holds NaN or infinity"):
        make_policy().read_weights(tmp_path)


def test_a_full_disk_is_an_error_of_the_disk(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written .*a previous checkpoint"):
            make_policy(seed=1).save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    weights = make_policy(seed=1).read_weights(folder)
    assert torch.equal(weights["query_head.queries"], make_policy(seed=0).query_head.queries)


@pytest.fixture
def payload(tmp_path, monkeypatch):
    """Code of a module that makes a file when it is imported; asking whether to is an error."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    yield f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer/tokenizer_config.json"])
def test_a_policy_folder_runs_no_code_of_its_own(folder, payload, file):
    path = folder / file
    data = json.loads(path.read_text())
    target = data["config"]["backbone"] if file == "config.json" else data
    target["auto_map"] = {name: ["own.Own", "own.Own"] for name in ("AutoTokenizer", "AutoModel")}
    data["tokenizer_class"] = "Own"
    path.write_text(json.dumps(data))
    (path.parent / "own.py").write_text(payload)
    with pytest.raises(ValueError, match=r"config\.json must name no code of its own"):
        TransformersVLA.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_a_backbone_folder_runs_no_code_of_its_own(tmp_path, payload, name):
    auto = {"AutoConfig": "own.Own", "AutoTokenizer": [None, "own.Own"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    (tmp_path / name).write_text(json.dumps({"model_type": "own", "nested": {"auto_map": auto}}))
    (tmp_path / "own.py").write_text(payload)
    with pytest.raises(ValueError, match=rf"{name} must name no code of its own"):
        pretrained.resolve_backbone(tmp_path, None, None, torch.float32, {})
    trust = {"trust_remote_code": True}
    with pytest.raises(ValueError, match="trust_remote_code must be False, got True"):
        pretrained.resolve_backbone(tmp_path, None, None, torch.float32, trust)


def test_weights_of_a_backbone_are_safetensors_only(tmp_path):
    model = AutoModel.from_config(smolvlm())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        pretrained.resolve_backbone(tmp_path, None, ["lift it"], torch.float32, {})


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("weights-*.safetensors", "weights-"),
        ("config.json", "config.json"),
        ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer_config.json"),
    ],
)
def test_missing_file_is_named(folder, missing, named):
    next(folder.glob(missing)).unlink()
    with pytest.raises(FileNotFoundError, match=f"must contain .*{named}"):
        TransformersVLA.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json, got .*nowhere. with nothing"):
        TransformersVLA.from_pretrained(folder / "nowhere")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", (0, 32), r"image_size must be at least 1, got \(0, 32\)"),
        ("num_cameras", 3, "num_cameras must be at most 2, got 3"),
        ("dtype", "int8", "dtype must be one of"),
        ("backbone", {}, "must contain 'model_type'"),
    ],
)
def test_config_out_of_range(policy, field, value, message):
    with pytest.raises(ValueError, match=message):
        TransformersVLAConfig.from_dict({**policy.config.to_dict(), field: value})


@pytest.mark.parametrize(
    "tokenizer",
    [
        UniformActionTokenizer(32, low=-1.0, high=1.0),
        UniformActionTokenizer(8, low=torch.tensor([-1.0, 0.0]), high=torch.tensor([1.0, 2.0])),
        VocabTailActionTokenizer(64),
        VocabTailActionTokenizer(
            64,
            norm_low=torch.tensor([-0.3, 0.0], dtype=torch.float64),
            norm_high=torch.tensor([0.7, 1.0], dtype=torch.float64),
            norm_mask=torch.tensor([True, False]),
            gripper_binarize=True,
        ),
    ],
)
def test_action_tokenizers_survive_json(tokenizer):
    data = json.loads(json.dumps(action_tokenizer_to_dict(tokenizer)))
    again = action_tokenizer_from_dict(data)
    assert again.vocab_size == tokenizer.vocab_size
    actions = torch.tensor([[-0.9, 0.1], [0.4, 0.8]])
    tokens = tokenizer.encode(actions)
    assert torch.equal(again.encode(actions), tokens)
    assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))


def test_unknown_action_tokenizer():
    class Other(UniformActionTokenizer):
        pass

    with pytest.raises(ValueError, match="got Other"):
        action_tokenizer_to_dict(Other(4, low=0.0, high=1.0))
    with pytest.raises(ValueError, match="kind must be"):
        action_tokenizer_from_dict({"kind": "fast"})
