# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Command evaluate: of a run, a checkpoint and a policy, on the episodes that a run evaluates."""

from __future__ import annotations

import json

import pytest
import torch

from torchrl_dvla.collectors import EvaluationResult
from torchrl_dvla.commands.evaluate import _table
from torchrl_dvla.data import EpisodeSpec
from torchrl_dvla.recipes.dvla_grpo import utils
from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings, to_dict
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy
from torchrl_dvla.recording import RunCheckpoints

TOY = ("--config-name", "toy", "workers.num_workers=1", "workers.envs_per_worker=2")
#: The toy environment as any other: by its dotted path.
FACTORY = (
    "env=factory", "env._target_=torchrl_dvla.envs.ToyChunkEnv", "+env.chunk_size=4",
    "+env.action_dim=2", "+env.image_size=32", "+env.success_steps=2", "+env.success_tol=0.35",
)  # fmt: skip


def test_a_run_does_what_its_report_says(call, trained, tmp_path):
    videos, outcomes = tmp_path / "the videos", tmp_path / "new folder" / "outcomes.json"
    code, out, err = call(
        "evaluate", trained, "--videos", 1, "--video-dir", videos, "--json", outcomes
    )
    assert code == 0, err
    report, found = (json.loads(path.read_text()) for path in (trained / "report.json", outcomes))
    success = report["after"]["num_successes"]
    assert (found["num_successes"], found["num_episodes"]) == (success, 4)
    assert (found["update"], found["tasks"]["toy"]["num_successes"]) == (2, success)
    assert [each["seed"] for each in found["episodes"]] == [2**31 - 1 - k for k in range(4)]
    assert sum(each["success"] for each in found["episodes"]) == success
    assert f"\ntoy   {25 * success:.1f} %" in out and f"{success}/4" in out
    outcome = "success" if found["episodes"][0]["success"] else "failure"
    (video,) = videos.iterdir()
    assert video.name == f"000_toy_{outcome}.gif" and video.read_bytes().startswith(b"GIF")


def test_a_policy_alone_is_played_in_the_environment_that_is_named(call, trained, tmp_path):
    (policy,) = trained.glob("checkpoints/update-*2/components/*-policy")
    outcomes = tmp_path / "outcomes.json"
    played = {}
    for name, more in {"toy": (), "factory": FACTORY, "seed": ("--seed", 1)}.items():
        arguments = (*TOY, "--episodes", 3, "--json", outcomes, *more)
        code, _, err = call("evaluate", policy, *arguments)
        assert code == 0, err
        played[name] = json.loads(outcomes.read_text())
    assert played["toy"]["update"] is None
    outcome = [
        [{**each, "task": ""} for each in played[name]["episodes"]] for name in ("toy", "factory")
    ]
    assert outcome[0] == outcome[1] and "ToyChunkEnv" in played["factory"]["tasks"]
    assert [each["seed"] for each in played["seed"]["episodes"]] == [
        2**31 - 4 - k for k in range(3)
    ]


def test_blank_rendering_hides_the_images_from_the_policy_of_a_run(
    call, trained, tmp_path, monkeypatch
):
    outcomes, seen = tmp_path / "outcomes.json", []
    make_collector = utils.make_collector

    def make(cfg, policy, buffer):
        policy.register_forward_pre_hook(
            lambda module, args: seen.append(args[0]["observation", "image"].unique().tolist())
        )
        return make_collector(cfg, policy, buffer)

    monkeypatch.setattr(utils, "make_collector", make)
    arguments = (trained, "--episodes", 2, "--json", outcomes)
    for rendering in ("blank", None):
        given = () if rendering is None else ("--rendering", rendering)
        code, out, err = call("evaluate", *arguments, *given)
        assert code == 0, err
        assert ("all images grey" in out) == (rendering == "blank")
        assert json.loads(outcomes.read_text())["rendering"] == rendering
        assert all((values == [128]) == (rendering == "blank") for values in seen) and seen
        seen.clear()


def test_a_policy_that_is_a_state_dict(call, tmp_path):
    small = ["policy.kind=tiny_vla", "workers.num_workers=1", "workers.envs_per_worker=2"]
    cfg = compose_settings("toy", [*small, f"log.dir={tmp_path}"])
    policy = utils.make_policy(cfg)
    check_policy(cfg, policy)  # makes the lazy parameters
    torch.nn.init.normal_(next(policy.parameters()))
    path = RunCheckpoints(tmp_path / "checkpoints", policy=policy).save(7, config=to_dict(cfg))
    for given in (tmp_path, path):
        code, out, err = call("evaluate", given, "--episodes", 2)
        assert code == 0, err
        assert out.splitlines()[0].split()[:2] == ["task", "success"]
    (state,) = path.glob("components/*/state.pt")
    state.write_bytes(state.read_bytes()[:-9])
    code, _, err = call("evaluate", path, "--episodes", 2)
    assert code == 1 and "truncated, or changed" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--episodes", "-1"), "--episodes must be at least 1, got -1"),
        (("--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--videos", "1", "--video-dir", "/dev/null/x"), "--video-dir must be a folder that can"),
        (("--json", "/dev/null/x.json"), "--json must be a file that can be written to"),
        (("--rendering", "fast"), "--rendering must be blank without --suite, got 'fast'"),
        (("env.image_size=16",), "image_shape must be (3, 32, 32) as the policy's"),
        (("env.imgae_size=16",), "Could not override 'env.imgae_size'"),
        (("workers.num_workers=0",), "workers.num_workers must be at least 1, got 0"),
        (("--config-name", "nowhere"), "--config-name must be one of libero, "),
        (("--config-name", "libero"), "image_shape must be (3, 32, 32) as the policy's|LIBERO"),
    ],
)
def test_what_cannot_be_played_is_said_before_a_worker_starts(
    call, trained, monkeypatch, arguments, message
):
    monkeypatch.setattr(utils, "make_collector", None)
    code, out, err = call("evaluate", trained, *arguments)
    assert code == 1 and out == ""
    assert err.startswith("error: ") and any(text in err for text in message.split("|"))


def test_a_run_without_a_checkpoint(call, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    code, _, err = call("evaluate", tmp_path)
    assert code == 1 and "must have a complete checkpoint" in err


def test_the_table_has_a_line_a_task_and_one_of_all():
    episodes = [EpisodeSpec(task, seed) for seed in range(10) for task in ("lift", "stack")]
    successes = [task == "lift" for _ in range(10) for task in ("lift", "stack")]
    result = EvaluationResult(successes, [0.0] * 20, [7, 9] * 10, policy_version=0)
    lines = [line.split() for line in _table(episodes, result).splitlines()]
    # Wilson: 10 / 10 gives 0.722 to 1, 10 / 20 gives 0.299 to 0.701
    assert lines[1] == ["lift", "100.0", "%", "10/10", "72.2-100.0", "7.0"]
    assert lines[2] == ["stack", "0.0", "%", "0/10", "0.0-27.8", "-"]
    assert lines[3] == ["all", "50.0", "%", "10/20", "29.9-70.1", "7.0"]
