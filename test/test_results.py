# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The tables of results are what scripts/results.py makes of the raw results that are kept."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

spec = importlib.util.spec_from_file_location("results", ROOT / "scripts" / "results.py")
assert spec is not None and spec.loader is not None
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)

ROWS = """
[[row]]
question = "How fast?"
files = "benchmarks/speed.json"
answer = "{spread.ratio} times, {share:.0%}, failed: {failed}"
options = "--all"
readme = true

[[row]]
question = "What is learned?"
files = "runs/toy_seed*.json"
answer = '''{before:g} of {num_scenes}, {after:g}; {num_env_steps:,.0f}; {minutes:.1f};
{worst_drop:.0%}; {num_looks:g}; {runs}'''
"""
SPEED = {
    "benchmark": "speed",
    "spread": {"ratio": {"median": 2.5, "min": 2.0, "max": 3.0}},
    "share": 0.25,
    "failed": {"one at /home/me/venvs/rllib": "no wheel in /tmp/x/wheels"},
    "machine": {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "load": 0.5},
    "quick": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results without any, but two rows."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "rows.toml").write_text(ROWS)
    return tmp_path


def make_run(folder: Path, seed: int, before: int, after: int | None, rates: str) -> Path:
    """The folder of a run: what train leaves with log.backend=csv."""
    run = folder / f"run{seed}_{after}"
    report = {
        "name": f"toy, seed {seed}",
        "before": {"num_successes": before, "num_episodes": 50},
        "after": None if after is None else {"num_successes": after, "num_episodes": 50},
        "num_env_steps": 1000 * before,
        "num_episodes": 7,
        "training_s": 60.0 * before,
        "checkpoint": "/tmp/secret/update-1",
    }
    for name, curve in {"eval": "0,0.1\n", "eval_subset": rates}.items():
        (run / "scalars" / name).mkdir(parents=True)
        (run / "scalars" / name / "success_rate.csv").write_text(curve)
    (run / "report.json").write_text(json.dumps(report))
    command = f"# torchrl-dvla train --config-name toy lr=1 seed={seed} log.dir=/tmp/secret/runs"
    (run / "settings.yaml").write_text(f"{command}\nseed: {seed}\n")
    return run


@pytest.mark.parametrize("page", [results.README, results.PAGE], ids=lambda page: page.name)
def test_the_table_of_a_page_is_made_of_the_files_that_are_kept(page: Path) -> None:
    made, _ = results.table(page)
    assert made.count("\n") > 4
    assert results.with_table(page.read_text(), made) == page.read_text(), "make results"


def test_every_file_that_is_kept_is_of_a_row() -> None:
    rows = tomllib.loads((RESULTS / "rows.toml").read_text())["row"]
    of_rows = {path for row in rows for path in RESULTS.glob(row["files"])}
    assert {path for path in RESULTS.rglob("*.json") if path not in of_rows} == set()


def test_a_missing_file_drops_its_row_and_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(RESULTS, tmp_path / "results")
    before, missing = results.table(results.PAGE, folder)
    (folder / "benchmarks" / "loss.json").unlink()
    after, missing_now = results.table(results.PAGE, folder)
    dropped = set(before.splitlines()) - set(after.splitlines())
    assert [line.startswith("| What does the loss cost") for line in dropped] == [True]
    assert set(missing_now) - set(missing) == {"benchmarks/loss.json"}


def test_rows_ask_for_what_benchmarks_report() -> None:
    num_keys = 0
    for row in tomllib.loads((RESULTS / "rows.toml").read_text())["row"]:
        script = ROOT / row["files"].replace(".json", ".py")
        if not script.is_file():
            continue
        text = script.read_text()
        beside = [script.with_name(f"{name}.py") for name in re.findall(r"^from (\w+)", text, re.M)]
        text += "".join(path.read_text() for path in beside if path.is_file())
        for key in re.findall(r"\{([^.:}]+)", row["answer"]):
            assert key == "reach" or re.search(rf"\b{key}\b", text), (script.name, key)
            num_keys += 1
    assert num_keys > 40


def test_a_benchmark_by_hand(folder: Path) -> None:
    output = folder / "speed.out"
    output.write_text(f"a line before\n{json.dumps(SPEED)}\n")
    kept = results.keep(output, folder)
    assert json.loads(kept.read_text())["failed"] == {"one at rllib": "no wheel in wheels"}
    made, missing = results.table(results.README, folder)
    assert made.splitlines()[2] == (
        "| How fast? | 2.5 (2.0 to 3.0) times, 25%, failed: one at rllib "
        "([raw](docs/results/benchmarks/speed.json)) | "
        "`.venv/bin/python benchmarks/speed.py --all` |"
    )
    assert made.splitlines()[-1] == "Measured on: 2 cores, Intel Xeon."
    assert (
        results.table(results.PAGE, folder)[0]
        .splitlines()[2]
        .endswith("| 2 cores, Intel Xeon, load 0.5: `docs/results/benchmarks/speed.json` |")
    )
    assert missing == []  # the other row is not the README's
    output.write_text(json.dumps(SPEED | {"quick": True}))
    results.keep(output, folder)
    assert "**quick run**" in results.table(results.README, folder)[0]


def test_a_value_that_a_benchmark_does_not_have_is_named(folder: Path) -> None:
    (folder / "benchmarks" / "speed.json").write_text(json.dumps(SPEED | {"spread": {}}))
    with pytest.raises(KeyError, match=r"\{spread.ratio\} is not in .* benchmarks/speed.py"):
        results.table(results.README, folder)


def test_reach_ends_where_a_policy_is_no_longer_efficient(folder: Path) -> None:
    rows = [("3 B", 8, 1.0), ("3 B", 16, 0.9), ("3 B", 32, 0.89), ("3 B", 64, 0.95)]
    rows += [("7 B", 16, 1.0), ("1 T", 8, None), ("1 T", 1024, 1.0)]  # None: does not fit
    predicted = [
        {"policy": policy, "nodes": nodes, "feasible": bool(found), "efficiency": found}
        for policy, nodes, found in rows
    ]
    file = folder / "simulate.json"
    file.write_text(json.dumps(SPEED | {"predicted": predicted}))
    assert results.of_benchmark(file, "")["reach"] == "16 nodes with 3 B, 7 B; 1,024 nodes with 1 T"


def test_runs_by_hand(folder: Path) -> None:
    runs = [
        make_run(folder, 0, 2, 40, "1,0.5\n2,0.75\n3,0.25\n4,1.0\n"),  # down by 50 points
        make_run(folder, 1, 4, 50, "1,0.5\n2,0.5\n"),
        make_run(folder, 1, 4, None, ""),  # broken off
    ]
    kept = [results.keep(run, folder) for run in runs]
    assert [path.stem for path in kept] == ["toy_seed0", "toy_seed1", "toy_seed1_again"]
    assert results.keep(runs[1], folder) == kept[1], "the same run is not kept twice"
    csv = (folder / "runs" / "toy_seed1_success.csv").read_text()
    assert (
        csv == "evaluation,update,success_rate\neval,0,0.1\neval_subset,1,0.5\neval_subset,2,0.5\n"
    )
    assert not any("secret" in path.read_text() for path in (folder / "runs").iterdir())
    made, missing = results.table(results.PAGE, folder)
    cells = made.splitlines()[2].split(" | ")
    assert cells[1] == (
        "3 (2 to 4) of 50, 45 (40 to 50); 4,000 (2,000 to 4,000); 4.0 (2.0 to 4.0); "
        "0% (0% to 50%); 2 (0 to 4); 3 runs, 1 of them broken off, seeds 0,1"
    )
    assert cells[2] == (
        "`make train ARGS='--multirun --config-name toy lr=1 seed=0,1 log.backend=csv'`"
    )
    assert missing == ["benchmarks/speed.json"]


def make_evaluation(
    folder: Path, name: str, successes: dict[str, int], is_over: bool = True
) -> Path:
    """The folder of an evaluation of two tasks, ten init states each."""
    evaluation = folder / name
    evaluation.mkdir()
    (evaluation / "episodes.jsonl").touch()
    renderings = {
        rendering: {"num_successes": number, "num_episodes": 20, "tasks": {"0": {}, "1": {}}}
        for rendering, number in successes.items()
    }
    report = {"policy": "/home/me/runs/p", "suite": "libero_object", "is_over": is_over}
    (evaluation / "report.json").write_text(json.dumps(report | {"renderings": renderings}))
    return evaluation


def test_evaluations_by_hand(folder: Path) -> None:
    (folder / "evaluations").mkdir()
    (folder / "rows.toml").write_text(
        """[[row]]
question = "Does it look?"
files = "evaluations/suite_*.json"
answer = "{before.fast.num_successes}, {after.blank.num_successes:03d} of {num_scenes}"
"""
    )
    for name, successes in (
        ("suite_before", {"fast": 12, "blank": 3}),
        ("suite_after", {"fast": 19, "blank": 4}),
    ):
        results.keep(make_evaluation(folder, name, successes), folder)
    made, missing = results.table(results.PAGE, folder)
    assert not missing
    answer, command, raw = made.strip().splitlines()[-1].split(" | ")[1:]
    assert answer == "12, 004 of 20"
    assert command == (
        "`torchrl-dvla evaluate POLICY --suite libero_object --episodes 10 --rendering fast,blank`"
    )
    assert "evaluations/suite_*.json" in raw and "load" not in raw
    assert "/home" not in (folder / "evaluations/suite_after.json").read_text()
    results.keep(make_evaluation(folder, "suite_again", {"fast": 12}), folder)
    with pytest.raises(ValueError, match="must differ in policies alone"):
        results.table(results.PAGE, folder)
    with pytest.raises(ValueError, match="must have all of its episodes"):
        results.keep(make_evaluation(folder, "suite_other", {"fast": 1}, is_over=False), folder)


def test_runs_with_other_settings_are_not_mixed(folder: Path) -> None:
    first, second = make_run(folder, 0, 2, 40, "1,0.5\n"), make_run(folder, 1, 4, 50, "1,0.5\n")
    settings = second / "settings.yaml"
    settings.write_text(settings.read_text().replace("lr=1", "lr=2"))
    for run in (first, second):
        results.keep(run, folder)
    with pytest.raises(ValueError, match="differ in seeds alone"):
        results.table(results.PAGE, folder)


def test_a_run_without_a_curve_is_refused(folder: Path) -> None:
    run = make_run(folder, 0, 2, 40, "")
    shutil.rmtree(run / "scalars")
    with pytest.raises(ValueError, match=r"log\.backend=csv"):
        results.keep(run, folder)


def test_no_path_of_a_machine_is_kept() -> None:
    files = [path for path in RESULTS.rglob("*") if path.suffix in (".json", ".csv")]
    assert len(files) > 10
    assert [path.name for path in files if results.FOLDERS.search(path.read_text())] == []


@pytest.mark.parametrize(("before", "after", "is_worse"), [(16, 12, False), (16, 11, True)])
def test_a_task_is_worse_below_its_interval_from_before(
    before: int, after: int, is_worse: bool
) -> None:
    """The interval of 16 of 20 is 58.4 to 91.9 %."""
    counts = [{"num_successes": number, "num_episodes": 20} for number in (before, after)]
    assert results.is_worse(*counts) is is_worse


def test_a_run_that_falls_below_its_start_at_once_has_a_drop(folder: Path) -> None:
    kept = results.keep(make_run(folder, 0, 5, 1, "5,0.02\n"), folder)  # from 0.1 at the start
    found = results.of_runs([kept])
    assert found["worst_drop"]["max"] == pytest.approx(0.1 - 0.02)
    assert found["num_looks"]["max"] == 1
