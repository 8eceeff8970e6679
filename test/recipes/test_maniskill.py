# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Configurations `maniskill` of both recipes: one environment, and scenes that are held out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from torchrl_dvla.recipes.dvla_grpo import utils as grpo
from torchrl_dvla.recipes.dvla_grpo.validation import check_settings
from torchrl_dvla.recipes.dvla_sft import train as sft
from torchrl_dvla.recipes.dvla_sft.settings import ManiSkillSettings, settings_from

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that one command may take.
DEADLINE_S = 300


def sft_settings(*overrides, name="maniskill"):
    with initialize_config_dir(version_base="1.3", config_dir=str(sft.CONFIG)):
        return settings_from(compose(name, list(overrides)))


def test_both_recipes_play_the_same_environment(settings):
    cfg, env = settings("maniskill", "policy.path=x"), sft_settings().env
    assert isinstance(env, ManiSkillSettings)
    assert cfg.env.target == "torchrl_dvla.envs.ManiSkillChunkEnv"
    assert cfg.env.arguments == {
        "task": env.task,
        "chunk_size": env.chunk_size,
        "camera_height": env.image_size,
        "camera_width": env.image_size,
        "max_episode_steps": env.max_episode_steps,
        "env_kwargs": env.env_kwargs,
    }
    assert cfg.workers.max_decisions == -(-env.max_episode_steps // env.chunk_size)
    check_settings(cfg)  # the environment takes these arguments


def test_scenes_of_training_are_never_evaluated(settings):
    cfg = settings("maniskill", "policy.path=x", "eval.num_episodes=3")
    episodes, _ = grpo.make_evaluation_episodes(cfg)
    assert [episode.seed for episode in episodes] == [2**31 - 1, 2**31 - 2, 2**31 - 3]
    assert {(episode.task, episode.init_state_id) for episode in episodes} == {
        ("ManiSkillChunkEnv", -1)
    }


@pytest.mark.parametrize("seed", [10, 14, 8])
def test_a_scene_with_a_demonstration_is_not_held_out(seed):
    given = ("demonstrations.first_seed=10", "demonstrations.num_per_task=5")
    small = ("training.num_validation_demonstrations=1", "evaluation.num_episodes=3")
    message = f"evaluation.seed must be of scenes without .*, got {seed}, .* Set evaluation.seed=15"
    with pytest.raises(ValueError, match=message):
        sft_settings(*given, *small, f"evaluation.seed={seed}")
    for held_out in (7, 15):
        cfg = sft_settings(*given, *small, f"evaluation.seed={held_out}")
        assert cfg.evaluation.seed == held_out
    # LIBERO's are init states, whatever the seed of the sampled actions is
    sft_settings(*given, *small, f"evaluation.seed={seed}", name="libero_object")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.backend=toy", r"env.backend must be one of \['libero', 'maniskill'\], got 'toy'"),
        ("env.task=PushCube-v1", "env.task must be .*PickCube-v1.*, got 'PushCube-v1'"),
        ("+env.shadows=true", "env.shadows must be a setting, got an unknown name"),
    ],
)
def test_what_is_refused(override, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sft_settings(override)


@pytest.mark.maniskill
@pytest.mark.timeout(2 * DEADLINE_S)
def test_from_demonstrations_to_an_update(tmp_path):
    def run(command, *arguments):
        environ = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        program = [sys.executable, "-m", "torchrl_dvla", command, "--config-name", "maniskill"]
        done = subprocess.run(
            [*program, *arguments],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    sizes = [f"policy.backbone.{name}=32" for name in ("vision_size", "text_size")]
    sizes += [f"policy.backbone.{name}=1" for name in ("vision_layers", "text_layers")]
    output = run(
        "sft",
        "checkpoint=policy",
        "demonstrations.num_per_task=4",
        "demonstrations.num_processes=1",
        "env.image_size=32",
        "training.num_steps=2",
        "training.batch_size=4",
        "training.num_validation_demonstrations=1",
        "evaluation.num_episodes=2",
        "evaluation.num_processes=1",
        "hydra.run.dir=sft",
        *sizes,
    )
    assert "train --config-name maniskill policy.path=policy" in output
    report = json.loads((tmp_path / "sft/report.json").read_text())
    assert [row["num_episodes"] for row in report["evaluation"]] == [2, 2]
    # A policy that never succeeds gives groups without contrast: one is learned from all the same.
    run(
        "train",
        "policy.path=policy",
        "env.camera_height=32",
        "env.camera_width=32",
        "workers.num_workers=1",
        "group.group_size=2",
        "group.groups_per_update=1",
        "group.max_no_signal_groups=1",
        "group.on_no_signal=keep",
        "train.num_updates=1",
        "eval.num_episodes=2",
        "eval.subset_episodes=0",
        "log.dir=runs",
    )
    (report,) = tmp_path.glob("runs/maniskill/*/report.json")
    assert report.is_file()
