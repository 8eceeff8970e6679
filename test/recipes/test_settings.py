# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Settings of both recipes: every value is refused by its dotted name, or is what the run uses."""

from __future__ import annotations

import importlib
import logging.config
import math
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from torchrl_dvla import recipes
from torchrl_dvla.recipes.dvla_grpo import settings as settings_
from torchrl_dvla.recipes.dvla_grpo import train as train_
from torchrl_dvla.recipes.dvla_grpo import utils

CONFIGS = sorted(Path(recipes.__file__).parent.glob("*/config/*.yaml"))
SFT = next(path for path in CONFIGS if path.stem == "libero_object")
#: No setting is all of these, and few are any.
MALFORMED = (
    None, True, 1.5, -0.5, 0, -1, 2**70, -(2**70), math.nan, math.inf, 1e308, "", "abc", "nan",
    "../../escaped", "a\0b", [], [1, "x"], [math.nan], {"a": 1}, {},
)  # fmt: skip


def compose_plain(path, *overrides):
    is_grpo = path.parents[1].name == "dvla_grpo"
    if (is_grpo and path.stem != "toy") or path.stem == "libero_vla":
        overrides = [*overrides, "++policy.path=x"]
    with initialize_config_dir(version_base="1.3", config_dir=str(path.parent)):
        return OmegaConf.to_container(compose(path.stem, list(overrides)))


def replace(data, path, value):
    """A copy of nested dicts with another value at ``path``."""
    head, *rest = path
    return data | {head: replace(data[head], rest, value) if rest else value}


def paths(data, before=()):
    """Every setting and every section; what a factory is given is its own business."""
    for name, value in data.items():
        yield (*before, name)
        if isinstance(value, dict) and name != "env_kwargs" and "_target_" not in value:
            yield from paths(value, (*before, name))


def as_used(settings, path):
    for name in path:
        settings = settings[name] if isinstance(settings, dict) else getattr(settings, name)
    return settings


@pytest.mark.parametrize(
    ("config", "overrides"),
    [*((path, ()) for path in CONFIGS), (SFT, ("policy=flow",))],
    ids=lambda value: value.stem if isinstance(value, Path) else " ".join(value),
)
def test_every_value_is_refused_by_name_or_used_as_it_is(config, overrides, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = f"{recipes.__name__}.{config.parents[1].name}.settings"
    settings_from = importlib.import_module(name).settings_from
    plain = compose_plain(config, *overrides)
    shipped, num_refused, num_accepted = settings_from(plain), 0, 0
    for path in paths(plain):
        dotted, value, used = ".".join(path), as_used(plain, path), as_used(shipped, path)
        if not isinstance(value, dict) and dotted != "log.dir":  # which is made absolute
            assert used == (tuple(value) if isinstance(value, list) else value), dotted
        for value in MALFORMED:
            try:
                used = as_used(settings_from(replace(plain, path, value)), path)
            except ValueError as error:
                # By its dotted name, or by that of a setting that does not fit to it.
                assert all(name in str(error) for name in path), (dotted, value, error)
                assert " must " in str(error) and ", got " in str(error)
                num_refused += 1
            else:
                num_accepted += 1
                if isinstance(value, dict):
                    assert not value or used == value
                elif isinstance(value, list):
                    assert used == tuple(map(type(used[0]), value)) if value else not used
                elif dotted != "log.dir":
                    assert used in (value, str(value)) and (used is True) == (value is True)
                    assert not isinstance(used, float) or math.isfinite(used)
    assert num_refused > num_accepted > 0
    assert list(tmp_path.iterdir()) == []


REFUSED = [
    ("toy", "train.num_updates=1.5", "train.num_updates must be a whole number.*, got 1.5"),
    ("toy", "train.num_updates=abc", "train.num_updates must be a whole number.*, got 'abc'"),
    ("toy", "train.max_minutes=0", "train.max_minutes must be positive, got 0. Use null"),
    ("toy", "+inference.timeout_s=nan", "inference.timeout_s must be a finite number, got nan"),
    ("toy", "workers.step_timeout_s=1e9", "workers.step_timeout_s must be at most 2000000"),
    ("toy", "learner.num_ranks=0", "learner.num_ranks must be at least 1, got 0"),
    ("toy", "learner.num_ranks=65", "optim.minibatch_size must be at least learner.num_ranks=65"),
    ("toy", "learner.strategy=zero", "learner.strategy must be one of .*fsdp.*ddp.*, got 'zero'"),
    (
        "toy",
        "loss.ratio_level=trajectory optim.minibatch_size=3",
        "optim.minibatch_size must be at "
        "least workers.max_decisions=4 with loss.ratio_level=trajectory, got 3: no rollout may be",
    ),
    (
        "toy",
        "loss.ratio_level=trajectory_mean optim.micro_batch_size=3",
        "optim.micro_batch_size "
        "must be at least workers.max_decisions=4 with loss.ratio_level=trajectory_mean, got 3",
    ),
    ("toy", "optim.micro_batch_size=65", "optim.micro_batch_size must be at most minibatch_size"),
    ("toy", "optim.betas=[0.9,1]", r"optim.betas must be below 1, got \[0.9, 1\]"),
    ("toy", "policy.temperature=inf", "policy.temperature must be a finite number, got inf"),
    ("toy", "policy.backbone.text_layers=0", "policy.backbone.text_layers must be at least 1"),
    ("toy", "policy.kind=checkpoint", "policy.path must be given, got nothing"),
    ("toy", "policy.action_dim=3", "policy.action_dim must be 2, as in env, got 3"),
    ("toy", "policy.state_std=[1]", "policy.state_std must have state_dim=4 entries"),
    ("toy", "eval.num_episodes=-1", "eval.num_episodes must be at least 0, got -1. 0 evaluates"),
    ("toy", "optim.max_grad_norm=inf", "optim.max_grad_norm must be .* or None, got inf. Use null"),
    ("toy", "train.timeout_s=inf", "train.timeout_s must be a finite number or None, got inf"),
    ("toy", "eval.every_minutes=inf", "eval.every_minutes must .* or None, got inf. Use null for"),
    ("toy", "+workers.env_vars={A:0.5}", "workers.env_vars must be a mapping of a text to a text"),
    ("toy", "name=../../escaped", "name must be the name of one folder, got '../../escaped'"),
    ("toy", "device=null", "device must be a text, got None"),
    ("toy", "device=gpu", "device must be a torch device, got 'gpu'"),
    ("toy", "seed=4294967296", "seed must be at most 4294967295"),
    ("toy", "+foo=1", "foo must be a setting, got an unknown name. There are name, "),
    ("toy", "+group.group_sise=8", r"group.group_sise must be .* mean group.group_size\?"),
    ("toy", "~train.num_updates", "train.num_updates must be given, got nothing"),
    ("toy", "env.backend=x", r"env.backend must be one of \['toy', 'libero'\], got 'x'"),
    ("toy", "env.backend=libero", "env.action_dim must be a setting, got an unknown name"),
    ("toy", "+inference.deterministic=true", "inference.deterministic must be None or False"),
    ("toy", "+workers.start_method=fork", "workers.start_method must be one of .*, got 'fork'"),
    ("toy", "loss.dual_clip=1.1", "loss.dual_clip must be greater than 1"),
    ("libero", "env.max_episode_steps=512", "workers.max_decisions must be at least 64, got 15"),
    ("libero", "env.replan_interval=9", "env.replan_interval must be from 1 to chunk_size=8"),
    ("libero", "env.task_suite=x", r"env.task_suite must be one of \['libero_spatial', "),
    ("libero", "env.task_ids=[3,3]", "env.task_ids must name at least one task, and each once"),
    ("libero", "env.cameras=agentview", "env.cameras must be a list of a text, got 'agentview'"),
    ("libero", "policy.kind=tiny_vla", "policy.kind=tiny_vla must be used with env.backend=toy"),
    ("libero_openvla_oft", "seed=0", "policy.path must be given, got nothing"),
    ("toy", "demo.kill_node=true", "demo.kill_node must be false but for several nodes"),
    ("toy_cluster", "cluster.hosts=[]", "cluster.hosts must name at least one node"),
]


@pytest.mark.parametrize(("config", "override", "message"), REFUSED, ids=lambda text: text)
def test_what_is_refused(settings, config, override, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        settings(config, *override.split())


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=4294967295", "seed", 2**32 - 1),
        ("name=2026", "name", "2026"),
        ("train.max_minutes=1", "train.max_minutes", 1.0),
        ("train.num_updates=1e3", "train.num_updates", 1000),
        ("train.num_updates='1e3'", "train.num_updates", 1000),
        ("train.timeout_s=null", "train.timeout_s", None),
        ("eval.num_episodes=0", "eval.num_episodes", 0),
        ("eval.num_episodes=8", "eval.num_episodes", 8),  # the subset is all of them
        ("eval.every_minutes=null", "eval.every_minutes", None),
        ("optim.max_grad_norm=null", "optim.max_grad_norm", None),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr='1e-3'", "optim.lr", 1e-3),
        ("optim.betas=[0,0]", "optim.betas", (0.0, 0.0)),
        ("optim.final_lr_share=0", "optim.final_lr_share", 0.0),
        ("optim.micro_batch_size='16'", "optim.micro_batch_size", 16),
        ("loss.clip_epsilon=0.2", "loss.clip_epsilon", 0.2),
        ("group.return_bounds=[0,1]", "group.return_bounds", (0.0, 1.0)),
        ("+workers.env_vars={A:1}", "workers.env_vars", {"A": "1"}),
        ("device=cuda:7", "device", "cuda:7"),  # whether it is there is asked of the machine
    ],
)
def test_what_is_accepted(settings, override, path, value):
    used = as_used(settings("toy", override), path.split("."))
    assert used == value and type(used) is type(value)


def test_a_relative_log_folder_is_in_the_working_folder(settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = settings("toy", "log.dir=runs/here")
    assert cfg.log.dir == str(tmp_path / "runs/here")
    folder = utils.make_run_folder(cfg, None)
    assert folder.parent == tmp_path / "runs/here/toy"


def test_what_a_checkpoint_holds_gives_the_same_settings(settings):
    cfg = settings("toy", "group.return_bounds=[0,1]")
    plain = settings_.to_dict(cfg)
    assert type(plain["group"]) is dict and plain["group"]["return_bounds"] == [0.0, 1.0]
    assert settings_.settings_from(plain) == cfg


def test_multirun_runs_every_job_and_tells_of_one_that_fails(monkeypatch, tmp_path):
    seeds = []

    def train(cfg, stop):
        seeds.append(cfg.seed)
        if cfg.seed == 1:
            raise ArithmeticError("injected")

    monkeypatch.setattr(train_, "train", train)
    monkeypatch.setattr(logging.config, "dictConfig", lambda config: None)
    argv = "--config-name=toy -m seed=0,1,2"
    monkeypatch.setattr(sys, "argv", ["train", *argv.split(), f"log.dir={tmp_path}/runs"])
    with pytest.raises(SystemExit, match="1"):
        train_.run()
    assert seeds == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(("divided", "advantage"), [(True, "mean_std"), (False, "mean")])
def test_settings_of_older_runs_say_how_advantages_were_normalised(divided, advantage):
    plain = compose_plain(next(path for path in CONFIGS if path.stem == "toy"))
    del plain["group"]["advantage"]
    plain["group"]["normalise_std"] = divided
    assert settings_.settings_from(plain).group.advantage == advantage
    plain["group"]["normalise_std"] = "yes"
    with pytest.raises(ValueError, match=r"group.normalise_std must be true or false, got 'yes'"):
        settings_.settings_from(plain)


def test_settings_of_older_runs_call_the_path_of_a_policy_its_checkpoint():
    plain = compose_plain(next(path for path in CONFIGS if path.stem == "libero"))
    plain["policy"]["checkpoint"] = plain["policy"].pop("path")
    assert settings_.settings_from(plain).policy.path == "x"
