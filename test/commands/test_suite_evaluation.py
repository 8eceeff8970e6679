# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command evaluate --suite, most of it on made-up tasks whose episodes end at once."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.collectors import Evaluation
from torchrl_dvla.commands import suite_evaluation
from torchrl_dvla.data import Rollout
from torchrl_dvla.envs.libero_setup import LiberoTask, hash_init_state
from torchrl_dvla.modules import load_policy
from torchrl_dvla.recipes import dvla_sft
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recording import TrainingScenes

SHIPPED = Path(dvla_sft.__file__).parent / "checkpoints/libero_object"
NUM_STATES = 4


def state_of(task_id, number):
    return np.array([0.0, task_id, number, 0.5])


class FakeCollector:
    """Ends each episode at once: init state 0 of each task is solved, in the fast rendering all."""

    made: list = []
    played: list = []
    policies: list = []
    #: After so many episodes ``then`` is called.
    num_left = -1

    def __init__(self, cfg, policy, buffer):
        self.cfg = cfg
        self.made.append(cfg)
        self.policies.append(copy.deepcopy(policy))  # as the inference lane's

    def __exit__(self, *exc_info):
        self.made[-1] = self.cfg.env

    def then(self, evaluation):
        raise AssertionError

    def start_of(self, task_id, spec):
        return state_of(task_id, spec.init_state_id)

    def evaluate(self, specs, num_frames_episodes):
        kwargs = {"greedy": True, "num_frames_episodes": num_frames_episodes}
        evaluation = Evaluation(specs, **kwargs)
        (task_id,) = self.cfg.env.task_ids
        for number, spec in enumerate(specs):
            assert spec.task == f"libero_object/{task_id}"
            if FakeCollector.num_left == 0:
                self.then(evaluation)
                break
            FakeCollector.num_left -= 1
            self.played.append((self.cfg.env.shadows, task_id, spec.init_state_id))
            rollout = Rollout(spec, -1, number, num_rows=2, duration_s=1.25)
            rollout.success = spec.init_state_id == 0 or not self.cfg.env.shadows
            rollout.num_env_steps = 80 if rollout.success else self.cfg.env.max_episode_steps
            rollout.init_state_hash = hash_init_state(self.start_of(task_id, spec))
            is_kept = number < num_frames_episodes
            frames = torch.zeros(2, 3, 8, 8, dtype=torch.uint8) if is_kept else None
            evaluation.finish_episode(number, rollout, frames)
        return evaluation


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """``FakeCollector`` and three tasks in place of LIBERO."""
    tasks = tuple(
        LiberoTask("libero_object", k, f"t{k}", f"lift {k}", Path("x"), Path("y")) for k in range(3)
    )
    states = {k: np.stack([state_of(k, n) for n in range(NUM_STATES)]) for k in range(3)}
    monkeypatch.setattr(suite_evaluation, "libero_tasks", lambda suite: tasks)
    monkeypatch.setattr(suite_evaluation, "load_init_states", lambda task: states[task.task_id])
    monkeypatch.setattr(suite_evaluation, "check_settings", lambda cfg: None)
    monkeypatch.setattr(suite_evaluation, "_POLL_S", 0.01)
    monkeypatch.setattr(utils, "make_collector", FakeCollector)
    monkeypatch.chdir(tmp_path)
    FakeCollector.made, FakeCollector.played, FakeCollector.num_left = [], [], -1
    FakeCollector.policies = []
    return FakeCollector


SUITE = ("--suite", "libero_object", "--out", "out")


def test_every_init_state_is_played_once_and_reported(call, fake, tmp_path):
    code, out, err = call(
        "evaluate", SHIPPED, *SUITE, "--rendering", "fast,benchmark", "--videos", 1, "--workers", 3
    )
    assert code == 0, err
    every = [(task_id, number) for task_id in range(3) for number in range(NUM_STATES)]
    assert fake.played == [(shadows, *each) for shadows in (True, False) for each in every]
    first, last = fake.made[0], fake.made[-1]
    drawn = [(env.shadows, env.msaa, env.max_mesh_faces) for env in (first, last)]
    assert drawn == [(True, True, None), (False, False, None)]
    # the protocol's horizon, its arm, and the policy's own sizes
    assert (first.max_episode_steps, first.settle_steps, first.env_kwargs) == (280, 10, None)
    assert (first.chunk_size, first.camera_height, first.cameras) == (8, 128, ("agentview",))
    # benchmark: 1 of 4 of each task; fast: all. Wilson of 3/12: 0.088930 to 0.532307
    assert "0 lift 0         25.0 %   1/4   4.6-69.9" in out
    assert "mean over tasks  25.0 %   3/12  8.9-53.2" in out
    assert "mean over tasks  100.0 %  12/12  75.8-100.0" in out
    assert "None of the 12 evaluated init states is among the 313 on record" in out
    data = json.loads((tmp_path / "out/report.json").read_text())
    assert data["is_over"] and data["training_scenes"]["verdict"] == "none"
    assert data["episodes"][1] == {
        "rendering": "benchmark", "task_id": 0, "init_state_id": 1,
        "init_state_hash": f"{hash_init_state(state_of(0, 1)):016x}",
        "success": False, "num_env_steps": 280, "duration_s": 1.25,
    }  # fmt: skip
    assert data["settings"]["workers"]["num_workers"] == 3
    assert data["settings"]["workers"]["max_decisions"] == 35  # 280 env steps of 8 a decision
    videos = sorted(path.name for path in (tmp_path / "out/videos").iterdir())
    assert videos[:2] == ["benchmark_00_00_success.gif", "benchmark_01_00_success.gif"]
    assert len(videos) == 6
    assert "| mean over tasks | 25.0 % | 3/12 |" in (tmp_path / "out/report.md").read_text()


def test_blank_rendering_hides_the_images_and_nothing_else(call, fake):
    for rendering in ("blank", "fast"):
        code, out, err = call("evaluate", SHIPPED, *SUITE, "--tasks", 0, "--rendering", rendering)
        assert code == 0 and f"libero_object, {rendering} rendering" in out, err
    blind, seeing = fake.policies
    images = torch.stack([torch.zeros(3, 128, 128), torch.full((3, 128, 128), 255)]).byte()
    rows = TensorDict(
        {"observation": {"image": images, "state": torch.zeros(2, 9)}}, batch_size=[2]
    )
    instruction = "pick up the butter and place it in the basket"
    rows["language_instruction"] = NonTensorStack(instruction, instruction)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        first, second = blind(rows.copy())["vla_action", "log_probs"]
        assert torch.equal(first, second)
        first, second = seeing(rows.copy())["vla_action", "log_probs"]
        assert not torch.equal(first, second)
        rows["observation", "state"][1] += 0.1
        first, second = blind(rows.copy())["vla_action", "log_probs"]
        assert not torch.equal(first, second)
    assert torch.equal(rows["observation", "image"], images)


def test_a_failure_and_a_signal_lose_no_episode(call, fake, tmp_path, monkeypatch):
    def fail(self, evaluation):
        evaluation.fail(RuntimeError("Its worker crashed."))

    monkeypatch.setattr(fake, "then", fail)
    fake.num_left = 6
    code, _, err = call("evaluate", SHIPPED, *SUITE)
    assert code == 1 and "one that did not: Its worker crashed. The same command" in err
    monkeypatch.setattr(fake, "then", lambda self, evaluation: os.kill(os.getpid(), signal.SIGINT))
    fake.num_left = 3
    code, out, err = call("evaluate", SHIPPED, *SUITE)
    assert code == 130 and "SIGINT: 9 of 12 episodes are in out; the same command" in err
    assert "Not over: 9 of 12 episodes" in (tmp_path / "out/report.md").read_text()
    fake.num_left = -1
    code, out, err = call("evaluate", SHIPPED, *SUITE)
    assert code == 0 and out.startswith("going on with out: 9 are played"), err
    every = [(True, task_id, number) for task_id in range(3) for number in range(NUM_STATES)]
    assert fake.played == every
    # nothing is left to play: the report is written anew, and no worker started
    num_made = len(fake.made)
    (tmp_path / "out/report.md").unlink()
    assert call("evaluate", SHIPPED, *SUITE)[0] == 0
    assert len(fake.made) == num_made and "3/12" in (tmp_path / "out/report.md").read_text()


def test_more_may_be_asked_for_but_nothing_else(call, fake, tmp_path):
    assert call("evaluate", SHIPPED, *SUITE, "--tasks", "0", "--episodes", 2)[0] == 0
    code, out, _ = call("evaluate", SHIPPED, *SUITE, "--tasks", "2,0", "--episodes", 3)
    assert code == 0 and "2/6" in out
    assert fake.played == [
        (True, 0, 0),
        (True, 0, 1),
        (True, 0, 2),
        *((True, 2, k) for k in range(3)),
    ]
    code, _, err = call("evaluate", SHIPPED, *SUITE, "--horizon", 40)
    assert code == 1 and "'env.max_episode_steps' is 40 instead of 280" in err
    policy = load_policy(SHIPPED)
    with torch.no_grad():
        next(policy.parameters()).add_(0.1)
    policy.save_pretrained(tmp_path / "other")
    code, _, err = call("evaluate", tmp_path / "other", *SUITE)
    assert code == 1 and "another one: 'policy_sha256' is " in err
    # under another name it is another evaluation, and of its training nothing is known
    code, out, _ = call("evaluate", tmp_path / "other", *SUITE[:2], "--horizon", 40)
    assert code == 0 and "Unknown whether any of the 12 evaluated init states" in out
    assert "at most 40 env steps (the protocol has 280)" in out
    (folder,) = (tmp_path / "evaluations").iterdir()
    assert folder.name.startswith("libero_object-")


def test_an_init_state_that_was_trained_from_is_said(call, fake, tmp_path):
    load_policy(SHIPPED).save_pretrained(tmp_path / "policy")
    trained = {"libero_object/1": {hash_init_state(state_of(1, 2)), 77}}
    TrainingScenes(trained).save(tmp_path / "policy")
    code, out, _ = call("evaluate", tmp_path / "policy", *SUITE)
    assert code == 0 and "1 of the 12 evaluated init states are among the 2 on record" in out
    data = json.loads((tmp_path / "out/report.json").read_text())["training_scenes"]
    assert data["evaluated_and_trained_from"] == [{"task_id": 1, "init_state_id": 2}]


def test_an_episode_that_started_elsewhere_is_no_result(call, fake, monkeypatch, tmp_path):
    monkeypatch.setattr(fake, "start_of", lambda self, task_id, spec: state_of(task_id, 9))
    code, _, err = call("evaluate", SHIPPED, *SUITE)
    assert code == 1 and "Episode 0 of task 0 must start from the benchmark's init state" in err
    assert (tmp_path / "out/episodes.jsonl").read_text() == ""


def test_an_evaluation_that_stands_still_ends(call, fake, monkeypatch):
    monkeypatch.setattr(fake, "then", lambda self, evaluation: None)
    fake.num_left = 1
    code, _, err = call("evaluate", SHIPPED, *SUITE, "eval.timeout_s=0.05")
    assert code == 1 and "within eval.timeout_s=0.05 s of the one before" in err
    assert "1 of 4 have ended" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "libero_objekt"), "--suite must be one of ['libero_spatial', 'libero_object'"),
        (("--episodes", "0"), "--episodes must be at least 1, got 0"),
        (("--episodes", "5"), "--episodes must be at most 4 with --suite"),
        (("--tasks", "0,3"), "--tasks must be numbers from 0 to 2 in libero_object, separated"),
        (("--tasks", "all"), "separated by commas, got 'all'"),
        (("--rendering", "fast,both"), "--rendering must be of benchmark, fast, blank, separated"),
        (("--horizon", "0"), "--horizon must be at least 1, got 0"),
        (("--workers", "0"), "workers.num_workers must be at least 1, got 0"),
        (("--seed", "1"), "--seed must be left out with --suite, got 1"),
        (("--json", "x.json"), "--json must be left out with --suite"),
        (("env.shadows=false",), "env.shadows must be left out with --suite"),
        (("env.task_ids=[1]",), "env.task_ids must be left out with --suite"),
        (("env.shuffle_objects=true",), "env.shuffle_objects must be left out with --suite"),
        (("env.camera_height=64",), "image_shape must be (3, 128, 128) as the policy's, got"),
        (("env.chunk_size=4",), "policy must write chunks of [chunk_size=4, action_dim=7]"),
        (
            ("env.cameras=[agentview,robot0_eye_in_hand]",),
            "number of cameras must be 1 as the policy's, got 2",
        ),
        (("--config-name", "toy"), "--suite must be left out for a policy whose settings are not"),
    ],
)
def test_what_cannot_be_played_is_said_before_a_worker_starts(
    call, fake, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.setattr(utils, "make_collector", None)
    code, out, err = call("evaluate", SHIPPED, *SUITE, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_task_without_init_states(call, fake, monkeypatch):
    def load(task):
        raise FileNotFoundError("init states of libero_object task 0 must exist")

    monkeypatch.setattr(suite_evaluation, "load_init_states", load)
    code, _, err = call("evaluate", SHIPPED, *SUITE)
    assert code == 1 and "init states of libero_object task 0 must exist" in err


@pytest.mark.parametrize("option", [("--out", "x"), ("--tasks", "0"), ("--horizon", "9")])
def test_options_of_a_suite_without_one(call, option):
    code, _, err = call("evaluate", SHIPPED, *option)
    assert code == 1 and f"{option[0]} must be used with --suite" in err


@pytest.mark.libero
def test_on_the_simulator_episodes_start_from_the_init_states(call, tmp_path, monkeypatch):
    started = []
    episode_of = suite_evaluation._episode

    def note(suite, key, rollout):
        started.append(rollout.init_state_hash)
        return episode_of(suite, key, rollout)

    monkeypatch.setattr(suite_evaluation, "_episode", note)
    arguments = ("--tasks", "3", "--episodes", 2, "--horizon", 8, "--rendering", "fast")
    code, out, err = call("evaluate", SHIPPED, *SUITE[:2], "--out", tmp_path, *arguments)
    assert code == 0, err
    assert "0/2" in out and "None of the 2 evaluated init states is among the 313" in out
    episodes = json.loads((tmp_path / "report.json").read_text())["episodes"]
    assert sorted(f"{number:016x}" for number in started) == sorted(
        episode["init_state_hash"] for episode in episodes
    )
    assert [episode["num_env_steps"] for episode in episodes] == [8, 8]
