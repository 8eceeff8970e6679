# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest

from torchrl_dvla.recording import (
    EpisodeKey,
    EpisodeRecord,
    SuiteRecord,
    SuiteReport,
    TrainingScenes,
)

SETTINGS = {"suite": "s", "env": {"chunk_size": 8, "cameras": ("agentview",)}}


def episode(task_id, number, success, num_env_steps=100, rendering="benchmark"):
    return EpisodeRecord(
        rendering, task_id, number, f"{16 * task_id + number:016x}", success, num_env_steps, 2.0
    )


def test_half_a_line_is_dropped_and_its_episode_missing(tmp_path):
    record = SuiteRecord(tmp_path, SETTINGS)
    for number in range(3):
        record.add(episode(0, number, True))
    record.close()
    path = tmp_path / "episodes.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-9])  # killed while it wrote
    again = SuiteRecord(tmp_path, SETTINGS)
    assert sorted(again.episodes) == [EpisodeKey("benchmark", 0, 0), EpisodeKey("benchmark", 0, 1)]
    again.add(episode(0, 2, True))
    again.close()
    assert path.read_bytes() == data


def test_a_damaged_line_is_refused_with_its_number(tmp_path):
    record = SuiteRecord(tmp_path, SETTINGS)
    record.add(episode(0, 0, True))
    record.close()
    path = tmp_path / "episodes.jsonl"
    path.write_text(path.read_text() + '{"task_id": -1}\n')
    with pytest.raises(ValueError, match="got another line 2: .*Delete that line"):
        SuiteRecord(tmp_path, SETTINGS)
    path.unlink()
    SuiteRecord(tmp_path, SETTINGS).close()  # the lock was let go


def test_other_settings_are_refused_by_name(tmp_path):
    SuiteRecord(tmp_path, SETTINGS).close()
    other = {**SETTINGS, "env": {**SETTINGS["env"], "chunk_size": 4}}
    message = r"of another one: 'env.chunk_size' is 4 instead of 8. Choose another"
    with pytest.raises(ValueError, match=message):
        SuiteRecord(tmp_path, other)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="must hold the settings of an evaluation, got"):
        SuiteRecord(tmp_path, SETTINGS)


def test_a_folder_of_something_else_or_in_use_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="--out must be a new folder or .* thesis.tex"):
        SuiteRecord(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    record = SuiteRecord(tmp_path / "new", SETTINGS)
    with pytest.raises(ValueError, match="in use by process"):
        SuiteRecord(tmp_path / "new", SETTINGS)
    record.close()


def make_report(episodes, scenes=None, num_episodes=4):
    return SuiteReport(
        policy="my/policy",
        suite="s",
        instructions={0: "lift", 7: "stack"},
        num_episodes=num_episodes,
        renderings={"benchmark": "with shadows", "fast": "without"},
        protocol="Greedy.",
        episodes={each.key: each for each in episodes},
        overlap=(scenes or TrainingScenes({"s/0": {1}})).overlap([0, 1, 112, 113]),
    )


def test_tasks_weigh_the_same_and_the_interval_is_of_all_episodes():
    # task 0: 3 of 4, lengths 80 and 90 and 100; task 7: 0 of 1. Mean of 75 % and 0 %: 37.5 %
    lengths, outcomes = (80, 90, 100, 280), (True, True, True, False)
    episodes = [episode(0, k, *each) for k, each in enumerate(zip(outcomes, lengths))]
    episodes.append(episode(7, 0, False, 280))
    episodes.append(episode(7, 9, True))  # not asked for
    report = make_report(episodes)
    _, first, second, mean = report.rows("benchmark")
    # Wilson of 3/4: 0.300642 to 0.954413; of 0/1: 0 to 0.793; of 3/5: 0.230724 to 0.882379
    assert first == ("0 lift", "75.0 %", "3/4", "30.1-95.4", "90.0", "2.0")
    assert second == ("7 stack", "0.0 %", "0/1", "0.0-79.3", "-", "2.0")
    assert mean == ("mean over tasks", "37.5 %", "3/5", "23.1-88.2", "90.0", "2.0")
    assert report.rows("fast")[1:] == [("0 lift", *"-----"), ("7 stack", *"-----")]
    assert report.num_played == 5 and len(report.keys()) == 16
    text, markdown, data = report.to_text(), report.to_markdown(), report.to_dict()
    assert "Not over: 5 of 16 episodes have been played." in text
    assert "| 0 lift | 75.0 % | 3/4 | 30.1-95.4 | 90.0 | 2.0 |" in markdown
    assert data["renderings"]["benchmark"]["mean_success_rate"] == 0.375
    assert data["renderings"]["benchmark"]["tasks"]["7"]["num_episodes"] == 1
    assert data["renderings"]["fast"]["interval"] is None
    assert not data["is_over"] and len(data["episodes"]) == 5


def test_init_states_that_the_policy_was_trained_from_are_named():
    # evaluated are, in this order, init states 0 and 1 of task 0 and of task 7
    trained = TrainingScenes({"s/7": {113}})
    data = make_report([], trained, num_episodes=2).to_dict()["training_scenes"]
    assert data["verdict"] == "some" and data["text"].startswith("1 of the 4 evaluated")
    assert data["evaluated_and_trained_from"] == [{"task_id": 7, "init_state_id": 1}]
    whole = make_report([episode(t, k, True) for t in (0, 7) for k in (0, 1)], num_episodes=2)
    assert "Not over: 4 of 8" in whole.to_text()
    assert whole.to_dict()["training_scenes"]["verdict"] == "some"
