# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import operator
import os
import random
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchrl.checkpoint import CheckpointError, GlobalRNGState

from torchrl_dvla.recording import RunCheckpoints, find_latest_checkpoint


class Value:
    """A component that is one value."""

    def __init__(self, value=None):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight


def _policy(width=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))


def _save(folder, update, value=None, **kwargs):
    return RunCheckpoints(folder, policy=_policy(), value=Value(value), **kwargs).save(update)


def _load(path, **components):
    """Load a checkpoint; without components, return the value in it."""
    value = Value()
    RunCheckpoints(path.parent, **(components or {"value": value})).load(path)
    return value.value


def _updates(folder):
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("update-*"))


def _visible(folder):
    return sorted(name for name in os.listdir(folder) if name != ".lock")


@pytest.fixture
def checkpoint(tmp_path):
    return _save(tmp_path / "checkpoints", 5, {"lr": 0.5})


def test_round_trip(tmp_path):
    policy, other = _policy(), _policy(seed=1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    policy(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = RunCheckpoints(tmp_path, policy=policy, optimizer=optimizer)
    saved.register("late", Value((1, [2.5, None], {3: "x"})))
    saved.save(5, config={"seed": 3})
    late, other_optimizer = Value(), torch.optim.AdamW(other.parameters(), lr=9.0)
    loaded = RunCheckpoints(tmp_path, policy=other, optimizer=other_optimizer, late=late)
    metadata = loaded.load(loaded.latest(), ["policy", "optimizer"])
    assert (metadata["update"], metadata["config"]) == (5, {"seed": 3})
    assert torch.equal(other[0].weight, policy[0].weight)
    assert other_optimizer.param_groups[0]["lr"] == 0.1
    assert late.value is None
    loaded.load(loaded.latest(), ["late"])
    assert late.value == (1, [2.5, None], {3: "x"})


def test_random_generators_continue(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, rng=GlobalRNGState())
    path = checkpoints.save(1)
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    checkpoints.load(path)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_tied_weights(tmp_path):
    policy, other = Tied(), Tied()
    _load(RunCheckpoints(tmp_path, policy=policy).save(1), policy=other)
    assert torch.equal(other.head.weight, policy.head.weight)
    assert other.head.weight is other.table.weight


def test_a_view_is_saved_without_the_storage_behind_it(tmp_path):
    path = _save(tmp_path, 1, torch.zeros(1_000_000)[3:5])
    assert sum(file.stat().st_size for file in path.rglob("*")) < 20_000
    assert _load(path).tolist() == [0.0, 0.0]


# -- which checkpoints stay, and which is the newest ----------------------------------------------
@pytest.mark.parametrize(
    ("saves", "left"),
    [
        ([(1, 2), (2, 2), (10, 2)], [2, 10]),
        ([(1, 1), (1, 1)], [1]),
        # 75 proved bad, and the run was resumed from 50: the one just written is the newest.
        ([(50, 2), (75, 2), (60, 2)], [50, 60]),
        ([(50, 2), (75, 2), (60, 1)], [60]),
        ([(25, 3), (50, 3), (75, 3), (30, 2), (30, 2)], [25, 30]),
    ],
)
def test_rotation(tmp_path, saves, left):
    for value, (update, keep_last) in enumerate(saves):
        path = _save(tmp_path, update, value, keep_last=keep_last)
        assert RunCheckpoints(tmp_path).latest() == path
        assert _load(path) == value
    assert _updates(tmp_path) == left
    assert len(_visible(tmp_path)) == len(left)


def test_the_clock_may_be_set_back(tmp_path, monkeypatch):
    path = _save(tmp_path, 1, "old")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["created_at"] = "2999-01-01T00:00:00+00:00"
    (path / "manifest.json").write_text(json.dumps(manifest))
    _save(tmp_path, 1, "new")
    assert _load(RunCheckpoints(tmp_path).latest()) == "new"


def test_the_newest_is_that_of_most_updates_in_the_newest_run(tmp_path):
    assert find_latest_checkpoint(tmp_path) is None
    newest = _save(tmp_path / "2026-02-01_seed0" / "checkpoints", 20)
    older = _save(tmp_path / "2026-02-01_seed0" / "checkpoints", 10, keep_last=2)
    _save(tmp_path / "2026-02-01_seed0" / "checkpoints", 20)
    _save(tmp_path / "2026-01-01_seed0" / "checkpoints", 90)
    (tmp_path / "2026-03-01_seed0" / "checkpoints" / "update-00000007").mkdir(parents=True)
    os.utime(older)  # after a copy, file times mean nothing
    assert find_latest_checkpoint(tmp_path) == newest


def test_the_third_save_of_an_update_counts_though_the_second_is_still_there(tmp_path, monkeypatch):
    module = sys.modules[RunCheckpoints.__module__]
    _save(tmp_path, 42)
    _save(tmp_path, 42)
    monkeypatch.setattr(module, "_remove", lambda path: None)  # killed before it
    third = _save(tmp_path, 42)
    assert RunCheckpoints(tmp_path).latest() == third


# -- a save that fails, or is killed --------------------------------------------------------------
def test_a_failed_save_leaves_the_previous_one_and_nothing_else(tmp_path):
    _save(tmp_path, 1)
    with pytest.raises(TypeError, match=r"Value\.state_dict\(\) must return .* got something else"):
        _save(tmp_path, 2, object())
    assert _visible(tmp_path) == ["update-00000001"]


def test_a_lazy_policy_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="must be initialised before it is saved, got a lazy 'wei"):
        RunCheckpoints(tmp_path, policy=nn.LazyLinear(2)).save(1)


def _save_until(folder, update, point):
    """Save in a process that ends at once at its ``point``-th file operation; whether it did."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = [point]

    def end(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree"):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    sys.addaudithook(end)
    try:
        _save(folder, update, "new", keep_last=1)
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("before", [[10], [9, 12]], ids=str)
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(tmp_path, monkeypatch, before):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power cut here
    for update in before:
        _save(tmp_path / "before", update, "old")
    for point in range(500):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(point))
        was_killed = _save_until(folder, 10, point)
        assert _load(RunCheckpoints(folder).latest()) in ("old", "new")
        if not was_killed:
            break
        _save(folder, 10, "after", keep_last=1)
        assert len(_visible(folder)) == 1, "what the killed process left is removed"
        assert _load(RunCheckpoints(folder).latest()) == "after"
        shutil.rmtree(folder)
    assert point > 20 and not was_killed
    assert _updates(folder) == [10]


def test_opening_a_folder_leaves_the_partial_files_of_another_process(tmp_path):
    class Other(Value):
        def state_dict(self):
            (partial,) = tmp_path.glob(".update-*")
            RunCheckpoints(tmp_path).latest()
            assert partial.exists()
            return {}

    RunCheckpoints(tmp_path, value=Other()).save(1)
    assert _visible(tmp_path) == ["update-00000001"]


# -- damage ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("component", ["policy", "value"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-7], r"state\.pt' is \w{64} instead of \w{64}: truncated, or"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "or changed .* Resume"),
        (None, r"state\.pt' is missing"),
    ],
    ids=["truncated", "flipped bit", "missing"],
)
def test_a_damaged_file_is_found(checkpoint, component, damage, message):
    (file,) = checkpoint.glob(f"components/*-{component}/*")
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(content))
    with pytest.raises(CheckpointError, match=message):
        _load(checkpoint)


def test_a_file_that_was_added_is_found(checkpoint):
    (checkpoint / "components" / "extra.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"'components/extra\.pt' is unknown"):
        _load(checkpoint)


def test_a_damaged_manifest_is_found(checkpoint):
    manifest = checkpoint / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content[:40])
    with pytest.raises(CheckpointError, match="manifest.json' must be .* got: Invalid"):
        _load(checkpoint)
    for key, value in (("container", NAN), ("checkpoint_id", None), ("created_at", 3)):
        manifest.write_text(json.dumps(json.loads(content) | {key: value}))
        with pytest.raises(CheckpointError, match=f"'manifest.{key}' must be "):
            _load(checkpoint)
    record = json.loads(content)
    manifest.write_text(json.dumps({key: record[key] for key in record if key != "metadata"}))
    with pytest.raises(CheckpointError, match=r"manifest\.json' must be .* got: "):
        _load(checkpoint)
    record["components"]["value"]["adapter_version"] = -7
    manifest.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="as 'value', got: none, or one written for another"):
        _load(checkpoint)
    manifest.write_text(json.dumps(json.loads(content) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="Unsupported newer checkpoint format version 99"):
        _load(checkpoint)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        _load(checkpoint)
    assert RunCheckpoints(checkpoint.parent).latest() is None


def test_another_architecture_is_refused_and_nothing_is_copied(checkpoint):
    wider = _policy(width=4)
    before = wider[1].bias.clone()
    message = r"'policy\.0\.weight' must be float32 \[4, 2\], got .* \[3, 2\].*settings"
    with pytest.raises(CheckpointError, match=message):
        _load(checkpoint, policy=wider)
    assert torch.equal(wider[1].bias, before)
    with pytest.raises(
        CheckpointError, match=r"'policy\.weight' is missing; .*\.0\.weight' is unk"
    ):
        _load(checkpoint, policy=nn.Linear(2, 1))


def _components():
    """What a run saves, after one step."""
    policy = _policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    policy(torch.ones(1, 2)).sum().backward()
    optimizer.step(), scheduler.step()
    parts = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler}
    return parts | {"rng": GlobalRNGState()}


def _rewrite(path, component, content):
    """Put ``content``, a state or bytes, into a component's file, with its digest made anew."""
    (file,) = path.glob(f"components/*-{component}/state.pt")
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    manifest = json.loads((path / "manifest.json").read_text())
    name = file.relative_to(path).as_posix()
    manifest["metadata"]["sha256"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


REMOVED = object()
NAN, ONES = float("nan"), torch.ones(3, 2)
WORDS = torch.ones(624, dtype=torch.int64)
# fmt: off
DAMAGE = {
    "policy/0.weight": [REMOVED, ONES.T.clone(), ONES.double(), ONES * NAN, "text"],
    "policy/foreign": [ONES],
    "optimizer/param_groups": [REMOVED, []],
    "optimizer/param_groups/0/lr": [REMOVED, NAN, -0.1, "fast"],
    "optimizer/param_groups/0/eps": [10**400],
    "optimizer/param_groups/0/betas": [(0.9, 5.0), (0.9,)],
    "optimizer/param_groups/0/amsgrad": [7],
    "optimizer/param_groups/0/params": [[0, 1, 3, 2], [0, 1, 2]],
    "optimizer/state": [[1, 2]],
    "optimizer/state/9": [{"step": torch.tensor(1.0)}],
    "optimizer/state/0": ["text"],
    "optimizer/state/0/exp_avg": [REMOVED, torch.ones(1, 2), ONES * NAN],
    "optimizer/state/0/exp_avg_sq": [-ONES],
    "optimizer/state/0/max_exp_avg_sq": [ONES],
    "optimizer/state/0/step": [torch.tensor(-1.0), torch.tensor(float("inf")), torch.tensor(1j)],
    "scheduler/last_epoch": [-1, 1.5, "text"],
    "scheduler/_step_count": [REMOVED],
    "scheduler/_is_initial": [NAN, 2],
    "scheduler/base_lrs": [[NAN], [0.1, 0.1]],
    "scheduler/_last_lr": [0.1, [-0.1]],
    "scheduler/optimizer": [3],
    "rng/torch_cpu": [REMOVED, *(torch.zeros(size, dtype=torch.uint8) for size in (9, 5056))],
    "rng/python": [(3, (1, 2), None), (3, (-1,) * 625, None), (3, (1,) * 624 + (0,), "text")],
    "rng/numpy": [
        ("PCG64", WORDS, 0, 0, 0.0), ("MT19937", WORDS * 2**32, 0, 0, 0.0),
        ("MT19937", WORDS, 625, 0, 0.0), ("MT19937", WORDS, 0, 0, NAN),
    ],
}
# fmt: on


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return RunCheckpoints(tmp_path_factory.mktemp("run"), **_components()).save(5)


@pytest.mark.parametrize("entry", DAMAGE)
def test_a_foreign_entry_is_refused_by_name_and_nothing_is_loaded(whole, tmp_path, entry):
    path = shutil.copytree(whole, tmp_path / "copy")
    component, *parts = entry.split("/")
    (file,) = path.glob(f"components/*-{component}/state.pt")
    *parents, last = (int(part) if part.isdecimal() else part for part in parts)
    for value in DAMAGE[entry]:
        state = torch.load(whole / file.relative_to(path), weights_only=True)
        node = functools.reduce(operator.getitem, parents, state)
        node[last] = value
        if value is REMOVED:
            del node[last]
        _rewrite(path, component, state)
        live = _components()
        before = [copy.deepcopy(live[name].state_dict()) for name in ("policy", "optimizer")]
        generators = torch.get_rng_state()
        with pytest.raises(CheckpointError, match="Resume from an older checkpoint") as info:
            RunCheckpoints(path.parent, **live).load(path)
        named = f"'{entry.replace('/', '.')}"
        assert named in str(info.value) or "a generator refuses" in str(info.value)
        after = [live[name].state_dict() for name in ("policy", "optimizer")]
        assert str(after) == str(before) and torch.equal(torch.get_rng_state(), generators)


def test_a_checkpoint_of_another_machine_and_version_is_loaded(whole, tmp_path, caplog):
    path, live = shutil.copytree(whole, tmp_path / "copy"), _components()
    rng, optimizer = live["rng"].state_dict(), live["optimizer"].state_dict()
    _rewrite(path, "rng", rng | {"torch_cuda": [torch.zeros(16, dtype=torch.uint8)] * 99})
    del optimizer["param_groups"][0]["decoupled_weight_decay"]  # as PyTorch 2.6 did not know it
    optimizer["param_groups"][0]["of_the_future"] = 1
    _rewrite(path, "optimizer", optimizer)
    RunCheckpoints(path.parent, **live).load(path)
    assert live["optimizer"].param_groups[0]["decoupled_weight_decay"]
    assert "states of 99 cuda generators are not loaded, got" in caplog.text
    _rewrite(path, "optimizer", torch.optim.SGD(_policy().parameters()).state_dict())
    with pytest.raises(CheckpointError, match=r"'optimizer\.param_groups\.0\.betas' is missing"):
        RunCheckpoints(path.parent, **live).load(path)


def test_memory_holds_one_component_at_a_time(tmp_path):
    found = []

    class Large(Value):
        def load_state_dict(self, state_dict):
            state_dict["value"].sum()
            status = Path("/proc/self/status").read_text()
            found.append(int(status.partition("RssAnon:")[2].split()[0]))

    parts = {name: Large(torch.ones(10_000_000)) for name in "abc"}  # 40 MB each
    path = RunCheckpoints(tmp_path, **parts).save(1)
    parts["a"].load_state_dict(parts["a"].state_dict())
    _load(path, **parts)
    assert len(found) == 4 and max(found) - found[0] < 60_000


@pytest.mark.parametrize("component", ["policy", "optimizer", "scheduler", "rng"])
def test_a_damaged_file_with_its_digest_made_anew_is_refused(whole, tmp_path, component):
    path = shutil.copytree(whole, tmp_path / "copy")
    (file,) = path.glob(f"components/*-{component}/state.pt")
    content = file.read_bytes()
    refused = [b"", content[: len(content) // 2], b"text", [1, 2], "text", None, {}, {1: 2}]
    flipped = [
        content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
        for at in range(0, len(content), max(1, len(content) // 60))
    ]
    for damaged in (*refused, *flipped):
        _rewrite(path, component, damaged)
        try:
            RunCheckpoints(path.parent, **_components()).load(path)
        except CheckpointError as error:
            assert f"{component}" in str(error)
        else:
            assert damaged in flipped, "only the value of a number may have changed"


@pytest.mark.parametrize(
    "content", ["[]", "3", "{}", '{"format": 1}', "\0", '{"metadata": {}}', "x" * 99]
)
@pytest.mark.parametrize("entry", [None, "metadata", "components"])
def test_a_manifest_of_anything_else_counts_for_nothing(checkpoint, content, entry):
    manifest = checkpoint / "manifest.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(whole | {entry: content}) if entry else content)
    with pytest.raises(CheckpointError, match=r"manifest\.json' must be .* got: .* older"):
        _load(checkpoint)
    assert find_latest_checkpoint(checkpoint.parents[1]) is None
    assert _save(checkpoint.parent, 6) == RunCheckpoints(checkpoint.parent).latest()


def test_other_optimizers_and_schedules_round_trip(tmp_path):
    for number, (kind, options) in enumerate(
        [
            (torch.optim.SGD, {"momentum": 0.9}),
            (torch.optim.SGD, {}),
            (torch.optim.Adagrad, {}),
            (torch.optim.Adafactor, {}),
            (torch.optim.Adam, {"amsgrad": True}),
            (torch.optim.LBFGS, {}),
        ]
    ):
        parts = []
        for _ in range(2):
            policy = _policy()
            optimizer = kind(policy.parameters(), lr=0.01, **options)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            schedule.trend = None  # a subclass may have it
            parts.append({"optimizer": optimizer, "scheduler": schedule, "policy": policy})

        def closure(policy=parts[0]["policy"]):
            loss = policy(torch.ones(1, 2)).square().sum()
            loss.backward()
            return loss

        closure()
        parts[0]["optimizer"].step(closure)
        parts[0]["scheduler"].step(-1.0)
        parts[0]["scheduler"].trend = (-0.5, "falling")
        path = RunCheckpoints(tmp_path / str(number), **parts[0]).save(1)
        _load(path, **parts[1])
        assert str(parts[1]["optimizer"].state_dict()) == str(parts[0]["optimizer"].state_dict())
        assert parts[1]["scheduler"].best == -1.0
        assert parts[1]["scheduler"].trend == (-0.5, "falling")


# -- a full disk ----------------------------------------------------------------------------------
@contextlib.contextmanager
def _full_disk(num_bytes):
    """No file of more than ``num_bytes`` can be written: the kernel refuses, as for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [0, 100, 5_000, 20_000])
def test_a_full_disk_is_named_and_the_next_save_tries_again(tmp_path, caplog, num_bytes):
    policy = nn.Linear(100, 100)  # 40,400 bytes
    checkpoints = RunCheckpoints(tmp_path, policy=policy)
    checkpoints.save(1)
    with _full_disk(num_bytes):
        with pytest.raises(OSError, match="it needs 40400 bytes, and .* are free.*Earlier") as info:
            checkpoints.save(2)
        assert str(tmp_path) in str(info.value)
        assert checkpoints.save(3, on_disk_error="warn") is None
    assert "The checkpoint of update 3 must be written" in caplog.text
    assert "Training goes on, and the next save tries again." in caplog.text
    assert _visible(tmp_path) == ["update-00000001"]
    _load(checkpoints.latest(), policy=nn.Linear(100, 100))
    assert checkpoints.save(4) == checkpoints.latest()


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(tmp_path, monkeypatch, caplog):
    _save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: os.listdir(tmp_path / "none"))
        assert _save(tmp_path, 2, keep_last=1) == RunCheckpoints(tmp_path).latest()
    assert "update-00000001 must be removed, got" in caplog.text
    _save(tmp_path, 3, keep_last=1)
    assert _updates(tmp_path) == [3]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="must be written to .*got Not a directory"):
        _save(tmp_path / "file" / "checkpoints", 1)


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        RunCheckpoints(tmp_path, keep_last=0)
