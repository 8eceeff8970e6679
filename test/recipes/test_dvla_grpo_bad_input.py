# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import os
import shutil

import pytest
from torchrl.checkpoint import CheckpointError, GlobalRNGState
from torchrl.data.vla import UniformActionTokenizer

from torchrl_dvla.modules import TransformersVLA
from torchrl_dvla.recipes.dvla_grpo import bookkeeping, train, utils, validation
from torchrl_dvla.recipes.dvla_grpo import settings as settings_
from torchrl_dvla.recording import GracefulStop, RunCheckpoints, RunLock, TrainingScenes


@pytest.fixture
def ends_early(monkeypatch):
    """Run the recipe; it has to end with an error before it starts a worker."""

    def start_workers(*args, **kwargs):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(utils, "make_collector", start_workers)

    def run(cfg, error, match):
        with pytest.raises(error, match=match):
            train.train(cfg, GracefulStop())

    return run


@pytest.mark.parametrize(
    ("overrides", "launcher", "message"),
    [
        (["learner.num_ranks=3"], {}, "learner.num_ranks must be at most the 2 cores .* got 3"),
        (["policy.kind=tiny_vla", "+policy.hidden_dim=16"], {}, "know its shapes, got the lazy"),
        ([], {"WORLD_SIZE": "3"}, "got 2 and WORLD_SIZE=3. Set learner.num_ranks=3, or leave"),
        (["learner.num_ranks=1"], {"WORLD_SIZE": "2"}, "got 1 and WORLD_SIZE=2"),
        ([], {"LOCAL_WORLD_SIZE": "1"}, "must be on one machine, got 1 of 2 here"),
    ],
)
def test_ranks_that_cannot_be(settings, ends_early, monkeypatch, overrides, launcher, message):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    if launcher:
        given = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", **launcher}
        for name, value in {"TORCHELASTIC_RUN_ID": "x", **given}.items():
            monkeypatch.setenv(name, value)
    ends_early(settings("toy", "learner.num_ranks=2", *overrides), ValueError, message)


@pytest.fixture(scope="module")
def libero_policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    policy = TransformersVLA.tiny(
        ["pick up the alphabet soup and place it in the basket"],
        action_dim=7,
        chunk_size=8,
        state_dim=9,
        action_tokenizer=UniformActionTokenizer(16, low=-1.0, high=1.0),
    )
    policy.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device=cuda:7", "device must be one that torch sees, got 'cuda:7'"),
        (
            "env.image_size=16",
            r"image_shape must be \(3, 32, 32\) as the policy's, got \(3, 16, 16\)",
        ),
        ("memory.env_bytes=64KB", "env_bytes must be at least .* an update needs"),
        ("memory.model_bytes=1MB", "model_bytes must .* got 1048576"),
        # 2 * 8 + 1 groups of 8 million rollouts, several hundred gigabytes
        ("group.group_size=8000000", "env_bytes must fit in memory, got .* lower .*group_size"),
        ("log.dir=/dev/null/runs", r"log\.dir must be a folder that can be written to"),
        ("checkpoint.resume=nowhere", r"checkpoint\.resume must be the folder of a training check"),
    ],
)
def test_settings_that_cannot_work(settings, ends_early, override, message):
    ends_early(settings("toy", *override.split()), (ValueError, FileNotFoundError), message)


# -- factories ------------------------------------------------------------------------------------
#: The toy environment and a policy for it, as any others: by their dotted paths.
ENV = (
    "env=factory", "env._target_=torchrl_dvla.envs.ToyChunkEnv", "+env.chunk_size=4",
    "+env.action_dim=2", "+env.image_size=32", "+env.success_steps=2", "+env.success_tol=0.35",
)  # fmt: skip
POLICY = (
    "policy=factory", "policy._target_=torchrl_dvla.modules.tiny_token_policy",
    "+policy.action_dim=2", "+policy.chunk_size=4",
)  # fmt: skip


def test_factories_make_the_same_environment_and_policy(settings):
    own, any_ = settings("toy", "policy.kind=tiny_vla"), settings("toy", *ENV, *POLICY)
    assert any_.env.target == "torchrl_dvla.envs.ToyChunkEnv"
    assert settings_.settings_from(settings_.to_dict(any_)) == any_
    validation.check_settings(any_)
    specs, by_hand = (validation.find_specs(cfg) for cfg in (any_, own))  # of a worker, and ours
    assert specs[:3] == by_hand[:3]
    made = [utils.make_policy(cfg) for cfg in (own, any_)]
    plans = [validation.check_policy(cfg, policy) for cfg, policy in zip((own, any_), made)]
    assert plans[0].env_bytes == plans[1].env_bytes
    assert list(utils.make_env_factories(any_)) == ["ToyChunkEnv"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "env._target_=no.where",
            "env._target_ must be the dotted .*, got 'no.where': No mod",
        ),
        ("env._target_=torchrl_dvla.envs.Nothing", "env._target_ must .*no attribute 'Nothing'"),
        ("env._target_=torchrl_dvla.envs.__all__", "env._target_ must .*, a list. Name what"),
        ("+env.colour=red", "env must hold .* takes .*success_tol.*: .*argument 'colour'. Correct"),
        ("~policy.chunk_size", "policy must hold the arg.*: missing .* 'chunk_size'"),
        ("policy._target_=torchrl_dvla.modules.nothing", "policy._target_ must be the dotted path"),
        ("+policy.a={_target_:no.where}", "policy.a._target_ must be the dotted path"),
        ("policy._target_=torch.nn.Linear", "policy must hold the arguments of torch.nn.Linear"),
        ("+policy.hidden_dim=-1", "_target_ must make what it is for, got an error"),
        ("env._target_=7", "env._target_ must be a text, got 7"),
        ("env._target_='???'", "env._target_ must be given, got nothing"),
    ],
)
@pytest.mark.usefixtures("ends_early")
def test_factories_that_cannot_work(settings, monkeypatch, overrides, message):
    monkeypatch.setattr(validation, "EnvProcesses", None)  # nor one that is asked for its specs
    with pytest.raises(ValueError, match=message):
        train.train(settings("toy", *ENV, *POLICY, overrides), GracefulStop())


def test_a_policy_for_an_environment_that_cannot_be_read(settings):
    with pytest.raises(ValueError, match="policy.kind must be checkpoint with an env._target_"):
        settings("toy", *ENV)


def test_a_policy_that_is_none(settings, ends_early):
    policy = ("policy=factory", "policy._target_=torch.nn.Linear", "+policy.in_features=1")
    cfg = settings("toy", *policy, "+policy.out_features=1")
    ends_early(cfg, ValueError, "policy._target_ must make a TensorDictModuleBase, .* a Linear")


# -- checkpoints ----------------------------------------------------------------------------------
@pytest.fixture
def training_checkpoint(settings, tmp_path):
    """A checkpoint of a run of the toy task, without what a collector adds."""
    cfg = settings("toy")
    policy = utils.make_policy(cfg)
    loss = utils.make_loss(cfg, policy)
    optimizer, scheduler, _ = utils.make_optimizer(cfg, loss, lambda: 0.0)
    state = bookkeeping.RunState(num_updates=3)
    folder = tmp_path / "runs" / "toy" / "2026-01-01_seed0" / "checkpoints"
    parts = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler, "run": state}
    saved = train.to_dict(cfg)
    return RunCheckpoints(folder, rng=GlobalRNGState(), **parts).save(3, config=saved)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.success_tol=0.5", "'env.success_tol' is 0.5 instead of 0.35"),
        ("policy.backbone.text_layers=1", "'policy.backbone.text_layers' is 1 instead of 2"),
        ("group.group_size=4", "'group.group_size' is 4 instead of 8"),
        ("workers.max_decisions=8", "'workers.max_decisions' is 8 instead of 4"),
        ("optim.minibatch_size=32", "'optim.minibatch_size' is 32 instead of 64"),
    ],
)
@pytest.mark.usefixtures("training_checkpoint")
def test_resuming_with_what_must_not_change(settings, ends_early, override, message):
    cfg = settings("toy", "checkpoint.resume=auto", override, "train.num_updates=7")
    ends_early(cfg, ValueError, f"the settings of the checkpoint, got {message}. Drop these")


def test_resuming_with_what_may_change_says_and_applies_it(
    settings, ends_early, training_checkpoint, monkeypatch, capsys
):
    made, make = [], utils.make_optimizer
    monkeypatch.setattr(utils, "make_optimizer", lambda *a: made.append(make(*a)) or made[0])
    overrides = ("optim.lr=0.004", "optim.betas=[0.8,0.9]", "workers.num_workers=1")
    cfg = settings("toy", "checkpoint.resume=auto", *overrides)
    ends_early(cfg, AssertionError, "a worker was started")
    said = capsys.readouterr().out.partition("settings that are new: ")[2].partition("\n")[0]
    assert set(said.split("; ")) == {
        "'workers.num_workers' is 1 instead of 2",
        "'optim.lr' is 0.004 instead of 0.002",
        "'optim.betas' is [0.8, 0.9] instead of [0.9, 0.95]",
    }
    ((optimizer, scheduler, _),) = made
    (group,) = optimizer.param_groups
    assert group["lr"] == pytest.approx(0.004 / 5) and group["betas"] == (0.8, 0.9)
    optimizer.step()
    scheduler.step()
    rate = 0.004 * 2 / 5 * (1 - 0.9 * 3 / 120)  # the warm-up and the fall go on
    assert scheduler.get_last_lr() == [pytest.approx(rate)]


def test_a_run_that_goes_on_is_not_resumed_a_second_time(settings, ends_early, training_checkpoint):
    lock = RunLock(training_checkpoint.parents[1])
    cfg = settings("toy", "checkpoint.resume=auto")
    ends_early(cfg, ValueError, f"must be free, got .* in use by process {os.getpid()} on")
    lock.release()


def test_a_checkpoint_that_was_copied_is_resumed_in_a_new_folder(
    settings, training_checkpoint, tmp_path
):
    copy = shutil.copytree(training_checkpoint, tmp_path / "copy")
    cfg = settings("toy", f"checkpoint.resume={copy}")
    folders = [utils.make_run_folder(cfg, copy) for _ in range(2)]
    assert folders[0] != folders[1] and {f.parent for f in folders} == {tmp_path / "runs" / "toy"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("components/*-optimizer/state.pt", "optimizer/state.pt' is .*: truncated, or"),
        ("manifest.json", "Invalid checkpoint manifest"),
    ],
)
def test_resuming_from_a_truncated_checkpoint(
    settings, ends_early, training_checkpoint, name, message
):
    (file,) = training_checkpoint.glob(name)
    file.write_bytes(file.read_bytes()[:-9])
    cfg = settings("toy", f"checkpoint.resume={training_checkpoint}")
    ends_early(cfg, CheckpointError, message)


def test_auto_goes_on_with_the_seeds_newest_run(settings, training_checkpoint, tmp_path):
    find = utils.find_resumed_checkpoint
    zero, one = (settings("toy", "checkpoint.resume=auto", f"seed={seed}") for seed in (0, 1))
    assert (find(zero), find(one)) == (training_checkpoint, None)
    newer = tmp_path / "runs/toy/2026-01-02_seed1/checkpoints" / training_checkpoint.name
    path = shutil.copytree(training_checkpoint, newer) / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert (find(zero), find(one)) == (training_checkpoint, newer)
    path.write_text(path.read_text().replace('"num_updates"', '"num_steps"'))
    with pytest.raises(ValueError, match="update-.*' was written with other .*: train.num_steps"):
        bookkeeping.check_resumed(one, newer)  # of another version


def test_the_record_of_training_scenes_goes_on(settings, training_checkpoint, tmp_path):
    toy, libero = settings("toy"), settings("libero")
    assert utils.find_training_scenes(toy, None) == TrainingScenes()  # it begins anew
    shipped = utils.find_training_scenes(libero, None)
    assert (shipped.num_known, shipped.gaps) == (313, [])
    (policy,) = training_checkpoint.glob("components/*-policy")
    (gap,) = utils.find_training_scenes(toy, training_checkpoint).gaps
    assert gap.startswith("what the policy in '") and str(policy) in gap
    TrainingScenes({"toy": {1}}).save(policy)
    assert utils.find_training_scenes(toy, training_checkpoint).tasks == {"toy": {1}}
    made = settings("toy", "policy=factory", "policy._target_=some.module.make")
    assert utils.find_training_scenes(made, None).gaps == [
        "what made the policy of some.module.make"
    ]


@pytest.mark.parametrize("part", ["runs/toy/2026-01-01_seed0", "", "auto"])
def test_what_may_be_resumed(settings, training_checkpoint, tmp_path, capsys, part):
    resume = part if part == "auto" else tmp_path / part if part else training_checkpoint
    cfg = settings("toy", f"checkpoint.resume={resume}")
    assert utils.find_resumed_checkpoint(cfg) == training_checkpoint
    (training_checkpoint / "manifest.json").unlink()  # no longer a whole checkpoint
    if part == "auto":
        assert utils.find_resumed_checkpoint(cfg) is None
        assert "checkpoint.resume=auto: no checkpoint of seed 0 in" in capsys.readouterr().out
    else:
        with pytest.raises(FileNotFoundError, match="without a complete one"):
            utils.find_resumed_checkpoint(cfg)


def test_a_policy_checkpoint_that_is_not_there(settings, ends_early):
    cfg = settings("libero", "policy.path=nowhere/at/all")
    ends_early(cfg, (FileNotFoundError, ImportError), "nowhere/at/all|LIBERO is not installed")


@pytest.mark.libero
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.task_ids=[10]"], "task_id must be from 0 to 9 in libero_object, got 10"),
        (["eval.num_episodes=51"], "eval.num_episodes must be at most 50"),
        (["env.camera_width=64"], r"image_shape must be \(3, 128, 128\)"),
        (["env.chunk_size=4", "workers.max_decisions=60"], r"_size=4, .* got \[8, 7\]"),
        (["env.cameras=[agentview,robot0_eye_in_hand]"], "number of cameras must be 1"),
    ],
)
def test_libero_settings_that_cannot_work(settings, ends_early, libero_policy, overrides, message):
    cfg = settings("libero", f"policy.path={libero_policy}", *overrides)
    ends_early(cfg, ValueError, message)


@pytest.mark.libero
def test_missing_assets(settings, ends_early, monkeypatch, tmp_path):
    from torchrl_dvla.envs import libero_setup

    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    monkeypatch.setattr(libero_setup, "_wheel_assets", lambda: tmp_path / "gone")
    ends_early(settings("libero"), FileNotFoundError, "'assets' folder must exist, got .* Install")


@pytest.mark.libero
def test_a_truncated_policy_checkpoint(settings, ends_early, libero_policy, tmp_path):
    folder = shutil.copytree(libero_policy, tmp_path / "copy")
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    cfg = settings("libero", f"policy.path={folder}")
    ends_early(cfg, ValueError, "The file is truncated")
