# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import json

import pytest
import torch

from torchrl_dvla.data import EpisodeSpec, Group, Rollout
from torchrl_dvla.recording import RunCheckpoints, TrainingScenes


def test_what_is_known_is_said_and_nothing_else():
    scenes = TrainingScenes({"suite/0": {1, 2}, "suite/1": {2, 3}})
    none = scenes.overlap([8, 9])
    assert (none.verdict, none.num_known, none.found) == ("none", 3, ())
    assert str(none).startswith("None of the 2 evaluated init states is among the 3 on record")
    some = scenes.overlap([9, 3, 1])
    assert (some.verdict, some.found) == ("some", (1, 2))
    assert str(some).startswith("2 of the 3 evaluated init states are among the 3 on record")
    scenes.add_gap("a checkpoint")
    unknown = scenes.overlap([8, 9])
    assert unknown.verdict == "unknown" and "unknown for the rest" in str(unknown)
    assert str(unknown).endswith("Not on record: a checkpoint.")
    # what was found stays found, whatever else there is
    assert scenes.overlap([3]).verdict == "some"


def test_a_policy_without_a_record_is_unknown(tmp_path):
    scenes = TrainingScenes.load(tmp_path)
    overlap = scenes.overlap([1])
    assert (overlap.verdict, overlap.num_known) == ("unknown", 0)
    assert str(overlap).startswith("Unknown whether any of the 1 evaluated init states")
    scenes.add("suite/0", 1)  # a run that begins from it knows its own
    assert scenes.overlap([1]).verdict == "some" and scenes.overlap([2]).verdict == "unknown"


def test_groups_are_added_once_a_scene():
    def group(task, init_state_hash):
        spec = EpisodeSpec(task, seed=0)
        rollouts = [Rollout(spec, 0, k, init_state_hash=init_state_hash) for k in range(2)]
        return Group(0, spec, deadline=1, rollouts=rollouts)

    scenes = TrainingScenes()
    scenes.add_groups([group("a", 5), group("a", 5), group("a", 6), group("b", 7)])
    assert (scenes.tasks, scenes.gaps) == ({"a": {5, 6}, "b": {7}}, [])
    scenes.add_groups([group("c", -1), group("c", -1)])
    assert (scenes.num_known, scenes.gaps) == (3, ["init states of c"])


def test_it_is_saved_with_the_policy_and_found_again(tmp_path):
    scenes = TrainingScenes({"a": {5, 2**63 - 1}}, ["the rest"])
    checkpoints = RunCheckpoints(tmp_path, policy=torch.nn.Linear(2, 1), run=torch.nn.Linear(1, 1))
    path = checkpoints.save(3, training_scenes=scenes)
    (file,) = path.glob("components/*/training_scenes.json")
    assert file.parent.name.endswith("-policy")
    assert json.loads(file.read_text())["tasks"] == {"a": ["0" * 15 + "5", "7" + "f" * 15]}
    assert TrainingScenes.load(file.parent) == scenes
    checkpoints.load(path)
    assert list(checkpoints.save(4).glob("components/*/*.json")) == []
    file.write_text(file.read_text().replace("rest", "remainder"))
    with pytest.raises(Exception, match="training_scenes.json"):  # its digest is in the manifest
        RunCheckpoints(tmp_path, policy=torch.nn.Linear(2, 1)).load(path)


@pytest.mark.parametrize("name", ["state.pt", "weights-0123abcd.safetensors"])
def test_beside_other_weights_it_counts_for_nothing(tmp_path, name):
    (tmp_path / name).write_bytes(b"old")
    TrainingScenes({"a": {1}}).save(tmp_path)
    assert TrainingScenes.load(tmp_path).overlap([2]).verdict == "none"
    (tmp_path / name).write_bytes(b"new" if name == "state.pt" else b"newer")
    overlap = TrainingScenes.load(tmp_path).overlap([2])
    assert (overlap.verdict, overlap.num_known) == ("unknown", 0)
    assert "its record is of other weights" in str(overlap)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "another"}'])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "training_scenes.json").write_text(text)
    with pytest.raises(ValueError, match="must be the record of a policy's training scenes, got"):
        TrainingScenes.load(tmp_path)
