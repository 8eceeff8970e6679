# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The supervised recipe without its simulator: demonstrations are made here, and so is the task."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.__main__ import main
from torchrl_dvla.data.demonstrations import Demonstration, DemonstrationInfo
from torchrl_dvla.modules import FlowVLA, TransformersVLA, load_policy
from torchrl_dvla.modules.formats import Stated
from torchrl_dvla.recipes.dvla_grpo import utils as grpo
from torchrl_dvla.recipes.dvla_grpo.validation import check_policy
from torchrl_dvla.recipes.dvla_sft import episodes, utils
from torchrl_dvla.recipes.dvla_sft import train as sft
from torchrl_dvla.recipes.dvla_sft.settings import settings_from
from torchrl_dvla.recording import TrainingScenes

INSTRUCTION = "follow the state"
SIZE, CHUNK, ROWS, DEMOS = 32, 4, 16, 12
#: Standard deviation of the task's actions.
SCALE = 0.3
SMALL = (
    f"env.image_size={SIZE}", f"env.chunk_size={CHUNK}", "env.task_ids=[3]",
    "demonstrations.first_seed=0",
    f"demonstrations.num_per_task={DEMOS}", "training.num_validation_demonstrations=2",
    "training.num_threads=1", "training.max_shift=0", "evaluation.num_episodes=4",
)  # fmt: skip
TINY = tuple(
    f"policy.backbone.{name}={size}"
    for name, size in {
        "vision_size": 32, "vision_layers": 1, "text_size": 32, "expert_size": 64, "layers": 2,
    }.items()
)  # fmt: skip


def sft_settings(*overrides, name="libero_object"):
    with initialize_config_dir(version_base="1.3", config_dir=str(sft.CONFIG)):
        return settings_from(compose(name, [*SMALL, *overrides]))


def observation(state, cameras=("image",)):
    images = {name: torch.zeros(len(state), 3, SIZE, SIZE, dtype=torch.uint8) for name in cameras}
    return TensorDict({"observation": {**images, "state": state}}, [len(state)])


def write_demonstrations(folder, *, state_dim=9, cameras=("image",), num=DEMOS, success=True):
    """Of a task whose expert answers a normal state by its first entries, each env step alike."""
    for seed in range(num):
        state = torch.randn(ROWS, state_dim, generator=torch.Generator().manual_seed(seed))
        rows = observation(state, cameras)
        rows["vla_action", "chunk"] = (SCALE * state[:, None, :7]).repeat(1, CHUNK, 1)
        rows["action_is_pad"] = torch.zeros(ROWS, CHUNK, dtype=torch.bool)
        rows["action_is_pad"][-1, 1:] = True
        info = DemonstrationInfo(INSTRUCTION, "libero_object", 3, seed, success, ROWS * CHUNK)
        Demonstration(rows, info).save(folder / "libero_object_3" / f"{seed:06d}.safetensors")


class FollowTask:
    """Three decisions, each right if its first action is near the expert's."""

    def set_seed(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def reset(self, _):
        self.num_decisions, self.success = 0, True
        return self.observe()

    def observe(self):
        self.state = torch.randn(1, 9, generator=self.generator)
        return observation(self.state)[0].set("language_instruction", INSTRUCTION)

    def step(self, td):
        error = td["vla_action", "chunk"][0] - SCALE * self.state[0, :7]
        self.num_decisions += 1
        self.success &= bool(error.square().mean().sqrt() < 0.7 * SCALE)
        end = {"done": torch.tensor([self.num_decisions == 3]), "success": [self.success]}
        end["action_is_pad"] = torch.zeros(CHUNK, dtype=torch.bool)
        return {"next": self.observe().update(end)}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``train`` in ``tmp_path``, in which nothing is left to record; returns the report."""

    @contextmanager
    def in_this_process(cfg, task_id, checkpoint, num_processes):
        assert checkpoint is not None, "a demonstration is missing"
        monkeypatch.setattr(episodes, "_env", FollowTask(), raising=False)
        monkeypatch.setattr(episodes, "_policy", utils.load_clone(cfg, checkpoint), raising=False)
        with ThreadPoolExecutor(1) as pool:
            yield pool

    def call(*overrides, **kwargs):
        folder = f"demonstrations.folder={tmp_path / 'demonstrations'}"
        cfg = sft_settings(folder, *overrides, **kwargs)
        sft.train(cfg)
        return cfg, json.loads((tmp_path / "report.json").read_text())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(episodes, "_pool", in_this_process)
    monkeypatch.setattr(utils, "check_tasks", lambda cfg: None)
    monkeypatch.setattr(utils, "make_run_folder", lambda cfg: tmp_path)
    return call


# -- from demonstrations to GRPO -------------------------------------------------------------------
def test_a_flow_policy_learns_and_goes_on_in_the_main_recipe(run, settings, tmp_path, capsys):
    write_demonstrations(tmp_path / "demonstrations")
    cfg, report = run(
        "policy=flow", *TINY, "training.num_steps=250", "training.decay_steps=250",
        "training.num_warmup_steps=20", "training.lr=3e-3", "training.validate_every=50",
        "training.snapshot_steps=[1]", "training.state_noise=0",
    )  # fmt: skip
    curve = [point["validation"] for point in report["curve"]]
    # The velocity (noise - action) of standard normal actions has variance 2. With the noisy point
    # of time t, but without the observation, 1 / (t**2 + (1 - t)**2) remains of it: at least 1.
    assert sorted(curve, reverse=True) == curve
    assert curve[-1] < 1 / 3
    assert [row["actions"] for row in report["evaluation"]] == ["greedy", "sampled"]
    assert report["evaluation"][0]["success_rate"] == 1
    assert "accuracy" not in report["curve"][0]
    assert isinstance(load_policy(tmp_path / "step_00001"), FlowVLA)
    # these demonstrations do not say what they started from
    scenes = TrainingScenes.load(tmp_path / "policy")
    assert (scenes.num_known, scenes.gaps) == (0, ["init states of libero_object/3"])
    # what it says to go on with
    told = utils.training_settings(cfg, "policy")
    assert shlex.join(told) in capsys.readouterr().out
    trained = settings("libero", *told)
    policy = grpo.make_policy(trained)
    check_policy(trained, policy)
    assert policy.config.freeze_prefix and policy.config.sampler == "sde"


def test_the_policy_keeps_the_record_of_its_demonstrations(tmp_path):
    def demo(seed, init_state_hash):
        info = DemonstrationInfo(INSTRUCTION, "suite", 3, seed, True, 8, init_state_hash)
        return Demonstration(observation(torch.zeros(1, 9)), info)

    scenes = utils.training_scenes(sft_settings(), [demo(0, 5), demo(1, 6)])
    assert (scenes.tasks, scenes.gaps) == ({"suite/3": {5, 6}}, [])
    # what goes on from a checkpoint was trained from that one's, too
    TrainingScenes({"suite/1": {4}}, ["the rest"]).save(tmp_path)
    cfg = sft_settings("policy=flow_checkpoint", f"policy.path={tmp_path}")
    scenes = utils.training_scenes(cfg, [demo(0, 5)])
    assert (scenes.tasks, scenes.gaps) == ({"suite/1": {4}, "suite/3": {5}}, ["the rest"])


def test_the_same_noise_at_each_validation():
    cfg = sft_settings("policy=flow", *TINY)
    policy = utils.make_policy(cfg, [INSTRUCTION], state_dim=9)
    batch = observation(torch.zeros(5, 9)).set("language_instruction", INSTRUCTION)
    batch["vla_action", "chunk"] = torch.zeros(5, CHUNK, 7)
    loss = utils.make_loss(policy)
    torch.manual_seed(1)
    first, drawn = utils.validate(loss, batch), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # training draws on as if there had been none
    assert utils.validate(loss, batch) == first


def test_tokens_are_cloned_by_the_same_loop(run, tmp_path):
    write_demonstrations(tmp_path / "demonstrations")
    sizes = {"vision_size": 32, "vision_layers": 1, "text_size": 32, "text_layers": 1}
    given = [f"policy.backbone.{name}={size}" for name, size in sizes.items()]
    cfg, report = run(*given, "training.num_steps=2")
    assert set(report["curve"][-1]) == {"step", "train", "validation", "accuracy"}
    assert isinstance(load_policy(tmp_path / "policy"), TransformersVLA)
    told = ["env.task_suite=libero_object", "env.task_ids=[3]", "env.chunk_size=4"]
    told += ["env.camera_height=32", "env.camera_width=32", "workers.max_decisions=30"]
    told += ["policy.path=policy"]
    assert utils.training_settings(cfg, "policy") == told


# -- statistics ------------------------------------------------------------------------------------
def rows_to_fit():
    """Two decisions of two env steps, the last of them padded."""
    rows = observation(torch.tensor([[1.0] + [0.0] * 8, [5.0] + [0.0] * 8]))
    chunk = torch.zeros(2, 2, 7)
    chunk[..., 0] = torch.tensor([[-1.0, 1.0], [3.0, 100.0]])
    rows["vla_action", "chunk"] = chunk
    rows["action_is_pad"] = torch.tensor([[False, False], [False, True]])
    return rows


def test_mean_and_deviation_of_what_is_not_padded():
    cfg = sft_settings("policy=flow", *TINY)
    policy = utils.make_policy(cfg, [INSTRUCTION], state_dim=9)
    utils.set_statistics(cfg, policy, rows_to_fit())
    # -1, 1, 3; what never moves is not blown up
    assert policy.action_statistics.mean.tolist() == [1.0] + [0.0] * 6
    assert policy.action_statistics.std.tolist() == pytest.approx([2.0] + [0.02] * 6)
    assert policy.state_statistics.mean.tolist() == [3.0] + [0.0] * 8
    assert policy.state_statistics.std.tolist() == pytest.approx([8**0.5] + [0.02] * 8)


def test_quantiles_for_a_pi05():
    cfg = sft_settings("policy=flow", "policy.backbone.model_type=pi05", *TINY)
    policy = utils.make_policy(cfg, [INSTRUCTION], state_dim=9)
    utils.set_statistics(cfg, policy, rows_to_fit())
    # 1 % of the way from -1 to 1, and 1 % of that from 3 to 1
    assert policy.action_statistics.low.tolist() == pytest.approx([-0.96] + [-0.02] * 6)
    assert policy.action_statistics.high.tolist() == pytest.approx([2.96] + [0.02] * 6)
    assert policy.state_statistics.low.tolist() == pytest.approx([1.04] + [-0.02] * 8)
    assert policy.state_statistics.high.tolist() == pytest.approx([4.96] + [0.02] * 8)


# -- from a checkpoint -----------------------------------------------------------------------------
def of_lerobot(foreign, folder, kind="pi0"):
    sizes = {"state_dim": 8, "action_dim": 7, "size": (SIZE, SIZE), "chunk_size": CHUNK}
    foreign.write_lerobot(folder, kind, max_tokens=200, **sizes)
    return (
        f"policy.path={folder}", f"policy.stated.tokenizer={folder / 'tokenizer'}",
        "env.replan_interval=2",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["pi0", "smolvla"])
@pytest.mark.parametrize("statistics", ["checkpoint", "demonstrations"])
def test_an_expert_is_trained_on_from_a_checkpoint(
    run, foreign, settings, tmp_path, monkeypatch, capsys, statistics, kind
):
    cameras = ("image", "wrist_image")
    write_demonstrations(tmp_path / "demonstrations", state_dim=8, cameras=cameras)
    given = of_lerobot(foreign, tmp_path / "start", kind)
    one = episodes.EpisodeResult(task_id=3, number=0, success=True, num_env_steps=1)
    monkeypatch.setattr(sft, "evaluate", lambda *args, **kwargs: [one])
    given = [*given, f"policy.statistics={statistics}", "training.num_steps=2"]
    cfg, _ = run(*given, name="libero_vla")
    start = utils.make_policy(cfg, [], state_dim=8)
    end = load_policy(tmp_path / "policy")
    before, after = start.state_dict(), end.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {n for n, parameter in start.named_parameters() if not parameter.requires_grad}
    assert frozen and not frozen & changed
    assert any(name.startswith("network.") for name in changed)
    kept = not any("statistics" in name for name in changed)
    assert kept == (statistics == "checkpoint")
    if not kept:
        assert end.action_statistics.std.tolist() == pytest.approx([SCALE] * 7, rel=0.2)
    trained = settings("libero", *utils.training_settings(cfg, "policy"))
    check_policy(trained, grpo.make_policy(trained))
    # The policy knows where it came from.
    out = tmp_path / "exported"
    assert main(["export", str(tmp_path / "policy"), str(out)]) == (0 if kept else 1)
    said = capsys.readouterr()
    assert said.out.endswith(f"{kind}: {out}\n") if kept else "statistics.mean' differs" in said.err
    if kept:
        again = load_policy(out, stated=Stated(tokenizer=str(out / "tokenizer"))).state_dict()
        assert all(torch.equal(again[name], after[name]) for name in again)


# -- what is refused -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy=flow", "+policy.num_bins=3"], "policy.num_bins must be a setting"),
        (["policy=tokens", "+policy.sampler=sde"], "policy.sampler must be a setting"),
        (["policy=flow", "+policy.temperature=1"], "policy.temperature must be a setting"),
        (["policy=flow", "+policy.path=x"], "policy.path must be a setting"),
        (["policy=flow_checkpoint"], "policy.path must be given"),
        (["policy=flow_checkpoint", "policy.path=''"], "policy.path must be a path"),
        (["policy=flow", "policy.kind=flows"], r"policy.kind must be one of \['tokens', 'flow', "),
        (["policy=flow", "policy.sampler=ode"], "policy.sampler must be one of"),
        (["policy=flow", "policy.backbone.layers=0"], "policy.backbone.layers must be at least 1"),
        (
            ["policy=flow_checkpoint", "policy.path=a/b", "checkpoint=a/../a/b"],
            "checkpoint must be another folder than policy.path, got 'a/../a/b' for both",
        ),
        (["+evaluation.temperature=1"], "evaluation.temperature must be a setting"),
        (["env.cameras=[a,a]"], "env.cameras must be one or two different names"),
        (["device=gpu"], "device must be a torch device, got 'gpu'. Use cpu or cuda:0"),
    ],
    ids=str,
)
def test_settings_that_are_refused(overrides, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sft_settings(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy.sampler=cps", "policy.noise_level=2"], r"policy.noise_level must be at most 1"),
        (["policy.stochastic_step=4"], "policy.stochastic_step must be below 4"),
        (
            ["policy.backbone.model_type=smolvla", "env.image_size=48"],
            "policy.image_size must be",
        ),
    ],
)
def test_a_policy_that_cannot_be_made(run, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        run("policy=flow", *overrides)
    assert list(tmp_path.iterdir()) == []  # before anything is recorded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.chunk_size=8", "env.chunk_size must be 4 as the policy's in policy.path, got 8"),
        ("env.image_size=64", r"env.image_size must be \(32, 32\) as the policy's"),
        ("env.cameras=[agentview]", "number of env.cameras must be 2"),
        ("env.orientation=quaternion", "state_dim, which env.orientation decides, must be 8"),
        ("policy.stated.chunk_size=8", "stated.chunk_size must be 4"),
    ],
)
def test_a_checkpoint_that_does_not_fit(run, foreign, tmp_path, override, message):
    given = of_lerobot(foreign, tmp_path / "start")
    with pytest.raises(ValueError, match=f"^{message}"):
        run(*given, override, name="libero_vla")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_a_path_without_a_flow_policy(run):
    with pytest.raises(FileNotFoundError, match=r"folder must contain config.json, got .*nowhere"):
        run("policy=flow_checkpoint", "policy.path=nowhere")
    shipped = sft.CONFIG.parent / "checkpoints/libero_object"
    with pytest.raises(ValueError, match="policy.path must be the folder of a flow policy, got"):
        run("policy=flow_checkpoint", f"policy.path={shipped}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.chunk_size=8", r"chunk \[8, 7\], as env says, got .*chunk \[4, 7\]"),
        ("env.image_size=64", r"image \[3, 64, 64\].*got .* image \[3, 32, 32\]"),
        (
            "env.cameras=[agentview,robot0_eye_in_hand]",
            r"wrist_image \[3, 32, 32\], chunk",
        ),
        ("env.orientation=axis_angle", r"state \[8\], .*got .* state \[9\]"),
    ],
)
def test_demonstrations_of_other_sizes(run, tmp_path, override, message):
    write_demonstrations(tmp_path / "demonstrations", num=1)
    with pytest.raises(ValueError, match=f"^demonstrations.folder must hold .*{message}"):
        run("policy=flow", *TINY, override)


def test_a_demonstration_in_the_folder_of_another_task(run, tmp_path):
    folder = tmp_path / "demonstrations"
    write_demonstrations(folder, num=2)
    path = folder / "libero_object_3" / "000000.safetensors"
    path.unlink()
    path.with_name("000001.safetensors").rename(path)
    message = r"000000.safetensors with task 3 of libero_object, seed 1\. Delete it"
    with pytest.raises(ValueError, match=f"^demonstrations.folder must hold .*{message}"):
        run("policy=flow", *TINY)


def test_a_device_that_is_not_there(run, tmp_path):
    with pytest.raises(ValueError, match=r"^device must be one that torch sees, got 'cuda:64' and"):
        run("policy=flow", *TINY, "device=cuda:64")
    assert list(tmp_path.iterdir()) == []  # before anything is recorded


@pytest.mark.parametrize(("num", "success"), [(DEMOS, False), (1, True)])
def test_too_few_demonstrations_that_reached_the_goal(run, tmp_path, monkeypatch, num, success):
    folder = tmp_path / "demonstrations"
    monkeypatch.setattr(sft, "record_missing", lambda *args: None)
    write_demonstrations(folder, num=num, success=success)
    message = rf"at least two in which the expert reached the goal, got {int(success)} of {num} in "
    with pytest.raises(ValueError, match=f"^demonstrations must hold {message}.*num_per_task"):
        run("policy=flow", *TINY)


def test_demonstrations_of_other_tasks_are_not_read(tmp_path):
    write_demonstrations(tmp_path, num=4)
    broken = Demonstration.load(tmp_path / "libero_object_3" / "000001.safetensors")
    broken.rows["observation", "state"][:] = torch.nan
    for suite, task_id, seed in (("libero_goal", 3, 0), ("libero_object", 4, 0)):
        info = replace(broken.info, task_suite=suite, task_id=task_id, seed=seed)
        Demonstration(broken.rows, info).save(tmp_path / suite / f"{task_id}.safetensors")
    cfg = sft_settings("demonstrations.num_per_task=3")
    assert [demo.info.seed for demo in utils.make_demonstrations(cfg, tmp_path)] == [0, 1, 2]


def test_demonstrations_of_shuffled_objects_are_others(tmp_path):
    write_demonstrations(tmp_path, num=4)
    cfg = sft_settings("demonstrations.num_per_task=3", "env.shuffle_objects=true")
    with pytest.raises(ValueError, match="got 0 of 0"):
        utils.make_demonstrations(cfg, tmp_path)
    assert "env.shuffle_objects=true" in utils.training_settings(cfg, "policy")


# -- signals ---------------------------------------------------------------------------------------
@pytest.mark.slow  # three processes that import everything
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_during_an_evaluation_leaves_no_process(tmp_path, number):
    write_demonstrations(tmp_path / "demonstrations")
    program = Path(__file__).with_name("hanging_clone.py")
    process = subprocess.Popen(
        [sys.executable, program, "policy=flow", *SMALL, *TINY, "training.num_steps=1",
         "demonstrations.folder=demonstrations", "evaluation.num_processes=2"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)), start_new_session=True,
    )  # fmt: skip
    watchdog = threading.Timer(250, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        output = []
        for line in process.stdout:
            output.append(line)
            if sum("playing in process" in line for line in output) == 2:
                break
        pids = [int(pid) for pid in re.findall(r"playing in process (\d+)", "".join(output))]
        assert len(pids) == 2, "".join(output)
        handles = [os.pidfd_open(pid) for pid in pids]
        process.send_signal(number)
        status = process.wait()
        output += process.stdout.readlines()  # to its end: nobody holds it any more
        assert status == (-number if number == signal.SIGKILL else 128 + number), "".join(output)
        if number == signal.SIGTERM:
            assert "SIGTERM: ended; what was recorded is kept" in "".join(output)
            assert "Traceback" not in "".join(output)
        for handle in handles:  # readable once its process has ended
            assert wait([handle], 10) == [handle]
            os.close(handle)
    finally:
        watchdog.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def test_a_greedy_flow_is_the_same_each_time():
    cfg = sft_settings("policy=flow", *TINY)
    policy = utils.make_policy(cfg, [INSTRUCTION], state_dim=9)
    td = observation(torch.ones(1, 9)).set("language_instruction", INSTRUCTION)
    chunks = []
    for _ in range(2):
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            chunks.append(policy(td.clone())["vla_action", "chunk"])
    assert torch.equal(*chunks)
