# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensordict import TensorDict

from torchrl_dvla.collectors import EpisodeSpec, Evaluation
from torchrl_dvla.recipes.dvla_grpo import bookkeeping, train, utils, validation
from torchrl_dvla.recording import DASHBOARD, GracefulStop, RunCheckpoints, TrainingScenes

from .. import named_memory

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that one run may take; on two idle cores it takes fifteen.
DEADLINE_S = 140
FAILING = Path(__file__).with_name("failing_run.py")
#: A policy without transformers and small groups: the run is about the recipe, not about learning.
SMALL = [
    "--quick",
    "policy.kind=tiny_vla",
    "+policy.hidden_dim=16",
    "group.group_size=4",
    "group.groups_per_update=2",
    "workers.envs_per_worker=2",
    "optim.minibatch_size=32",
    "eval.num_episodes=4",
    "eval.subset_episodes=2",
    "eval.every_minutes=0",
    "optim.max_grad_norm=null",
    "train.timeout_s=null",
    "checkpoint.every_updates=2",
    "log.line_every_s=0",
    "train.max_minutes=null",
]
#: Metrics of settings that the run does not use, or of what need not happen in it.
_OCCASIONAL = (
    r"collector/env_steps_clipped|faults/|cluster/|groups/dropped_"
    r"|loss/(loss_entropy|loss_kl|kl_to_ref|clip_fraction_dual)"
)


class Run:
    """The recipe in a session of its own, whose processes can be told apart from all others.

    It is killed after DEADLINE_S, so that a run that hangs is an error and outlives no test.
    """

    def __init__(self, tmp_path, *overrides, program=("-m", "torchrl_dvla")):
        self.mark = f"DVLA_TEST_RUN={uuid.uuid4().hex}"
        self.tmp = Path(tempfile.mkdtemp(prefix="run-"))  # the paths of sockets must be short
        weakref.finalize(self, shutil.rmtree, self.tmp, ignore_errors=True)
        key, value = self.mark.split("=")
        env = dict(os.environ, TMPDIR=str(self.tmp), OMP_NUM_THREADS="1", **{key: value})
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        self.output = ""
        self.named_before = named_memory.named()
        self.process = subprocess.Popen(
            [sys.executable, *program, "train", *SMALL, f"log.dir={tmp_path / 'runs'}", *overrides],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.watchdog = threading.Timer(DEADLINE_S, self.kill)
        self.watchdog.daemon = True
        self.watchdog.start()

    def read_until(self, pattern):
        for line in self.process.stdout:
            self.output += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"{pattern!r} never came:\n{self.output}")

    def finish(self):
        self.output += self.process.stdout.read()
        return self.process.wait()

    def kill(self):
        self.watchdog.cancel()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()

    def left_over(self):
        """Processes, temporary files and shared memory of the run that outlived it."""
        alive = re.findall("resource_tracker: .*", self.output)
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environ.read_bytes().split(b"\0"):
                    alive.append((environ.parent / "cmdline").read_bytes().replace(b"\0", b" "))
            except OSError:
                continue  # gone, or another user's
        alive += [str(path) for path in self.tmp.rglob("*") if path.is_file()]
        return alive + [f"/dev/shm/{name}" for name in named_memory.left_behind(self.named_before)]


def _state(checkpoint, component):
    """What a training checkpoint holds of a component."""
    (file,) = checkpoint.glob(f"components/*-{component}/state.pt")
    return torch.load(file, weights_only=True)


def _scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return events, events.Tags()["scalars"]


@pytest.fixture(scope="module")
def interrupted_and_resumed(tmp_path_factory):
    """One run, ended by SIGTERM in the middle of training and then resumed to its end."""
    tmp_path = tmp_path_factory.mktemp("run")
    first = Run(tmp_path, "train.num_updates=1000")
    try:
        first.read_until(r" 3/1000 \[")
        asked_s = time.monotonic()
        # To all its processes at once, as `timeout` and systemd do: the harder case.
        os.killpg(first.process.pid, signal.SIGTERM)
        first.code = first.finish()
        first.end_s = time.monotonic() - asked_s
        first.remains = first.left_over()
        (first.folder,) = (tmp_path / "runs" / "toy").iterdir()
        first.checkpoint = RunCheckpoints(first.folder / "checkpoints").latest()
        RunCheckpoints(first.checkpoint.parent).load(first.checkpoint)  # compares the digests
        first.num_updates = _state(first.checkpoint, "run")["num_updates"]
        first.num_steps = _state(first.checkpoint, "optimizer")["state"][0]["step"]
        groups = _state(first.checkpoint, "collector")["buffer"]["_groups"]
        first.num_published = groups["counts"]["updates"]
        first.components = {p.name.partition("-")[2] for p in first.checkpoint.glob("components/*")}
        first.report = json.loads((first.folder / "report.json").read_text())
        updates = first.num_updates + 3
        second = Run(tmp_path, f"train.num_updates={updates}", "checkpoint.resume=auto")
        try:
            second.code = second.finish()
        finally:
            second.kill()
        second.remains = second.left_over()
        second.folders = list((tmp_path / "runs" / "toy").iterdir())
        second.report = json.loads((first.folder / "report.json").read_text())
    finally:
        first.kill()
    return first, second


@pytest.mark.slow
class TestRun:
    def test_sigterm_ends_it_within_ten_seconds_and_leaves_nothing(self, interrupted_and_resumed):
        first, _ = interrupted_and_resumed
        assert first.code == 128 + signal.SIGTERM
        assert first.end_s < 10
        assert "Traceback" not in first.output
        assert [run.remains for run in interrupted_and_resumed] == [[], []]

    def test_the_checkpoint_is_whole_and_not_older_than_the_signal(self, interrupted_and_resumed):
        first, _ = interrupted_and_resumed
        assert first.num_updates >= 3
        parts = {"policy", "optimizer", "scheduler", "collector", "rng", "run"}
        assert first.components == parts
        assert first.report["ended_by"] == "SIGTERM"
        assert first.report["checkpoint"] == str(first.checkpoint)
        assert first.report["after"] is None

    def test_an_update_that_was_left_does_not_count(self, interrupted_and_resumed):
        first, _ = interrupted_and_resumed
        assert first.num_published == first.num_updates

    def test_a_resumed_run_goes_on_and_ends(self, interrupted_and_resumed):
        first, second = interrupted_and_resumed
        assert second.code == 0, second.output
        assert second.folders == [first.folder]
        assert "decisions of its own version" not in second.output, "though weights were stepped"
        report = second.report
        assert report["num_updates"] == first.num_updates + 3
        assert report["ended_by"] == "update budget"
        # Greedy success before is what was measured then: it is not evaluated a second time.
        assert report["before"] == first.report["before"]
        assert second.output.count("evaluating:") == 1
        assert report["after"]["num_episodes"] == 4
        assert report["num_episodes"] > first.report["num_episodes"]
        assert report["training_s"] > first.report["training_s"]
        assert report["max_policy_lag"] <= 1
        final = RunCheckpoints(first.folder / "checkpoints").latest()
        assert _state(final, "run")["num_updates"] == report["num_updates"]
        # The toy task does not say which scene it plays, and so the record says that.
        (policy,) = final.glob("components/*-policy")
        assert TrainingScenes.load(policy) == TrainingScenes(gaps=["init states of toy"])
        assert _state(final, "optimizer")["state"][0]["step"] > first.num_steps

    def test_the_weight_version_goes_on(self, interrupted_and_resumed):
        first, second = interrupted_and_resumed
        events, _ = _scalars(first.folder)
        versions = [(e.step, e.value) for e in events.Scalars("weights/version")]
        assert versions == [(step, step) for step in range(1, second.report["num_updates"] + 1)]

    def test_every_scalar_is_documented(self, interrupted_and_resumed):
        first, _ = interrupted_and_resumed
        documented = _documented_metrics()
        _, names = _scalars(first.folder)
        assert len(names) > 40
        undocumented = [n for n in names if not any(re.fullmatch(d, n) for d in documented)]
        assert undocumented == []

    def test_every_documented_scalar_and_chart_is_there(self, interrupted_and_resumed):
        first, _ = interrupted_and_resumed
        _, names = _scalars(first.folder)

        def missing(patterns):
            return [p for p in patterns if not any(re.fullmatch(p, name) for name in names)]

        assert [p for p in missing(_documented_metrics()) if not re.match(_OCCASIONAL, p)] == []
        charts = {chart: tags for group in DASHBOARD.values() for chart, tags in group.items()}
        empty = {chart for chart, tags in charts.items() if missing(tags) == tags}
        assert empty <= {"faults", *DASHBOARD["Cluster"]}

    def test_tensorboard_has_videos_scenes_and_the_dashboard(self, interrupted_and_resumed):
        first, _ = interrupted_and_resumed
        events, names = _scalars(first.folder)
        images = events.Tags()["images"]
        assert "eval/start" in images
        assert len([name for name in images if re.fullmatch(r"eval/episode_\d_\w+", name)]) >= 2
        assert "custom_scalars__config__" in events.Tags()["tensors"]
        for name in ("eval/success_rate", "eval_subset/success_rate", "lane/sampling_busy"):
            assert name in names

    def test_plan_pools_and_end_table_are_printed(self, interrupted_and_resumed):
        _, second = interrupted_and_resumed
        plan, pools = second.output.split("evaluating:")
        assert re.search(r"^groups at once +4 of 4: 2 an update, lag 1$", plan, re.MULTILINE)
        assert re.search(r"^model pool +\S+ KiB reserved, \S+ KiB used", pools, re.MULTILINE)
        for label in ("greedy success before", "greedy success after", "lanes busy", "policy lag"):
            assert re.search(rf"^{label}  +\S", second.output, re.MULTILINE)


def _documented_metrics():
    """Regular expressions of the names in the tables of the guide's page on metrics."""
    page = (ROOT / "docs" / "source" / "guide" / "metrics.md").read_text()
    names = []
    for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            name = re.escape(name).replace(re.escape("..."), r"\w+")
            names.append(re.sub(r"<\w+>", r"\\w+", name))
    return names


def test_a_run_without_contrast_ends_with_its_time_budget(tmp_path):
    # Nothing ever succeeds: no group is learned from, and the learner waits for one.
    run = Run(tmp_path, "env.success_tol=0.0001", "train.max_minutes=0.05", "eval.num_episodes=2")
    try:
        assert run.finish() == 0, run.output
    finally:
        run.kill()
    assert "ended by time budget, waiting for a group with contrast" in run.output
    assert not run.left_over()


def test_a_run_without_updates_evaluates_and_that_is_all(tmp_path):
    run = Run(tmp_path, "train.num_updates=0")
    try:
        assert run.finish() == 0, run.output
    finally:
        run.kill()
    (report,) = tmp_path.glob("runs/toy/*/report.json")
    report = json.loads(report.read_text())
    assert report["before"]["num_episodes"] == 4 and report["after"] is None
    assert not list(tmp_path.glob("runs/toy/*/checkpoints/update-*"))


def test_a_solved_task_ends_well_also_if_nobody_reads_what_it_says(tmp_path):
    # One random action in five is a success, and an episode has 64.
    task = ["env.success_tol=0.5", "env.success_steps=1", "workers.max_decisions=64"]
    run = Run(tmp_path, *task, "group.max_no_signal_groups=6", "eval.every_minutes=null")
    try:
        run.read_until("all rollouts of 6 groups in a row succeeded: nothing is left to learn")
        run.process.stdout.close()  # as `| head` does
        assert run.process.wait() == 0
    finally:
        run.kill()
    assert run.output.count("groups in a row had nothing to learn from") <= 2
    (report,) = tmp_path.glob("runs/toy/*/report.json")
    report = json.loads(report.read_text())
    assert (report["ended_by"], report["num_updates"]) == ("a solved task", 0)
    assert report["after"]["num_episodes"] == 4
    assert Path(report["checkpoint"]).is_dir()


@pytest.mark.slow
def test_a_learner_that_raises_leaves_a_checkpoint(tmp_path, settings):
    program = (FAILING, "learner")
    # No checkpoint is due before the error.
    run = Run(tmp_path, "eval.num_episodes=0", "checkpoint.every_updates=1000", program=program)
    try:
        assert run.finish() == 1, run.output
    finally:
        run.kill()
    assert "ArithmeticError: injected after 2 updates" in run.output
    assert "ArithmeticError: saving a checkpoint" in run.output
    assert run.left_over() == []
    (path,) = tmp_path.glob("runs/toy/*/checkpoints/update-*")
    assert _state(path, "run")["num_updates"] == 2
    buffer = _state(path, "collector")["buffer"]
    assert buffer["_groups"]["counts"]["updates"] == 2
    assert buffer["_plan"]["update"] == 2 and buffer["_plan"]["position"] == 1, "it goes on there"
    cfg = settings("toy", *SMALL[1:])
    policy = utils.make_policy(cfg)
    validation.check_policy(cfg, policy)  # makes the lazy parameters
    assert RunCheckpoints(path.parent, policy=policy).load(path)["update"] == 2
    assert all(bool(parameter.isfinite().all()) for parameter in policy.parameters())
    assert _state(path, "optimizer")["state"][0]["step"] >= 2


@pytest.mark.slow
def test_a_last_evaluation_that_fails_leaves_checkpoint_and_report(tmp_path):
    arguments = ("train.num_updates=2", "eval.num_episodes=4", "eval.subset_episodes=0")
    run = Run(tmp_path, *arguments, program=(FAILING, "evaluation"))
    try:
        assert run.finish() == 1, run.output
        assert "RuntimeError: injected after 2 updates" in run.output
        (report,) = tmp_path.glob("runs/toy/*/report.json")
        (trace,) = tmp_path.glob("runs/toy/*/timeline.json")
        written = trace.read_text()
        # Resumed, its budget is spent: it evaluates at once, and samples nothing for training.
        run = Run(tmp_path, *arguments, "checkpoint.resume=auto")
        assert run.finish() == 0, run.output
    finally:
        run.kill()
    report = json.loads(report.read_text())
    assert (report["num_updates"], report["ended_by"]) == (2, "update budget")
    assert report["after"]["num_episodes"] == 4
    assert trace.read_text() == written


@pytest.mark.parametrize(("value", "num_saved"), [(1.0, 1), (float("nan"), 0), (float("inf"), 0)])
def test_only_finite_weights_are_saved_after_an_error(capsys, value, num_saved):
    policy = torch.nn.Linear(2, 1)
    with torch.no_grad():
        policy.weight[0, 1] = value
    saved = []
    bookkeeping.save_after(ArithmeticError("no"), policy, lambda: saved.append(1))
    assert len(saved) == num_saved
    expected = "saving a checkpoint" if num_saved else "the weights hold NaN or infinity"
    assert f"ArithmeticError: {expected}" in capsys.readouterr().out


def test_an_evaluation_that_fails_does_not_end_the_training(capsys):
    collector = MagicMock()
    collector.replay_buffer.groups.quarantined = {"bad"}
    good, bad = EpisodeSpec("good", 0), EpisodeSpec("bad", 0)
    for episodes in ([good, bad], [bad]):
        train.begin_evaluation(collector, episodes)
    collector.evaluate.assert_called_once_with([good], num_frames_episodes=0)
    assert "not evaluated: 1 episodes, for bad is quarantined" in capsys.readouterr().out
    evaluation = Evaluation([good], greedy=True, num_frames_episodes=0)
    with pytest.raises(TimeoutError, match=r"more than timeout_s=0.01 s: 0 of 1 episodes"):
        evaluation.result(0.01)
    evaluation.fail(RuntimeError("It crashed."))
    assert train.result_of(evaluation) is None
    assert "training goes on. It crashed." in capsys.readouterr().out


@pytest.mark.parametrize(("observed", "num_kept"), [("image", 2), ("state", 0)])
def test_an_environment_without_a_camera_has_no_videos(observed, num_kept):
    collector = MagicMock()
    collector.replay_buffer.groups.quarantined = set()
    rows = TensorDict({"observation": {observed: torch.zeros(3)}}, [])
    collector.memory.environment.rows = rows
    episodes = [EpisodeSpec("task", 0)]
    train.begin_evaluation(collector, episodes, num_videos=2)
    collector.evaluate.assert_called_once_with(episodes, num_frames_episodes=num_kept)


def test_micro_batches_of_a_minibatch_hold_whole_rollouts_where_a_ratio_needs_them():
    batch = TensorDict({"num_decisions": torch.tensor([3, 3, 3, 2, 2, 4, 4, 4, 4])[:, None]}, [9])
    whole, rows = (MagicMock(needs_whole_rollouts=needed) for needed in (True, False))
    assert [len(part) for part in train.micro_batches(batch, 4, rows)] == [4, 4, 1]
    assert [len(part) for part in train.micro_batches(batch, None, rows)] == [9]
    assert [len(part) for part in train.micro_batches(batch, 5, whole)] == [5, 4]
    assert [len(part) for part in train.micro_batches(batch, None, whole)] == [9]
    with pytest.raises(ValueError, match="micro_batch_size must be at least 4"):
        train.micro_batches(batch, 3, whole)


def test_an_update_of_whole_rollouts_through_the_recipe(settings, capsys):
    cfg = settings(
        "toy", "policy.kind=tiny_vla", "group.group_size=4", "group.groups_per_update=1",
        "workers.envs_per_worker=4", "workers.num_workers=1", "eval.num_episodes=0",
        "optim.minibatch_size=8", "optim.micro_batch_size=4", "train.num_updates=2",
        "group.on_no_signal=keep", "group.max_no_signal_groups=1",
        "loss.ratio_level=trajectory", "loss.reduction=trajectory_mean",
    )  # fmt: skip
    with GracefulStop() as stop:
        train.train(cfg, stop)
    assert re.search(r"updates +2\n", capsys.readouterr().out)


def test_an_error_while_saving_does_not_hide_the_first(capsys):
    def save():
        raise OSError("disk full")

    bookkeeping.save_after(ArithmeticError("no"), torch.nn.Linear(2, 1), save)
    assert "it could not be saved: OSError('disk full')" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_learn_and_one_goes_on_from_their_checkpoint(tmp_path):
    ranks = ["policy.kind=tiny", "learner.num_ranks=2", "eval.num_episodes=0"]
    runs = []
    for overrides in (
        ["train.num_updates=2", *ranks],
        ["train.num_updates=3", *ranks, "learner.num_ranks=1", "checkpoint.resume=auto"],
    ):
        run = Run(tmp_path, *overrides)
        try:
            assert run.finish() == 0, run.output
        finally:
            run.kill()
        assert run.left_over() == []
        runs.append(run)
    assert "'learner.num_ranks' is 1 instead of 2" in runs[1].output
    (folder,) = (tmp_path / "runs" / "toy").iterdir()
    first, second = sorted((folder / "checkpoints").glob("update-*"))
    assert len(list(first.glob("components/*-optimizer/*.distcp"))) == 2  # a file a rank
    entries = _state(second, "optimizer")["state"]
    # Minibatches of 32 rows, two epochs: as many steps as the schedule has counted.
    steps = {int(entry["step"]) for entry in entries.values()}
    assert steps == {_state(second, "scheduler")["last_epoch"]}
    assert min(steps) > 2
    report = json.loads((folder / "report.json").read_text())
    assert report["num_updates"] == 3
    assert report["max_policy_lag"] <= 1
