# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import dataclasses
import inspect

import pytest
import yaml
from tensordict import TensorDict

from torchrl_dvla.collectors import InitStateSchedule
from torchrl_dvla.envs import LiberoChunkEnv, ToyChunkEnv
from torchrl_dvla.objectives import GRPOLoss
from torchrl_dvla.recipes.dvla_grpo import bookkeeping, utils
from torchrl_dvla.recipes.dvla_grpo.settings import LiberoSettings, LossSettings, ToySettings, flat
from torchrl_dvla.recipes.dvla_grpo.train import CONFIG
from torchrl_dvla.recording import SuccessRate

SHARED = "common/settings"


def test_every_setting_is_one_that_the_code_reads():
    for section, target, others in (
        (ToySettings, ToyChunkEnv, {"backend"}),
        (LiberoSettings, LiberoChunkEnv, {"backend", "task_ids"}),
        (LossSettings, GRPOLoss, set()),
    ):
        names = {field.name for field in dataclasses.fields(section)} - others
        assert names <= set(inspect.signature(target.__init__).parameters)


def read_option(group, option):
    """What an option of a group says, with those that it begins with."""
    data, before = yaml.safe_load((CONFIG / group / f"{option}.yaml").read_text()), {}
    for name in data.pop("defaults", ["_self_"])[:-1]:
        before |= read_option(group, name)
    return before | data


@pytest.mark.parametrize("name", ("toy", "libero", "maniskill", "libero_openvla_oft"))
def test_a_configuration_says_only_what_is_its_own(name):
    own, shared = (yaml.safe_load((CONFIG / f"{each}.yaml").read_text()) for each in (name, SHARED))
    groups = {
        group: option for entry in own.pop("defaults")[1:-1] for group, option in entry.items()
    }
    assert set(groups) == {"env", "policy"}
    for group, option in groups.items():
        shared[group] = read_option(group, option)
    own, shared = flat(own), flat(shared)
    assert set(own) <= set(shared)
    assert [setting for setting in own if own[setting] == shared[setting]] == []


def test_the_learning_rate_rises_and_then_falls_with_the_budget(settings):
    cfg = settings("toy", "optim.lr=1.0", "optim.warmup_steps=4", "optim.final_lr_share=0.2")
    loss = utils.make_loss(cfg, utils.make_policy(cfg))
    used_up = iter([0.0, 0.0, 0.0, 0.0, 0.5, 1.0])
    optimizer, scheduler, _ = utils.make_optimizer(cfg, loss, lambda: next(used_up))
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.6, 0.2])


@pytest.mark.parametrize(
    ("num_updates", "training_s", "share"), [(0, 0.0, 0.0), (10, 15.0, 0.25), (30, 0.0, 0.6)]
)
def test_progress_is_that_of_the_tighter_budget(settings, num_updates, training_s, share):
    cfg = settings("toy", "train.num_updates=50", "train.max_minutes=1")
    state = bookkeeping.RunState(num_updates=num_updates, training_s=training_s)
    assert state.progress(cfg) == pytest.approx(share)


def test_losses_of_micro_batches_add_up_and_measures_of_them_are_averaged():
    parts = [(3, 4, (0.3, 2.0)), (1, 4, (0.1, 6.0)), (4, 4, (1.0, 4.0))]  # of two minibatches
    parts = [(n, of, TensorDict(loss_entropy=a, entropy=b)) for n, of, (a, b) in parts]
    found = bookkeeping.loss_metrics(parts)
    assert found == pytest.approx({"loss/loss_entropy": 0.7, "loss/entropy": 3.5})


def test_held_out_episodes_are_never_trained_on(settings):
    held_out, subset = utils.make_evaluation_episodes(settings("toy"))
    assert len(set(held_out)) == 50
    assert set(subset) < set(held_out) and len(subset) == 16
    schedule = InitStateSchedule(["toy"], seed=7)
    assert {next(schedule).seed for _ in range(1000)}.isdisjoint(e.seed for e in held_out)


def test_libero_is_evaluated_on_the_benchmark_and_trained_on_sampled_scenes(settings):
    cfg = settings("libero", "env.task_ids=[0,3]", "eval.num_episodes=100")
    held_out, _ = utils.make_evaluation_episodes(cfg)
    assert sorted(e.init_state_id for e in held_out if e.task == "libero_object/3") == [*range(50)]
    assert {e.task for e in held_out} == {"libero_object/0", "libero_object/3"}
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, subset_episodes=10))
    held_out, subset = utils.make_evaluation_episodes(cfg)
    assert [[e.task[-1] for e in subset].count(task) for task in "03"] == [5, 5]
    assert sorted(e.init_state_id for e in subset) == sorted([0, 10, 20, 30, 40] * 2)
    other = dataclasses.replace(cfg, seed=1)  # two seeds of a run evaluate the same scenes
    assert utils.make_evaluation_episodes(other)[0] == held_out


def test_the_report_has_the_success_of_each_of_several_tasks(settings):
    state = bookkeeping.RunState(before=[True, False, False, True, True])
    several = bookkeeping.report_of(settings("libero", "env.task_ids=[3,0]"), state)
    assert several.tasks == {
        "libero_object/3": {"before": SuccessRate(2, 3)},
        "libero_object/0": {"before": SuccessRate(1, 2)},
    }
    assert bookkeeping.report_of(settings("libero"), state).tasks == {}
    not_evaluated = settings("libero", "env.task_ids=[3,0]")
    assert bookkeeping.report_of(not_evaluated, bookkeeping.RunState()).tasks == {}
