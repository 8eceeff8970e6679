# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Export: bit for bit what came in, but for what was trained."""

from __future__ import annotations

import filecmp
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrl_dvla.__main__ import main
from torchrl_dvla.modules import FlowVLA, LoraConfig, load_policy
from torchrl_dvla.modules.formats import (
    Stated,
    export_policy,
    read_foreign,
    write_fingerprint,
)
from torchrl_dvla.modules.origin import fingerprint_of_file

from .foreign import denoise, make_observation, write_lerobot, write_openpi

FORMATS = [
    (write_lerobot, "pi0"), (write_lerobot, "pi05"), (write_lerobot, "smolvla"),
    (write_openpi, "pi0"), (write_openpi, "pi05"),
]  # fmt: skip


def stated(folder):
    kwargs = {}
    if (folder / "assets").exists():
        kwargs = {"image_size": (48, 60)}
        if folder.name == "pi05":
            kwargs["state_in_prompt"] = True
    return Stated(tokenizer=str(folder / "tokenizer"), **kwargs)


@pytest.mark.parametrize(("write", "kind"), FORMATS)
def test_round_trip_is_exact(write, kind, tmp_path):
    folder = write(tmp_path / kind, kind)
    # As LeRobot's SmolVLA is: two dtypes in one file.
    path = folder / "model.safetensors"
    tensors = load_file(path)
    half = {k: v.bfloat16() if "vision" in k else v for k, v in tensors.items()}
    save_file(half, path, metadata={"format": "pt"})
    base = read_foreign(folder, stated(folder))
    policy = base.load()
    policy.save_pretrained(tmp_path / "own")  # as a run does
    again = FlowVLA.from_pretrained(tmp_path / "own")
    export_policy(again, base, tmp_path / "out" / kind)
    assert (tmp_path / "out" / kind / path.name).read_bytes() == path.read_bytes()
    compared = filecmp.dircmp(folder, tmp_path / "out" / kind)
    assert not compared.left_only and not compared.right_only and not compared.diff_files


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_trained_is_what_differs(dtype, tmp_path):
    folder = write_lerobot(tmp_path / "pi0", "pi0")
    base = read_foreign(folder, stated(folder))
    policy = base.load(dtype=dtype, sampler="noise")
    policy.network.model.action_out_proj.bias.add_(1.0)
    policy.network.words.weight.mul_(2.0)
    out = tmp_path / "out"
    export_policy(policy, base, out)
    before, after = (load_file(each / "model.safetensors") for each in (folder, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "model.action_out_proj.bias",
        "model.paligemma_with_expert.paligemma.lm_head.weight",
    }
    assert {name: t.dtype for name, t in before.items()} == {n: t.dtype for n, t in after.items()}
    again = load_policy(out, stated=stated(folder))
    found = again.state_dict()
    for name, tensor in policy.state_dict().items():
        if not name.startswith("noise_head"):
            torch.testing.assert_close(found[name].to(tensor.dtype), tensor, rtol=0, atol=0)


def test_copies_of_the_words_stay_equal(tmp_path):
    folder = write_lerobot(tmp_path / "pi0", "pi0")
    whole = "model.paligemma_with_expert.paligemma"
    words, head = f"{whole}.model.language_model.embed_tokens.weight", f"{whole}.lm_head.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {words: tensors[head].clone()}, folder / "model.safetensors")
    base = read_foreign(folder, stated(folder))
    policy = base.load()
    policy.network.words.weight.data.mul_(2.0)
    export_policy(policy, base, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after[words], after[head]) and torch.equal(after[head], 2 * tensors[head])


def test_the_fingerprint_is_compared(tmp_path):
    folder = write_lerobot(tmp_path / "smolvla", "smolvla")
    base = read_foreign(folder, stated(folder))
    policy, out = base.load(), tmp_path / "out"
    export_policy(policy, base, out)
    write_fingerprint(load_policy(out, stated=stated(out)), out)
    td, noise = make_observation()
    again = load_policy(out, stated=stated(out))
    assert torch.equal(denoise(again, td, noise), denoise(policy, td, noise))
    path = out / "torchrl_dvla_fingerprint.json"
    data = json.loads(path.read_text())
    data["actions"][1] += 1.0
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="must do what it did when it was saved.*actions differ"):
        load_policy(out, stated=stated(out))
    load_policy(out, stated=stated(out), num_steps=2)  # is another policy


def test_a_policy_knows_where_it_came_from_through_any_number_of_trainings(tmp_path, capsys):
    folder = write_lerobot(tmp_path / "pi0", "pi0")
    given = stated(folder)
    policy = load_policy(folder, stated=given)
    for name in ("first", "second"):  # each goes on from the one before
        policy.network.model.action_out_proj.bias.data.add_(1.0)
        policy.save_pretrained(tmp_path / name)
        policy = load_policy(tmp_path / name)
    assert policy.origin.path == str(folder) and policy.origin.stated["tokenizer"]
    second = str(tmp_path / "second")
    assert main(["export", second, str(tmp_path / "out")]) == 0
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    bias = "model.action_out_proj.bias"
    assert torch.equal(after[bias], before[bias] + 1 + 1)
    capsys.readouterr()
    # Another one at the same place, of the same names, shapes and statistics.
    shutil.move(folder, tmp_path / "moved")
    assert main(["export", second, str(tmp_path / "x")]) == 1
    assert "where nothing is. If it has been moved, name its folder by" in said(capsys)
    shutil.copytree(tmp_path / "moved", folder)
    before[bias] += 1
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["export", second, str(tmp_path / "x")]) == 1
    assert "must be exported to the checkpoint that it came from" in said(capsys)
    assert main(["export", second, str(tmp_path / "x"), "--base", str(tmp_path / "moved")]) == 0


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_a_policy_that_does_not_know_where_it_came_from(tmp_path, capsys):
    folder = write_lerobot(tmp_path / "pi0", "pi0")
    policy = read_foreign(folder, stated(folder)).load()
    policy.save_pretrained(tmp_path / "own")  # as one saved before there were origins
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "out")]) == 1
    assert "--base must be given for" in said(capsys)
    base = ["--base", str(folder)]
    path = tmp_path / "own" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"origin": {"path": str(folder)}}))
    with pytest.raises(ValueError, match="'.*origin.fingerprint' is missing"):
        load_policy(tmp_path / "own")
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "out"), *base]) == 1


def test_files_are_told_apart_by_a_megabyte_of_them(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 << 20))
    zeros = fingerprint_of_file(path)
    assert zeros.endswith(f"-{3 << 20}")
    for position, is_read in ((0, True), (4095, True), (4096, False), (12288 + 5, True)):
        data = bytearray(3 << 20)
        data[position] = 1  # every 12 KiB, 4 KiB are read
        path.write_bytes(data)
        assert (fingerprint_of_file(path) != zeros) == is_read
    path.write_bytes(bytes((3 << 20) + 1))
    assert fingerprint_of_file(path) != zeros


def test_what_did_not_come_from_there(tmp_path):
    folder = write_lerobot(tmp_path / "pi0", "pi0")
    base = read_foreign(folder, stated(folder))
    policy = base.load()
    with pytest.raises(ValueError, match="must be empty or not there"):
        export_policy(policy, base, folder)
    policy.action_statistics.mean.add_(1.0)
    with pytest.raises(ValueError, match="'action_statistics.mean' differs"):
        export_policy(policy, base, tmp_path / "out")
    other = FlowVLA.tiny(["lift the cup"], action_dim=2, chunk_size=4)
    with pytest.raises(ValueError, match="must be one that came from .*'action_dim' is 4"):
        export_policy(other, base, tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pi0", "smolvla"])
def test_adapters_are_merged(kind, tmp_path):
    pytest.importorskip("peft", reason="of the extra 'lora'")
    folder = write_lerobot(tmp_path / kind, kind)
    given = stated(folder)
    policy = load_policy(folder, stated=given, lora=LoraConfig(rank=2, targets=["q_proj"]))
    export_policy(policy, read_foreign(folder, given), tmp_path / "untrained")
    name = "model.safetensors"
    assert (tmp_path / "untrained" / name).read_bytes() == (folder / name).read_bytes()
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            parameter.fill_(0.05)
    policy.save_pretrained(tmp_path / "adapters")  # as a run does; what was stated is in it
    again = load_policy(tmp_path / "adapters")
    export_policy(again, read_foreign(folder, given), tmp_path / "out")
    before, after = (load_file(each / name) for each in (folder, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("q_proj.weight") for name in changed)
    td, x = make_observation()
    plain = load_policy(tmp_path / "out", stated=given)
    torch.testing.assert_close(denoise(plain, td, x), denoise(policy, td, x), rtol=1e-4, atol=1e-5)
