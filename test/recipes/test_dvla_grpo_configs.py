# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import dataclasses
import inspect

import pytest

from torchrl_dvla.collectors import GroupConfig, InferenceConfig, WorkerConfig
from torchrl_dvla.envs import LiberoChunkEnv, ToyChunkEnv
from torchrl_dvla.modules import TransformersVLA
from torchrl_dvla.objectives import GRPOLoss

NAMES = ("toy", "libero", "libero_openvla_oft")


def _parameters(function):
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_one_that_the_code_reads(settings, name):
    cfg = settings(name)
    env = dict(cfg.env)
    env_class = ToyChunkEnv if env.pop("backend") == "toy" else LiberoChunkEnv
    env["task_id"] = env.pop("task_ids", None) if env_class is LiberoChunkEnv else 0
    assert set(env) - {"task_id"} <= _parameters(env_class.__init__)
    for section, config in (
        ("group", GroupConfig),
        ("workers", WorkerConfig),
        ("inference", InferenceConfig),
    ):
        assert set(cfg[section]) <= {field.name for field in dataclasses.fields(config)}
    assert set(cfg.loss) <= _parameters(GRPOLoss.__init__)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_has_the_same_sections(settings, name):
    toy, other = settings("toy"), settings(name)
    assert set(other) == set(toy)
    for section in ("group", "memory", "loss", "optim", "train", "eval", "checkpoint", "log"):
        assert set(other[section]) == set(toy[section])


@pytest.mark.parametrize("name", NAMES)
def test_collection_settings_are_valid(settings, recipe, name):
    cfg = settings(name)
    group, workers = recipe.utils.make_group_config(cfg), recipe.utils.make_worker_config(cfg)
    assert group.num_candidates == 8
    if name != "toy":
        steps = cfg.env.replan_interval or cfg.env.chunk_size
        assert workers.max_decisions * steps >= cfg.env.max_episode_steps


def test_the_gpu_configuration_builds_its_policy_in_miniature(settings, recipe, tmp_path):
    kwargs = {"action_dim": 7, "chunk_size": 8, "state_dim": 9}
    TransformersVLA.tiny(["open the drawer"], **kwargs).save_pretrained(tmp_path / "sft")
    cfg = settings("libero_openvla_oft", f"policy.checkpoint={tmp_path / 'sft'}", "device=cpu")
    policy = recipe.utils.make_policy(cfg)
    assert policy.temperature == 1.6
    assert not any(p.requires_grad for p in policy.backbone.model.vision_model.parameters())
    loss = recipe.utils.make_loss(cfg, policy)
    optimizer, _ = recipe.utils.make_optimizer(cfg, loss, lambda: 0.0)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert 0 < trained < sum(p.numel() for p in policy.parameters())


def test_the_learning_rate_rises_and_then_falls_with_the_budget(settings, recipe):
    cfg = settings("toy", "optim.lr=1.0", "optim.warmup_steps=4", "optim.final_lr_share=0.2")
    loss = recipe.utils.make_loss(cfg, recipe.utils.make_policy(cfg))
    used_up = iter([0.0, 0.0, 0.0, 0.0, 0.5, 1.0])
    optimizer, scheduler = recipe.utils.make_optimizer(cfg, loss, lambda: next(used_up))
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.6, 0.2])


@pytest.mark.parametrize(
    ("num_updates", "training_s", "share"), [(0, 0.0, 0.0), (10, 15.0, 0.25), (30, 0.0, 0.6)]
)
def test_progress_is_that_of_the_budget_used_up_most(
    settings, recipe, num_updates, training_s, share
):
    cfg = settings("toy", "train.num_updates=50", "train.max_minutes=1")
    state = recipe.bookkeeping.RunState(num_updates=num_updates, training_s=training_s)
    assert state.progress(cfg) == pytest.approx(share)


def test_held_out_episodes_are_never_trained_on(settings, recipe):
    from torchrl_dvla.collectors import InitStateSchedule

    held_out, subset = recipe.utils.make_evaluation_episodes(settings("toy"))
    assert len(set(held_out)) == 50
    assert set(subset) < set(held_out) and len(subset) == 16
    schedule = InitStateSchedule(["toy"], seed=7)
    assert {next(schedule).seed for _ in range(1000)}.isdisjoint(e.seed for e in held_out)


def test_libero_is_evaluated_on_the_benchmark_and_trained_on_sampled_scenes(settings, recipe):
    cfg = settings("libero", "env.task_ids=[0,3]", "eval.num_episodes=100")
    held_out, _ = recipe.utils.make_evaluation_episodes(cfg)
    assert sorted(e.init_state_id for e in held_out if e.task == "libero_object/3") == [*range(50)]
    assert {e.task for e in held_out} == {"libero_object/0", "libero_object/3"}
    cfg.seed += 1  # two seeds of a run evaluate the same scenes
    assert recipe.utils.make_evaluation_episodes(cfg)[0] == held_out
