# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Folders of openpi's PyTorch code: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from torchrl_dvla.modules import load_policy
from torchrl_dvla.modules.formats import Stated, is_foreign, read_foreign, read_openpi

from .foreign import (
    ACTION_DIM,
    CHUNK_SIZE,
    STATE_DIM,
    denoise,
    make_observation,
    make_statistics,
    write_lerobot,
    write_openpi,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openpi")
    return {kind: write_openpi(folder / kind, kind) for kind in ("pi0", "pi05")}


def stated(folder, **kwargs):
    return Stated(tokenizer=str(folder / "tokenizer"), image_size=(48, 60), **kwargs)


def test_what_is_read(folders):
    found = read_openpi(folders["pi0"], Stated())
    config = found.config
    assert found.format == "openpi pi0" and found.tokenizer == "google/paligemma-3b-pt-224"
    assert (config.state_dim, config.action_dim) == (STATE_DIM, ACTION_DIM)
    assert (config.backbone["chunk_size"], config.num_steps) == (CHUNK_SIZE, 10)
    assert config.image_size == (28, 28)  # the network's: nothing is resized
    assert (config.state_scaling, config.prompt_style.instruction) == (
        "standard",
        "{instruction}\n",
    )
    std = make_statistics()["action.std"].double() + 1e-6
    torch.testing.assert_close(found.statistics["action_statistics.std"].double(), std)


def test_the_network_is_that_of_lerobot(folders, tmp_path):
    """Which has its own names and statistics from openpi's, and was compared with LeRobot."""
    td, noise = make_observation()
    lerobot = write_lerobot(tmp_path / "pi0", "pi0")
    other = load_policy(lerobot, stated=Stated(tokenizer=str(lerobot / "tokenizer")), num_steps=10)
    policy = load_policy(folders["pi0"], stated=stated(folders["pi0"]))
    # Images are resized otherwise, and 1e-6 is added to deviations.
    other.normalize = policy.normalize
    one, two = denoise(policy, td, noise), denoise(other, td, noise)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_a_state_that_is_in_the_prompt_or_nowhere(folders):
    folder = folders["pi05"]
    with pytest.raises(ValueError, match="stated.state_in_prompt must be given"):
        read_openpi(folder, Stated())
    without = read_openpi(folder, Stated(state_in_prompt=False)).config
    assert (without.state_dim, without.prompt_style.instruction) == (0, "{instruction}\n")
    with_state = read_openpi(folder, Stated(state_in_prompt=True)).config
    assert (
        with_state.state_dim == STATE_DIM
        and "State: {state}" in with_state.prompt_style.instruction
    )
    assert with_state.state_scaling == with_state.action_scaling == "range"
    policy = load_policy(folder, stated=stated(folder, state_in_prompt=False))
    td = make_observation()[0]
    del td["observation", "state"]
    assert policy(td)["vla_action", "chunk"].shape == (2, CHUNK_SIZE, ACTION_DIM)


def test_what_training_leaves_says_no_chunk_size(tmp_path):
    folder = write_openpi(tmp_path / "run", "pi0", converted=False)
    assert is_foreign(folder)
    with pytest.raises(ValueError, match="stated.chunk_size must be given"):
        read_foreign(folder)
    assert read_foreign(folder, Stated(chunk_size=9)).config.backbone["chunk_size"] == 9


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders["pi0"], tmp_path / "copy")


def test_statistics_of_none_or_of_several(copy):
    path = copy / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    other = copy / "droid" / "norm_stats.json"
    other.parent.mkdir()
    shutil.copy(path, other)
    with pytest.raises(ValueError, match="one norm_stats.json, .* got .*libero.*, droid"):
        read_openpi(copy, Stated())
    shutil.rmtree(other.parent)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="one norm_stats.json, .* got none"):
        read_openpi(copy, Stated())


def test_padded_and_incomplete_statistics(copy):
    path = copy / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    data = json.loads(path.read_text())["norm_stats"]
    padded = {
        entry: {name: values + [0.0] * (8 - len(values)) for name, values in each.items()}
        for entry, each in data.items()
    }
    path.write_text(json.dumps({"norm_stats": padded}))
    with pytest.raises(ValueError, match="stated.action_dim must be given"):
        read_openpi(copy, Stated(state_dim=5))
    config = read_openpi(copy, Stated(state_dim=5, action_dim=4)).config
    assert (config.state_dim, config.action_dim) == (5, 4)
    data["actions"] = {"mean": data["actions"]["mean"], "std": None}
    path.write_text(json.dumps({"norm_stats": data}))
    with pytest.raises(ValueError, match=r"must hold mean and std of the action, got \['mean'\]"):
        read_openpi(copy, Stated())
    path.write_text(json.dumps({"norm_stats": {"state": data["state"]}}))
    with pytest.raises(ValueError, match=r"must hold 'state' and 'actions', got \['state'\]"):
        read_openpi(copy, Stated())


def test_sizes_of_another_policy(copy):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"action_dim": 32}))
    with pytest.raises(ValueError, match="action_dim in .* must be 8, as the weights have it"):
        read_openpi(copy, Stated())


def test_what_cannot_be_loaded_says_why(tmp_path):
    jax = tmp_path / "jax"
    (jax / "params").mkdir(parents=True)
    (jax / "assets" / "x").mkdir(parents=True)
    (jax / "assets" / "x" / "norm_stats.json").write_text("{}")
    with pytest.raises(ValueError, match="Convert them by openpi"):
        load_policy(jax)


def test_nothing_is_stated_of_a_policy_of_our_own(tmp_path):
    from torchrl_dvla.modules import FlowVLA

    FlowVLA.tiny(["lift the cup"], action_dim=2, chunk_size=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stated must be None"):
        load_policy(tmp_path, stated=Stated(chunk_size=4))
    assert load_policy(tmp_path, stated=Stated()).chunk_size == 4
